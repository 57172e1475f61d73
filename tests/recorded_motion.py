"""Recordings for tests of readers and linter: an arm picks a block up and sets it down, seen by two cameras.

Each is plain columns and pictures, as a data engineer would have them; `lerobot_files` and `rlds_files` write them as
sets. Every array is a pure function of the seed. The pictures may carry their row number, so that a test
can read it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

FPS = 10
HEIGHT, WIDTH = 64, 80
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
SUBTASKS = ("reach for the block", "grasp the block", "carry the block to the left", "release the block")
OPEN, CLOSED = 0.08, 0.0

DESCRIPTION = """
robot = "test_arm"
control_hz = 10
[cameras.front]
column = "observation.images.front"
[cameras.wrist]
column = "observation.images.wrist"
mount = "wrist"
[[arms]]
[arms.state]
position = "observation.state[0:3]"
rotation = "observation.state[3:6]"
rotation_as = "euler_xyz"
gripper = "observation.state[6]"
gripper_open = 0.08
gripper_closed = 0.0
[arms.action]
mode = "absolute"
position = "action[0:3]"
rotation = "action[3:6]"
rotation_as = "euler_xyz"
gripper = "action[6]"
gripper_open = 0.08
gripper_closed = 0.0
"""


@dataclass
class Raw:
    """One recording: `state` and `action` `[N, 7]` (metres, Euler angles, gripper width), pictures `[N, H, W, 3]`."""

    state: np.ndarray
    action: np.ndarray
    pictures: dict[str, np.ndarray]
    subtasks: list[str]
    times: np.ndarray
    task: str = "put the block on the left"
    extra: dict[str, np.ndarray] = field(default_factory=dict)


def recordings(count: int, rows: int = 41, *, numbered: bool = True) -> list[Raw]:
    """`count` recordings of about `rows` rows, no two equally long; `numbered` pictures carry their row number."""
    return [recording(seed, rows + 3 * seed, numbered=numbered) for seed in range(count)]


def recording(seed: int, rows: int, *, numbered: bool = True) -> Raw:
    """One recording of `rows` rows at 10 Hz."""
    rng = np.random.default_rng(seed)
    block, goal = rng.uniform([0.3, -0.25, 0.02], [0.5, -0.05, 0.02]), rng.uniform([0.3, 0.1, 0.02], [0.5, 0.25, 0.02])
    up = np.array([0, 0, 0.25])
    waypoints = np.array([[0.35, 0.0, 0.35], block, block, block + up, goal + up, goal, goal, [0.35, 0.0, 0.35]])
    knots = np.array([0, 0.2, 0.3, 0.45, 0.65, 0.8, 0.87, 1.0]) * (rows - 1)
    clock = np.arange(rows)
    part = np.clip(np.searchsorted(knots, clock, side="right") - 1, 0, len(knots) - 2)
    share = (clock - knots[part]) / (knots[part + 1] - knots[part])
    eased = (share * share * (3 - 2 * share))[:, None]
    position = waypoints[part] * (1 - eased) + waypoints[part + 1] * eased
    turn = Rotation.from_euler(
        "xyz", np.stack([0.2 * np.sin(clock / 7), 0.15 * np.cos(clock / 9), clock * 0.8 / rows], 1)
    )
    angles = (turn * Rotation.from_euler("x", np.pi)).as_euler("xyz")
    holds = (clock >= knots[1] + 1) & (clock < knots[5] + 1)
    command_width = np.where(holds, CLOSED, OPEN)
    width = np.convolve(np.pad(command_width, (2, 0), mode="edge"), np.ones(3) / 3, mode="valid")
    state = np.column_stack([position, angles, width])
    following = np.minimum(clock + 1, rows - 1)
    action = np.column_stack([position[following] + rng.normal(0, 1e-3, (rows, 3)), angles[following], command_width])
    phase = np.searchsorted([knots[1], knots[2], knots[5]], clock, side="right")
    carried = np.where(holds[:, None], position, np.where(clock[:, None] < knots[3], block, goal))
    pictures = {
        FRONT: np.stack([_front(position[row], carried[row]) for row in clock]),
        WRIST: np.stack([_wrist(position[row]) for row in clock]),
    }
    if numbered:
        pictures = {view: _numbered(shown) for view, shown in pictures.items()}
    return Raw(state, action, pictures, [SUBTASKS[n] for n in phase], clock / FPS)


def row_of(picture: np.ndarray) -> int:
    """The row number that a picture carries, read from the eight squares in its top row."""
    side = picture.shape[0] // 8
    squares = picture[:side, : 8 * side].reshape(side, 8, side, 3)[1:-1, :, 1:-1].mean((0, 2, 3))
    return int(((squares > 128) << np.arange(8)).sum())


def _project(point: np.ndarray) -> tuple[int, int]:
    """Pixel (x, y) of a point seen by a camera in front of the table, upright and tilted down."""
    eye, target = np.array([1.4, 0.1, 0.9]), np.array([0.3, 0.0, 0.1])
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    seen = np.array([right, np.cross(forward, right), forward]) @ (point - eye)
    return int(WIDTH / 2 + 80 * seen[0] / seen[2]), int(HEIGHT / 2 + 80 * seen[1] / seen[2])


def _front(hand: np.ndarray, block: np.ndarray) -> np.ndarray:
    picture = np.full((HEIGHT, WIDTH, 3), (90, 100, 110), np.uint8)
    picture[HEIGHT // 2 :] = (150, 130, 110)
    for point, colour, half in ((block, (200, 40, 40), 3), (hand, (235, 235, 240), 4)):
        x, y = _project(point)
        picture[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = colour
    return picture


def _wrist(hand: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pattern = np.sin((x + 400 * hand[1]) / 6) + np.sin((y + 400 * hand[0] + 300 * hand[2]) / 5)
    grey = (128 + 50 * pattern).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _numbered(pictures: np.ndarray) -> np.ndarray:
    """Writes row numbers as eight squares along the top of the middle square of pictures `[N, H, W, 3]`."""
    side, left = HEIGHT // 8, (WIDTH - HEIGHT) // 2
    for row, picture in enumerate(pictures):
        for bit in range(8):
            picture[:side, left + bit * side : left + (bit + 1) * side] = 230 if row >> bit & 1 else 25
    return pictures
