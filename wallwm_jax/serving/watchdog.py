"""The watchdog: does an event or a chunk go as the model predicted? Compares observed latents with predicted ones.

The codec encodes the frames that a robot sends back, on the clock of the prediction. What counts is the *change* since
the first frame of the event or chunk: the share of the predicted change that is missing from the observed one,

    missing = 1 - <observed change, predicted change> / <predicted change, predicted change>,

summed over views, cells and the latents so far. It is 0 where everything happens as predicted and 1 where nothing of it
does, however blurred the prediction is. An alarm is a share that successful events, or chunks, hardly ever reach; a
`Calibration` by `wallwm_jax.evaluation.watchdog` has found it on recorded ones, of each mode for itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np
from etils import epath

from wallwm_jax.console import UserError, write_text
from wallwm_jax.inference.event_mode import EventMode

CALIBRATION_FILE = "watchdog.json"

_GROUP = 4  # video frames per latent
_TINY = 1e-9  # no change at all
_DURATIONS = 33  # equally probable durations that the place in an event is judged over


@dataclass(frozen=True)
class Calibration:
    """What successful events, or chunks, look like to the watchdog of one checkpoint.

    Attributes:
      step: of the checkpoint.
      threshold: missing share that an event sets off the alarm with.
      false_alarm_rate: share of the successful events that reach it.
      spread: mean squared distance of observed from predicted change, as a share of the predicted one.
      events: how many successful events, or chunks, that was found on.
      store: name of their event store.
    """

    step: int
    threshold: float
    false_alarm_rate: float
    spread: float
    events: int
    store: str


def save_calibrations(path: epath.Path, found: Mapping[str, Calibration]) -> None:
    """Writes JSON: decoding mode → its calibration."""
    write_text(path, json.dumps({mode: asdict(one) for mode, one in found.items()}, indent=1) + "\n")


def load_calibrations(path: epath.Path, step: int) -> dict[str, Calibration]:
    """Reads what `save_calibrations` wrote.

    Raises:
      UserError: no such file, damaged, or of another checkpoint than `step`.
    """
    try:
        found = {mode: Calibration(**one) for mode, one in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"calibration {str(path)!r} cannot be read ({error}); make it by --calibrate") from error
    for one in found.values():
        if one.step != step:
            raise UserError(f"calibration {str(path)!r} is of step {one.step}, not {step}; make it by --calibrate")
    return found


@dataclass(frozen=True)
class Judgement:
    """How an event goes.

    Attributes:
      progress: share of the event that is over, 0 to 1.
      done_probability: that the event is over.
      score: missing share so far; None before the first whole latent, or where nothing was predicted.
      worst: the largest score of the event so far.
      latents: how many latents were compared.
    """

    progress: float
    done_probability: float
    score: float | None
    worst: float | None
    latents: int


class EventWatch:
    """One event, or one chunk, while it is executed.

    Args:
      mode: that predicted the event; its codec encodes what is observed.
      frames: view → `[1 + 4M, H, W, 3]` uint8 up to the observation that the event or chunk began with: M latents of
        history were seen before.
      latents: view → `[1 + N, h, w, C]` predicted latents from the observation's on, un-normalised; None leaves only
        the clock.
      steps: control steps of the event.
      seconds: its duration, as planned with.
      quantiles_s: `[Q]` the model's own duration quantiles; their spread around the median is put around `seconds`;
        None of a chunk, which takes as long as it takes.
      spread: of a `Calibration`; infinite leaves the progress to the clock.
    """

    def __init__(
        self,
        mode: EventMode,
        frames: Mapping[str, np.ndarray],
        latents: Mapping[str, np.ndarray] | None,
        *,
        steps: int,
        seconds: float,
        quantiles_s: np.ndarray | None = None,
        spread: float = math.inf,
    ) -> None:
        self.steps, self._seconds, self._spread = steps, seconds, spread
        self._codec, self._size = mode.codec, tuple(mode.store["size"])
        self._stride, self._hz = int(mode.store["video_stride"]), float(mode.store["action_hz"])
        self._frames = {view: [self._picture(frame) for frame in frames[view]] for view in latents or ()}
        self._past = max((len(shots) - 1 for shots in self._frames.values()), default=0)
        # Inner products say everything: of the predicted changes, and of each observed one with them and itself.
        self._predicted = _changes(list(latents.values())) if latents else np.zeros((1, 0), np.float32)
        self._gram = self._predicted @ self._predicted.T
        self._products = np.zeros((1, len(self._gram)))
        self._energies = np.zeros(1)
        self._durations = np.array([seconds])
        if quantiles_s is not None:
            self._durations = possible_durations(quantiles_s, mode.config.model.duration_quantiles, seconds)
        self._step = 0

    def observe(self, step: int, frames: Mapping[str, np.ndarray]) -> Judgement:
        """Takes the frames seen `step` control steps after the event began; where frames are left out, the last holds.

        Raises:
          UserError: `step` is not later than the one before, or a view of the event's beginning is missing.
        """
        if step <= self._step:
            raise UserError(f"step {step} was told already; the next is at least {self._step + 1}")
        absent = [view for view in self._frames if view not in frames]
        if absent:
            raise UserError(f"it began with the view {absent[0]!r}; send it with every executed observation")
        self._step = step
        last = self.steps // self._stride
        number = min(step // self._stride, last)
        if self._frames and (step >= self.steps or step % self._stride == 0):
            for view, shots in self._frames.items():
                if (held := self._past + number - len(shots)) >= 0:
                    shots += [shots[-1]] * held + [self._picture(frames[view])]
            self._encode(number, whole=-(-last // _GROUP) if number == last else number // _GROUP)
        return self.judgement()

    def judgement(self) -> Judgement:
        """How the event goes, by what was observed so far."""
        shares = np.minimum(1.0, self._step / self._hz / self._durations)
        weights, scores = self._weights(), self._scores()
        return Judgement(
            progress=float(weights @ shares),
            done_probability=float(weights @ (shares >= 1.0)),
            score=float(scores[-1]) if len(scores) else None,
            worst=float(scores.max()) if len(scores) else None,
            latents=len(self._energies) - 1,
        )

    def distances(self) -> np.ndarray:
        """`[n]` squared distance of each observed change from the predicted one, relative to the largest predicted."""
        return self._distances(np.eye(len(self._gram))).diagonal()[1 : len(self._energies)]

    def _encode(self, number: int, whole: int) -> None:
        """Encodes what is new of the first `whole` latents; after frame `number`, the event's last, that one holds."""
        if whole < len(self._energies):
            return
        indices = np.minimum(np.arange(self._past + 1 + _GROUP * whole), self._past + number)
        observed = self._codec.encode(np.stack([[shots[i] for i in indices] for shots in self._frames.values()]))
        changes = _changes(list(observed[:, self._past // _GROUP :]))
        self._products = changes @ self._predicted.T
        self._energies = (changes**2).sum(1)

    def _scores(self) -> np.ndarray:
        """`[n]` missing share after each latent; none where no change was predicted."""
        count = len(self._energies)
        energy = np.cumsum(np.diag(self._gram)[1:count])
        return (1.0 - np.cumsum(np.diag(self._products)[1:]) / np.maximum(energy, _TINY))[energy > _TINY]

    def _weights(self) -> np.ndarray:
        """`[K]` probability of each duration: those count more under which the prediction explains what was seen."""
        latents = np.arange(len(self._gram))
        log = np.zeros(len(self._durations))
        for n in range(1, len(self._energies)):
            place = np.minimum(latents[-1], n * self._seconds / self._durations)  # of what is seen, in the prediction
            blend = np.maximum(0.0, 1.0 - np.abs(place[:, None] - latents))
            log -= self._distances(blend)[n] / (2.0 * self._spread)
        weights = np.exp(log - log.max())
        return weights / weights.sum()

    def _distances(self, blend: np.ndarray) -> np.ndarray:
        """`[1 + n, K]` relative squared distances of observed changes from blends `[K, 1 + N]` of predicted ones."""
        own = ((blend @ self._gram) * blend).sum(1)
        distances = self._energies[:, None] - 2.0 * self._products @ blend.T + own
        return distances / max(self._gram.diagonal().max(), _TINY)

    def _picture(self, frame: np.ndarray) -> np.ndarray:
        if frame.shape[:2] == tuple(self._size):
            return frame
        return cv2.resize(frame, (self._size[1], self._size[0]), interpolation=cv2.INTER_AREA)


def _changes(latents: Sequence[np.ndarray]) -> np.ndarray:
    """Views of `[1 + N, h, w, C]` latents to `[1 + N, D]` changes since latent 0, all views in a row."""
    rows = [np.asarray(view, np.float32).reshape(len(view), -1) for view in latents]
    return np.concatenate([view - view[:1] for view in rows], axis=1)


def possible_durations(quantiles_s: np.ndarray, levels: Sequence[float], seconds: float) -> np.ndarray:
    """`[K]` equally probable durations: the spread of the quantiles around `seconds`, straight lines in log-seconds."""
    logs = np.log(np.asarray(quantiles_s, np.float64))
    places = (np.arange(_DURATIONS) + 0.5) / _DURATIONS
    inside = np.interp(places, levels, logs - np.interp(0.5, levels, logs))
    return seconds * np.exp(inside)
