"""What a run says: a line per N steps, metrics.jsonl, TensorBoard; and the stop at the first loss that is not finite.

Metrics are read from the device one step late, after the next step has been dispatched, so reading never holds the
device up. `metrics.jsonl` has one line per step; its numbers are written in full, so that two runs can be compared bit
by bit. `heldout.jsonl` has one line per evaluation on held-out events, if there are any.

MFU is what a step's model FLOPs (`models.model_flops`, `models.language_flops`) would take at the devices' bfloat16
peak, over what the step took. As in preflight, rows count as full of events of the greatest length: with shorter
events, or padding, less is needed than counted. Devices whose peak is unknown have no MFU.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from wallwm_jax.console import UserError, write_text
from wallwm_jax.parallel.chips import peak_flops
from wallwm_jax.paths import open_path
from wallwm_jax.training.families import family_of
from wallwm_jax.training.goodput import Goodput
from wallwm_jax.training.stages import get_stage

METRICS_FILE = "metrics.jsonl"
HELDOUT_FILE = "heldout.jsonl"
_TIMING = ("step_s", "input_wait_s", "mfu")
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

    def __init__(
        self,
        workdir: Path,
        goodput: Goodput,
        *,
        first_step: int,
        last_step: int,
        log_every: int,
        ideal_step_s: float | None = None,
        writes: bool = True,
    ):
        """Opens the files; what they hold of steps from `first_step` on is cut off, since those steps come again.

        Args:
          workdir: of the run.
          goodput: learns which steps count.
          first_step: index of the first step to come.
          last_step: number of steps of the whole run.
          log_every: steps per printed line and TensorBoard point.
          ideal_step_s: from `ideal_step_s`; None leaves MFU out.
          writes: False in all processes but one.
        """
        self.last_step, self.log_every = last_step, log_every
        self._goodput, self._ideal_step_s = goodput, ideal_step_s
        self._pending: _Pending | None = None
        self._window: deque[dict[str, float]] = deque(maxlen=log_every)
        self._mark = time.perf_counter()
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if writes:
            path = workdir / METRICS_FILE
            kept, lost = _cut(path, first_step)
            goodput.begin(first_step, useful_s=sum(map(_useful_s, kept)), lost_steps=len(lost))
            self._file = path.open("a")
            self._heldout = workdir / HELDOUT_FILE
            _cut(self._heldout, first_step + 1)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step or None)

    def start(self) -> None:
        """Starts the clock of the next step: before the first one, and after whatever is no part of a step."""
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

    def heldout(self, done: int, losses: Mapping[str, float]) -> None:
        """Says what an evaluation after `done` steps found (`training.heldout`)."""
        if self._board:
            for name, value in losses.items():
                self._board.add_scalar(f"heldout/{name}", value, done)
        if self._file:
            with self._heldout.open("a") as file:
                file.write(json.dumps({"step": done, **losses}) + "\n")
            print(f"    held-out events after {done} steps: loss {losses['loss']:.4f} ({_streams(losses)})", flush=True)

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
        if self._ideal_step_s:
            line["mfu"] = self._ideal_step_s / max(line["step_s"], 1e-9)
        self._mark = now
        self._goodput.step_done(_useful_s(line))
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
            "goodput": self._goodput.totals()["goodput"],
            **({"mfu": self._ideal_step_s / seconds} if self._ideal_step_s else {}),
        }
        if self._board:
            for name, value in shown.items():
                self._board.add_scalar(name, value, step)
        if self._file:
            left = (self.last_step - step - 1) * seconds
            shares = {"MFU": "mfu", "input wait": "input_wait_share", "goodput": "goodput"}
            percent = "".join(f"  {label} {100 * shown[name]:.1f} %" for label, name in shares.items() if name in shown)
            print(
                f"step {step + 1:>{len(str(self.last_step))}}/{self.last_step}  loss {shown['loss']:.4f} "
                f"({_streams(shown)})  grad {shown['grad_norm']:.2f}  {shown['events_per_s']:.1f} events/s"
                f"  {1e3 * seconds:.0f} ms/step"
                f"{percent}  left {clock(left)}",
                flush=True,
            )


def ideal_step_s(config: ConfigDict, mesh: Mesh) -> float | None:
    """Seconds that the model FLOPs of a step would take at the peak of all devices; None where that is unknown.

    Args:
      config: with `data.views` named.
      mesh: over all devices of the run.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if peak is None:
        return None
    flops = family_of(get_stage(config.train.stage)).flops
    row = flops.training_flops(config, flops.RowShape.of(config, len(config.data.views)), config.train.stage)
    return config.data.rows * row / (mesh.size * peak)


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order of steps; a line torn by a kill is left out.

    Raises:
      UserError: the workdir has no metrics.
    """
    path = open_path(workdir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; is this the workdir of a training run?")
    return _lines(path)


def read_heldout(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's heldout.jsonl, "step" being how many were done; none where nothing was evaluated."""
    path = open_path(workdir) / HELDOUT_FILE
    return _lines(path) if path.is_file() else []


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = round(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _lines(path: Path | epath.Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _cut(path: Path, first_step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Keeps the lines of steps before `first_step`, atomically; returns these, and those that it cut off."""
    if not path.is_file():
        return [], []
    lines = _lines(path)
    kept = [line for line in lines if line["step"] < first_step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept, [line for line in lines if line["step"] >= first_step]


def _streams(losses: Mapping[str, float]) -> str:
    return " ".join(f"{name[5:]} {value:.4f}" for name, value in losses.items() if name.startswith("loss_"))


def _useful_s(line: Mapping[str, float]) -> float:
    """Seconds of a step without the wait for its batch."""
    return line.get("step_s", 0.0) - line.get("input_wait_s", 0.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
