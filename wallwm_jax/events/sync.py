"""Time synchronisation: how far the pictures of an episode lag behind its actions, and the episode without that lag.

A picture changes most where the hand moves most. For every candidate lag, the change from frame
to frame is compared, by rank correlation, with how far the hands went over the same stretch that much earlier. Ranks,
because what one millimetre changes depends on camera and background. A correlation `r` over `n` frame pairs is worth
`-n / 2 · log(1 - r²)` nats of evidence for its lag; cameras add up. Neighbouring pairs tell much the same, so evidence
counts a quarter. The best lag is refined between candidates by a parabola.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
      camera_nats: evidence by which a camera must prefer another lag to dispute this one.
      half_nats: the same for half of the episode, which knows less and errs more.
      min_frames: frames; smaller lags are left alone, they are within the estimate's own error.
      spans_follow: "actions", or "frames" where somebody labelled the events in the video; see `shift`.
    """

    search_s: float = 1.5
    max_lag_s: float = 1.0
    min_confidence: float = 0.6
    min_correlation: float = 0.3
    camera_nats: float = 1.0
    half_nats: float = 2.0
    min_frames: float = 0.5
    spans_follow: str = "actions"


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
    views, changes = list(motion.changes), np.nan_to_num(np.stack(list(motion.changes.values())))
    correlations, evidence = _compare(changes, travel)
    total = evidence.sum(0)
    best = int(total.argmax())
    if total[best] <= 0:
        return Lag(0.0, 0.0, dict.fromkeys(views, 0.0), 0.0, {})
    near = np.abs(lags - lags[best]) <= motion.frame_s + 1e-9
    middle = len(travel[0]) // 2
    opinions = {f"camera {view!r}": alone for view, alone in zip(views, evidence)}
    for name, half in (("the first half", slice(None, middle)), ("the second half", slice(middle, None))):
        opinions[name] = _compare(changes[:, half], travel[:, half])[1].sum(0)
    likelihood = np.exp(total - total[best])
    return Lag(
        seconds=_refined(lags, total),
        confidence=float(likelihood[near].sum() / likelihood.sum()),
        per_camera={view: _refined(lags, alone) for view, alone in zip(views, evidence)},
        correlation=float(correlations[:, best].mean()),
        disputed_by={name: float(opinion.max() - opinion[near].max()) for name, opinion in opinions.items()},
    )


def synchronise(episode: Episode | Motion, limits: SyncLimits | None = None) -> Synchronised:
    """Estimates the lag and removes it, or quarantines the episode where the estimate is not to be trusted."""
    limits = limits or SyncLimits()
    motion = episode if isinstance(episode, Motion) else Motion(episode)
    episode, lag = motion.episode, estimate_lag(motion, limits)
    cameras = ", ".join(f"{view} {seconds:+.2f} s" for view, seconds in lag.per_camera.items())
    seen = f"pictures {lag.seconds:+.2f} s behind the actions, confidence {lag.confidence:.2f}"
    for kind, limit, verdict in (
        ("camera", limits.camera_nats, "cameras_disagree"),
        ("the", limits.half_nats, "lag_drifts"),
    ):
        disputes = {name: nats for name, nats in lag.disputed_by.items() if name.startswith(kind) and nats > limit}
        if disputes:
            who = max(disputes, key=disputes.__getitem__)
            reason = f"{seen}, but {who} says otherwise by {disputes[who]:.1f} nats: {cameras}"
            return Synchronised(None, lag, verdict, reason)
    if lag.confidence < limits.min_confidence or lag.correlation < limits.min_correlation:
        return Synchronised(None, lag, "lag_unclear", f"{seen}, correlation {lag.correlation:.2f}: too weak to tell")
    if abs(lag.seconds) > limits.max_lag_s:
        return Synchronised(None, lag, "lag_too_long", f"{seen}; at most {limits.max_lag_s:g} s is a camera's delay")
    steps = round(lag.seconds * episode.clock_hz)
    if steps == 0 or abs(lag.seconds) < limits.min_frames * motion.frame_s:
        return Synchronised(episode, lag, "in_sync", seen)
    moved = shift(episode, steps, spans_follow=limits.spans_follow)
    return Synchronised(moved, lag, "shifted", f"{seen}; moved by {steps:+d} control steps")


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
        # The last span goes on to the end, also where labels that follow the frames end before.
        spans=retimed(episode.spans, lambda at: length if at == episode.num_steps else min(max(at - begin, 0), length)),
        cameras={
            view: _moved(camera, (first_step + stride * np.arange(frames)) / stride)
            for view, camera in episode.cameras.items()
        },
        provenance=(*episode.provenance, said),
    )


def _compare(changes: np.ndarray, travel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compares what `V` cameras saw, `[V, n]`, with the travel at each of `L` lags, `[L, n]`, NaN where there is none.

    Returns:
      rank correlations `[V, L]`, at least 0, and the evidence for each lag in nats `[V, L]`; see the module.
    """
    found, pairs = np.zeros((len(changes), len(travel))), np.isfinite(travel).sum(1)
    for number, row in enumerate(travel):
        if pairs[number] < _MIN_PAIRS:
            continue
        inside = np.isfinite(row)
        moved, seen = rankdata(row[inside]), rankdata(changes[:, inside], axis=1)
        moved, seen = moved - moved.mean(), seen - seen.mean(1, keepdims=True)
        scale = np.sqrt((moved @ moved) * (seen * seen).sum(1))
        found[:, number] = np.maximum(seen @ moved, 0.0) / np.maximum(scale, 1e-9)
    return found, -0.5 * _INDEPENDENT * pairs * np.log1p(-(np.minimum(found, 0.999) ** 2))


def _refined(lags: np.ndarray, evidence: np.ndarray) -> float:
    """The lag of the maximum of the parabola through the best candidate and its neighbours."""
    best = int(evidence.argmax())
    if not 0 < best < len(lags) - 1:
        return float(lags[best])
    left, centre, right = evidence[best - 1 : best + 2]
    bend = left - 2 * centre + right
    offset = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return float(lags[best] + offset * (lags[1] - lags[0]))


def retimed(spans: Mapping[str, Sequence[Span]], when: Callable[[int], int]) -> dict[str, list[Span]]:
    """Spans on another clock: each boundary at step `k` moves to `when(k)`, which never decreases; empty ones go."""
    moved: dict[str, list[Span]] = {}
    places: dict[int, int] = {}  # of the coarser level: old index → new
    for level in (level for level in LEVELS if level in spans):
        inside: list[Span] = []
        here: dict[int, int] = {}
        for number, span in enumerate(spans[level]):
            start, end = when(span.start), when(span.end)
            if start < end:
                here[number] = len(inside)
                parent = None if span.parent is None else places[span.parent]
                inside.append(replace(span, start=start, end=end, parent=parent))
        moved[level], places = inside, here
    return moved


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
