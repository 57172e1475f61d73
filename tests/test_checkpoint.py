"""Checkpoints: a killed run goes on bit for bit; what is on disk, what inference reads, and what is refused; what
becomes of a checkpoint that is damaged, cannot be written, or grows old; and the command that looks at them.
"""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_setup import (
    STEPS,
    built_step,
    random_state,
    subprocess_environment,
    training_config,
    use_prepared_steps,
)

from wallwm_jax import checkpoints
from wallwm_jax.config import to_json
from wallwm_jax.console import UserError
from wallwm_jax.data.normalization import Stats
from wallwm_jax.train import run
from wallwm_jax.training import checkpoint
from wallwm_jax.training.checkpoint import Checkpointer, load_params, prepare_workdir
from wallwm_jax.training.integrity import checksum, damage, write_manifest
from wallwm_jax.training.telemetry import read_metrics
from wallwm_jax.training.train_state import flatten

TIMING = ("step_s", "input_wait_s")  # and mfu, which a CPU has not
ASSETS, CONFIG = {"store": {"fingerprint": "f00d"}, "stats": {}}, {"train": {"stage": "joint"}}


@pytest.fixture(scope="module")
def straight(clustered_store, tmp_path_factory):
    """The workdir and outcome of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        use_prepared_steps(patch, clustered_store)
        outcome = run(training_config(clustered_store), workdir)
    return workdir, outcome


def curve(workdir):
    """The lines of metrics.jsonl without what depends on the clock; floats as written, in full."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(workdir)]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


# Resuming


def test_killed_and_resumed_training_is_bit_identical(straight, clustered_store, tmp_path):
    """SIGKILL after the checkpoint of step 2, in step 4 or later; the same command with --resume ends the run."""
    config_file = tmp_path / "config.py"
    config_file.write_text(
        "from training_setup import training_config\n\n"
        f"def get_config():\n    return training_config({str(clustered_store)!r})\n"
    )
    command = [sys.executable, "-m", "wallwm_jax.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    environment = subprocess_environment()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (
        metrics.is_file() and metrics.read_text().count("\n") >= 4 and (tmp_path / "run/checkpoints/2").is_dir()
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done_before = [line["step"] for line in curve(tmp_path / "run")]
    assert 4 <= len(done_before) < STEPS  # killed in the middle

    logging = {**environment, "JAX_LOG_COMPILES": "1"}
    again = subprocess.run([*command, "--resume"], env=logging, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "restore step" in again.stdout
    assert again.stderr.count("Compiling jit(step)") == 1  # one compilation in a whole run
    assert [line["step"] for line in curve(tmp_path / "run")] == list(range(STEPS))
    assert curve(tmp_path / "run") == curve(straight[0])
    goodput = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert goodput["lost_steps"] == len(done_before) - goodput["starts"][1]["first_step"]
    ours, theirs = (load_params(workdir) for workdir in (tmp_path / "run", straight[0]))
    for path, leaf in flatten(ours.params).items():
        np.testing.assert_array_equal(leaf, flatten(theirs.params)[path])


@pytest.mark.extended
def test_without_an_average_the_parameters_are_what_inference_loads(straight, clustered_store, tmp_path):
    """`train.ema_decay=0`: the same losses, after a resume, too, and parameters as of an average without memory."""
    loaded = []
    for name, decay in (("none", 0.0), ("short", 1e-9)):
        config = training_config(clustered_store)
        with config.unlocked():
            config.train.ema_decay = decay
        run(config, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / str(saved_steps(tmp_path / name)[-1]))
        run(config, tmp_path / name, resume=True)
        assert curve(tmp_path / name) == curve(straight[0])
        loaded.append(flatten(load_params(tmp_path / name).params))
    for path, leaf in loaded[0].items():
        np.testing.assert_allclose(leaf, loaded[1][path], atol=1e-6)


def test_a_finished_run_that_is_resumed_has_nothing_to_do(straight, clustered_store, capsys):
    workdir, _ = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    outcome = run(training_config(clustered_store), workdir, resume=True)
    assert (outcome.step, outcome.seconds) == (STEPS, {})
    assert f"already trained: step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("section", "knob", "value", "message"),
    [
        ("model", "ffn", 128, "cannot resume: model.ffn was 64 and is now 128"),
        (None, "seed", 1, "cannot resume: seed was 0 and is now 1"),
    ],
)
def test_another_model_or_seed_cannot_resume(straight, clustered_store, section, knob, value, message):
    config = training_config(clustered_store).copy_and_resolve_references()
    with config.unlocked():
        (config[section] if section else config)[knob] = value
        config.train.steps = STEPS + 4
    with pytest.raises(UserError, match=message):
        run(config, straight[0], resume=True)


def test_another_store_cannot_resume(straight, clustered_store, tmp_path):
    other = shutil.copytree(clustered_store, tmp_path / "other")
    meta = json.loads((other / "store.json").read_text())
    (other / "store.json").write_text(json.dumps({**meta, "built": "again"}))
    with pytest.raises(UserError, match=r"was trained on event store .*; give the old store"):
        run(training_config(other), straight[0], resume=True)


# What is on disk


def test_inference_reads_average_and_assets_and_no_optimizer(straight, clustered_store, tmp_path):
    workdir, outcome = straight
    bare = shutil.copytree(workdir, tmp_path / "bare")
    for state in bare.glob("checkpoints/*/state"):
        shutil.rmtree(state)
    loaded = load_params(bare)
    config = training_config(clustered_store)
    assert loaded.step == outcome.step == STEPS
    assert set(loaded.params) == {"video", "action", "text", "duration"}
    assert loaded.config == json.loads(to_json(config))
    assert loaded.assets["store"]["codec"] == "haar8" and loaded.assets["store"]["views"] == list(config.data.views)
    stats = Stats.from_dict(loaded.assets["stats"])
    np.testing.assert_array_equal(stats.latent_std, Stats.load(clustered_store / "stats.json").latent_std)


def test_the_last_checkpoints_are_kept_and_can_be_named(straight):
    """Saved at 2, 4 and the end, all three within `keep_checkpoints`."""
    workdir, _ = straight
    assert saved_steps(workdir) == [2, 4, STEPS]
    assert load_params(workdir, 2).step == load_params(workdir / "checkpoints" / "2").step == 2
    with pytest.raises(UserError, match=rf"has no checkpoint at step 3; it has 2, 4, {STEPS}"):
        load_params(workdir, 3)
    with pytest.raises(UserError, match="is not the workdir of a training run"):
        load_params(workdir / "tensorboard")


def test_every_step_has_its_line_and_tensorboard_its_file(straight):
    workdir, _ = straight
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert {"loss", "loss_video", "loss_action", "loss_duration", "grad_norm", "lr", "events", *TIMING} <= set(lines[0])
    assert any((workdir / "tensorboard").iterdir())


# Frozen parameters


@pytest.fixture(scope="module")
def frozen_run(clustered_store, tmp_path_factory):
    """A saved state of stage action, whose video tower and text encoder are frozen."""
    workdir = prepare_workdir(tmp_path_factory.mktemp("runs") / "action", resume=False, overwrite=False)
    config, built = training_config(clustered_store, "action"), built_step(clustered_store, "action")
    state = random_state(config, built)
    saver = Checkpointer(workdir, keep=2, save_every=1)
    saver.keep_frozen(state.frozen)
    for step in (1, 2, 3):
        saver.save(step, state, {"store": {}, "stats": {}}, {"train": {"stage": "action"}})
    saver.close()
    return workdir, built, state


def test_frozen_parameters_are_written_once_and_come_back_for_inference_and_resume(frozen_run):
    workdir, built, state = frozen_run
    params = flatten(load_params(workdir).params)
    frozen = flatten(state.frozen)
    assert set(frozen) < set(params)
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(params[path], np.asarray(leaf, np.float32))
    restored = Checkpointer(workdir, keep=2, save_every=1).restore(built.abstract_state)
    assert checksum(restored.frozen) == checksum(state.frozen)
    assert checksum(restored.trainable) == checksum(state.trainable)
    sizes = {
        item: sum(file.stat().st_size for file in Path(workdir / item).rglob("*"))
        for item in ("frozen", "checkpoints/3")
    }
    assert sizes["frozen"] > 100_000 > 0
    assert saved_steps(workdir) == [2, 3]


def test_frozen_parameters_that_were_replaced_are_refused(frozen_run, tmp_path):
    workdir, _, state = frozen_run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "frozen")
    with pytest.raises(UserError, match=r"frozen parameters .* are missing"):
        load_params(copy)
    other = dataclasses.replace(state, frozen=jax.tree.map(lambda leaf: leaf + 1, state.frozen))
    Checkpointer(copy, keep=2, save_every=1).keep_frozen(other.frozen)
    with pytest.raises(UserError, match="do not match the checkpoint"):
        load_params(copy)


@pytest.fixture
def copy(straight, tmp_path):
    """A copy of the workdir of `straight`, with checkpoints at 2, 4 and 6, to do harm to."""
    return shutil.copytree(straight[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def state(clustered_store):
    return random_state(training_config(clustered_store), built_step(clustered_store, "joint"))


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step_directory):
    path = largest_file(step_directory / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(step_directory):
    largest_file(step_directory / "ema").unlink()


def flip_bits(step_directory):
    path = largest_file(step_directory / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


# Damage


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(truncate, r"state/\S+ has \d+ of \d+ bytes"), (flip_bits, "")],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_last_whole_one(
    copy, straight, clustered_store, harm, reason, capfd, monkeypatch
):
    use_prepared_steps(monkeypatch, clustered_store)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    harm(copy / "checkpoints" / "4")
    outcome = run(training_config(clustered_store), copy, resume=True)
    said = capfd.readouterr().err
    assert re.search(rf"warning: checkpoint of step 4 is damaged \(.*{reason}", said), said
    assert "4.damaged', and the run goes on from step 2" in said
    assert outcome.step == STEPS
    assert curve(copy) == curve(straight[0])
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"2", "4", "6", "4.damaged"}
    ours, theirs = (flatten(load_params(workdir).params) for workdir in (copy, straight[0]))
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])


def test_with_no_whole_checkpoint_nothing_is_renamed_and_each_is_named(copy, clustered_store):
    for step in (2, 4, STEPS):
        truncate(copy / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"can be read \(step 2: state/.*; step 4: .*; step 6: .*\); nothing was chan"):
        run(training_config(clustered_store), copy, resume=True)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"2", "4", "6"}


def test_inference_takes_the_newest_whole_checkpoint_and_refuses_a_damaged_one_by_name(copy):
    lose_a_file(copy / "checkpoints" / str(STEPS))
    assert load_params(copy).step == 4
    with pytest.raises(UserError, match=r"checkpoint 6 of .* is damaged: ema/\S+ is missing"):
        load_params(copy, STEPS)


def test_a_manifest_sees_what_is_missing_short_or_torn(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("12345")
    (tmp_path / "b").write_text("1")
    assert damage(tmp_path) == ""  # nobody noted anything
    write_manifest(tmp_path, ["a", "b"])
    assert damage(tmp_path) == ""
    (tmp_path / "a" / "x").write_text("123")
    assert damage(tmp_path) == "a/x has 3 of 5 bytes"
    assert damage(tmp_path, ["b"]) == ""
    (tmp_path / "b").unlink()
    assert damage(tmp_path, ["b"]) == "b is missing"
    (tmp_path / "manifest.json").write_text('{"files": {"a/')
    assert damage(tmp_path) == "manifest.json is torn"


def test_a_checksum_sees_every_bit_and_where_it_is():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, "bfloat16")}
    same = checksum(jax.device_put(tree))
    assert same == checksum(tree)
    bits = tree["a"].copy().view(np.uint32)
    bits[1, 2] ^= 1
    assert checksum({**tree, "a": bits.view(np.float32)}) != same
    assert checksum({**tree, "a": tree["a"][::-1]}) != same
    assert checksum({"a": tree["a"], "c": tree["b"]}) != same


# What cannot be written


@contextlib.contextmanager
def files_of_at_most(size):
    """The kernel refuses longer files, as it refuses any on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_nothing_behind_and_the_next_one_works(tmp_path, state, capfd):
    workdir = prepare_workdir(tmp_path / "run", resume=False, overwrite=False)
    saver = Checkpointer(workdir, keep=1, save_every=1, max_failed=2)
    saver.save(1, state, ASSETS, CONFIG)
    saver.wait()
    before = {path: path.stat().st_mtime_ns for path in Path(workdir / "checkpoints" / "1").rglob("*")}
    with files_of_at_most(20_000):
        for step in (2, 3):
            saver.save(step, state, ASSETS, CONFIG)
            with pytest.raises(UserError, match=r"could not be saved in .* newest checkpoint is that of step 1\. Make"):
                saver.wait()
    assert {path: path.stat().st_mtime_ns for path in Path(workdir / "checkpoints" / "1").rglob("*")} == before
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" was not written")[0] for line in said] == [
        "warning: checkpoint of step 2",
        "warning: checkpoint of step 3",
    ]
    assert "File too large" in said[0] and said[1].endswith("[2 of at most 2 failures in a row]")
    assert saver.save(4, state, ASSETS, CONFIG)
    saver.close()
    assert saved_steps(workdir) == [4]  # keep=1
    assert damage(workdir / "checkpoints" / "4") == ""


def test_too_many_failed_saves_in_a_row_end_the_run(tmp_path, state):
    workdir = prepare_workdir(tmp_path / "run", resume=False, overwrite=False)
    saver = Checkpointer(workdir, keep=1, save_every=1, max_failed=1)
    with files_of_at_most(20_000):
        saver.save(1, state, ASSETS, CONFIG)
        saver.save(2, state, ASSETS, CONFIG)
        with pytest.raises(UserError, match=r"of step 2 was not written: .* Make room in .*, then --resume"):
            saver.save(3, state, ASSETS, CONFIG)
    assert saved_steps(workdir) == []


# When to save, what to keep


def test_the_newest_are_kept_and_every_so_many_steps_one_for_good(tmp_path, state):
    workdir = prepare_workdir(tmp_path / "run", resume=False, overwrite=False)
    saver = Checkpointer(workdir, keep=1, keep_every=2, save_every=1)
    for step in range(1, 6):
        saver.save(step, state, ASSETS, CONFIG)
    saver.close()
    assert saved_steps(workdir) == [2, 4, 5]


def test_a_checkpoint_is_due_after_some_minutes_whatever_the_step(tmp_path, state, monkeypatch):
    now = time.monotonic()
    workdir = prepare_workdir(tmp_path / "run", resume=False, overwrite=False)
    saver = Checkpointer(workdir, keep=2, save_every=100, save_minutes=5, look_every=10)
    assert [step for step in range(1, 250) if saver.wants(step)] == [100, 200]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now + 310)
    assert [step for step in range(1, 31) if saver.wants(step)] == [10, 20, 30]
    saver.save(30, state, ASSETS, CONFIG)
    assert [step for step in range(31, 99) if saver.wants(step)] == []
    saver.close()


# Looking


def test_the_command_lists_steps_sizes_parameters_and_what_changed(copy, clustered_store, capsys):
    truncate(copy / "checkpoints" / "4")
    changed = json.loads((copy / "config.json").read_text())
    changed["optim"]["lr"] = 7.0
    found = checkpoints.report(copy, changed)
    assert [one["step"] for one in found["checkpoints"]] == [2, 4, STEPS]
    assert [one["whole"] for one in found["checkpoints"]] == [True, False, True]
    newest = found["checkpoints"][-1]
    parameters = {name: tree for name, tree in load_params(copy).params.items()}
    for group, tree in parameters.items():
        assert newest["arrays"][f"params/{group}"] == {"float32": sum(leaf.size for leaf in jax.tree.leaves(tree))}
    assert newest["arrays"]["ema"] == {"float32": sum(leaf.size for leaf in jax.tree.leaves(parameters))}
    assert (
        newest["bytes"] > newest["items"]["state"] > newest["items"]["ema"] > 4 * newest["arrays"]["ema"]["float32"] / 2
    )
    assert newest["config_changes"] == {"optim.lr": [training_config(clustered_store).optim.lr, 7.0]}
    assert newest["written"].startswith("20") and newest["store"]
    text = checkpoints.table(found)
    assert "no: state/" in text and "config: optim.lr was 0.001 and is now 7.0" in text


def test_reading_every_array_finds_what_sizes_do_not_show(copy):
    flip_bits(copy / "checkpoints" / "2")
    shutil.rmtree(copy / "checkpoints" / "4")
    assert damage(copy / "checkpoints" / "2") == ""
    assert [one["whole"] for one in checkpoints.report(copy, verify=True)["checkpoints"]] == [False, True]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not the workdir of a training run"):
        checkpoints.report(tmp_path)


# The workdir


def test_a_workdir_that_exists_needs_a_word(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists; add --resume to go on with its run, or --overwrite to delete it"):
        prepare_workdir(tmp_path, resume=False, overwrite=False)
    with pytest.raises(UserError, match="exclude each other"):
        prepare_workdir(tmp_path, resume=True, overwrite=True)
    prepare_workdir(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    prepare_workdir(tmp_path, resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]  # only what a run writes is deleted


def test_overwrite_never_touches_a_directory_that_no_run_made(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no training run but 'thesis\.tex'; refusing"):
        prepare_workdir(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
