"""Synthetic episodes for tests: one arm moves coloured squares around; every array is a pure function of the seed.

`synthetic_episode` returns a valid `Episode` with spans on all four levels, a camera that stands still and one that
moves with the arm, so that tests of windows, stores, packing and models need no simulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from wallwm_jax.events.schema import CameraTrack, Episode, Span

VIEWS = ("front_pixels", "ur5e/wrist")  # a static view, then one on the wrist; names may contain a slash
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
VERBS = ("reach", "grasp", "carry", "release")
CLOCK_HZ = 10.0
VIDEO_STRIDE = 2


def synthetic_episode(
    seed: int,
    steps: int = 64,
    views: Sequence[str] = VIEWS,
    size: int = 64,
    source: str = "synthetic/squares",
    smooth: bool = False,
) -> Episode:
    """One episode of `steps` commands at 10 Hz with 5 fps video, one arm.

    Args:
      seed: everything follows from it; different seeds give different lengths of events, colours and motions.
      steps: commands `T`, at least 12.
      views: view names; one that contains "wrist" moves with the arm.
      size: height and width of the frames, pixels.
      source: the family the episode claims to be from.
      smooth: the hand moves as arms do, from rest to rest, where otherwise events of one step are jumps; and pictures
        have the noise of a sensor.
    """
    rng = np.random.default_rng(seed)
    colours = list(rng.permutation(list(COLOURS)))
    spans = _spans(rng, steps, colours)
    poses, grippers = _motion(rng, spans["action"], steps)
    if smooth:
        poses, grippers = _smoothed(rng, steps)
    commands = poses[1:].copy()
    commands[:, 0, :3, 3] += rng.normal(0, 2e-3, (steps, 3))
    frame_steps = np.arange(0, steps + 1, VIDEO_STRIDE)
    frames, cameras = {}, {}
    for number, view in enumerate(views):
        extrinsics = _extrinsics(poses[frame_steps, 0], moving="wrist" in view, number=number)
        intrinsics = np.array([[1.1 * size, 0, size / 2], [0, 1.1 * size, size / 2], [0, 0, 1]])
        cameras[view] = CameraTrack(intrinsics=intrinsics, extrinsics=extrinsics)
        pictures = [_draw(size, poses[step, 0, :3, 3], grippers[step, 0], colours, number) for step in frame_steps]
        if smooth:
            noise = np.random.default_rng([seed, number]).normal(0, 2, (len(pictures), size, size, 3))
            pictures = list(np.clip(pictures + noise, 0, 255).astype(np.uint8))
        frames[view] = [_jpeg(picture) for picture in pictures]
    return Episode(
        episode_id=f"synthetic-{seed:04d}",
        source=source,
        embodiment="one_arm",
        clock_hz=CLOCK_HZ,
        video_stride=VIDEO_STRIDE,
        size=(size, size),
        frames=frames,
        poses=poses,
        grippers=grippers,
        command_poses=commands,
        command_grippers=(grippers[1:] > 0.5).astype(np.float64),
        spans=spans,
        cameras=cameras,
        seed=seed,
        success=True,
    )


def _cuts(rng: np.random.Generator, start: int, end: int, pieces: int) -> list[int]:
    """Boundaries of `pieces` non-empty parts of `[start, end)`, fewer where there is no room."""
    inner = rng.permutation(np.arange(start + 1, end))[: pieces - 1]
    return [start, *sorted(int(cut) for cut in inner), end]


def _spans(rng: np.random.Generator, steps: int, colours: list[str]) -> dict[str, list[Span]]:
    task = "sort the squares by colour"
    spans: dict[str, list[Span]] = {
        "task": [Span(0, steps, task, "sort", None, ("put every square in its place",))],
        "subtask": [],
        "action": [],
        "segment": [],
    }
    pieces = max(2, min(len(colours), steps // 16))
    edges = [round(steps * part / pieces) for part in range(pieces + 1)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        colour = colours[number]
        caption = f"move the {colour} square to the left"
        spans["subtask"].append(Span(start, end, caption, "move", 0, (f"bring the {colour} square to the left side",)))
        cuts = _cuts(rng, start, end, len(VERBS))
        for verb, (low, high) in zip(VERBS, itertools.pairwise(cuts)):
            action = len(spans["action"])
            paraphrases = (f"the arm does: {verb} the {colour} square", f"{verb} the square that is {colour}")
            spans["action"].append(Span(low, high, f"{verb} the {colour} square", verb, number, paraphrases, True))
            parts = _cuts(rng, low, high, 2)
            for name, (begin, finish) in zip(("start to", "finish to"), itertools.pairwise(parts)):
                spans["segment"].append(Span(begin, finish, f"{name} {verb} the {colour} square", verb, action))
    return spans


def _motion(rng: np.random.Generator, actions: Sequence[Span], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses `[T + 1, 1, 4, 4]` and grippers `[T + 1, 1]`: straight lines between a random waypoint per action."""
    edges = [0, *(span.end for span in actions)]
    clock = np.arange(steps + 1)
    waypoints = rng.uniform([0.3, -0.3, 0.05], [0.6, 0.3, 0.4], (len(edges), 3))
    angles = np.cumsum(rng.uniform(-0.6, 0.6, len(edges)))
    poses = np.tile(np.eye(4), (steps + 1, 1, 1, 1))
    for axis in range(3):
        poses[:, 0, axis, 3] = np.interp(clock, edges, waypoints[:, axis])
    yaw = np.interp(clock, edges, angles)
    poses[:, 0, 0, 0], poses[:, 0, 0, 1] = np.cos(yaw), -np.sin(yaw)
    poses[:, 0, 1, 0], poses[:, 0, 1, 1] = np.sin(yaw), np.cos(yaw)
    closed = np.array([0.0, *(float(span.verb in ("grasp", "carry")) for span in actions)])
    return poses, np.interp(clock, edges, closed)[:, None]


def _smoothed(rng: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_motion`, but about every two seconds there is a new waypoint, and speeds are those of a calm arm."""
    clock, count = np.arange(steps + 1), steps // 20 + 2
    arrivals = np.cumsum(rng.uniform(0.5, 1.5, count))
    edges = steps * (arrivals - arrivals[0]) / (arrivals[-1] - arrivals[0])
    number = np.clip(np.searchsorted(edges, clock, side="right") - 1, 0, count - 2)
    share = np.clip((clock - edges[number]) / (edges[number + 1] - edges[number]), 0, 1)
    share = share**2 * (3 - 2 * share)  # from rest to rest
    waypoints = rng.uniform([0.35, -0.25, 0.05, -0.4, 0], [0.55, 0.25, 0.4, 0.4, 1], (count, 5))
    x, y, z, yaw, closed = (waypoints[number].T * (1 - share)) + waypoints[number + 1].T * share
    poses = np.tile(np.eye(4), (steps + 1, 1, 1, 1))
    poses[:, 0, :3, 3] = np.stack([x, y, z], 1)
    poses[:, 0, :2, :2] = np.stack([np.cos(yaw), -np.sin(yaw), np.sin(yaw), np.cos(yaw)], 1).reshape(-1, 2, 2)
    return poses, closed[:, None]


def _extrinsics(poses: np.ndarray, *, moving: bool, number: int) -> np.ndarray:
    """World-from-camera `[N, 4, 4]`: 0.1 m behind the hand where it moves with it, otherwise fixed above the table."""
    down = np.diag([1.0, -1.0, -1.0, 1.0])
    if moving:
        offset = down.copy()
        offset[2, 3] = 0.1
        return poses @ offset
    down[:3, 3] = [0.4, 0.1 * number, 1.2]
    return np.tile(down, (len(poses), 1, 1))


def _draw(size: int, hand: np.ndarray, gripper: float, colours: list[str], view: int) -> np.ndarray:
    """RGB picture: a shaded table, one square per colour, and the hand as a grey square that shrinks as it closes."""
    ramp = np.linspace(60, 140, size).astype(np.uint8)
    picture = np.stack([np.broadcast_to(ramp[:, None], (size, size))] * 3, axis=-1).copy()
    side = size // 8
    for number, name in enumerate(colours):
        shift = int((hand[1] + 0.3) / 0.6 * size / 4) if view else 0  # the wrist view sees the table move
        x, y = (number * size // 4 + side // 2 + shift) % (size - side), size // 2 + side * (number % 2)
        picture[y : y + side, x : x + side] = COLOURS[name]
    x = int(np.clip((hand[1] + 0.3) / 0.6, 0, 1) * (size - side))
    y = int(np.clip((0.4 - hand[2]) / 0.4, 0, 1) * (size - side))
    half = max(2, int(side * (1.0 - 0.5 * gripper)))
    picture[y : y + half, x : x + half] = (200, 200, 205)
    return picture


def _jpeg(picture: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok
    return data.tobytes()
