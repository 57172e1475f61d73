"""What a run says: a line per N steps, metrics.jsonl, TensorBoard; and the stop at the first loss that is not finite.

Metrics are read from the device one step late, after the next step has been dispatched, so reading never holds the
device up. `metrics.jsonl` has one line per step; its numbers are written in full, so that two runs can be compared bit
by bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter

from wallwm_jax.console import UserError

METRICS_FILE = "metrics.jsonl"
_TIMING = ("step_s", "input_wait_s")
"""Fields of a line that depend on the machine; every other field is a pure function of config, data and step."""


@dataclass
class _Pending:
    step: int
    metrics: Mapping[str, jax.Array]
    input_wait_s: float


class Telemetry:
    """Collects the metrics of a run; one per process, only the first process writes.

    Call `record` right after dispatching a step, `flush` before saving or ending, `close` at the end.
    """

    def __init__(self, workdir: Path, *, first_step: int, last_step: int, log_every: int, writes: bool = True):
        """Opens the files; what they hold of steps from `first_step` on is cut off, since those steps come again.

        Args:
          workdir: of the run.
          first_step: index of the first step to come.
          last_step: number of steps of the whole run.
          log_every: steps per printed line and TensorBoard point.
          writes: False in all processes but one.
        """
        self.last_step, self.log_every = last_step, log_every
        self._pending: _Pending | None = None
        self._window: deque[dict[str, float]] = deque(maxlen=log_every)
        self._mark = time.perf_counter()
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if writes:
            path = workdir / METRICS_FILE
            _cut(path, first_step)
            self._file = path.open("a")
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step or None)

    def start(self) -> None:
        """Starts the clock of the first step; compilation is not counted."""
        self._mark = time.perf_counter()

    def record(self, step: int, metrics: Mapping[str, jax.Array], input_wait_s: float) -> None:
        """Takes the metrics of step `step` (from 0), still on the device, and settles those of the step before.

        Raises:
          UserError: the loss or the gradient of the step before is not finite.
        """
        previous, self._pending = self._pending, _Pending(step, metrics, input_wait_s)
        if previous is not None:
            self._settle(previous)

    def flush(self) -> None:
        """Settles the last step.

        Raises:
          UserError: its loss or gradient is not finite.
        """
        previous, self._pending = self._pending, None
        if previous is not None:
            self._settle(previous)

    def close(self) -> None:
        """Closes the files."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def mean_step_s(self) -> float:
        """Mean seconds per step over the last `log_every` settled steps; 0 before the first."""
        return _mean([line["step_s"] for line in self._window])

    def _settle(self, done: _Pending) -> None:
        values = {name: float(value) for name, value in jax.device_get(dict(done.metrics)).items()}
        now = time.perf_counter()
        line = {"step": done.step, **values, "step_s": now - self._mark, "input_wait_s": done.input_wait_s}
        self._mark = now
        self._window.append(line)
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"step {done.step}: {', '.join(bad)} is not finite; training ends and saves nothing of this step. "
                "Resume from the last checkpoint with lower --config.optim.lr and --config.optim.muon_lr"
            )
        if (done.step + 1) % self.log_every == 0 or done.step + 1 == self.last_step:
            self._report(done.step)

    def _report(self, step: int) -> None:
        means = {name: _mean([line[name] for line in self._window]) for name in self._window[-1] if name != "step"}
        seconds = max(means["step_s"], 1e-9)
        shown = {
            **{name: value for name, value in means.items() if name not in _TIMING},
            "events_per_s": means["events"] / seconds,
            "step_s": means["step_s"],
            "input_wait_share": means["input_wait_s"] / seconds,
        }
        if self._board:
            for name, value in shown.items():
                self._board.add_scalar(name, value, step)
        if self._file:
            streams = " ".join(f"{name[5:]} {value:.4f}" for name, value in shown.items() if name.startswith("loss_"))
            left = (self.last_step - step - 1) * seconds
            print(
                f"step {step + 1:>{len(str(self.last_step))}}/{self.last_step}  loss {shown['loss']:.4f} ({streams})"
                f"  grad {shown['grad_norm']:.2f}  {shown['events_per_s']:.1f} events/s  {1e3 * seconds:.0f} ms/step"
                f"  input wait {100 * shown['input_wait_share']:.1f} %  left {clock(left)}",
                flush=True,
            )


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order of steps; a line torn by a kill is left out.

    Raises:
      UserError: the workdir has no metrics.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; is this the workdir of a training run?")
    return _lines(path)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = round(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _cut(path: Path, first_step: int) -> None:
    """Keeps the lines of steps before `first_step`, atomically."""
    if not path.is_file():
        return
    kept = [line for line in _lines(path) if line["step"] < first_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
