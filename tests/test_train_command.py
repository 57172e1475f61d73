"""The training command: it teaches its use, refuses in one line what cannot work, stops when told, chains stages."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_setup import STEPS, built_step, traced_steps, training_config, use_prepared_steps

from wallwm_jax.console import UserError
from wallwm_jax.data import device_feed
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.packing import batch_spec
from wallwm_jax.data.pipeline import BatchSource
from wallwm_jax.train import run
from wallwm_jax.training import heldout
from wallwm_jax.training.checkpoint import load_params, prepare_workdir
from wallwm_jax.training.goodput import Goodput
from wallwm_jax.training.objectives import compute_loss
from wallwm_jax.training.telemetry import METRICS_FILE, Telemetry, clock, read_heldout, read_metrics
from wallwm_jax.training.train_state import count, flatten

ROOT = Path(__file__).parents[1]


def changed(config, **knobs):
    """The config with `section__knob=value` set."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, value in knobs.items():
            section, knob = name.split("__")
            config[section][knob] = value
    return config.lock()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "wallwm_jax.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def prepared_steps(monkeypatch, clustered_store):
    use_prepared_steps(monkeypatch, clustered_store)


# Teaching


def test_help_shows_the_common_uses_and_the_flags():
    text = command("--help").stdout
    for expected in (
        "--resume",
        "--overwrite",
        "--config.optim.muon_lr",
        "train.init_from",
        "--workdir",
        "train.max_seconds",
    ):
        assert expected in text, text


# Refusing: one line, exit code 2, and nothing left behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.lrr=1"], "lrr"),
        (["--config.train.steps=many"], "many"),
        (["--config.data.store=/nowhere/store"], r"'/nowhere/store' does not exist; make one with"),
        ([], "no event store given; pass --config.data.store"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, tmp_path):
    done = command("--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(message, lines[0]), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"model__latent_channels": 48}, "codec 'haar8' 768, but model.latent_channels is 48"),
        ({"train__stage": "actoin"}, "train.stage='actoin' is not a stage"),
        ({"train__stage": "action"}, "freezes video and text: say where they come from with --config.train.init_from"),
        ({"train__steps": 0}, "train.steps=0 must be at least 1"),
        ({"train__heldout_batches": 0}, "train.heldout_batches=0 must be at least 1"),
        ({"train__keep_every": 3}, "train.keep_every=3 must be a multiple of train.save_every=2"),
        ({"data__window_kind": "tile"}, "cannot train on data.window_kind='tile'; it takes event or fixed"),
        ({"objective__action_sigma": "same"}, "neither independent nor symmetric"),
        ({"optim__warmup_steps": 99}, f"optim.warmup_steps=99 must be below train.steps={STEPS}"),
        ({"mesh__data": 7}, "does not fit 1 devices"),
        ({"data__views": ("top",)}, "data.views asks for 'top'"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_made(clustered_store, tmp_path, knobs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(changed(training_config(clustered_store), **knobs), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_workdir_is_refused(clustered_store, tmp_path):
    (tmp_path / "something").write_text("")
    with pytest.raises(UserError, match=r"exists; add --resume to go on with its run, or --overwrite to delete it"):
        run(training_config(clustered_store), tmp_path)


def test_a_damaged_store_is_refused(clustered_store, tmp_path):
    store = shutil.copytree(clustered_store, tmp_path / "store")
    (store / "index-train.npy").write_bytes(b"not an index")
    with pytest.raises(UserError, match=r"index-train\.npy"):
        run(changed(training_config(clustered_store), data__store=str(store)), tmp_path / "run")


# Stopping


@pytest.mark.usefixtures("prepared_steps")
def test_told_to_stop_it_saves_the_step_and_resumes_there(clustered_store, tmp_path):
    """As SIGTERM does."""
    config, stop = training_config(clustered_store), threading.Event()
    stop.set()
    outcome = run(config, tmp_path / "run", stop=stop)
    assert (outcome.step, outcome.stopped_by) == (1, "preemption")
    assert load_params(tmp_path / "run").step == 1
    outcome = run(config, tmp_path / "run", resume=True)
    assert (outcome.step, outcome.stopped_by) == (STEPS, "")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(STEPS))


@pytest.mark.usefixtures("prepared_steps")
def test_the_time_limit_ends_a_run_with_a_checkpoint_and_a_warning(clustered_store, tmp_path, capsys):
    config = changed(training_config(clustered_store), train__max_seconds=1e-3)
    outcome = run(config, tmp_path / "run")
    assert (outcome.step, outcome.stopped_by) == (config.train.log_every, "max_seconds")
    assert load_params(tmp_path / "run").step == outcome.step
    assert re.search(rf"warning: {STEPS} steps need .* --config.train.steps=\d+ would fit", capsys.readouterr().out)


@pytest.mark.usefixtures("prepared_steps")
def test_a_loss_that_is_not_finite_names_the_step_and_saves_nothing_of_it(clustered_store, tmp_path, monkeypatch):
    """The fourth batch holds a broken action; the checkpoint of step 2 stays the last."""

    class Broken(device_feed.DeviceFeed):
        count = 0

        def __next__(self):
            arrays, meta, waited = super().__next__()
            self.count += 1
            if self.count == 4:
                broken = np.full(arrays["actions"].shape, np.nan, np.float32)
                arrays = {**arrays, "actions": jax.device_put(broken, arrays["actions"].sharding)}
            return arrays, meta, waited

    monkeypatch.setattr(device_feed, "DeviceFeed", Broken)
    with pytest.raises(UserError, match=r"step 3: .*loss_action nan.*is not finite"):
        run(training_config(clustered_store), tmp_path / "run")
    assert load_params(tmp_path / "run").step == 2
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


# Chaining stages


@pytest.mark.extended
@pytest.mark.usefixtures("prepared_steps")
def test_the_action_stage_starts_from_the_average_of_the_video_stage(clustered_store, tmp_path, capsys):
    video = training_config(clustered_store, "video")
    action = changed(training_config(clustered_store, "action"), train__init_from=str(tmp_path / "video"))
    run(video, tmp_path / "video")
    capsys.readouterr()
    outcome = run(action, tmp_path / "action")
    printed = capsys.readouterr().out
    first, second = (load_params(tmp_path / name).params for name in ("video", "action"))
    assert set(first) == {"video", "text"} and set(second) == {"video", "text", "action", "duration"}
    for path, leaf in flatten(first).items():  # frozen in bfloat16
        np.testing.assert_array_equal(flatten(second)[path], np.asarray(leaf).astype("bfloat16").astype(np.float32))
    assert f"parameters from {tmp_path / 'video'}, step {STEPS}" in printed
    assert re.search(rf"video\s+{len(flatten(first['video']))}\s+0\s+0", printed)
    assert re.search(rf"action\s+0\s+{len(flatten(second['action']))}\s+0", printed)
    assert outcome.step == STEPS


# What a run tells of itself


@pytest.fixture(scope="module")
def resumed(clustered_store, tmp_path_factory):
    """A whole run whose checkpoints after step 2 were lost, resumed; the second start was asked for a profile."""
    workdir = tmp_path_factory.mktemp("runs") / "resumed"
    config = training_config(clustered_store).copy_and_resolve_references()
    with pytest.MonkeyPatch.context() as patch, config.unlocked():
        use_prepared_steps(patch, clustered_store)
        patch.setenv("XLA_FLAGS", "--xla_dump_to=")
        run(config, workdir)
        for lost in (4, STEPS):
            os.rename(workdir / "checkpoints" / str(lost), workdir.parent / str(lost))
        (workdir / "profile").write_text("2")
        config.train.dump_hlo = True
        run(config, workdir, resume=True)
    return workdir


def test_repeated_steps_are_lost_and_the_spans_fill_the_wall_time(resumed):
    found = json.loads((resumed / "goodput.json").read_text())
    assert found["lost_steps"] == STEPS - 2
    assert [(start["first_step"], start["lost_steps"]) for start in found["starts"]] == [(0, 0), (2, STEPS - 2)]
    assert set(found["spans"]) == {"init", "restore", "compile", "step", "data", "checkpoint", "other"}
    assert sum(found["spans"].values()) + found["down_s"] == pytest.approx(found["wall_s"])
    steps_s = sum(line["step_s"] - line["input_wait_s"] for line in read_metrics(resumed))
    assert found["useful_s"] == pytest.approx(steps_s)
    assert 0 < found["goodput"] == found["useful_s"] / found["wall_s"] < 1


def test_held_out_losses_are_those_of_the_average_and_come_again_after_a_resume(clustered_store, tmp_path, resumed):
    config = changed(training_config(clustered_store), train__heldout_every=4, train__heldout_batches=2)
    with pytest.MonkeyPatch.context() as patch:
        use_prepared_steps(patch, clustered_store)
        run(config, tmp_path / "run")
        found = read_heldout(tmp_path / "run")
        os.rename(tmp_path / "run" / "checkpoints" / str(STEPS), tmp_path / "lost")
        run(config, tmp_path / "run", resume=True)
    assert read_heldout(tmp_path / "run") == found
    assert [line["step"] for line in found] == [4, STEPS]
    assert found[0]["loss"] != found[1]["loss"] and {"loss_video", "loss_action"} < set(found[0])
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == [line["loss"] for line in read_metrics(resumed)]
    spans = json.loads((tmp_path / "run" / "goodput.json").read_text())["spans"]
    assert spans["evaluation"] > 0

    built, state = built_step(clustered_store, "joint"), load_params(tmp_path / "run")  # the average
    store = open_store(clustered_store, "heldout")
    source = BatchSource(store, config)
    losses = []
    for number in range(2):
        made = source[number]
        batch = {name: made[name] for name in batch_spec(config, 2)}
        stream = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2)
        key = jax.random.fold_in(stream, number)
        weight = jnp.asarray(open_store(clustered_store).channel_weights())
        losses.append(compute_loss(state.params, {}, config, built.stage, batch, key, weight)[0])
    assert found[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_held_out_losses_need_held_out_events(clustered_store, tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "open_store", lambda path, split: SimpleNamespace(index=[]))
    config = changed(training_config(clustered_store), train__heldout_every=1)
    with pytest.raises(UserError, match="no heldout windows; build it with --heldout_fraction, or set"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_profiled_where_it_goes_on(resumed):
    assert traced_steps(resumed / "profiles" / "step_2") == [2, 3]


def test_the_compiled_step_is_written_with_its_memory_and_cost(resumed):
    text = (resumed / "hlo" / "step.hlo.txt").read_text()
    memory, cost = (json.loads((resumed / "hlo" / f"{name}.json").read_text()) for name in ("memory", "cost"))
    assert text.startswith("HloModule jit_step")
    assert memory["argument_size_in_bytes"] > memory["alias_size_in_bytes"] > 1e6  # the state is donated
    assert cost["flops"] > 1e8


def test_the_run_card_has_every_start(resumed, clustered_store):
    first, second = json.loads((resumed / "run_card.json").read_text())["starts"]
    state = built_step(clustered_store, "joint").abstract_state
    assert (first["step"], second["step"]) == (0, 2)
    assert first["config"] != second["config"]  # dump_hlo
    assert first["store"] == second["store"] == open_store(clustered_store).fingerprint
    assert first["versions"]["jax"] == jax.__version__
    assert first["devices"]["count"] == 1 and first["devices"]["kind"] == "cpu" and first["devices"]["processes"] == 1
    assert sum(first["parameters"]["trained"].values()) == count(state.trainable)
    assert first["flags"]["XLA_FLAGS"] == "--xla_dump_to="
    assert first["at"] <= second["at"]


def test_a_cpu_has_no_mfu(resumed):
    assert all("mfu" not in line for line in read_metrics(resumed))


def test_overwriting_deletes_all_that_a_run_wrote(resumed):
    (resumed / "profile").write_text("")
    written = {path.name for path in resumed.iterdir()}
    assert {"goodput.json", "run_card.json", "profile", "profiles", "hlo", "tensorboard"} < written
    prepare_workdir(resumed, resume=False, overwrite=True)
    assert list(resumed.iterdir()) == []


# Telemetry


def test_lines_are_means_over_the_window_and_shares_of_time(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, Goodput(tmp_path), first_step=0, last_step=4, log_every=2)
    telemetry.start()
    for step in range(4):
        values = {"loss": step, "loss_video": 2.0 * step, "grad_norm": 1.0, "lr": 0.1, "events": 10}
        telemetry.record(step, {name: np.float32(value) for name, value in values.items()}, 0.0)
    telemetry.flush()
    telemetry.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 2/4", "loss 0.5000 (video 1.0000)"],
        ["step 4/4", "loss 2.5000 (video 5.0000)"],
    ]
    assert all(
        re.search(r"events/s  .* ms/step  input wait 0.0 %  goodput [\d.]+ %  left 0:00", line) for line in lines
    )
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_metrics_are_settled_one_step_late(tmp_path):
    telemetry = Telemetry(tmp_path, Goodput(tmp_path), first_step=0, last_step=9, log_every=9)
    metrics = {"loss": np.float32(1), "grad_norm": np.float32(1), "events": np.int32(1)}
    telemetry.record(0, metrics, 0.0)
    assert read_metrics(tmp_path) == []
    telemetry.record(1, metrics, 0.0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    telemetry.close()


def test_a_resumed_run_cuts_what_comes_again_and_a_torn_line(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text("".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in range(5)) + '{"step": 5, "lo')
    Telemetry(tmp_path, Goodput(tmp_path), first_step=3, last_step=9, log_every=1).close()
    assert path.read_text() == "".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in range(3))


def test_the_clock_reads_like_one():
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3600 * 27 + 125)] == ["0:00", "1:00", "1:01", "27:02:05"]
