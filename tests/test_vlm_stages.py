"""The VLM stages: what a row asks, what each stage learns and leaves alone, the planner, and how it is measured."""

import dataclasses
import itertools
import json
import re
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import save_run
from training_setup import STEPS, training_config
from vlm_setup import (
    built_vlm_step,
    compiled_vlm_step,
    random_vlm_state,
    use_prepared_vlm_steps,
    vlm_batch,
    vlm_training_config,
)

from wallwm_jax.benchmarks import train_step
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.packing import pack_row
from wallwm_jax.data.pipeline import make_loader
from wallwm_jax.data.vlm_batches import Questions, VlmRows
from wallwm_jax.evaluation import actors, planner_accuracy
from wallwm_jax.evaluation.actors import Acting
from wallwm_jax.events import planning_text
from wallwm_jax.events.planning_text import DONE, Plan
from wallwm_jax.inference import planner as planner_module
from wallwm_jax.inference.planner import VlmPlanner
from wallwm_jax.models.vlm.text_projector import text_length
from wallwm_jax.models.vlm.tokenizer import BytesTokenizer, WordsTokenizer
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.train import run
from wallwm_jax.training.checkpoint import Loaded, load_params
from wallwm_jax.training.language_objectives import align_loss, answer_loss, match_loss
from wallwm_jax.training.starting import fresh_state
from wallwm_jax.training.telemetry import read_metrics
from wallwm_jax.training.train_state import flatten
from wallwm_jax.training.train_step import build_train_step


def changed(config, **knobs):
    """The config with `section__knob=value` set; `vlm_...` knobs are of `data.vlm`."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, value in knobs.items():
            section, knob = name.split("__")
            (config.data.vlm if section == "vlm" else config[section])[knob] = value
    return config.lock()


@pytest.fixture(scope="module")
def store(clustered_store):
    return open_store(clustered_store)


@pytest.fixture(scope="module")
def config(clustered_store):
    return vlm_training_config(clustered_store)


# Text


@pytest.mark.parametrize("before", ["", planning_text.trace(["lift it"], ["next: to it", "go"], "")])
def test_an_answer_is_read_as_it_was_written(before):
    assert planning_text.parse(before + planning_text.answer("open it, then wait", 2.4)) == Plan(
        "open it, then wait", 2.5, False
    )
    assert planning_text.parse(before + planning_text.answer("", 0.0)) == Plan("", None, True)
    assert planning_text.parse("something else") == Plan("something else", None, False)


def test_words_are_one_token_each_and_all_else_is_bytes():
    tokenizer = WordsTokenizer()
    for text, tokens in {
        "press the red button, takes 2.5 s": 11,
        "now: open the drawer\nhow long?": 9,
        "Über 12 quux": len("Über 12 quux".encode()),
        "<|image_pad|> on  the left": 13 + 1 + 1 + 1 + 1,
    }.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) == tokens, text
        assert max(ids) < tokenizer.vocabulary == 512 and not set(ids) & set(range(256, 262))
    assert tokenizer.decode([tokenizer.start_id, *tokenizer.encode("lift it"), tokenizer.end_id]) == "lift it"


# Rows


def test_rows_are_a_pure_function_of_seed_and_row_for_any_number_of_hosts(store, config):
    def take(count, config=config, **where):
        with make_loader(store, config, VlmRows, **where) as loader:
            return list(itertools.islice(loader, count))

    whole = take(4)
    halves = [take(2, host_index=host, host_count=2, start_step=2) for host in (0, 1)]
    for step, parts in enumerate(zip(*halves)):
        assert whole[2 + step]["row"].tolist() == [4 + 2 * step, 5 + 2 * step]
        for name, value in whole[2 + step].items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value, err_msg=name)
    assert not np.array_equal(take(1, changed(config, data__rows=4))[0]["ids"][:2], take(1, _seeded(config))[0]["ids"])
    spec = VlmRows.spec(config, 2)
    assert {name: (value.shape, value.dtype) for name, value in whole[0].items() if name in spec} == spec


def _seeded(config):
    config = config.copy_and_resolve_references().unlock()
    config.seed = 1
    return config.lock()


def test_a_planner_learns_from_no_episode_that_begins_within_a_task(clustered_store, config):
    store = open_store(clustered_store)
    store.episodes[int(store.index["episode"][0])]["derived_from"] = "another"
    with pytest.raises(UserError, match=r"begins within a task.*data\.mixture"):
        VlmRows(store, config)


def test_a_row_asks_for_its_event_and_the_answer_is_its_caption_with_the_duration(store, config):
    tokenizer, rows = BytesTokenizer(), VlmRows(store, config)
    for number in range(12):
        row, (window,) = rows(number), rows.sampler.row(number)
        span, record = store.span(window), store.read(window)
        start, end = int(row["answer_start"]), int(row["length"])
        prompt, said = tokenizer.decode(row["ids"][:start]), tokenizer.decode(row["ids"][start:end])
        assert end - start == row["answer_length"] and row["ids"][end - 1] == tokenizer.end_id
        assert (row["ids"] == tokenizer.image_id).sum() == 2 * 2 * 2  # two views of 2 x 2 tokens
        assert prompt.endswith(f"next {record.level}?\nassistant\n")
        history = [store.caption(caption) for caption in record.previous_caption_ids]
        if said == DONE:
            assert record.next_caption_ids[("task", "subtask", "action").index(record.level)] == -1
            assert row["remaining_s"] == 0 and row["text_length"].tolist() == [1]
            history.append(span["caption"])
        else:
            assert said == planning_text.answer(span["caption"], record.duration_s)
            assert row["remaining_s"] == np.float32(record.duration_s)
            assert row["text_length"].tolist() == [len(span["caption"]) + 1]
        kept = re.search("done: (.*)\n", prompt)[1]
        assert (kept == "nothing" and (not history or len(prompt) > 100)) or "; ".join(history).endswith(kept)
        trace = tokenizer.decode(row["trace_ids"][: row["trace_length"]])
        assert trace.endswith(f"next: {said}")


def test_inside_an_event_the_question_is_how_long_it_still_takes(store, config):
    inside = changed(config, vlm__inside_prob=1.0, vlm__done_prob=0.0)
    tokenizer, rows, moments = BytesTokenizer(), VlmRows(store, inside), set()
    for number in range(12):
        row, (window,) = rows(number), rows.sampler.row(number)
        span, record = store.span(window), store.read(window)
        start, end = int(row["answer_start"]), int(row["length"])
        prompt, said = tokenizer.decode(row["ids"][:start]), tokenizer.decode(row["ids"][start:end])
        assert prompt.endswith(f"now: {span['caption']}\nhow long?\nassistant\n")
        shown = [record.start + int(share * (record.num_actions // 2)) * 2 for share in (0.25, 0.5, 0.75)]
        left = [max(1, record.span_end - step) / 10 for step in shown]
        assert min(abs(row["remaining_s"] - seconds) for seconds in left) < 1e-6
        assert planning_text.parse_time_left(said) == max(round(2 * float(row["remaining_s"])) / 2, 0.5)
        assert not row["is_next"] and row["trace_length"] == 0 and row["text_length"].tolist() == [1]
        moments.add(round(record.duration_s - float(row["remaining_s"]), 3))
    assert len(moments) > 3


def test_the_towers_see_the_window_that_packed_rows_hold(clustered_store, store):
    config = vlm_training_config(clustered_store, "staircase")
    rows, seen = VlmRows(store, changed(config, vlm__done_prob=0.5)), 0
    for number in range(12):
        row, (window,) = rows(number), rows.sampler.row(number)
        if not row["is_next"]:
            assert not row["latent_event"].any() and not row["action_event"].any() and not row["action_valid"].any()
            continue
        packed, seen = pack_row(store, config, [window], number, config.data.views), seen + 1
        for name in ("latents", "latent_event", "latent_role", "latent_pos", "actions", "action_event", "action_pos"):
            np.testing.assert_array_equal(row[name], packed[name], err_msg=name)
        for name in ("state", "state_valid", "view_id", "valid_rect"):
            np.testing.assert_array_equal(row[name], packed[name][:1], err_msg=name)
        np.testing.assert_array_equal(row["view_geometry"], packed["view_geometry"])
    assert 0 < seen < 12


def test_the_loss_covers_the_answer_only(clustered_store, config):
    batch = {name: jnp.asarray(value) for name, value in vlm_batch(clustered_store, config).items()}
    start, length = int(batch["answer_start"][0]), int(batch["answer_length"][0])
    logits = jax.random.normal(jax.random.key(0), (2, config.data.vlm.answer_length, 264))
    losses = {place: answer_loss(logits, {**batch, "ids": batch["ids"].at[0, place].add(-1)})
              for place in (0, start - 1, start, start + length - 1, start + length)}  # fmt: skip
    inside = {place for place, loss in losses.items() if loss != answer_loss(logits, batch)}
    assert inside == {start, start + length - 1}
    slope = np.asarray(jax.grad(answer_loss)(logits, batch))[0]
    assert not slope[length:].any() and np.abs(slope[:length]).max(-1).min() > 0


def test_history_is_cut_from_the_front_and_what_cannot_fit_is_named(store, config):
    tight = changed(config, vlm__length=178)
    tokenizer, last = BytesTokenizer(), max(range(12), key=lambda row: VlmRows(store, config)(row)["length"])
    whole, cut = (VlmRows(store, knobs)(last) for knobs in (config, tight))
    before, after = (
        re.search("done: (.*)\n", tokenizer.decode(row["ids"][: row["answer_start"]]))[1] for row in (whole, cut)
    )
    assert len(after) < len(before) and (after == "nothing" or before.endswith(f"; {after}"))
    for knobs, message in [
        ({"vlm__length": 120}, "more than the 56 of data.vlm.length - data.vlm.answer_length; raise data.vlm.length"),
        ({"vlm__answer_length": 30}, "more than data.vlm.answer_length=30; raise it"),
        ({"vlm__image_size": 40}, "data.vlm.image_size=40 must be a multiple of 16"),
        ({"vlm__answer": "poem"}, "data.vlm.answer='poem' is neither event nor trace"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            VlmRows.check(store, changed(config, **knobs))


def test_the_event_before_can_be_shown_too(store, config):
    questions = Questions(store, changed(config, vlm__previous_images=True))
    index = store.index
    chosen = (index["kind"] == 0) & (index["level"] == 2) & (index["episode"] == index["episode"][0])
    first, second = sorted(np.flatnonzero(chosen), key=lambda window: index["event_index"][window])[:2]
    earlier, later = questions.ask(first).pictures, questions.ask(second).pictures
    assert earlier.shape == later.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(later[:2], earlier[2:])
    np.testing.assert_array_equal(earlier[:2], earlier[2:])  # nothing before: the same again


# Learning


@pytest.mark.extended
@pytest.mark.parametrize("stage", ["vlm_sft", "vlm_text", "staircase"])
def test_each_loss_falls_and_what_is_frozen_stays_bit_for_bit(clustered_store, stage):
    built, step = built_vlm_step(clustered_store, stage), compiled_vlm_step(clustered_store, stage)
    batch = vlm_batch(clustered_store, vlm_training_config(clustered_store, stage))
    state, placed = random_vlm_state(built), jax.device_put(batch, built.rows)
    before, lines = jax.device_get({"on": flatten(state.trainable), "off": flatten(state.frozen)}), []
    for _ in range(STEPS):
        state, metrics = step(state, placed)
        lines.append({name: float(value) for name, value in metrics.items()})
    after = jax.device_get({"on": flatten(state.trainable), "off": flatten(state.frozen)})
    assert {path.split("/")[0] for path in after["on"]} == set(built.stage.trains)
    assert {path.split("/")[0] for path in after["off"]} == set(built.stage.freezes)
    assert [path for path, leaf in after["on"].items() if np.array_equal(leaf, before["on"][path])] == []
    for path, leaf in after["off"].items():
        assert leaf.dtype == "bfloat16"
        np.testing.assert_array_equal(leaf, before["off"][path])
    assert {name for name in lines[0] if name.startswith("loss_")} == {f"loss_{name}" for name in built.stage.losses}
    for name in set(built.stage.losses) - {"latent_action", "latent_video"}:  # random towers hardly read their text
        assert lines[-1][f"loss_{name}"] < lines[0][f"loss_{name}"], name
    weights = {"next": 0.1, "time": 0.1, "present": 0.1}
    total = sum(weights.get(name, 1.0) * lines[0][f"loss_{name}"] for name in built.stage.losses)
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.extended
def test_the_action_tie_alone_lowers_the_towers_loss(clustered_store):
    """With the same noise as before; no trace is told, and no reading is matched."""
    others = {f"objective__{name}_weight": 0.0 for name in ("trace", "match", "latent_video")}
    config = changed(vlm_training_config(clustered_store, "staircase"), **others, optim__lr=1e-3)
    built = build_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    batch, state = jax.device_put(vlm_batch(clustered_store, config), built.rows), random_vlm_state(built)
    lines = []
    for _ in range(STEPS):
        state, metrics = built.step(dataclasses.replace(state, step=jnp.zeros((), jnp.int32)), batch)
        lines.append(metrics)
    assert "loss_trace" not in lines[0] and "loss_match" not in lines[0]
    assert float(lines[0]["loss"]) == float(lines[0]["loss_latent_action"])
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"])


@pytest.mark.parametrize("stage", ["vlm_sft", "vlm_text", "staircase"])
def test_a_row_of_padding_leaves_no_trace(clustered_store, stage):
    """Whatever its pictures and ids hold, loss and gradient are the same bits."""
    built, step = built_vlm_step(clustered_store, stage), compiled_vlm_step(clustered_store, stage)
    batch, seen = vlm_batch(clustered_store, vlm_training_config(clustered_store, stage)), []
    absent = {"window_index": -1, "answer_length": 0, "trace_length": 0, "is_next": 0, "remaining_s": 0}
    absent |= {name: 0 for name in ("latent_event", "latent_role", "action_event") if name in batch}
    for name, value in absent.items():
        batch[name][1] = value
    for poison in (0, 77):
        batch["images"][1], batch["ids"][1, 3:40], batch["trace_ids"][1, 2:30] = poison, poison, poison
        _, metrics = step(random_vlm_state(built), jax.device_put(batch, built.rows))
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[0]["events"] == 1 and seen[0] == seen[1]


def test_a_match_is_one_for_the_mean_reading_and_zero_for_the_target():
    target = jax.random.normal(jax.random.key(0), (2, 4, 3, 5)) * jnp.array([0.1, 10.0])[:, None, None, None]
    valid = jnp.array([True, True, True, False])
    mean = jnp.broadcast_to(target[:, :3].mean(1, keepdims=True), target.shape)
    assert float(match_loss(mean, target, valid)) == pytest.approx(1.0, rel=1e-3)
    assert float(match_loss(target.at[:, 3].set(9e9), target, valid)) == 0.0


def test_the_alignment_is_one_for_the_mean_feature_and_zero_for_the_target():
    target = jax.random.normal(jax.random.key(0), (3, 5, 4)) * jnp.array([0.5, 1, 2, 4])
    length = jnp.array([5, 2, 0])
    real = jnp.concatenate([target[0], target[1, :2]])
    mean = jnp.broadcast_to(real.mean(0), target.shape)
    assert float(align_loss(mean, target, length)) == pytest.approx(1.0, rel=1e-3)
    assert float(align_loss(target.at[1, 2:].set(9e9).at[2].set(9e9), target, length)) == 0.0


@pytest.mark.parametrize(
    ("logits", "length"), [([3, 2, 1, -1, -2], 3), ([-1, -2, -3, 0, 0], 1), ([2, -1, 2, -9, 1], 3), ([1] * 5, 5)]
)
def test_the_length_of_features_is_the_likeliest(logits, length):
    """Of all that say text up to there and padding after, the one of largest probability."""
    each = [sum(logits[:n]) for n in range(1, 6)]
    assert each[length - 1] == max(each)
    assert text_length(jnp.asarray([logits, logits], jnp.float32)).tolist() == [length] * 2


# Runs


@pytest.fixture
def prepared_steps(monkeypatch, clustered_store):
    use_prepared_vlm_steps(monkeypatch, clustered_store)


@pytest.mark.extended
@pytest.mark.usefixtures("prepared_steps")
def test_a_stopped_run_goes_on_bit_for_bit_and_the_next_stage_takes_over(clustered_store, store, tmp_path):
    config, stop = vlm_training_config(clustered_store), threading.Event()
    stop.set()
    assert run(config, tmp_path / "stopped", stop=stop).step == 1
    assert run(config, tmp_path / "stopped", resume=True).step == STEPS
    run(config, tmp_path / "whole")
    lines = [
        [
            {name: value for name, value in line.items() if not name.endswith("_s")}
            for line in read_metrics(tmp_path / n)
        ]
        for n in ("whole", "stopped")
    ]
    assert len(lines[0]) == STEPS and lines[0] == lines[1]

    save_run(tmp_path / "world", store, training_config(clustered_store))
    text = vlm_training_config(clustered_store, "vlm_text")
    with pytest.raises(UserError, match=r"give --config\.train\.text_from=WORKDIR of its run"):
        run(changed(text, train__init_from=str(tmp_path / "whole")), tmp_path / "none")
    sources = {"train__init_from": str(tmp_path / "whole"), "train__text_from": str(tmp_path / "world")}
    run(changed(text, **sources), tmp_path / "text")
    sft, world, result = (flatten(load_params(tmp_path / name).params) for name in ("whole", "world", "text"))
    assert {path.split("/")[0] for path in result} == {"vlm", "text", "vlm_text"}
    for path, leaf in result.items():
        source = {"vlm": sft, "text": world}.get(path.split("/")[0])
        if source is not None:
            np.testing.assert_array_equal(leaf, np.asarray(source[path]).astype("bfloat16").astype(np.float32))

    stairs = changed(vlm_training_config(clustered_store, "staircase"), **sources)
    branch = fresh_state(built_vlm_step(clustered_store, "staircase"), stairs).trainable["staircase"]
    for path, leaf in flatten({"blocks": branch["blocks"], "norm": branch["border"]["norm"]}).items():
        np.testing.assert_array_equal(leaf, sft[f"vlm/language/{path}"])  # it starts as its backbone
    run(stairs, tmp_path / "stairs")
    assert set(load_params(tmp_path / "stairs").params) == {"vlm", "small", "video", "action", "text", "staircase"}


@pytest.mark.parametrize(
    ("stage", "knobs", "message"),
    [
        ("vlm_text", {}, "freezes vlm and text: say where they come from with --config.train.init_from=WORKDIR of a"),
        ("vlm_sft", {"train__text_from": "x"}, "train.text_from='x' is for stage 'staircase'"),
        ("vlm_sft", {"data__window_kind": "fixed"}, "cannot train on data.window_kind='fixed'; it takes event"),
    ],
)
def test_what_a_vlm_stage_cannot_do_is_refused(clustered_store, tmp_path, stage, knobs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(changed(vlm_training_config(clustered_store, stage), **knobs), tmp_path / "run")


def test_a_stage_without_any_weight_is_refused(clustered_store, tmp_path):
    weights = {f"objective__{tie}_weight": 0.0 for tie in ("trace", "match", "latent_action", "latent_video")}
    with pytest.raises(UserError, match="stage 'staircase' has nothing to learn"):
        run(changed(vlm_training_config(clustered_store, "staircase"), **weights), tmp_path / "run")


@pytest.mark.parametrize("stage", ["vlm_sft", "staircase"])
def test_a_made_up_batch_is_like_one_of_a_store(clustered_store, stage):
    config = vlm_training_config(clustered_store, stage)
    _, made_up, _ = train_step.prepare(config, "", 0)
    _, stored, weight = train_step.prepare(config, str(clustered_store), 0)
    assert {n: (a.shape, a.dtype) for n, a in made_up.items()} == {n: (a.shape, a.dtype) for n, a in stored.items()}
    assert (
        weight.shape == (config.model.latent_channels,) and made_up["length"].tolist() == [config.data.vlm.length] * 2
    )
    np.testing.assert_array_equal(stored["ids"], vlm_batch(clustered_store, config)["ids"])


# Planner


def test_the_planner_asks_as_training_did(store, config):
    planner = VlmPlanner(random_vlm_state(built_vlm_step(store.path, "vlm_sft")).trainable, config)
    rows, questions = VlmRows(store, changed(config, vlm__done_prob=0.0)), Questions(store, config)
    for number in range(4):
        row, (window,) = rows(number), rows.sampler.row(number)
        request = planner_accuracy.request_of(questions.ask(window), config.data.views)
        ids, pictures = planner._questioner._prompt(request)
        np.testing.assert_array_equal(ids, row["ids"][: row["answer_start"]])
        np.testing.assert_array_equal(pictures, row["images"])


def test_the_time_left_is_asked_as_training_did(store, config):
    inside = changed(config, vlm__inside_prob=0.5)
    planner = VlmPlanner(random_vlm_state(built_vlm_step(store.path, "vlm_sft")).trainable, inside)
    rows, questions = VlmRows(store, inside), Questions(store, inside)
    (window,) = rows.sampler.row(0)
    row, question = rows.asked(window, moment=2), questions.ask(window, moment=2)
    request = planner_accuracy.request_of(question, inside.data.views)
    ids, pictures = planner._questioner._prompt(request)
    np.testing.assert_array_equal(ids, row["ids"][: row["answer_start"]])
    np.testing.assert_array_equal(pictures, row["images"])
    with pytest.raises(UserError, match="with its caption in `now` only"):
        planner.time_left([planner_accuracy.request_of(questions.ask(window), inside.data.views)])
    with pytest.raises(UserError, match="never asked inside an event"):
        VlmPlanner({"vlm": {}}, config).time_left([request])


@pytest.mark.extended
def test_the_time_head_of_a_text_run_is_what_training_regressed(clustered_store, store):
    """The planner's seconds are those whose logarithm the loss of the same rows compares."""
    config = changed(vlm_training_config(clustered_store, "vlm_text"), vlm__inside_prob=1.0, vlm__done_prob=0.0)
    built = built_vlm_step(clustered_store, "vlm_text")
    state, batch = random_vlm_state(built), vlm_batch(clustered_store, config)
    params = {**state.trainable, **jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.frozen)}
    planner, questions = VlmPlanner(params, config, batch_size=2), Questions(store, config)
    asked = [questions.ask(window, moment=moment) for window, moment in _moments(store, config)]
    planner.warm_up()
    warm = planner._seconds_left._cache_size()
    told = planner.time_left([planner_accuracy.request_of(question, config.data.views) for question in asked])
    assert planner._seconds_left._cache_size() == warm
    _, metrics = compiled_vlm_step(clustered_store, "vlm_text")(state, jax.device_put(batch, built.rows))
    errors = optax.huber_loss(jnp.log(jnp.array(told)), jnp.log(batch["remaining_s"]))
    assert float(metrics["loss_time"]) == pytest.approx(float(errors.mean()), rel=1e-4)


def _moments(store, config):
    """(window, keyframe) of the first two rows, found by what they hold."""
    rows, questions = VlmRows(store, config), Questions(store, config)
    for number in (0, 1):
        (window,) = rows.sampler.row(number)
        left = [questions.ask(window, moment=moment).remaining_s for moment in (1, 2, 3)]
        yield window, 1 + left.index(pytest.approx(float(rows(number)["remaining_s"])))


def test_a_planner_that_does_not_fit_the_evaluation_is_refused(store, config, monkeypatch):
    params = random_vlm_state(built_vlm_step(store.path, "vlm_sft")).trainable
    assets = {"store": {"views": list(config.data.views)}}
    monkeypatch.setattr(planner_module, "load_params", lambda *_: Loaded(params, assets, config.to_dict(), 7))
    engine = SimpleNamespace(batch_size=2, views=config.data.views)
    planner = actors._planner(Acting(planner="run"), engine)
    assert (planner.step, planner.levels) == (7, ("action", "subtask"))
    assert actors._planner(Acting(), engine) is None  # the scripted one
    with pytest.raises(UserError, match="looks at ur5e/wrist, but the policy was trained on front_pixels"):
        actors._planner(Acting(planner="run"), SimpleNamespace(batch_size=2, views=["front_pixels"]))
    with pytest.raises(UserError, match="--level=segment is none of them"):
        actors._planner(Acting(planner="run", level="segment"), engine)
    del params["vlm"]
    with pytest.raises(UserError, match="has no vision-language model; a planner needs a run of stage 'vlm_sft'"):
        VlmPlanner.from_checkpoint("run")


@pytest.mark.extended
def test_the_planner_says_what_the_model_was_overfitted_on(clustered_store, store, config):
    config = changed(config, train__steps=120, optim__lr=1e-2, vlm__done_prob=0.0)
    built = build_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    batch = jax.device_put(vlm_batch(clustered_store, config), built.rows)
    state = random_vlm_state(built)
    for _ in range(120):
        state, metrics = built.step(state, batch)
    assert float(metrics["loss_answer"]) < 0.02
    planner, rows, questions = VlmPlanner(state.trainable, config), VlmRows(store, config), Questions(store, config)
    for number in range(2):
        (window,) = rows.sampler.row(number)
        question = questions.ask(window)
        (plan,) = planner.plan([planner_accuracy.request_of(question, config.data.views)])
        assert plan.caption == store.span(window)["caption"] and not plan.done
        assert plan.duration_s == max(round(2 * question.remaining_s) / 2, 0.5)


# Measuring


class Oracle:
    """Knows all answers, and changes them by `spoil`."""

    def __init__(self, answers, spoil):
        self.answers, self.spoil = iter(answers), spoil

    def plan(self, requests):
        return [self.spoil(*next(self.answers)) for _ in requests]


def test_accuracy_counts_wordings_objects_and_seconds(clustered_store, config):
    held_out = open_store(clustered_store, "heldout")
    asked = planner_accuracy.collect(held_out, config, ["subtask", "action"], 1000)

    def measured(spoil):
        oracle = Oracle(asked, spoil)
        return planner_accuracy.measure(oracle, held_out, config, levels=["subtask", "action"], limit=1000)

    def told(wordings, choose):
        return Plan(choose(wordings), 2.0, False) if wordings else Plan("", None, True)

    right = measured(lambda question, wordings: told(wordings, lambda wordings: wordings[-1]))
    assert right["planner"]["exact"]["rate"] == 1.0
    errors = [abs(question.remaining_s - 2.0) for question, wordings in asked if wordings]
    assert right["planner"]["seconds_error"] == pytest.approx(np.median(errors))
    elsewhere = measured(
        lambda question, wordings: told(wordings, lambda wordings: re.sub(" to the .*", "", wordings[0]) + " on a pole")
    )
    share = sum(not wordings for _, wordings in asked) / len(asked)
    assert elsewhere["planner"]["exact"]["rate"] == pytest.approx(share)
    assert elsewhere["planner"]["object"]["rate"] == 1.0
    assert right["majority"]["exact"] == elsewhere["majority"]["exact"]
    assert right["majority"]["exact"]["rate"] <= right["after_last"]["exact"]["rate"] < 1.0
    unseen = elsewhere["planner"]["object_unseen_order"]
    assert unseen["rate"] == 1.0 > elsewhere["planner"]["exact_unseen_order"]["rate"]
    assert 0 < unseen["episodes"] == right["planner"]["exact_unseen_order"]["episodes"] < len(asked)
    assert right["questions"] == len(asked)


def test_the_command_says_what_was_measured_and_keeps_it(clustered_store, config, tmp_path, monkeypatch):
    """A planner that always says the same caption, on the split that training did not see."""
    held_out = open_store(clustered_store, "heldout")
    span = next(e for e in held_out.episodes if e["split"] == "heldout")["spans"]["subtask"][0]
    parrot = SimpleNamespace(config=config, levels=("subtask",), step=7)
    parrot.plan = lambda requests: [Plan(span["caption"], 2.0, False) for _ in requests]
    monkeypatch.setattr(VlmPlanner, "from_checkpoint", lambda workdir: parrot)
    out = tmp_path / "new" / "planner.json"
    found = planner_accuracy.measure_run("run", clustered_store, out, 1000)
    assert json.loads(out.read_text()) == found
    assert (found["workdir"], found["step"], found["split"], found["levels"]) == ("run", 7, "heldout", ["subtask"])
    assert found["time_left"] is None  # it was never asked inside events
    lines = planner_accuracy.table(found).splitlines()
    assert lines[0].startswith(f"| {found['questions']} questions about subtask events | planner | most frequent ")
    rate = found["planner"]["object_unseen_order"]
    assert 0 < rate["episodes"] < found["questions"]
    assert lines[5].startswith(f"| right object, unseen order | {100 * rate['rate']:.0f} % [")
    assert f"{100 * rate['high']:.0f}] of {rate['episodes']} |" in lines[5]
    assert lines[-1].startswith("Duration of the next event: median error ")
    with pytest.raises(UserError, match="no --store given"):
        planner_accuracy.measure_run("run", "", "", 1000)
    with pytest.raises(UserError, match="is a directory; give a JSON file"):
        planner_accuracy.measure_run("run", clustered_store, tmp_path, 1000)
    with pytest.raises(UserError, match=r"out 'gs://bucket/planner\.json' is an address in an object store"):
        planner_accuracy.measure_run("run", clustered_store, "gs://bucket/planner.json", 1000)


def test_the_error_of_the_time_left_is_over_the_later_keyframes(clustered_store, config):
    held_out = open_store(clustered_store, "heldout")

    class Clock:
        """Answers two seconds, and nothing at all to every fourth question."""

        def __init__(self):
            self.asked = 0

        def time_left(self, requests):
            assert all(request.now for request in requests)
            self.asked += len(requests)
            return [None if number % 4 == 0 else 2.0 for number in range(len(requests))]

    clock = Clock()
    found = planner_accuracy.measure_time_left(clock, held_out, config, levels=["subtask"], limit=1000)
    events = np.flatnonzero((held_out.index["kind"] == 0) & (held_out.index["level"] == 1))
    assert found["asked"] == clock.asked == 3 * len(events)
    questions = Questions(held_out, config)
    true = np.array(
        [questions.ask(int(window), moment=moment).remaining_s for window in events for moment in (1, 2, 3)]
    )
    assert 0 < found["error"] < np.abs(true - 2.0).max() and found["error_usual"] > 0
    assert np.all(np.diff(true.reshape(-1, 3)) <= 0) and true.min() > 0


def test_verb_and_thing_of_a_caption():
    for caption, expected in {
        "press the red button on the right to unlock the drawer": ("press", "red button"),
        "pick up the blue block on the left and put it onto the table": ("pick", "blue block"),
        "open the drawer by moving its handle to the left": ("open", "drawer"),
        "lift the cube": ("lift", "cube"),
        "wait": None,
    }.items():
        assert planner_accuracy.verb_and_thing(caption) == expected
