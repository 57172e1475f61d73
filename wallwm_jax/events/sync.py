"""Time synchronisation: how far the pictures of an episode lag behind its actions, and the episode without that lag.

A picture changes most where the hand moves most. For every candidate lag, the change from frame
to frame is compared, by rank correlation, with how far the hands went over the same stretch that much earlier. Ranks,
because what one millimetre changes depends on camera and background. A correlation `r` over `n` frame pairs is worth
`-n / 2 · log(1 - r²)` nats of evidence for its lag; cameras add up. Neighbouring pairs tell much the same, so evidence
counts a quarter. The best lag is refined between candidates by a parabola.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation, Slerp
from scipy.stats import rankdata

from wallwm_jax.events.motion import Motion
from wallwm_jax.events.schema import LEVELS, CameraTrack, Episode, Span

_INDEPENDENT = 0.25  # share of frame pairs that tell something new
_PER_FRAME = 4  # candidate lags per frame
_MIN_PAIRS = 8  # frame pairs below which a correlation says nothing


@dataclass(frozen=True)
class SyncLimits:
    """When an episode's lag is believed and corrected.

    Attributes:
      search_s: seconds either way that are searched; beyond `max_lag_s`, so that a longer lag shows as one.
      max_lag_s: seconds; a longer lag is no delay of a camera but a broken recording.
      min_confidence: probability that the lag is right within one frame; chance agreement rarely reaches it.
      min_correlation: mean rank correlation of the cameras at the lag; weaker says that something else moves.
      dispute_nats: evidence by which a camera, or half of the episode, must prefer another lag to dispute this one.
      min_frames: frames; smaller lags are left alone, they are within the estimate's own error.
    """

    search_s: float = 1.5
    max_lag_s: float = 1.0
    min_confidence: float = 0.6
    min_correlation: float = 0.3
    dispute_nats: float = 2.0
    min_frames: float = 0.5


@dataclass(frozen=True)
class Lag:
    """How far the pictures are behind the actions.

    Attributes:
      seconds: positive where a picture shows what the arm did that much earlier.
      confidence: 0 to 1, the share of all evidence that lies within one frame of `seconds`.
      per_camera: view → seconds that this camera alone would say.
      correlation: mean rank correlation of the cameras at `seconds`.
      disputed_by: nats by which a camera ("camera 'wrist'") or "the first half", "the second half" of the episode
        prefers another lag to any within one frame of `seconds`.
    """

    seconds: float
    confidence: float
    per_camera: Mapping[str, float]
    correlation: float
    disputed_by: Mapping[str, float]


@dataclass(frozen=True)
class Synchronised:
    """What became of an episode: `episode` is None where it is quarantined.

    Attributes:
      episode: with the lag removed; the very same where there is none.
      lag: as estimated.
      verdict: "in_sync" or "shifted"; "lag_unclear", "lag_too_long", "cameras_disagree" or "lag_drifts" where it is
        quarantined.
      reason: the verdict in words, with its numbers.
    """

    episode: Episode | None
    lag: Lag
    verdict: str
    reason: str


def estimate_lag(episode: Episode | Motion, limits: SyncLimits | None = None) -> Lag:
    """The lag of an episode's pictures; confidence 0 where it is too short or nothing moves."""
    limits = limits or SyncLimits()
    motion = episode if isinstance(episode, Motion) else Motion(episode)
    step = motion.frame_s / _PER_FRAME
    reach = int(limits.search_s / step)
    lags = step * np.arange(-reach, reach + 1)
    travel = np.stack([motion.travel(lag) for lag in lags])
    changes = {view: np.nan_to_num(change) for view, change in motion.changes.items()}
    correlations = {view: _correlations(change, travel) for view, change in changes.items()}
    evidence = {view: _evidence(*found) for view, found in correlations.items()}
    total = np.sum(list(evidence.values()), axis=0)
    best = int(total.argmax())
    near = np.abs(lags - lags[best]) <= motion.frame_s + 1e-9
    if total[best] <= 0:
        return Lag(0.0, 0.0, dict.fromkeys(changes, 0.0), 0.0, {})
    likelihood = np.exp(total - total[best])
    disputed = {f"camera {view!r}": float(alone.max() - alone[near].max()) for view, alone in evidence.items()}
    middle = len(travel[0]) // 2
    for name, half in (("the first half", slice(None, middle)), ("the second half", slice(middle, None))):
        alone = np.sum(
            [_evidence(*_correlations(change[half], travel[:, half])) for change in changes.values()], axis=0
        )
        disputed[name] = float(alone.max() - alone[near].max())
    return Lag(
        seconds=_refined(lags, total),
        confidence=float(likelihood[near].sum() / likelihood.sum()),
        per_camera={view: _refined(lags, alone) for view, alone in evidence.items()},
        correlation=float(np.mean([found[best] for found, _ in correlations.values()])),
        disputed_by=disputed,
    )


def synchronise(episode: Episode | Motion, limits: SyncLimits | None = None) -> Synchronised:
    """Estimates the lag and removes it, or quarantines the episode where the estimate is not to be trusted."""
    limits = limits or SyncLimits()
    motion = episode if isinstance(episode, Motion) else Motion(episode)
    episode, lag = motion.episode, estimate_lag(motion, limits)
    cameras = ", ".join(f"{view} {seconds:+.2f} s" for view, seconds in lag.per_camera.items())
    dissenter, nats = max(lag.disputed_by.items(), key=lambda item: item[1], default=("", 0.0))
    seen = f"pictures {lag.seconds:+.2f} s behind the actions, confidence {lag.confidence:.2f}"
    if nats > limits.dispute_nats:
        verdict = "cameras_disagree" if dissenter.startswith("camera") else "lag_drifts"
        return Synchronised(None, lag, verdict, f"{seen}, but {dissenter} says otherwise by {nats:.1f} nats: {cameras}")
    if lag.confidence < limits.min_confidence or lag.correlation < limits.min_correlation:
        return Synchronised(None, lag, "lag_unclear", f"{seen}, correlation {lag.correlation:.2f}: too weak to tell")
    if abs(lag.seconds) > limits.max_lag_s:
        return Synchronised(None, lag, "lag_too_long", f"{seen}; at most {limits.max_lag_s:g} s is a camera's delay")
    steps = round(lag.seconds * episode.clock_hz)
    if steps == 0 or abs(lag.seconds) < limits.min_frames * motion.frame_s:
        return Synchronised(episode, lag, "in_sync", seen)
    return Synchronised(shift(episode, steps), lag, "shifted", f"{seen}; moved by {steps:+d} control steps")


def shift(episode: Episode, steps: int, *, spans_follow: str = "actions") -> Episode:
    """The episode with its pictures `steps` control steps earlier against poses, commands and calibration.

    What has no partner any more is dropped at both ends; the episode then ends on a stored frame. Calibration goes
    with the poses: where a camera moves, it was computed from them.

    Args:
      episode: whose pictures are `steps` late; negative where they are early.
      steps: control steps, not necessarily a multiple of the video stride.
      spans_follow: "actions", or "frames" where somebody labelled the events in the video.

    Raises:
      ValueError: less than one video stride is left.
    """
    stride = episode.video_stride
    first_frame = -(-max(steps, 0) // stride)
    first_step = first_frame * stride - steps
    frames = min(episode.num_frames - first_frame, (episode.num_steps - first_step) // stride + 1)
    length = stride * (frames - 1)
    if length <= 0:
        raise ValueError(f"a shift of {steps} steps leaves nothing of {episode.num_steps}")
    kept = slice(first_step, first_step + length)
    begin = first_step if spans_follow == "actions" else stride * first_frame
    said = (
        f"pictures moved {abs(steps)} control steps ({abs(steps) / episode.clock_hz:.2f} s) "
        f"{'earlier' if steps > 0 else 'later'} against the actions; of {episode.num_steps} steps, "
        f"{first_step} at the start and {episode.num_steps - first_step - length} at the end went without a partner"
    )
    return replace(
        episode,
        frames={view: seen[first_frame : first_frame + frames] for view, seen in episode.frames.items()},
        poses=episode.poses[first_step : first_step + length + 1],
        grippers=episode.grippers[first_step : first_step + length + 1],
        command_poses=episode.command_poses[kept],
        command_grippers=episode.command_grippers[kept],
        spans=_cut_spans(episode.spans, begin, length),
        cameras={
            view: _moved(camera, (first_step + stride * np.arange(frames)) / stride)
            for view, camera in episode.cameras.items()
        },
        provenance=(*episode.provenance, said),
    )


def _correlations(change: np.ndarray, travel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlation, at least 0, of `change` `[n]` with each row of `travel` `[L, n]`, and the pairs it is over."""
    found, pairs = np.zeros(len(travel)), np.isfinite(travel).sum(1)
    for number, row in enumerate(travel):
        inside = np.isfinite(row)
        seen, moved = change[inside], row[inside]
        if pairs[number] >= _MIN_PAIRS and np.ptp(seen) > 0 and np.ptp(moved) > 0:
            found[number] = max(0.0, np.corrcoef(rankdata(seen), rankdata(moved))[0, 1])
    return found, pairs


def _evidence(correlation: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Nats for each lag; see the module."""
    return -0.5 * _INDEPENDENT * pairs * np.log1p(-(np.minimum(correlation, 0.999) ** 2))


def _refined(lags: np.ndarray, evidence: np.ndarray) -> float:
    """The lag of the maximum of the parabola through the best candidate and its neighbours."""
    best = int(evidence.argmax())
    if not 0 < best < len(lags) - 1:
        return float(lags[best])
    left, centre, right = evidence[best - 1 : best + 2]
    bend = left - 2 * centre + right
    offset = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return float(lags[best] + offset * (lags[1] - lags[0]))


def _cut_spans(spans: Mapping[str, Sequence[Span]], begin: int, length: int) -> dict[str, list[Span]]:
    """What lies in `[begin, begin + length)`, counted from its start; behind the end the last span goes on."""
    cut: dict[str, list[Span]] = {}
    places: dict[int, int] = {}  # of the coarser level: old index → new
    for level in (level for level in LEVELS if level in spans):
        inside: list[Span] = []
        here: dict[int, int] = {}
        last = max(span.end for span in spans[level])
        for number, span in enumerate(spans[level]):
            start = max(span.start - begin, 0)
            end = length if span.end == last else min(span.end - begin, length)
            if start < end:
                here[number] = len(inside)
                parent = None if span.parent is None else places[span.parent]
                inside.append(replace(span, start=start, end=end, parent=parent))
        cut[level], places = inside, here
    return cut


def _moved(camera: CameraTrack, places: np.ndarray) -> CameraTrack:
    """Calibration at fractional positions among the stored frames; a camera's pose is interpolated between two."""
    known = np.asarray(camera.extrinsics, float)
    whole = places.astype(int)
    if np.array_equal(whole, places):
        return replace(camera, extrinsics=known[whole])
    after = np.minimum(whole + 1, len(known) - 1)
    share = (places - whole)[:, None]
    between = np.tile(np.eye(4), (len(places), 1, 1))
    turning = Slerp(np.arange(len(known)), Rotation.from_matrix(known[:, :3, :3]))
    between[:, :3, :3] = turning(np.minimum(places, len(known) - 1)).as_matrix()
    between[:, :3, 3] = (1 - share) * known[whole, :3, 3] + share * known[after, :3, 3]
    return replace(camera, extrinsics=between)
