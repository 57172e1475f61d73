"""What ends a run early: a hang is named and shown, and ends the process where it is told to."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from wallwm_jax.console import TRY_AGAIN, UserError
from wallwm_jax.training.limits import Watchdog, explained_disk_full

_HANGS = """
import time
from wallwm_jax.training.limits import Watchdog
def wait_for_a_batch_that_never_comes():
    time.sleep(60)
with Watchdog(0.5, aborts=True) as watchdog:
    watchdog.enter("data of step 7")
    wait_for_a_batch_that_never_comes()
"""


def test_a_hang_shows_the_stacks_once_and_names_the_phase(capfd):
    with Watchdog(1.0) as watchdog:
        for step in range(10):  # each phase is shorter than the limit
            watchdog.enter(f"step {step}")
            time.sleep(0.15)
        watchdog.enter("data of step 10")
        time.sleep(2.5)
    said = capfd.readouterr().err
    assert said.count("warning: process 0 of 1 hangs in phase 'data of step 10'") == 1
    assert "hangs in phase 'step" not in said
    assert "test_a_hang_shows_the_stacks_once" in said  # where the main thread is


def test_a_full_disk_is_one_line():
    with (
        pytest.raises(UserError, match=r"No space left on device; make room, then --resume goes on"),
        explained_disk_full(),
    ):
        Path("/dev/full").write_text("metrics")
    with pytest.raises(FileNotFoundError), explained_disk_full():
        Path("/nowhere/metrics").read_text()


def test_no_limit_watches_nothing():
    with Watchdog(0.0) as watchdog:
        watchdog.enter("compile")
        assert watchdog.phase == "compile"


def test_a_hang_ends_the_process_with_the_code_that_says_try_again():
    done = subprocess.run([sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=300)
    assert done.returncode == TRY_AGAIN == 75
    assert "hangs in phase 'data of step 7'" in done.stderr
    assert "in wait_for_a_batch_that_never_comes" in done.stderr
    assert "error: ended by train.hang_aborts; the same command with --resume goes on" in done.stderr
