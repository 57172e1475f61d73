"""Faults of real recordings, planted into good episodes: each a function that damages one, and the rule it should trip.

    _, plant = FAULTS["frozen camera"]
    damaged = plant(episode, np.random.default_rng(0))

What a fault needs (a stretch in which the hands move, for example) it looks for in the episode; sizes are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from wallwm_jax.events.motion import Motion
from wallwm_jax.events.schema import Episode
from wallwm_jax.events.sync import retimed, shift

Fault = Callable[[Episode, np.random.Generator], Episode]


def late_pictures(episode: Episode, steps: int) -> Episode:
    """The episode with its pictures `steps` control steps late; early where negative."""
    return shift(episode, -steps)


def without_steps(episode: Episode, start: int, end: int) -> Episode:
    """The episode without the states of `[start, end)`, both multiples of the video stride."""
    states = np.r_[0:start, end : episode.num_steps + 1]
    return _taken(episode, states, lambda at: min(at, start) + max(at - end, 0))


def begun(episode: Episode, steps: int) -> Episode:
    """The first `steps` control steps of the episode."""
    return _taken(episode, np.arange(steps + 1), lambda at: min(at, steps))


def paused(episode: Episode, step: int, steps: int) -> Episode:
    """The episode with a rest of `steps` control steps at `step`, both multiples of the video stride."""
    states = np.insert(np.arange(episode.num_steps + 1), step, np.full(steps, step))
    return _taken(episode, states, lambda at: at + steps * (at > step))


def _taken(episode: Episode, states: np.ndarray, when: Callable[[int], int]) -> Episode:
    """The episode as if it had gone through `states`, old control steps; a span's boundary `k` moves to `when(k)`."""
    commands, frames = np.maximum(states[1:] - 1, 0), states[:: episode.video_stride] // episode.video_stride
    return replace(
        episode,
        frames={view: [seen[place] for place in frames] for view, seen in episode.frames.items()},
        poses=episode.poses[states],
        grippers=episode.grippers[states],
        command_poses=episode.command_poses[commands],
        command_grippers=episode.command_grippers[commands],
        spans=retimed(episode.spans, when),
        cameras={
            view: replace(camera, extrinsics=np.asarray(camera.extrinsics)[frames])
            for view, camera in episode.cameras.items()
        },
    )


def _unreadable(episode: Episode, rng: np.random.Generator) -> Episode:
    """One frame is cut off in the middle of its bytes."""
    view, seen = _any_view(episode, rng)
    place = rng.integers(len(seen))
    seen[place] = seen[place][: len(seen[place]) // 2]
    return _with_view(episode, view, seen)


def _blank(episode: Episode, rng: np.random.Generator) -> Episode:
    """One to three frames are black, or white."""
    view, seen = _any_view(episode, rng)
    place, count = rng.integers(len(seen) - 3), rng.integers(1, 4)
    picture = np.full((*episode.size, 3), rng.choice([0, 255]), np.uint8)
    seen[place : place + count] = [cv2.imencode(".jpg", picture)[1].tobytes()] * count
    return _with_view(episode, view, seen)


def _frozen(episode: Episode, rng: np.random.Generator) -> Episode:
    """A camera keeps its picture for 1 to 3 seconds in which the hands go at least 10 cm."""
    view, seen = _any_view(episode, rng)
    count = int(rng.uniform(1.0, 3.0) * episode.clock_hz / episode.video_stride)
    count = min(count, len(seen) - 2)
    gone = np.convolve(Motion(episode).travel(), np.ones(count), "valid")
    start = int(rng.choice(np.flatnonzero(gone >= min(0.1, gone.max()))))
    seen[start : start + count + 1] = [seen[start]] * (count + 1)
    return _with_view(episode, view, seen)


def _duplicated(episode: Episode, rng: np.random.Generator) -> Episode:
    """A tenth of the frames repeat the one before, while the hands move more than 1.5 cm."""
    view, seen = _any_view(episode, rng)
    moving = np.flatnonzero(Motion(episode).travel() > 0.015)
    count = min(len(moving), -(-len(seen) // 10))
    for place in np.sort(rng.permutation(moving)[:count]):
        seen[place + 1] = seen[place]
    return _with_view(episode, view, seen)


def _stretched(episode: Episode, rng: np.random.Generator) -> Episode:
    """Rotations of a few steps are scaled or mirrored."""
    poses, start = episode.poses.copy(), rng.integers(episode.num_steps - 3)
    poses[start : start + 3, :, :3, 0] *= rng.choice([-1.0, 1.3])
    return replace(episode, poses=poses)


def _rounded(episode: Episode, rng: np.random.Generator) -> Episode:
    """Poses are rounded to two decimals."""
    return replace(episode, poses=np.round(episode.poses, 2))


def _millimetres(episode: Episode, rng: np.random.Generator) -> Episode:
    """Measured positions are in millimetres."""
    poses = episode.poses.copy()
    poses[..., :3, 3] *= 1000
    return replace(episode, poses=poses)


def _spike(episode: Episode, rng: np.random.Generator) -> Episode:
    """One to three single steps of the measured hand are 10 to 30 cm off."""
    poses = episode.poses.copy()
    for step in _inner_steps(episode, rng, int(rng.integers(1, 4))):
        poses[step, :, :3, 3] += _direction(rng) * rng.uniform(0.1, 0.3)
    return replace(episode, poses=poses)


def _jump(episode: Episode, rng: np.random.Generator) -> Episode:
    """From a step on the measured hand is 15 to 40 cm off."""
    poses, (step,) = episode.poses.copy(), _inner_steps(episode, rng, 1)
    poses[step:, :, :3, 3] += _direction(rng) * rng.uniform(0.15, 0.4)
    return replace(episode, poses=poses)


def _gap(episode: Episode, rng: np.random.Generator) -> Episode:
    """Half a second to two seconds are missing, in which the hand got 15 cm farther, or as far as it ever does."""
    stride = episode.video_stride
    frames = max(2, int(rng.uniform(0.5, 2.0) * episode.clock_hz / stride))
    frames = min(frames, episode.num_frames // 3)
    hands = episode.poses[::stride][: episode.num_frames, :, :3, 3]
    gone = np.linalg.norm(hands[frames:] - hands[:-frames], axis=-1).max(-1)
    inner = np.arange(5, len(gone) - 5) if len(gone) > 12 else np.arange(1, len(gone) - 1)
    start = stride * int(rng.choice(inner[gone[inner] >= min(0.15, gone[inner].max())]))
    return without_steps(episode, start, start + stride * frames)


def _other_frame(episode: Episode, rng: np.random.Generator) -> Episode:
    """Commands are in a frame turned by 90 degrees about the vertical."""
    turn = np.eye(4)
    turn[:2, :2] = [[0, -1], [1, 0]]
    return replace(episode, command_poses=turn @ episode.command_poses)


def _percent(episode: Episode, rng: np.random.Generator) -> Episode:
    """The measured gripper is in percent."""
    return replace(episode, grippers=100 * np.maximum(episode.grippers, 0.02))


def _offset_gripper(episode: Episode, rng: np.random.Generator) -> Episode:
    """The measured gripper is a few hundredths below zero when it is most open."""
    return replace(episode, grippers=episode.grippers - episode.grippers.min() - rng.uniform(0.02, 0.08))


def _stuck(episode: Episode, rng: np.random.Generator) -> Episode:
    """The measured gripper stays where it was at the start."""
    return replace(episode, grippers=np.broadcast_to(episode.grippers[:1], episode.grippers.shape).copy())


def _not_finite(episode: Episode, rng: np.random.Generator) -> Episode:
    """A measured position is NaN; making the episode raises."""
    poses, (step,) = episode.poses.copy(), _inner_steps(episode, rng, 1)
    poses[step, 0, rng.integers(3), 3] = np.nan
    return replace(episode, poses=poses)


def _uncalibrated(episode: Episode, rng: np.random.Generator) -> Episode:
    """One pose of a camera is NaN."""
    view = str(rng.choice(sorted(episode.cameras)))
    extrinsics = np.array(episode.cameras[view].extrinsics, float)
    extrinsics[rng.integers(len(extrinsics)), 0, 3] = np.nan
    return replace(episode, cameras={**episode.cameras, view: replace(episode.cameras[view], extrinsics=extrinsics)})


def _broken_off(episode: Episode, rng: np.random.Generator) -> Episode:
    """The recording ends after less than a second."""
    return begun(episode, int(0.8 * episode.clock_hz))


def _motionless(episode: Episode, rng: np.random.Generator) -> Episode:
    """Nobody moves: all is as at the start."""
    still: dict[str, Any] = {
        name: np.broadcast_to(value[:1], value.shape).copy()
        for name in ("poses", "grippers", "command_poses", "command_grippers")
        for value in [getattr(episode, name)]
    }
    return replace(episode, frames={view: [seen[0]] * len(seen) for view, seen in episode.frames.items()}, **still)


def _one_late_camera(episode: Episode, rng: np.random.Generator) -> Episode:
    """One camera is 0.6 to 1 seconds later than the others, or earlier."""
    view, _ = _any_view(episode, rng)
    steps = int(rng.choice([-1, 1]) * rng.uniform(0.6, 1.0) * episode.clock_hz)
    steps = round(steps / episode.video_stride) * episode.video_stride
    late = late_pictures(episode, steps)
    first = max(steps, 0) // episode.video_stride
    others = {name: seen[first : first + late.num_frames] for name, seen in episode.frames.items() if name != view}
    return replace(late, frames={name: others.get(name, seen) for name, seen in late.frames.items()})


def _lost_pictures(episode: Episode, rng: np.random.Generator) -> Episode:
    """All cameras lose 0.6 to 1 seconds of pictures in the middle; those behind come as much too early."""
    lost = round(rng.uniform(0.6, 1.0) * episode.clock_hz / episode.video_stride)
    middle = (episode.num_frames - lost) // 2
    short = begun(episode, (episode.num_frames - lost - 1) * episode.video_stride)
    frames = {view: [*seen[:middle], *seen[middle + lost :]] for view, seen in episode.frames.items()}
    return replace(short, frames=frames)


def _backwards(episode: Episode, rng: np.random.Generator) -> Episode:
    """The pictures do not belong to the actions: they run backwards."""
    return replace(episode, frames={view: list(reversed(seen)) for view, seen in episode.frames.items()})


def _far_too_late(episode: Episode, rng: np.random.Generator) -> Episode:
    """The pictures are 1.2 to 1.4 seconds late, or early."""
    return late_pictures(episode, round(rng.choice([-1, 1]) * rng.uniform(1.2, 1.4) * episode.clock_hz))


# Name of the fault → the rules of which one should be tripped, and what plants it.
FAULTS: dict[str, tuple[tuple[str, ...], Fault]] = {
    "frame cut off": (("unreadable_frame",), _unreadable),
    "blank frames": (("blank_frame",), _blank),
    "frozen camera": (("frozen_camera",), _frozen),
    "repeated frames": (("duplicated_frame",), _duplicated),
    "stretched rotation": (("not_a_rotation",), _stretched),
    "rounded rotation": (("not_a_rotation",), _rounded),
    "millimetres": (("out_of_reach",), _millimetres),
    "pose spikes": (("pose_spike",), _spike),
    "pose jump": (("pose_jump", "time_gap"), _jump),
    "missing seconds": (("time_gap", "pose_jump"), _gap),
    "commands in another frame": (("command_mismatch",), _other_frame),
    "gripper in percent": (("gripper_range",), _percent),
    "gripper below zero": (("gripper_range",), _offset_gripper),
    "gripper not recorded": (("gripper_stuck",), _stuck),
    "NaN in poses": (("invalid_episode",), _not_finite),
    "NaN in calibration": (("bad_calibration",), _uncalibrated),
    "broken off": (("too_short",), _broken_off),
    "no motion": (("no_motion",), _motionless),
    "one camera late": (("cameras_disagree",), _one_late_camera),
    "pictures lost midway": (("lag_drifts", "cameras_disagree", "lag_unclear"), _lost_pictures),
    "pictures backwards": (("lag_unclear", "cameras_disagree", "lag_drifts", "lag_too_long"), _backwards),
    "far too late": (("lag_too_long", "lag_unclear", "lag_drifts", "cameras_disagree"), _far_too_late),
}


def _any_view(episode: Episode, rng: np.random.Generator) -> tuple[str, list[bytes]]:
    view = str(rng.choice(sorted(episode.frames)))
    return view, list(episode.frames[view])


def _with_view(episode: Episode, view: str, seen: list[bytes]) -> Episode:
    return replace(episode, frames={**episode.frames, view: seen})


def _inner_steps(episode: Episode, rng: np.random.Generator, count: int) -> np.ndarray:
    """Control steps at least six apart, not at the ends."""
    return 5 + 6 * np.sort(rng.permutation((episode.num_steps - 10) // 6)[:count])


def _direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)
