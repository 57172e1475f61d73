"""Open loop: how far the predicted events are from the recorded ones on held-out windows, beside two baselines.

The model sees the first frame of each view, the state and the caption, and predicts the event's actions and video.
Errors are over the event's true steps; a prediction that is too short is held to the end, one that is too long is cut,
which is what a robot would do. Baselines get the true duration:

- `hold_still`: stay at the observed pose with the observed gripper;
- `cluster_mean`: the mean trajectory of the nearest vision-language cluster of the training windows, stretched to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wallwm_jax.console import UserError, progress
from wallwm_jax.data.clusters import load_clusters
from wallwm_jax.data.event_store import BadRecord, EventStore, WindowRecord
from wallwm_jax.evaluation.statistics import normalized_error, physical_error, psnr
from wallwm_jax.events.actions import ARM_DIM, GRIPPER_OFFSET
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS
from wallwm_jax.inference.event_mode import EventMode, EventPlan, EventRequest

BASELINES = ("hold_still", "cluster_mean")
MODEL = "model"
MODEL_PREDICTED = "model_predicted_duration"
PREDICTORS = (MODEL, MODEL_PREDICTED, *BASELINES)


@dataclass(frozen=True)
class Strip:
    """Recorded and predicted video of one window: view name → (recorded, predicted), `[n, H, W, 3]` uint8 each."""

    caption: str
    duration_s: float
    views: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class OpenLoopResult:
    """Everything measured; `to_json` is the `open_loop` of `evaluation.json`.

    Attributes:
      rows: one dictionary per window: level, verb, duration_s, predicted quantiles, PSNR, and per predictor the
        normalised L1 error and the physical errors.
      strips: some true and predicted videos.
      quantiles: levels of the duration quantiles.
      bad_records: what is wrong with records that were left out.
    """

    rows: list[dict[str, Any]]
    quantiles: tuple[float, ...]
    strips: list[Strip] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Means over windows, in all and by level and verb; durations; final-frame PSNR."""
        rows = self.rows
        return {
            "windows": len(rows),
            "bad_records": self.bad_records,
            MODEL: _mean(rows, MODEL, "error"),
            MODEL_PREDICTED: _mean(rows, MODEL_PREDICTED, "error"),
            "baselines": {name: _mean(rows, name, "error") for name in BASELINES},
            "physical": {
                name: {unit: _mean(rows, name, unit) for unit in ("translation_mm", "rotation_degrees", "gripper")}
                for name in PREDICTORS
            },
            "by_level": _grouped(rows, lambda row: row["level"]),
            "by_verb": _grouped(rows, lambda row: f"{row['level']}: {row['verb']}"),
            "duration": self._durations(),
            "final_frame_psnr": {
                "model": float(np.mean([row["psnr"] for row in rows])),
                "copy_first_frame": float(np.mean([row["psnr_copy"] for row in rows])),
            },
        }

    def _durations(self) -> dict[str, Any]:
        true = np.array([row["duration_s"] for row in self.rows])
        quantiles = np.array([row["duration_quantiles_s"] for row in self.rows])
        median = quantiles[:, _median(self.quantiles)]
        return {
            "mean_absolute_error_s": float(np.abs(median - true).mean()),
            "mean_true_s": float(true.mean()),
            "inside_outer_quantiles": float(((true >= quantiles[:, 0]) & (true <= quantiles[:, -1])).mean()),
            "true_s": true.round(3).tolist(),
            "predicted_s": median.round(3).tolist(),
        }


def evaluate_open_loop(
    mode: EventMode,
    store: EventStore,
    *,
    levels: Sequence[str],
    limit: int = 256,
    strips: int = 3,
    seed: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> OpenLoopResult:
    """Runs the model and the baselines on the event windows of `store`, usually its heldout split.

    Args:
      mode: the trained model; its batch size is how many windows run at once.
      store: a clustered store.
      levels: which levels of events.
      limit: windows at most, chosen evenly over the split.
      strips: how many windows of the coarsest level keep their videos, at most one per batch.
      seed: of the sampling noise.
      out_of_time: asked before each batch; True ends early, after at least one batch.

    Raises:
      UserError: the store has no such windows, none that can be read, or no clusters.
    """
    clusters = load_clusters(store.path)
    wanted = [LEVELS.index(level) for level in levels]
    chosen = np.flatnonzero((store.index["kind"] == KINDS.index("event")) & np.isin(store.index["level"], wanted))
    if not len(chosen):
        raise UserError(f"split {store.split!r} of {str(store.path)!r} has no event windows of levels {list(levels)}")
    chosen = chosen[_spread(len(chosen), limit)]
    # Windows of one length share a bucket: shorter programs run, and in a batch nobody waits for a long event.
    chosen = chosen[np.argsort(store.index["length"][chosen], kind="stable")]
    batches = [chosen[start : start + mode.batch_size] for start in range(0, len(chosen), mode.batch_size)]
    coarsest = LEVELS[store.index["level"][chosen].min()]
    result = OpenLoopResult([], tuple(mode.config.model.duration_quantiles))
    order = np.random.default_rng(seed).permutation(len(batches))  # so that an early end leaves no length out
    for number in progress(order, total=len(order), unit="batch", label="open loop"):
        if result.rows and out_of_time():
            break
        records = _readable(store, batches[number], result.bad_records)
        requests = [recorded_request(store, record) for record in records]
        seeds = [seed + record.index for record in records]
        plans = mode.plan(requests, seeds=seeds, video=True)
        quantiles = mode.durations(requests)
        medians = quantiles[:, _median(result.quantiles)]
        untold = [_with_duration(request, float(median)) for request, median in zip(requests, medians)]
        own = mode.plan(untold, seeds=seeds)
        film = strips > len(result.strips)  # one window of this batch
        for i, record in enumerate(records):
            mean = clusters.mean_actions(int(store.index[record.index]["cluster_vl"]), record.num_actions)
            predictions = {
                MODEL: _held(plans[i].actions, record.num_actions),  # shorter where the longest bucket cut it
                MODEL_PREDICTED: _held(own[i].actions, record.num_actions),
                "hold_still": _hold_still(record),
                "cluster_mean": mean,
            }
            row, strip = _measure(mode, store, record, plans[i], predictions)
            result.rows.append({**row, "duration_quantiles_s": quantiles[i].tolist()})
            if film and record.level == coarsest:
                result.strips.append(strip)
                film = False
    if not result.rows:
        raise UserError(f"no window of split {store.split!r} could be read: {result.bad_records[0]}; build it again")
    return result


def _readable(store: EventStore, windows: np.ndarray, bad: list[str]) -> list[WindowRecord]:
    """The records of `windows`; what is wrong with those that cannot be read goes to `bad`."""
    records = []
    for window in windows:
        try:
            records.append(store.read(int(window)))
        except BadRecord as error:
            bad.append(str(error))
    return records


def _measure(
    mode: EventMode, store: EventStore, record: WindowRecord, plan: EventPlan, predictions: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], Strip]:
    """Errors of all predictions on one window, and its videos."""
    span = store.span(record.index) or {}
    stats, valid = mode.stats, record.action_valid
    true = stats.normalize_actions(record.actions)
    row: dict[str, Any] = {"level": record.level, "verb": span.get("verb", ""), "duration_s": record.duration_s}
    for name, actions in predictions.items():
        error = physical_error(actions, record.actions, valid)
        row[name] = {
            "error": normalized_error(stats.normalize_actions(actions), true, valid),
            "translation_mm": error.translation_mm,
            "rotation_degrees": error.rotation_degrees,
            "gripper": error.gripper,
        }
    count = 1 + len(plan.actions) // int(store.meta["video_stride"])  # frames beyond only hold the last one
    views = {
        view: (store.video(record, view, mode.codec)[:count], predicted[:count])
        for view, predicted in mode.decode(plan).items()
    }
    row["psnr"] = float(np.mean([psnr(predicted[-1], recorded[-1]) for recorded, predicted in views.values()]))
    row["psnr_copy"] = float(np.mean([psnr(recorded[0], recorded[-1]) for recorded, _ in views.values()]))
    return row, Strip(store.caption(record.caption_id), record.duration_s, views)


def recorded_request(store: EventStore, record: WindowRecord) -> EventRequest:
    """What the model is told of a recorded event: its first frames, state, caption and true length."""
    return EventRequest(
        frames={view: record.picture(view, 0) for view in record.frames},
        state=record.state,
        state_valid=record.state_valid,
        caption=store.caption(record.caption_id),
        duration_s=record.num_actions / float(store.meta["action_hz"]),  # the stored stretch, snapped to frames
    )


def _with_duration(request: EventRequest, seconds: float) -> EventRequest:
    return EventRequest(request.frames, request.state, request.state_valid, request.caption, seconds)


def _hold_still(record: WindowRecord) -> np.ndarray:
    """`[T, 32]`: no translation, no rotation, the measured gripper."""
    still = np.zeros_like(record.actions)
    for start in range(0, int(record.action_valid.sum()), ARM_DIM):
        still[:, [start + 3, start + 7]] = 1.0  # the identity's first two columns
        still[:, start + GRIPPER_OFFSET] = record.state[start + GRIPPER_OFFSET]
    return still


def _held(actions: np.ndarray, steps: int) -> np.ndarray:
    """`actions [T', 32]` cut to `steps`, or its last one repeated."""
    return actions[np.minimum(np.arange(steps), len(actions) - 1)]


def _spread(count: int, most: int) -> np.ndarray:
    """`most` positions, evenly spread over `0 .. count - 1`; all of them where there are no more."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def _median(quantiles: Sequence[float]) -> int:
    return int(np.argmin(np.abs(np.asarray(quantiles) - 0.5)))


def _mean(rows: Iterable[Mapping[str, Any]], predictor: str, key: str) -> float:
    return float(np.mean([row[predictor][key] for row in rows]))


def _grouped(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {
        name: {"windows": len(members), **{predictor: _mean(members, predictor, "error") for predictor in PREDICTORS}}
        for name, members in sorted(groups.items(), key=lambda item: -len(item[1]))
    }
