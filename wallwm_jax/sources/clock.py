"""One clock for a recording: its rows are checked for time and brought to evenly spaced control steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import LEVELS, Episode, Span
from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.embodiment import Embodiment, Motion

RATE_TOLERANCE = 0.02  # rates that differ by less are the same
_MAX_GAP = 3.5  # periods; a longer pause between rows is a hole, and what happened in it is unknown
_EXACT = 0.1  # periods; rows this close to the steps of the clock are taken as they are


@dataclass(frozen=True)
class Clock:
    """Control steps per second, and steps per stored frame."""

    hz: float
    video_stride: int

    def __str__(self) -> str:
        return f"{self.hz:g} control steps and {self.hz / self.video_stride:g} frames per second"


def choose_clock(embodiment: Embodiment, video_fps: float) -> Clock:
    """`two_step_clock(video_fps)`; the set's own clock where that is 0."""
    return two_step_clock(video_fps) if video_fps else Clock(float(embodiment.control_hz), embodiment.video_stride)


def two_step_clock(video_fps: float) -> Clock:
    """Two control steps per frame at `video_fps` frames per second; raises `UserError` where that is not positive."""
    if not video_fps > 0:
        raise UserError(f"--video_fps is {video_fps}; give frames per second, or 0 for the source's own rate")
    return Clock(2 * video_fps, 2)


def row_rate(times: np.ndarray) -> float:
    """Rows per second of timestamps `[N]`, by the median distance; 0 for fewer than two rows."""
    return float(1.0 / np.median(np.diff(times))) if len(times) > 1 else 0.0


def check_times(times: np.ndarray, hz: float | None = None) -> None:
    """Raises `BadRecording` where timestamps `[N]` are not finite, go backwards or pause, or are not `hz` a second."""
    if len(times) < 2:
        raise BadRecording("timestamp", f"{len(times)} rows; two are needed for one command and what came of it")
    if not np.isfinite(times).all():
        row = int(np.argmin(np.isfinite(times)))
        raise BadRecording("timestamp", f"is {times[row]} at row {row}")
    steps = np.diff(times)
    if steps.min() <= 0:
        row = int(np.argmin(steps)) + 1
        raise BadRecording("timestamp", f"goes from {times[row - 1]:.3f} to {times[row]:.3f} s at row {row}")
    rate = row_rate(times)
    hz = hz or rate
    if abs(rate / hz - 1) > RATE_TOLERANCE:
        raise BadRecording("timestamp", f"says {rate:.4g} rows per second, control_hz says {hz:g}")
    if steps.max() > _MAX_GAP / hz:
        row = int(np.argmax(steps)) + 1
        raise BadRecording("timestamp", f"pauses for {steps.max():.2f} s before row {row}; rows are lost")


def control_steps(times: np.ndarray, clock: Clock) -> int:
    """`T`, whole control steps between the first and the last row; raises `BadRecording` where there is none."""
    steps = int(np.floor((times[-1] - times[0]) * clock.hz + 2 * _EXACT))
    if steps < 1:
        raise BadRecording("timestamp", f"lasts {times[-1] - times[0]:.3f} s, not one control step at {clock.hz:g} Hz")
    return steps


def resample(motion: Motion, times: np.ndarray, clock: Clock) -> tuple[Motion, bool]:
    """Motion at steps 0 .. T of the clock (commands: T), and whether it is other than the rows themselves.

    Positions are interpolated linearly, rotations on the shortest arc, measured grippers linearly. A command is what
    the arm shall reach one row later, so commands are interpolated at the times they are for; of gripper commands the
    one in force is taken.
    """
    steps = control_steps(times, clock)
    seconds = times - times[0]
    wanted = np.arange(steps + 1) / clock.hz
    if len(times) == steps + 1 and np.abs(seconds - wanted).max() < _EXACT / clock.hz:
        return Motion(motion.poses, motion.grippers, motion.command_poses[:-1], motion.command_grippers[:-1]), False
    due = seconds[1:]  # of the command of each row but the last, whose outcome was not recorded
    in_force = np.minimum(np.searchsorted(due, wanted[1:] - _EXACT / clock.hz), len(due) - 1)
    arms = range(motion.poses.shape[1])
    return (
        Motion(
            poses=np.stack([_interpolate(motion.poses[:, arm], seconds, wanted) for arm in arms], axis=1),
            grippers=np.stack([np.interp(wanted, seconds, motion.grippers[:, arm]) for arm in arms], axis=1),
            command_poses=np.stack(
                [_interpolate(motion.command_poses[:-1, arm], due, wanted[1:]) for arm in arms], axis=1
            ),
            command_grippers=motion.command_grippers[in_force],
        ),
        True,
    )


def resample_episode(episode: Episode, clock: Clock) -> Episode:
    """An episode on another clock, for sources that have one of their own; the same one where that is `clock`.

    Each frame is the nearest one that was stored. Boundaries of events go to the nearest step; events that would not
    keep one step are left out and counted in the provenance.
    """
    if (episode.clock_hz, episode.video_stride) == (clock.hz, clock.video_stride):
        return episode
    times = np.arange(episode.num_steps + 1) / episode.clock_hz
    last = np.minimum(np.arange(episode.num_steps + 1), episode.num_steps - 1)  # a row for the final observation
    rows = Motion(episode.poses, episode.grippers, episode.command_poses[last], episode.command_grippers[last])
    motion, _ = resample(rows, times, clock)
    steps = len(motion.command_poses)
    shown = nearest_rows(times[:: episode.video_stride], np.arange(0, steps + 1, clock.video_stride), clock)
    spans, lost = _retimed(episode, clock.hz / episode.clock_hz, steps)
    notes = [f"resampled from {episode.clock_hz:g} to {clock.hz:g} Hz"]
    notes += [f"{lost} events left out: shorter than a control step"] if lost else []
    return dataclasses.replace(
        episode,
        clock_hz=clock.hz,
        video_stride=clock.video_stride,
        frames={view: [frames[row] for row in shown] for view, frames in episode.frames.items()},
        poses=motion.poses,
        grippers=motion.grippers,
        command_poses=motion.command_poses,
        command_grippers=motion.command_grippers,
        spans=spans,
        cameras={
            view: dataclasses.replace(camera, extrinsics=camera.extrinsics[shown])
            for view, camera in episode.cameras.items()
        },
        provenance=(*episode.provenance, *notes),
    )


def nearest_rows(times: np.ndarray, steps: np.ndarray, clock: Clock) -> np.ndarray:
    """The row nearest in time to each control step."""
    seconds, wanted = times - times[0], steps / clock.hz
    after = np.clip(np.searchsorted(seconds, wanted), 1, len(seconds) - 1)
    return np.where(wanted - seconds[after - 1] <= seconds[after] - wanted, after - 1, after)


def _interpolate(poses: np.ndarray, seconds: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Poses `[N, 4, 4]` at `seconds`, brought to the seconds `wanted`; the first and last one are held outside."""
    result = np.tile(np.eye(4), (len(wanted), 1, 1))
    if len(seconds) == 1:
        result[:] = poses[0]
        return result
    for axis in range(3):
        result[:, axis, 3] = np.interp(wanted, seconds, poses[:, axis, 3])
    turns = Slerp(seconds, Rotation.from_matrix(poses[:, :3, :3]))
    result[:, :3, :3] = turns(np.clip(wanted, seconds[0], seconds[-1])).as_matrix()
    return result


def _retimed(episode: Episode, ratio: float, steps: int) -> tuple[dict[str, list[Span]], int]:
    """Spans on a clock `ratio` times as fast, and how many vanish; one map of all boundaries keeps levels nested."""
    levels: dict[str, list[Span]] = {}
    places: dict[int, int] = {}  # of the coarser level's spans that are left
    lost = 0
    for level in (level for level in LEVELS if level in episode.spans):
        kept: list[Span] = []
        here: dict[int, int] = {}
        for number, span in enumerate(episode.spans[level]):
            start, end = (min(round(step * ratio), steps) for step in (span.start, span.end))
            if start == end:
                lost += 1
                continue
            here[number] = len(kept)
            parent = None if span.parent is None else places[span.parent]
            kept.append(dataclasses.replace(span, start=start, end=end, parent=parent))
        levels[level], places = kept, here
    return levels, lost
