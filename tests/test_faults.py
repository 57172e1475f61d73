"""Runs that cannot be lost: real processes are killed, and the loss curve is bit for bit that of an undisturbed run.

All of them: python -m pytest -m fault. Those of continuous integration: python -m pytest -m "fault and not slow".
"""

import contextlib
import random
import shutil
import signal
import subprocess
import time

import pytest
from fault_runs import Run, curve, finished, saved_steps, write_config

from wallwm_jax.console import TRY_AGAIN

pytestmark = pytest.mark.fault

STEPS = 12


@pytest.fixture(scope="module")
def config(clustered_store, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("fault"), clustered_store, steps=STEPS, save_every=3)


@pytest.fixture(scope="module")
def straight_on_two(config, tmp_path_factory):
    """The workdir of a run that nobody disturbed: one process with two devices."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finished(config, workdir, devices=2)
    return workdir


@pytest.fixture(scope="module")
def straight_on_one(config, tmp_path_factory):
    """The same of one process with one device."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finished(config, workdir)
    return workdir


@contextlib.contextmanager
def small_disk(directory, megabytes):
    """A disk of its own at `directory`, which must be new; yields what makes it larger. Skips where one may not."""
    directory.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a disk takes root")
    try:
        yield lambda megabytes: subprocess.run(
            ["mount", "-o", f"remount,size={megabytes}m", str(directory)], check=True
        )
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_one_process_two_processes_one_process_is_one_curve(config, straight_on_two, tmp_path):
    """The same mesh of two devices: one process is killed inside a save, one of two in a step, and one ends the run."""
    workdir = tmp_path / "run"
    first = Run(config, workdir, devices=2)
    first.kill_inside_a_save()
    assert first.is_saving()  # what was half written is still there

    second = Run(config, workdir, "--resume", processes=2)
    second.wait_for(lambda: second.is_compiled() and second.steps_done() >= 5)
    second.signal(signal.SIGKILL, process=1)
    start = time.monotonic()
    (code, output), (killed, _) = second.end()
    assert time.monotonic() - start < 150
    assert killed == -signal.SIGKILL
    assert code == TRY_AGAIN, output[-3000:]
    assert "error: process 0 of 2 failed in phase '" in output
    assert "because another process of the run has ended" in output

    (output,) = finished(config, workdir, "--resume", devices=2)
    assert "restore step" in output
    assert curve(workdir) == curve(straight_on_two)
    assert saved_steps(workdir) == [6, 9, STEPS]
    assert not first.is_saving()


@pytest.mark.slow
def test_a_notice_to_one_of_two_processes_makes_both_save_the_same_step(config, straight_on_two, tmp_path):
    workdir = tmp_path / "run"
    run = Run(config, workdir, processes=2)
    run.wait_for(lambda: run.is_compiled() and run.steps_done() >= 2)
    run.signal(signal.SIGTERM, process=1)
    ends = run.end()
    assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    step = saved_steps(workdir)[-1]
    assert step < STEPS and f"stopped by preemption: step {step} saved" in ends[0][1]
    (output,) = finished(config, workdir, "--resume", devices=2)
    assert f"restore step {step}" in output
    assert curve(workdir) == curve(straight_on_two)


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_other_ends_too(config, tmp_path):
    """It is the one that the others meet at; JAX ends them itself."""
    run = Run(config, tmp_path / "run", processes=2)
    run.wait_for(lambda: run.steps_done() >= 2)
    run.signal(signal.SIGKILL)
    start = time.monotonic()
    _, (code, output) = run.end()
    assert time.monotonic() - start < 200
    assert code not in (0, None), output[-3000:]


@pytest.mark.slow
def test_ten_random_kills_half_of_them_inside_a_save(clustered_store, tmp_path):
    """Of the other half some come while the run starts, some while it trains."""
    config = write_config(tmp_path, clustered_store, steps=60, save_every=2)
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    finished(config, straight)
    moments, reached = random.Random(5), []
    for number in range(10):
        run = Run(config, workdir, *(["--resume"] if number else []))
        if number % 4 == 0:
            time.sleep(moments.uniform(1.0, 15.0))
        else:
            run.wait_for(run.is_compiled)  # what an earlier kill left half written is deleted by then
        if number % 4 == 2:
            time.sleep(moments.uniform(0.0, 1.0))
        if number % 2 == 1:
            run.kill_inside_a_save(max(saved_steps(workdir), default=0) + 2 * moments.randrange(1, 3))
            assert run.is_saving()
        else:
            run.kill()
        reached.append(max(saved_steps(workdir), default=0) if (workdir / "checkpoints").is_dir() else 0)
    print(f"newest checkpoint after each kill: {reached}")
    assert reached == sorted(reached) and 0 < reached[-1] < 60
    finished(config, workdir, "--resume")
    assert curve(workdir) == curve(straight)


@pytest.mark.slow
def test_on_a_full_disk_training_goes_on_and_older_checkpoints_stay(config, straight_on_one, tmp_path):
    """A disk that holds two checkpoints; the third and the last do not fit, until there is room."""
    workdir = tmp_path / "run"
    with small_disk(workdir / "checkpoints", megabytes=38) as grow:
        ((code, output),) = Run(config, workdir, "--resume").end()
        assert code == 2, output[-3000:]
        assert "warning: checkpoint of step 9 was not written: " in output
        assert "No space left on device" in output
        assert output.splitlines()[-1].startswith(f"error: the last step could not be saved in '{workdir}'")
        assert saved_steps(workdir) == [3, 6]
        grow(megabytes=100)
        (output,) = finished(config, workdir, "--resume")
        assert "restore step 6" in output
        assert saved_steps(workdir) == [6, 9, STEPS]
    assert curve(workdir) == curve(straight_on_one)


@pytest.mark.slow
def test_on_another_mesh_the_curve_is_the_same_to_a_millionth(config, straight_on_two, tmp_path):
    """The first checkpoint of two devices is read by one."""
    workdir = shutil.copytree(straight_on_two, tmp_path / "run")
    first, *later = saved_steps(workdir)
    for step in later:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    finished(config, workdir, "--resume")
    assert curve(workdir)[:first] == curve(straight_on_two)[:first]
    for line, expected in zip(curve(workdir), curve(straight_on_two), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
