"""Goodput: the share of a run's wall time, over all its starts, that went into steps which count.

    workdir/goodput.json    totals over all starts, then the starts one by one; seconds

Every second of a start belongs to one span:

    init        config, store, devices, fresh parameters
    restore     reading a checkpoint
    compile     of the train step
    step        dispatching steps and waiting for them
    data        waiting for the next batch; the devices may still be busy with the step before
    evaluation  losses on held-out events, and at the start their rows and program
    checkpoint  what saving holds the loop up, and the wait for the last one at the end
    other       the rest

Steps count once: those that a kill makes a run repeat are lost. `down_s` is the time between starts; with starts that
did not come to train, and with what passed of a killed one since the file was last written (a step, or 10 s).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from wallwm_jax.console import write_text

GOODPUT_FILE = "goodput.json"
_WRITE_EVERY_S = 10.0


class Goodput:
    """The clock of one start of a run; one per process, only the first process writes.

    `begin` when the first step to come is known, `step_done` after each step, `close` at the end.

    Attributes:
      spans: seconds of this start by span.
    """

    def __init__(self, workdir: Path, *, since: float | None = None, writes: bool = True):
        """Reads what earlier starts left.

        Args:
          workdir: of the run.
          since: `time.monotonic()` when this start began; what has passed is "init". None is now.
          writes: False in all processes but one.
        """
        now = time.monotonic()
        since = now if since is None else since
        self.spans: dict[str, float] = {"init": now - since}
        self._path, self._writes, self._begun = workdir / GOODPUT_FILE, writes, False
        self._earlier = read_starts(self._path)
        self._this: dict[str, Any] = {"began": time.time() - (now - since), "spans": self.spans}
        self._useful_s = 0.0
        self._name, self._mark, self._written = "other", now, now

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Charges the block to `name`; the span around it pauses meanwhile."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def begin(self, first_step: int, *, useful_s: float, lost_steps: int) -> None:
        """Says where this start takes up the run.

        Args:
          first_step: index of the first step to come.
          useful_s: seconds of the steps before it, which count.
          lost_steps: steps from it on that an earlier start had done.
        """
        self._this |= {"first_step": first_step, "lost_steps": lost_steps}
        self._useful_s, self._begun = useful_s, True
        self._write()

    def step_done(self, seconds: float) -> None:
        """Counts a step that took `seconds`, without the wait for its batch."""
        self._useful_s += seconds
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self._write()

    def totals(self) -> dict[str, Any]:
        """Over all starts: goodput, wall_s, useful_s, down_s, lost_steps, spans; and `starts`, each with its own."""
        self._switch(self._name)
        starts = [*self._earlier, self._this]
        spans: dict[str, float] = {}
        for start in starts:
            for name, seconds in start["spans"].items():
                spans[name] = spans.get(name, 0.0) + seconds
        down = sum(
            max(0.0, after["began"] - before["began"] - sum(before["spans"].values()))
            for before, after in itertools.pairwise(starts)
        )
        wall = max(down + sum(spans.values()), 1e-9)
        return {
            "goodput": min(1.0, max(0.0, self._useful_s) / wall),
            "wall_s": wall,
            "useful_s": self._useful_s,
            "down_s": down,
            "lost_steps": sum(start.get("lost_steps", 0) for start in starts),
            "spans": spans,
            "starts": starts,
        }

    def summary(self) -> str:
        """One line: goodput, and the shares of the wall time in the order of their size."""
        found = self.totals()
        shares = {**found["spans"], "down": found["down_s"]}
        parts = [
            f"{name} {100 * seconds / found['wall_s']:.1f} %"
            for name, seconds in sorted(shares.items(), key=lambda item: -item[1])
            if seconds >= 1e-3 * found["wall_s"]
        ]
        wall = timedelta(seconds=round(found["wall_s"]))
        starts = f" in {len(found['starts'])} starts, {found['lost_steps']} steps repeated" if self._earlier else ""
        return f"goodput {100 * found['goodput']:.1f} % of {wall}{starts}: {', '.join(parts)}"

    def close(self) -> None:
        """Ends the clock; writes and prints what a start that came to `begin` found."""
        if self._begun and self._writes:
            self._write()
            print(f"    {self.summary()}", flush=True)

    def _switch(self, name: str) -> str:
        """Charges the time since the last switch to the span that ends, and returns that span's name."""
        now, before = time.monotonic(), self._name
        self.spans[before] = self.spans.get(before, 0.0) + now - self._mark
        self._name, self._mark = name, now
        return before

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._writes:
            with contextlib.suppress(OSError):  # a full disk: no run ends over its report
                write_text(self._path, json.dumps(self.totals(), indent=1) + "\n")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """ "starts" of a JSON file; none if it is absent or damaged, for no run shall fail to resume over such a file."""
    try:
        return list(json.loads(path.read_text())["starts"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
