"""Cuts a recording without labels into events: subtasks, actions and segments, from motion, gripper and pictures alone.

Three steps, each a plain idea:

1. **Knots.** A movement is the longest stretch of the commanded path that a cubic in time explains to a millimetre
   (constant jerk, the usual model of one smooth movement). The cheapest cover of the path by such pieces, found by
   dynamic programming, has its joints where the behaviour changes: stops, changes of direction, changes of pace.
   Pieces in which the hand stays where it is are rests; a joint or a run of rests is a **station**.
2. **Contacts.** The gripper closing or opening at a station is a grasp or a release. A station at which the hand comes
   along its own axis and goes back the way it came is a touch: a press, a tap.
3. **Phases.** Contacts order what lies between them: retract, reach and descend while the hand is empty, with the
   border between two subtasks at the last stop before the next approach; lift, carry and lower, or one pull, push or
   slide, while it holds something. A grasp that is undone and tried again at the same place stays in its subtask.

Actions are phases, subtasks run from reach to retract, segments are actions cut at every station. Labels on
levels that are not kept are never read; what is found nests with those that are. With `Options.lookahead_s` every
boundary at time t depends on data up to t + lookahead alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.phases import Arm, Options, thinned
from wallwm_jax.events.schema import LEVELS, Episode, EpisodeError, Span

_NEAR_S = 0.25  # a boundary found this near to one that is given is the same, as people see it
_PICTURE_CHANGE = 2.0  # grey levels of 255 by which a picture changes beyond the usual


def segment(episode: Episode, options: Options | None = None, *, keep: Sequence[str] = ("task",)) -> Episode:
    """The episode with spans found in the recording on every level but those kept.

    Args:
      keep: levels whose spans and captions stay as they are, the task among them. Those found on finer levels lie
        inside them; a boundary that people set within a quarter of a second of a found one takes its place. Those found
        between two that are kept (subtasks, where only actions are given) consist of whole spans of the finer one:
        their boundaries are the nearest of its.

    Found spans are half-open, gap-free, nested, at least `min_steps` long where what they lie in is. Captions say what
    the hand does, plainly, since nothing is known of objects. With a lookahead boundaries are those of a stream; verbs
    and captions then still speak of whole spans.

    Raises:
      EpisodeError: a picture that is needed cannot be decoded.
      UserError: a lookahead of too few steps.
    """
    options = options or Options()
    arms, found = _analyse(episode, options)
    if options.lookahead_s is not None:
        found = _causal_boundaries(episode, options)
    return dataclasses.replace(episode, spans=_spans(episode, arms, found, keep, options))


def tolerance_s(seconds: Sequence[float]) -> float:
    """How far a found boundary may be from a true one: 0.3 s, or a quarter of the median of the true spans' seconds."""
    return min(0.3, float(np.median(seconds)) / 4)


def match_boundaries(found: Sequence[int], true: Sequence[int], within: float) -> list[tuple[int, int]]:
    """The most pairs (found, true) at most `within` apart, each boundary in one pair; both are in time order."""
    pairs, rest = [], list(true)
    for step in found:
        while rest and rest[0] < step - within - 1e-9:
            rest.pop(0)
        if rest and rest[0] <= step + within + 1e-9:
            pairs.append((step, rest.pop(0)))
    return pairs


def boundaries(episode: Episode, level: str) -> list[int]:
    """Steps at which a new span of the level begins, the first span excepted."""
    return [span.start for span in episode.spans[level]][1:]


def _analyse(episode: Episode, options: Options) -> tuple[list[Arm], dict[str, list[int]]]:
    """The arms, and the boundaries per level, those of all arms together."""
    arms = [Arm(episode, arm, options) for arm in range(episode.grippers.shape[1])]
    return arms, {
        "subtask": [phase.start for arm in arms for phase in arm.plan if phase.opens],
        "action": [phase.start for arm in arms for phase in arm.plan],
        "segment": [edge for arm in arms for station in arm.stations for edge in (station.lo, station.hi)]
        + _picture_changes(episode, arms),
    }


def _nested(
    episode: Episode, found: dict[str, list[int]], options: Options, keep: Sequence[str] = ("task",)
) -> dict[str, list[int]]:
    """Boundaries per level that is not kept: each level's are among the next finer one's, and none is too close."""
    coarser, near, bounds = boundaries(episode, "task"), _NEAR_S * episode.clock_hz, {}
    given = [step for level in keep if level != "task" for step in boundaries(episode, level)]
    for number, (level, steps) in enumerate(found.items()):
        finer = [other for other in list(found)[number:] if other in keep]
        if level in keep:
            coarser = boundaries(episode, level)
        elif finer:
            places = boundaries(episode, finer[0])
            nearest = {min(places, key=lambda place: abs(place - step)) for step in steps if places}
            coarser = bounds[level] = sorted({*coarser, *nearest})
        else:
            free = [step for step in steps if all(abs(step - other) >= near for other in given)]
            coarser = bounds[level] = thinned(coarser, free, episode.num_steps, options.min_steps)
    return bounds


def _causal_boundaries(episode: Episode, options: Options) -> dict[str, list[int]]:
    """A boundary is decided once, from the recording up to a fixed time after it; a later view cannot change it.

    The end of the lookahead is for `thinned`, which prefers a coarser boundary that follows closely, on either level.
    """
    ahead = round((options.lookahead_s or 0) * episode.clock_hz) - 2 * options.min_steps
    if ahead < 1:
        least = (2 * options.min_steps + 1) / episode.clock_hz
        raise UserError(f"lookahead_s is {options.lookahead_s}; at {episode.clock_hz:g} Hz give at least {least:g}")
    found: dict[str, list[int]] = {"subtask": [], "action": [], "segment": []}
    for seen in range(ahead + 1, episode.num_steps + 1):
        until = _until(episode, seen)
        bounds = _nested(until, _analyse(until, options)[1], options)
        for level, steps in found.items():
            steps += [b for b in bounds[level] if b == seen - ahead or (b > seen - ahead and seen == episode.num_steps)]
    return found


def _until(episode: Episode, seen: int) -> Episode:
    """The recording as it stands after `seen` commands."""
    frames = seen // episode.video_stride + 1
    return dataclasses.replace(
        episode,
        frames={view: pictures[:frames] for view, pictures in episode.frames.items()},
        poses=episode.poses[: seen + 1],
        grippers=episode.grippers[: seen + 1],
        command_poses=episode.command_poses[:seen],
        command_grippers=episode.command_grippers[:seen],
        spans={"task": [Span(0, seen, episode.instruction, "task")]},
        cameras={},
    )


def _picture_changes(episode: Episode, arms: Sequence[Arm]) -> list[int]:
    """Steps at which the pictures change although every arm has been at rest for a second or more."""
    still = np.ones(episode.num_steps, bool)
    for arm in arms:
        mine = np.zeros_like(still)
        for station in arm.stations:
            mine[station.lo : station.hi] = True
        still &= mine
    edges = np.flatnonzero(np.diff(np.concatenate([[0], still, [0]])))
    out = []
    for start, end in edges.reshape(-1, 2):
        first, last = -(-start // episode.video_stride) + 1, end // episode.video_stride
        if end - start < episode.clock_hz or last - first < 2:
            continue
        change = np.array([_change(episode, frame) for frame in range(first, last)])
        peak = int(np.argmax(change))
        if change[peak] > _PICTURE_CHANGE + 3 * np.median(change):
            out.append((first + peak) * episode.video_stride)
    return out


def _change(episode: Episode, frame: int) -> float:
    """Mean change of grey level, over the views, from the stored frame before `frame` to it."""
    changes = []
    for view, pictures in episode.frames.items():
        before, after = _grey(pictures[frame - 1]), _grey(pictures[frame])
        if before is None or after is None:
            raise EpisodeError(f"episode {episode.episode_id!r}: view {view!r} cannot be decoded at frame {frame}")
        changes.append(np.abs(after - before).mean())
    return float(np.mean(changes))


@functools.lru_cache(maxsize=256)
def _grey(jpeg: bytes) -> np.ndarray | None:
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    if picture is None:
        return None
    return cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)


# -- spans and plain captions ---------------------------------------------------------------------------------------

_ACTIONS = {
    "reach": "move the open hand {way}",
    "descend": "approach, moving {way}",
    "grasp": "close the gripper",
    "lift": "lift what the gripper holds",
    "carry": "carry it {way}",
    "lower": "set it down",
    "release": "open the gripper",
    "retract": "back off {way}",
    "press": "press, moving {way}",
    "pull": "pull it {way}",
    "push": "push it {way}",
    "slide": "slide it {way}",
    "wait": "hold still",
}
_SUBTASKS = {
    "place": "pick something up and set it down",
    "pick": "pick something up",
    "press": "press something",
    "pull": "take hold of something and pull it {way}",
    "push": "take hold of something and push it {way}",
    "slide": "take hold of something and slide it {way}",
    "reach": "move the hand {way}",
}
_AXES = (("forward", "back"), ("to the left", "to the right"), ("up", "down"))  # of the base frame


def _spans(
    episode: Episode, arms: Sequence[Arm], found: dict[str, list[int]], keep: Sequence[str], options: Options
) -> dict[str, list[Span]]:
    bounds = _nested(episode, found, options, keep)
    spans = {"task": list(episode.spans["task"])}
    for level in LEVELS[1:]:
        coarser = next(reversed(spans))
        parent_of = functools.partial(_containing, spans[coarser])
        if level in keep:
            spans[level] = [dataclasses.replace(span, parent=parent_of(span.start)) for span in episode.spans[level]]
            continue
        spans[level] = []
        for start, end in itertools.pairwise([0, *bounds[level], episode.num_steps]):
            arm = max(range(len(arms)), key=lambda a: arms[a].speed[start:end].sum())  # the one that moves most
            verb = arms[arm].subtask_verb(start, end) if level == "subtask" else arms[arm].verb(start, end)
            caption = (_SUBTASKS if level == "subtask" else _ACTIONS)[verb].format(
                way=_words(arms[arm].way(start, end))
            )
            if len(arms) > 1:
                caption += f" with arm {arm + 1}"
            spans[level].append(Span(start, end, caption, verb, parent_of(start)))
    return spans


def _containing(spans: Sequence[Span], step: int) -> int:
    return next(number for number, span in enumerate(spans) if span.start <= step < span.end)


def _words(way: np.ndarray) -> str:
    """A direction in the base frame (x forward, y left, z up) in words."""
    named = [names[int(part < 0)] for part, names in zip(way, _AXES) if abs(part) > 0.4]
    return " and ".join(named) or "a little"
