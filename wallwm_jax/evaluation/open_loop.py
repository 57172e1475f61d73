"""Open loop: how far the predicted events or chunks are from the recorded ones on held-out windows, and two baselines.

Event mode sees the first frame of each view, the state and the caption, and predicts the event's actions and video.
Errors are over the event's true steps; a prediction that is too short is held to the end, one that is too long is cut,
which is what a robot would do. Unified mode sees the window's history and the instruction, and predicts the chunk,
whose length is given: its own durations are the true ones. Baselines get the true duration:

- `hold_still`: stay at the observed pose with the observed gripper;
- `cluster_mean`: the mean trajectory of the nearest vision-language cluster of the training windows, stretched to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from wallwm_jax.console import UserError, progress
from wallwm_jax.data.clusters import Clusters, load_clusters
from wallwm_jax.data.event_store import BadRecord, EventStore, WindowRecord
from wallwm_jax.evaluation.statistics import normalized_error, physical_error, psnr
from wallwm_jax.events.actions import ARM_DIM, GRIPPER_OFFSET, absolute_commands
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import GROUP, KINDS
from wallwm_jax.inference.event_mode import EventMode, EventRequest
from wallwm_jax.inference.unified_mode import ChunkRequest, UnifiedMode

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
            "by_verb": _grouped([row for row in rows if row["verb"]], lambda row: f"{row['level']}: {row['verb']}"),
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


class _Predicted(NamedTuple):
    """What a model says of one window: actions over the true duration and over its own, that duration, the videos."""

    actions: np.ndarray
    own: np.ndarray
    quantiles: list[float]
    films: Mapping[str, np.ndarray]


def evaluate_open_loop(
    mode: EventMode | UnifiedMode,
    store: EventStore,
    *,
    levels: Sequence[str],
    limit: int = 256,
    strips: int = 3,
    seed: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> OpenLoopResult:
    """Runs the model and the baselines on windows of `store`, usually its heldout split.

    Args:
      mode: the trained model, in the mode to evaluate: on event windows, or on those with a history. Its batch size is
        how many windows run at once.
      store: a clustered store.
      levels: which levels of events; chunks have none.
      limit: windows at most, chosen evenly over the split.
      strips: how many windows of the coarsest level keep their videos, at most one per batch.
      seed: of the sampling noise.
      out_of_time: asked before each batch; True ends early, after at least one batch.

    Raises:
      UserError: the store has no such windows, none that can be read, or no clusters.
    """
    clusters = load_clusters(store.path)
    engine = mode.engine if isinstance(mode, UnifiedMode) else mode
    chosen = _windows(store, mode, levels)
    chosen = chosen[spread(len(chosen), limit)]
    # Windows of one length share a bucket: shorter programs run, and in a batch nobody waits for a long event.
    chosen = chosen[np.argsort(store.index["length"][chosen], kind="stable")]
    batches = [chosen[start : start + engine.batch_size] for start in range(0, len(chosen), engine.batch_size)]
    coarsest = LEVELS[store.index["level"][chosen].min()]
    result = OpenLoopResult([], tuple(engine.config.model.duration_quantiles))
    order = np.random.default_rng(seed).permutation(len(batches))  # so that an early end leaves no length out
    for number in progress(order, total=len(order), unit="batch", label="open loop"):
        if result.rows and out_of_time():
            break
        records = readable(store, batches[number], result.bad_records)
        seeds = [seed + record.index for record in records]
        if isinstance(mode, UnifiedMode):
            predictions = _predict_chunks(mode, store, records, seeds)
        else:
            predictions = _predict_events(mode, store, records, seeds)
        film = strips > len(result.strips)  # one window of this batch
        for record, predicted in zip(records, predictions):
            row, strip = _measure(engine, store, record, predicted, clusters)
            result.rows.append(row)
            if film and record.level == coarsest:
                result.strips.append(strip)
                film = False
    if not result.rows:
        raise UserError(f"no window of split {store.split!r} could be read: {result.bad_records[0]}; build it again")
    return result


def _windows(store: EventStore, mode: EventMode | UnifiedMode, levels: Sequence[str]) -> np.ndarray:
    """Positions of the windows that the mode decodes."""
    if isinstance(mode, UnifiedMode):
        chosen = np.flatnonzero(store.index["kind"] == KINDS.index("history"))
        if not len(chosen):
            raise UserError(f"split {store.split!r} of {str(store.path)!r} has no windows with history")
        return chosen
    return event_windows(store, levels)


def event_windows(store: EventStore, levels: Sequence[str]) -> np.ndarray:
    """Positions of the event windows of `levels` in the split. Raises UserError where there are none."""
    wanted = [LEVELS.index(level) for level in levels]
    chosen = np.flatnonzero((store.index["kind"] == KINDS.index("event")) & np.isin(store.index["level"], wanted))
    if not len(chosen):
        raise UserError(f"split {store.split!r} of {str(store.path)!r} has no event windows of levels {list(levels)}")
    return chosen


def _predict_events(
    mode: EventMode, store: EventStore, records: Sequence[WindowRecord], seeds: Sequence[int]
) -> list[_Predicted]:
    requests = [recorded_request(store, record) for record in records]
    plans = mode.plan(requests, seeds=seeds, video=True)
    quantiles = mode.durations(requests)
    medians = quantiles[:, _median(mode.config.model.duration_quantiles)]
    untold = [_with_duration(request, float(median)) for request, median in zip(requests, medians)]
    own = mode.plan(untold, seeds=seeds)
    return [
        _Predicted(plan.actions, untold_plan.actions, told.tolist(), mode.decode(plan))
        for plan, untold_plan, told in zip(plans, own, quantiles)
    ]


def _predict_chunks(
    mode: UnifiedMode, store: EventStore, records: Sequence[WindowRecord], seeds: Sequence[int]
) -> list[_Predicted]:
    requests = [recorded_chunk_request(record) for record in records]
    texts = {record.caption_id: mode.encode_text(store.caption(record.caption_id)) for record in records}
    chunks = mode.plan_all(requests, [texts[record.caption_id] for record in records], seeds=seeds, video=True)
    told = len(mode.engine.config.model.duration_quantiles)
    return [
        _Predicted(
            chunk.actions,
            chunk.actions,
            [record.duration_s] * told,
            {view: film[mode.past_frames :] for view, film in mode.decode(chunk).items()},
        )
        for record, chunk in zip(records, chunks)
    ]


def readable(store: EventStore, windows: np.ndarray, bad: list[str]) -> list[WindowRecord]:
    """The records of `windows`; what is wrong with those that cannot be read goes to `bad`."""
    records = []
    for window in windows:
        try:
            records.append(store.read(int(window)))
        except BadRecord as error:
            bad.append(str(error))
    return records


def _measure(
    engine: EventMode, store: EventStore, record: WindowRecord, predicted: _Predicted, clusters: Clusters
) -> tuple[dict[str, Any], Strip]:
    """Errors of all predictions on one window, and its videos."""
    span = store.span(record.index) or {}
    stats, valid, past = engine.stats, record.action_valid, record.past_actions
    actual = record.actions[past:]
    true = stats.normalize_actions(actual)
    cluster = int(store.index[record.index]["cluster_vl"])
    predictions = {
        MODEL: held(predicted.actions, len(actual)),  # shorter where the longest bucket cut it
        MODEL_PREDICTED: held(predicted.own, len(actual)),
        "hold_still": _hold_still(record)[past:],
        "cluster_mean": clusters.mean_actions(cluster, record.num_actions)[past:],
    }
    row: dict[str, Any] = {
        "level": record.level,
        "verb": span.get("verb", ""),
        "duration_s": record.duration_s,
        "duration_quantiles_s": predicted.quantiles,
    }
    for name, actions in predictions.items():
        error = physical_error(actions, actual, valid)
        row[name] = {
            "error": normalized_error(stats.normalize_actions(actions), true, valid),
            "translation_mm": error.translation_mm,
            "rotation_degrees": error.rotation_degrees,
            "gripper": error.gripper,
        }
    steps = min(len(predicted.actions), len(actual))
    count = 1 + steps // int(store.meta["video_stride"])  # frames beyond only hold the last one
    now = GROUP * record.history
    views = {
        view: (store.video(record, view, engine.codec)[now : now + count], film[:count])
        for view, film in predicted.films.items()
    }
    row["psnr"] = float(np.mean([psnr(film[-1], recorded[-1]) for recorded, film in views.values()]))
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


def recorded_chunk_request(record: WindowRecord) -> ChunkRequest:
    """What the model is told of a recorded window with history: all but the future."""
    arms = int(record.state_valid.sum()) // ARM_DIM
    base = np.broadcast_to(np.eye(4), (arms, 4, 4))
    poses, grippers = absolute_commands(record.state[None], base)  # a state is a pose relative to the base
    past = absolute_commands(record.actions[: record.past_actions], poses[0])
    shown = range(1 + GROUP * record.history)
    return ChunkRequest(
        frames={view: np.stack([record.picture(view, place) for place in shown]) for view in record.frames},
        pose=poses[0],
        gripper=grippers[0],
        command_poses=past[0],
        command_grippers=past[1],
        number=1 + record.event_index,
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


def held(actions: np.ndarray, steps: int) -> np.ndarray:
    """`actions [T', 32]` cut to `steps`, or its last one repeated."""
    return actions[np.minimum(np.arange(steps), len(actions) - 1)]


def spread(count: int, most: int) -> np.ndarray:
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
