"""What ends a run before its schedule does: a signal, the time limit, a full disk, a phase that hangs."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from wallwm_jax.console import TRY_AGAIN, UserError
from wallwm_jax.parallel.distributed import first_says, this_host
from wallwm_jax.training.telemetry import clock

_LOOKS = 20  # of the watchdog during its limit


class Watchdog:
    """Prints the stacks of all threads when a phase of work takes longer than a limit; for use in a `with` block."""

    def __init__(self, limit_s: float, *, aborts: bool = False):
        """Starts watching.

        Args:
          limit_s: seconds that one phase may take; 0 watches nothing.
          aborts: also end the process, with exit code `console.TRY_AGAIN`.
        """
        self._limit_s, self._aborts = limit_s, aborts
        self._phase, self._since, self._told = "start", time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def phase(self) -> str:
        """What is being done now."""
        return self._phase

    def enter(self, phase: str) -> None:
        """From now on the process does `phase`, such as "step 12"; that ends the phase before."""
        self._phase, self._since, self._told = phase, time.monotonic(), False

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._limit_s / _LOOKS):
            spent = time.monotonic() - self._since
            if spent > self._limit_s and not self._told:
                self._told = True
                self._tell(spent)

    def _tell(self, spent: float) -> None:
        host = this_host()
        print(
            f"warning: process {host.index} of {host.count} hangs in phase {self._phase!r}: {clock(spent)} and "
            f"train.hang_seconds is {self._limit_s:g}; the stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._aborts:
            print("error: ended by train.hang_aborts; the same command with --resume goes on", file=sys.stderr)
            sys.stderr.flush()
            os._exit(TRY_AGAIN)


class TimeLimit:
    """`train.max_seconds`, on the clock of the first process, so that all processes stop at the same step."""

    def __init__(self, config: ConfigDict):
        """Starts the clock."""
        self._limit, self._steps, self._every = config.train.max_seconds, config.train.steps, config.train.log_every
        self._start, self._warned = time.monotonic(), False

    def exceeded(self, done: int, step_s: float) -> bool:
        """Whether the time is up; looked at every `log_every` steps. Warns once if the schedule will not fit.

        Args:
          done: steps made.
          step_s: seconds that a step takes.
        """
        if not self._limit or done % self._every:
            return False
        spent = float(first_says(time.monotonic() - self._start))
        need = spent + (self._steps - done) * step_s
        if need > self._limit and not self._warned:
            self._warned = True
            fits = done + int(max(0.0, self._limit - spent) / max(step_s, 1e-9))
            print(
                f"warning: {self._steps} steps need {clock(need)}, but train.max_seconds ends the run at "
                f"{clock(self._limit)}, with the learning rate still high; --config.train.steps={fits} would fit",
                flush=True,
            )
        return spent > self._limit


@contextlib.contextmanager
def explained_disk_full() -> Iterator[None]:
    """A write that finds the disk full, as of metrics, is a `UserError`; that of a checkpoint is tried again."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{error}; make room, then --resume goes on from the last checkpoint") from error


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: clusters send it some seconds before they take a machine away."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
