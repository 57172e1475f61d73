"""Unified mode: it sees what training saw, conditioning is swapped without compiling, gradients reach it."""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from history_windows import HISTORY, PAST, STEPS, configured
from synthetic import synthetic_episode
from tiny_model import random_like, random_params
from vlm_setup import vlm_training_config

from wallwm_jax.console import UserError
from wallwm_jax.data.packing import pack_row
from wallwm_jax.evaluation.open_loop import recorded_chunk_request
from wallwm_jax.inference import denoising, unified_mode
from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.inference.latent_conditioner import LatentConditioner, check_alignment
from wallwm_jax.inference.planner import PlanRequest
from wallwm_jax.inference.policy import Policy
from wallwm_jax.inference.unified_mode import History, UnifiedMode
from wallwm_jax.models import language_pathway


@pytest.fixture(autouse=True)
def quickly():
    yield


@pytest.fixture(scope="module")
def store(history_store):
    return history_store


@pytest.fixture(scope="module")
def mode(store):
    config = configured(store)
    with config.unlocked():
        config.sampling.update(steps=2, video_steps=2, action_draws=2)
    return UnifiedMode(EventMode(random_params(config.model, seed=3), config, store.meta, store.stats, batch_size=2))


def recorded(store, number):
    """The second or third window of an episode, and the episode."""
    found = store.index[(store.index["kind"] == 2) & (store.index["event_index"] == number)]
    index = int(np.flatnonzero(store.index == found[0])[0])
    record = store.read(index)
    seed = store.episodes[record.episode_id]["seed"]
    return index, record, synthetic_episode(seed, steps=64 + 7 * seed)


def lived(mode, store, record, episode):
    """A history that has seen the record's frames and the episode's commands up to its observation."""
    history, stride, past = History(mode), mode.stride, mode.past_frames
    shown = {step: past - (record.start - step) // stride for step in range(0, record.start + 1, stride)}
    for step in range(record.start + 1):
        place = shown.get(step, -1)
        frames = {view: record.picture(view, place) for view in store.meta["views"]} if place >= 0 else {}
        blank = {view: np.zeros((*store.meta["size"], 3), np.uint8) for view in store.meta["views"]}
        observation = SimpleNamespace(frames=frames or blank, pose=episode.poses[step], gripper=episode.grippers[step])
        command = (episode.command_poses[step - 1], episode.command_grippers[step - 1]) if step else None
        history.observe(observation, command)
    return history.request()


@pytest.mark.parametrize("number", [0, 1])
def test_the_model_sees_what_it_saw_in_training(mode, store, number):
    """The whole batch of a window, made from a robot's history, is the row that training packs of the same window."""
    index, record, episode = recorded(store, number)
    inputs = mode.inputs(lived(mode, store, record, episode))
    made = {name: np.asarray(value)[0] for name, value in
            denoising.window_batch(mode.config.model, inputs, 1 + STEPS // 8).items()}  # fmt: skip
    row = pack_row(store, mode.config, [index], 0, store.meta["views"])
    latents, actions = len(made["latent_pos"]), record.num_actions
    known = HISTORY + 1
    for name in ("latent_pos", "latent_role", "latent_event"):
        np.testing.assert_array_equal(made[name], row[name][:latents], err_msg=name)
    np.testing.assert_allclose(made["latents"][:, :known], row["latents"][:, :known], atol=1e-4)
    acts = slice(PAST - record.past_actions, None)  # the past that is not there comes first
    for name in ("action_pos", "action_event", "action_valid"):
        np.testing.assert_array_equal(made[name][acts], row[name][:actions], err_msg=name)
        assert not made[name][: acts.start].any()
    given = slice(acts.start, PAST)
    np.testing.assert_allclose(made["actions"][given], row["actions"][: record.past_actions], atol=1e-5)
    for name in ("state", "state_valid", "view_id", "window_number"):
        np.testing.assert_allclose(made[name][:1], row[name][:1], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", [0, 1])
def test_a_recorded_window_tells_the_model_what_living_through_it_does(mode, store, number):
    _, record, episode = recorded(store, number)
    asked = mode.inputs(recorded_chunk_request(record))
    for name, array in mode.inputs(lived(mode, store, record, episode)).items():
        np.testing.assert_allclose(asked[name], array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_program_can_be_compiled_from_shapes_alone(mode, store, guidance):
    """`program_inputs` is what a request becomes."""
    _, record, episode = recorded(store, 1)
    config = mode.config.copy_and_resolve_references()
    with config.unlocked():
        config.sampling.guidance = guidance
    mode = copy.copy(mode)
    mode.config = config
    told, conditioning, seeds = unified_mode.program_inputs(config, 1, len(store.meta["views"]), HISTORY)
    made = mode.inputs(lived(mode, store, record, episode)), unified_mode.stacked([mode.encode_text("reach")])
    assert jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), made) == (told, conditioning)
    assert (seeds.shape, seeds.dtype) == ((1,), np.uint32)


def test_sources_of_text_are_swapped_in_one_program(mode, store):
    """A global instruction, one for each chunk, latents; latents that are a text's features give that text's chunk."""
    _, record, episode = recorded(store, 1)
    request = lived(mode, store, record, episode)
    task, event = mode.encode_text("put the red block on the left"), mode.encode_text("reach")
    chunks = [mode.plan(request, conditioning) for conditioning in (task, event, task)]
    before = mode.compilations
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(3, task.features.shape[1])), jnp.float32)
    latents = jax.device_put(latents, jax.devices()[0])  # bound to a device, as what loaded parameters give
    chunks += [mode.plan(request, mode.from_latents(part)) for part in (latents, event.features[: int(event.length)])]
    assert mode.compilations == before == 2
    assert chunks[0].actions.shape == (STEPS, 32) and np.isfinite(chunks[0].actions).all()
    np.testing.assert_array_equal(chunks[0].actions, chunks[2].actions)
    np.testing.assert_allclose(chunks[1].actions, chunks[4].actions, atol=1e-6)
    for one, other in ((0, 1), (1, 3)):
        assert np.abs(chunks[one].actions - chunks[other].actions).max() > 1e-3


def test_features_of_a_vlm_take_the_place_of_words_in_the_same_program(mode, store):
    """As many as the projector takes for text: all of them, one, or what its logits say; the rest is not read."""
    config = vlm_training_config(store.path, "vlm_text").copy_and_resolve_references()
    with config.unlocked():
        config.data.text_length, config.model = mode.config.data.text_length, mode.config.model
    shapes = jax.eval_shape(lambda: language_pathway.init(config, jax.random.key(0), ("vlm", "vlm_text")))
    params = random_like(shapes, seed=5) | {"text": mode.engine.params["text"]}
    conditioner = LatentConditioner(params, config, batch_size=2)
    check_alignment(conditioner, mode, "run")
    room, width = conditioner.shape
    assert (room, width) == mode.encode_text("").features.shape == (12, 16)

    _, record, episode = recorded(store, 1)
    request = lived(mode, store, record, episode)
    frames = {view: record.picture(view, mode.past_frames) for view in config.data.views}
    asked = [PlanRequest(frames, "put the red block on the left", done) for done in ((), ("reach",), ("lift it",))]

    def told(bias):
        kernel = params["vlm_text"]["present"]["kernel"] * (bias == 0.0)
        conditioner._params["vlm_text"]["present"] = {"kernel": kernel, "bias": jnp.full(1, bias)}
        return [mode.from_latents(features) for features in conditioner.latents(asked)]

    words = mode.plan(request, mode.encode_text("reach"))
    before, chunks = mode.compilations, []
    for bias, lengths in ((1.0, {room}), (-1.0, {1}), (0.0, set(range(1, room + 1)))):
        given = told(bias)
        assert {int(one.length) for one in given} <= lengths
        for one in given:
            assert one.features.shape == (room, width) and not np.asarray(one.features)[int(one.length) :].any()
        chunks.append(mode.plan(request, given[0]).actions)
    assert mode.compilations == before
    for one, other in itertools.combinations([words.actions, *chunks[:2]], 2):
        assert np.abs(one - other).max() > 1e-4
    with pytest.raises(UserError, match="names events of action, subtask, not of 'task'"):
        conditioner.latents([dataclasses.replace(asked[0], level="task")])


def test_robots_are_planned_for_together_as_each_alone(mode, store):
    """Three of them in batches of two, each with its own past, words and noise, in the same program."""
    requests = [lived(mode, store, *recorded(store, number)[1:]) for number in (0, 1, 1)]
    texts = [mode.encode_text(text) for text in ("reach", "put the red block on the left", "")]
    alone = [mode.plan(*pair, seed=seed) for seed, pair in enumerate(zip(requests, texts))]
    before = mode.compilations
    together = mode.plan_all(requests, texts, seeds=[0, 1, 2])
    assert mode.compilations == before and len(together) == 3
    for one, other in zip(alone, together):
        np.testing.assert_allclose(one.poses, other.poses, atol=1e-5)
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
    assert min(np.abs(together[i].actions - together[j].actions).max() for i, j in ((0, 1), (1, 2))) > 1e-3
    shifted = mode.plan_all(requests[1:], texts[1:], seeds=[1, 2])  # another row of the batch
    np.testing.assert_allclose(shifted[0].actions, together[1].actions, atol=1e-5)


def test_a_text_is_encoded_once_for_each_set_of_parameters(mode, monkeypatch):
    twin, asked = copy.copy(mode), []
    monkeypatch.setattr(twin, "_texts", (None, {}))
    monkeypatch.setattr(twin, "_encode_text", lambda params, _: asked.append(params) or (len(asked), 1))
    with mode.config.unlocked():
        mode.config.sampling.guidance = 3.0  # which needs the null text, too
    try:
        told = [twin.encode_text(text) for text in ("reach", "lift", "reach")]
        assert len(asked) == 3 and told[0] == told[2] and told[0].null == told[1].null
        monkeypatch.setattr(twin, "engine", mode.engine.with_params({}))
        assert twin.encode_text("reach") != told[0] and asked[3:] == [{}, {}]
    finally:
        with mode.config.unlocked():
            mode.config.sampling.guidance = 1.0


def test_a_chunk_is_relative_to_the_observation_and_its_video_keeps_the_past(mode, store):
    _, record, episode = recorded(store, 1)
    request = lived(mode, store, record, episode)
    chunk = mode.plan(request, mode.encode_text("reach"), video=True)
    offset = chunk.poses[:, 0, :3, 3] - episode.poses[record.start][0, :3, 3]
    np.testing.assert_allclose(offset, chunk.actions[:, :3], atol=1e-6)
    view = store.meta["views"][0]
    film = mode.decode(chunk)[view]
    assert len(film) == 1 + 4 * (HISTORY + STEPS // 8)
    difference = film[: mode.past_frames + 1].astype(int) - request.frames[view]
    assert np.abs(difference).max() <= 1


@pytest.mark.extended
def test_the_gradient_of_an_action_loss_reaches_the_conditioning(mode, store):
    """Against a finite difference along a random direction."""
    _, record, episode = recorded(store, 1)
    inputs, task = mode.inputs(lived(mode, store, record, episode)), mode.encode_text("reach")
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, PAST + STEPS, 32)), jnp.float32)

    @jax.jit
    def loss(features):
        flow = unified_mode._flow(
            mode.config,
            1 + STEPS // 8,
            mode.engine.params,
            inputs,
            unified_mode.stacked([task._replace(features=features)]),
        )
        _, context = flow.context(flow.batch["latents"], jnp.float32(0.357))
        return jnp.mean(flow.action(context, noise, jnp.float32(0.5)) ** 2)

    gradient = jax.jit(jax.grad(loss))(task.features)
    assert float(jnp.abs(gradient[: int(task.length)]).min(1).max()) > 0
    assert not np.asarray(gradient[int(task.length) :]).any()  # beyond the text nothing is read
    direction = jnp.asarray(np.random.default_rng(2).normal(size=task.features.shape), jnp.float32)
    slope = (loss(task.features + 1e-2 * direction) - loss(task.features - 1e-2 * direction)) / 2e-2
    assert float(slope) == pytest.approx(float(jnp.vdot(gradient, direction)), rel=0.03)


def test_what_does_not_fit_is_an_error(mode, store):
    history = History(mode)
    with pytest.raises(UserError, match="a chunk begins at an observation"):
        history.request()
    _, record, episode = recorded(store, 1)
    seen = SimpleNamespace(
        frames={store.meta["views"][0]: record.picture(store.meta["views"][0], 0)}, pose=episode.poses[0],
        gripper=episode.grippers[0],
    )  # fmt: skip
    history.observe(seen)
    with pytest.raises(UserError, match="comes with the command that led to it"):
        history.observe(seen)
    assert {len(frames) for frames in history.request().frames.values()} == {1 + 4 * HISTORY}  # the first is held
    history.observe(seen, (episode.command_poses[0], episode.command_grippers[0]))
    with pytest.raises(UserError, match=r"multiple of 2 control steps; this is after 1"):
        history.request()
    with pytest.raises(UserError, match=r"latents \[3, 7\] cannot stand for a text"):
        mode.from_latents(jnp.zeros((3, 7)))
    with pytest.raises(UserError, match=r"unified mode needs a model trained with data\.window_kind='history'"):
        UnifiedMode(EventMode(mode.engine.params, event_config(store), store.meta, store.stats))


def event_config(store):
    config = configured(store)
    with config.unlocked():
        config.data.window_kind = "event"
    return config


def test_a_policy_lives_through_chunks(mode, store):
    """Two chunks: the second sees what the first one did, and the same as an engine that is told by hand."""
    policy = Policy(mode.engine, seed=4)
    _, record, episode = recorded(store, 0)
    picture = {view: record.picture(view, mode.past_frames) for view in store.meta["views"]}

    def seen(step):
        return SimpleNamespace(frames=picture, pose=episode.poses[step], gripper=episode.grippers[step])

    observation = seen(0)
    first = policy.infer(observation, "reach", mode="unified")
    assert len(first.poses) == STEPS and first.duration_s == pytest.approx(STEPS / store.meta["action_hz"])
    by_hand = History(policy.unified_mode)
    by_hand.observe(observation)
    with pytest.raises(UserError, match="a chunk starts from the last observation"):
        policy.infer(seen(1), "reach", mode="unified")
    for step, command in enumerate(zip(first.poses, first.grippers), start=1):
        observation = seen(step)
        policy.observe(observation, command)
        by_hand.observe(observation, command)
    second = policy.infer(observation, "reach", mode="unified")
    told = policy.unified_mode.plan(by_hand.request(), policy.unified_mode.encode_text("reach"), seed=6)
    np.testing.assert_array_equal(second.actions, told.actions)
    policy.reset()
    np.testing.assert_array_equal(policy.infer(seen(0), "reach", mode="unified").actions, first.actions)
    event = Policy(EventMode(mode.engine.params, event_config(store), store.meta, store.stats))
    with pytest.raises(UserError, match="was not trained on windows with history"):
        event.infer(seen(0), "reach", mode="unified")
