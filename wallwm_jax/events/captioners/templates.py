"""Captions from motion and gripper alone, for episodes whose source knows no objects.

What can be said without seeing: which way the hand goes, how far, how fast, up or down, whether the fingers close,
open, or have stopped around something. Whatever they hold is "the object", in the words of `events.caption`.

Directions are those of the picture where a camera that stands still is calibrated ("to the right", "away from the
camera"), else those of a base frame with x forward and y left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wallwm_jax.events.caption import Facts, Thing, describe, direction_in_image, fill
from wallwm_jax.events.captioners import Caption, with_captions
from wallwm_jax.events.schema import LEVELS, CameraTrack, Episode, Span

PROVENANCE = "templates"

# {tool} is the gripper and its state; a template is used where all its facts are known.
MOTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "reach": (
        "move {tool} {direction} by about {distance}",
        "move {tool} {direction}",
        "{pace} bring {tool} {direction}",
        "go {direction} with {tool}",
    ),
    "raise": (
        "raise {tool} by about {distance}",
        "move {tool} up",
        "{pace} raise {tool}",
        "lift {tool} to {height} above its lowest point",
    ),
    "descend": (
        "lower {tool} by about {distance}",
        "move {tool} down",
        "{pace} lower {tool}",
        "bring {tool} down to {height} above its lowest point",
    ),
    "grasp": ("close the gripper", "shut the fingers", "bring the fingers together"),
    "release": ("open the gripper", "spread the fingers", "let the fingers go apart"),
    "turn": ("turn {tool} by about {angle}", "rotate {tool} in place", "{pace} twist {tool}"),
    "wait": ("hold {tool} still", "keep {tool} where it is", "wait with {tool}"),
}

_HELD = {"reach": "carry", "raise": "lift", "descend": "lower"}  # the same motions with something in the fingers
_STILL = 0.01  # metres; less is no motion
_TURN = 15.0  # degrees
_GRIP = 0.3  # change of the closing fraction that is an event
_CLOSED = 0.5
_HOLDING = (0.1, 0.92)  # closing fraction of fingers that were told to close and stopped around something
_SLOW, _FAST = 0.03, 0.3  # metres per second
_NAMED = 3  # parts that a coarser caption names at most


@dataclass(frozen=True)
class Motion:
    """What the arm does in one span.

    Attributes:
      displacement: `[3]` metres of the hand, base frame, z up.
      path: metres of the way it took.
      turned: degrees between its first and last orientation.
      height: metres of its end above the lowest point of the hand in the episode.
      closing: measured closing fraction at the start and at the end.
      closed: whether the gripper is told to be closed at the end.
      holds: whether the fingers stop around something, at the start and at the end.
      seconds: of the span.
      direction: which way it goes on the ground, in words.
    """

    displacement: np.ndarray
    path: float
    turned: float
    height: float
    closing: tuple[float, float]
    closed: bool
    holds: tuple[bool, bool]
    seconds: float
    direction: str

    @property
    def carries(self) -> bool:
        """Whether something is between the fingers all the way."""
        return all(self.holds)


class TemplateCaptioner:
    """Writes captions of the chosen levels from the motion; the others keep theirs."""

    def __init__(self, levels: Sequence[str] = ("subtask", "action", "segment")) -> None:
        """A level without captions of its own is described by its parts; by default the task keeps its instruction."""
        self._levels = tuple(levels)

    def caption(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        for episode in episodes:
            said: dict[tuple[str, int], Caption] = {}
            present = [level for level in LEVELS if level in episode.spans]
            for level in present:
                if level not in self._levels:
                    continue
                finer = present[present.index(level) + 1 :][:1] if level in ("task", "subtask") else []
                for index, span in enumerate(episode.spans[level]):
                    parts = [part for part in episode.spans[finer[0]] if part.parent == index] if finer else [span]
                    said[level, index] = describe_motions([motion_of(episode, part) for part in parts])
            yield replace(episode, spans=with_captions(episode.spans, said))


def motion_of(episode: Episode, span: Span) -> Motion:
    """The motion of a span, of the arm that moves or grips most in it."""
    steps = slice(span.start, span.end + 1)
    ways = np.linalg.norm(np.diff(episode.poses[steps, :, :3, 3], axis=0), axis=-1).sum(0)
    grips = np.abs(episode.grippers[span.end] - episode.grippers[span.start])
    arm = int(np.argmax(ways / _STILL + grips / _GRIP))
    positions = episode.poses[steps, arm, :3, 3]
    first, last = episode.poses[span.start, arm, :3, :3], episode.poses[span.end, arm, :3, :3]
    cosine = np.clip((np.trace(first.T @ last) - 1) / 2, -1, 1)
    told = episode.command_grippers[[max(span.start - 1, 0), span.end - 1], arm] > _CLOSED
    closing = episode.grippers[[span.start, span.end], arm]
    holds = told & (closing > _HOLDING[0]) & (closing < _HOLDING[1])
    return Motion(
        displacement=positions[-1] - positions[0],
        path=float(ways[arm]),
        turned=float(np.degrees(np.arccos(cosine))),
        height=float(positions[-1, 2] - episode.poses[:, arm, 2, 3].min()),
        closing=(float(closing[0]), float(closing[1])),
        closed=bool(told[1]),
        holds=(bool(holds[0]), bool(holds[1])),
        seconds=span.length / episode.clock_hz,
        direction=_direction(episode, positions[0], positions[-1]),
    )


def verb_of(motion: Motion) -> tuple[str, float]:
    """The verb of a motion, a key of `MOTION_TEMPLATES`, and how clearly it is that and nothing else, 0 to 1."""
    across, up = float(np.linalg.norm(motion.displacement[:2])), float(motion.displacement[2])
    far = float(np.linalg.norm(motion.displacement))
    weights = {
        "grasp" if motion.closing[1] > motion.closing[0] else "release": abs(np.diff(motion.closing)[0]) / _GRIP,
        "reach": across / (3 * _STILL),  # fingers that move while the hand goes a few centimetres count for more
        "raise" if up > 0 else "descend": abs(up) / (3 * _STILL),
    }
    verb, weight = max(weights.items(), key=lambda item: item[1])
    if verb in ("grasp", "release") and weight >= 1:
        return verb, weight / sum(weights.values())
    if far >= _STILL:
        verb = "reach" if across >= abs(up) else "raise" if up > 0 else "descend"
        return verb, max(across, abs(up)) / (across + abs(up)) * min(1.0, far / max(motion.path, far))
    if motion.turned >= _TURN:
        return "turn", min(1.0, motion.turned / (3 * _TURN))
    return "wait", 1.0 - far / (2 * _STILL)


def describe_motions(motions: Sequence[Motion]) -> Caption:
    """One caption of one or several motions in a row; of several the clearest are named, in order."""
    found = [verb_of(motion) for motion in motions]
    clearest = sorted(range(len(motions)), key=lambda i: (found[i][0] == "wait", -round(motions[i].path, 3)))[:_NAMED]
    chosen = sorted(clearest)
    wordings = [_wordings(motions[i], found[i][0]) for i in chosen]
    texts = [
        ", then ".join(dict.fromkeys(words[min(variant, len(words) - 1)] for words in wordings))
        for variant in range(max(map(len, wordings)))
    ]
    main = found[clearest[0]][0]
    carried = motions[clearest[0]].carries and main in _HELD
    confidence = float(np.mean([found[i][1] for i in chosen])) * len(chosen) / len(motions)
    verb = _HELD[main] if carried else main
    return Caption(texts[0], tuple(texts[1:]), round(confidence, 2), PROVENANCE, verb)


def _wordings(motion: Motion, verb: str) -> tuple[str, ...]:
    it = Thing("object")
    if (verb == "grasp" and motion.holds[1]) or (verb == "release" and motion.holds[0]):
        return describe("action", verb, Facts(it))
    if verb in _HELD and motion.carries:
        return describe("action", _HELD[verb], Facts(it, toward=motion.direction))
    speed = motion.path / motion.seconds
    words = {
        "tool": "the closed gripper" if motion.closed else "the open gripper",
        "direction": motion.direction,
        "distance": _centimetres(float(np.linalg.norm(motion.displacement))),
        "height": _centimetres(motion.height),
        "angle": f"{5 * round(motion.turned / 5)} degrees",
        "pace": "slowly" if speed < _SLOW else "quickly" if speed > _FAST else "",
    }
    return fill(MOTION_TEMPLATES[verb], words)


def _centimetres(metres: float) -> str:
    """Rounded as a person would say it: single centimetres below ten, then fives."""
    centimetres = 100 * metres
    return f"{round(centimetres)} cm" if centimetres < 9.5 else f"{5 * round(centimetres / 5)} cm"


def _direction(episode: Episode, start: np.ndarray, end: np.ndarray) -> str:
    for camera in episode.cameras.values():
        if np.ptp(camera.extrinsics, axis=0).max() < 1e-6:
            pixels = _project(camera, np.stack([start, end]))
            if pixels is not None:
                return direction_in_image(*pixels)
    forward, left = (end - start)[:2]
    if abs(forward) >= abs(left):
        return "forward" if forward > 0 else "back"
    return "to the left" if left > 0 else "to the right"


def _project(camera: CameraTrack, points: np.ndarray) -> np.ndarray | None:
    """Pixels `[n, 2]` of base-frame points `[n, 3]`; None where one is behind the camera."""
    world_from_camera = camera.extrinsics[0]
    seen = (points - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]
    if (seen[:, 2] <= 0).any():
        return None
    image = seen @ camera.intrinsics.T
    return image[:, :2] / image[:, 2:]
