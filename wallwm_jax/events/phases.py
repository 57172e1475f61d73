"""What one arm of a recording does, as phases: the mechanics behind `events.segment`, whose docstring has the idea."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import Episode

_BLOCKED = 0.1  # closing fraction by which fingers that hold something stay behind their command
_EDGE = 0.1  # share of a gripper's range at either end that counts as open or closed
_IDLE = 0.1  # share of the greatest speed below which a step tells nothing of how fast the hand usually is
_SAMPLES = 128  # of the longest movement; more would take time and tell no more
_TIE = 0.5  # squared tolerances that two covers may differ by


@dataclass(frozen=True)
class Options:
    """What counts as a movement, a rest, a contact. The defaults were chosen on OCBench's chamber and block families.

    Attributes:
      tolerance_m: standard deviation of what a cubic leaves of a movement, metres; where the recording is noisier, by
        its fourth differences, its noise takes the place.
      piece_cost: what another movement costs, in squared tolerances.
      longest_s: longest movement, seconds.
      rest_m: farthest that a hand at rest may drift, metres.
      rest_share: fastest that it may do so, as a share of the speed of the faster steps of its motion.
      stop_share: a joint is a stop where the speed falls below this share of that on either side.
      reversal_cosine: the ways in and out of a touch have a smaller cosine than this.
      axis_cosine: a way is along the hand's axis, in or out, where its cosine with it is greater than this.
      axis: column of the pose's rotation that points out of the hand.
      straight_cosine: neighbouring movements with a greater cosine between them are one lift or one approach.
      gripper_change: least change of the closing fraction that opens or closes.
      retry_m: a grasp this near to the one before, with nothing set down elsewhere in between, is a retry.
      min_steps: shortest span, control steps.
      lookahead_s: None uses the whole recording; otherwise seconds after a boundary that it may depend on.
    """

    tolerance_m: float = 0.001
    piece_cost: float = 12.0
    longest_s: float = 6.0
    rest_m: float = 0.025
    rest_share: float = 0.35
    stop_share: float = 0.5
    reversal_cosine: float = -0.7
    axis_cosine: float = 0.5
    axis: int = 2
    straight_cosine: float = 0.87
    gripper_change: float = 0.3
    retry_m: float = 0.06
    min_steps: int = 2
    lookahead_s: float | None = None

    def __post_init__(self) -> None:
        if min(self.tolerance_m, self.piece_cost, self.longest_s, self.rest_m) <= 0 or self.min_steps < 1:
            raise UserError(f"tolerance_m, piece_cost, longest_s, rest_m and min_steps must be positive: {self}")
        if self.axis not in (0, 1, 2):
            raise UserError(f"axis {self.axis} is no column of a rotation; give 0, 1 or 2")
        if self.lookahead_s is not None and self.lookahead_s <= 0:
            raise UserError(f"lookahead_s is {self.lookahead_s}; give seconds, or None for the whole recording")


@dataclass(frozen=True)
class Station:
    """Where one movement ends and the next begins: a joint (`lo == hi`) or a rest `[lo, hi)`."""

    lo: int
    hi: int
    stop: bool
    touch: bool


@dataclass(frozen=True)
class Phase:
    """One action of one arm."""

    start: int
    end: int
    verb: str
    opens: bool = False  # begins a subtask


class Arm:
    """The motion of one arm as stations and phases."""

    def __init__(self, episode: Episode, arm: int, options: Options):
        self.options = options
        self.measured = episode.poses[:, arm, :3, 3]
        self.path = np.concatenate([self.measured[:1], episode.command_poses[:, arm, :3, 3]])
        self.axis = episode.poses[:, arm, :3, options.axis]
        self.gripper = episode.command_grippers[:, arm]
        self.measured_gripper = episode.grippers[:, arm]
        self.steps = len(self.gripper)
        self.speed = np.linalg.norm(np.diff(self.path, axis=0), axis=1)
        self.fast = float(np.quantile(self.speed[self.speed >= _IDLE * self.speed.max()], 0.9))
        self.changes = gripper_changes(self.gripper, options.gripper_change)
        self.stations = self._stations(knots_of(self.path[1:], episode.clock_hz, options))
        self.plan = self._phases()

    def verb(self, start: int, end: int) -> str:
        """Of the phase that covers most of the steps."""
        return max(self.plan, key=lambda phase: min(end, phase.end) - max(start, phase.start)).verb

    def subtask_verb(self, start: int, end: int) -> str:
        """What the phases within the steps amount to."""
        verbs = [p.verb for p in self.plan if min(end, p.end) - max(start, p.start) >= self.options.min_steps]
        for verb in ("pull", "push", "slide", "press"):
            if verb in verbs:
                return verb
        if "lift" in verbs:
            return "place" if "carry" in verbs or "lower" in verbs else "pick"
        return "reach"

    def way(self, start: int, end: int) -> np.ndarray:
        """Unit vector `[3]` of the commanded travel from step to step; zero where there is none."""
        return _unit(self.path[end] - self.path[start])

    def _stations(self, knots: Sequence[int]) -> list[Station]:
        grips = [grip for grip in map(self._grip, self.changes) if grip]
        knots = thinned(knots, [edge for grip in grips for edge in grip], self.steps, self.options.min_steps)
        edges = [0, *knots, self.steps]
        rests = [
            self._rests(a, b) or any(max(a, c) + 1 < min(b, d) and 2 * (d - c) >= b - a for c, d in grips)
            for a, b in itertools.pairwise(edges)
        ]
        groups: list[list[int]] = [[0]]
        for edge, rest in zip(edges[1:], rests):
            if rest:
                groups[-1].append(edge)
            else:
                groups.append([edge])
        bounds = [self._trimmed(group[0], group[-1]) for group in groups]
        return [
            self._station(bounds[max(i - 1, 0)][1], lo, hi, bounds[min(i + 1, len(bounds) - 1)][0])
            for i, (lo, hi) in enumerate(bounds)
        ]

    def _grip(self, change: GripperChange) -> tuple[int, int] | None:
        """The steps of a change of the gripper during which the hand stays where it is, if it does."""
        for end in (change.end, change.half + 1):
            held = self.path[change.onset + 1 : end + 1]
            travel = np.linalg.norm(held - held[0], axis=1).max()
            if travel < self.options.rest_m:
                return change.onset, end
        return None

    def _trimmed(self, lo: int, hi: int) -> tuple[int, int]:
        """A rest without the steps at its ends in which the hand moves."""
        slow = np.flatnonzero(self.speed[lo:hi] <= self.options.rest_share * self.fast)
        return (lo + int(slow[0]), lo + int(slow[-1]) + 1) if len(slow) else (lo, hi)

    def _rests(self, start: int, end: int) -> bool:
        options = self.options
        travel = np.linalg.norm(self.path[start : end + 1] - self.path[start], axis=1).max()
        return bool(travel <= options.rest_m and self.speed[start:end].mean() <= options.rest_share * self.fast)

    def _station(self, before: int, lo: int, hi: int, after: int) -> Station:
        """`before`, `after`: where the movement into it began, where the one out of it ends."""
        stop = hi > lo or lo in (0, self.steps)
        touch = False
        if before < lo and hi < after:
            peak = min(self.speed[before:lo].max(), self.speed[hi:after].max())
            around = [x[min(k + 1, self.steps)] - x[k - 1] for x in (self.path, self.measured) for k in (lo, hi + 1)]
            stop = stop or np.linalg.norm(around, axis=1).min() / 2 < self.options.stop_share * peak
            come, go = self.way(before, lo), self.way(hi, after)
            into = come @ self.axis[lo] > self.options.axis_cosine
            touch = bool(into and come @ go < self.options.reversal_cosine)
            if touch and lo == hi:  # where it is farthest out
                near = np.arange(max(before + 1, lo - 2), min(after, lo + 3))
                lo = hi = int(near[np.argmax(self.path[near] @ self.axis[lo])])
        return Station(lo, hi, bool(stop), touch)

    def along(self, start: int, end: int) -> float:
        """Cosine between the way from step to step and the hand's axis: 1 goes forwards, -1 backs off."""
        return float(self.way(start, end) @ self.axis[end])

    # -- contacts ---------------------------------------------------------------------------------------------------

    def _contacts(self) -> list[tuple[int, str]]:
        """(index of a station, "grasp", "release" or "touch") in time order."""
        kinds: dict[int, str] = {}  # by the first step of the station, which no other shares
        holding: list[tuple[int, int]] = []
        for number, change in enumerate(self.changes):
            opening = next((later for later in self.changes[number + 1 :] if not later.closes), None)
            at = self._grasp_station(change, opening.onset if opening else self.steps) if change.closes else None
            if at is None or at.lo in kinds:
                continue
            kinds[at.lo] = "grasp"
            released = self.steps
            if opening:
                to = self._open_station(opening)
                released = to.lo
                if to.lo > at.lo:
                    kinds[to.lo] = "release"
            holding.append((at.lo, released))
        for station in self.stations:
            if station.touch and station.lo not in kinds and not any(a <= station.lo <= b for a, b in holding):
                kinds[station.lo] = "touch"
        if self._ends_in_contact(max(kinds, default=-1), holding):
            kinds.setdefault(self.stations[-1].lo, "touch")
        return [(index, kinds[station.lo]) for index, station in enumerate(self.stations) if station.lo in kinds]

    def _ends_in_contact(self, latest: int, holding: list[tuple[int, int]]) -> bool:
        """Whether the last movement is an approach, or sets something down."""
        if len(self.stations) < 2:
            return False
        start, end = self.stations[-2].hi, self.stations[-1].lo
        held = any(a <= start <= b for a, b in holding)
        stopped = any(station.stop and latest < station.lo for station in self.stations[:-1])
        return (held or stopped) and self.along(start, end) > self.options.axis_cosine

    def _grasp_station(self, change: GripperChange, until: int) -> Station | None:
        """Where a closing gripper takes hold: the station it closes at, or the one right after where something keeps
        the fingers apart; None where it closes in mid-air."""
        grip, end = self._grip(change), change.end
        near = [s for s in self.stations if s.lo - 1 <= change.half <= s.hi + 1 and 0 < s.lo < self.steps]
        near = [s for s in near if grip or (s.hi > s.lo and change.half <= s.hi)]
        if near:
            return min(near, key=lambda s: abs(s.lo + s.hi - 2 * change.half))
        if until > end and np.median(self.gripper[end:until] - self.measured_gripper[end + 1 : until + 1]) > _BLOCKED:
            after = [s for s in self.stations if end - 2 <= s.hi and s.lo < until and (s.touch or s.hi > s.lo)]
            return after[0] if after else None
        return None

    def _open_station(self, change: GripperChange) -> Station:
        """The station at which the gripper opens, made where there is none."""
        near = [s for s in self.stations if s.lo - 1 <= change.half <= s.hi + 1]
        if near:
            return near[0]
        made = Station(change.onset, change.onset, stop=True, touch=False)
        self.stations = sorted([*self.stations, made], key=lambda station: station.lo)
        return made

    # -- phases -----------------------------------------------------------------------------------------------------

    def _phases(self) -> list[Phase]:
        """What the arm does, gap-free over the recording."""
        contacts = self._contacts()
        if not contacts:
            return self._wander()
        out: list[Phase] = []
        first, kind = contacts[0]
        out += self._approach(0, first, kind, opens=False)
        for number, (index, kind) in enumerate(contacts):
            station = self.stations[index]
            if kind != "touch":
                out.append(Phase(station.lo, station.hi, kind))
            if number + 1 == len(contacts):
                if station.hi < self.steps:
                    out += self._held(index, len(self.stations) - 1) if kind == "grasp" else []
                    out += [Phase(station.hi, self.steps, "retract")] if kind != "grasp" else []
                break
            following, next_kind = contacts[number + 1]
            if kind == "grasp":
                out += self._held(index, following)
            elif kind == "release" and self._retried(contacts, number):
                out += self._approach(self.stations[index].hi, following, next_kind, opens=False)
            else:
                border = self._border(index, following)
                out.append(Phase(station.hi, border, "retract"))
                out += self._approach(border, following, next_kind, opens=True)
        return [phase for phase in out if phase.end > phase.start]

    def _wander(self) -> list[Phase]:
        """Without any contact: moves from stop to stop and from turn to turn."""
        cuts = [0]
        for station, following in zip(self.stations[1:-1], self.stations[2:]):
            turned = self.way(cuts[-1], station.lo) @ self.way(station.hi, following.lo) < self.options.axis_cosine
            if station.stop or turned:
                cuts.append(station.hi)
        pairs = itertools.pairwise([*cuts, self.steps])
        return [Phase(a, b, self._verb(a, b)) for a, b in pairs]

    def _verb(self, start: int, end: int) -> str:
        if self._rests(start, end):
            return "wait"
        along = self.along(start, end)
        if along > self.options.axis_cosine:
            return "descend"
        return "retract" if along < -self.options.axis_cosine else "reach"

    def _approach(self, start: int, contact: int, kind: str, *, opens: bool) -> list[Phase]:
        """reach `[start, p)`, then descend or press `[p, contact)`."""
        end = self.stations[contact].lo
        split = self._last_move(start, contact)
        last = "press" if kind == "touch" else "lower" if kind == "release" else "descend"
        if split <= start:
            return [Phase(start, end, last, opens)]
        return [Phase(start, split, "reach", opens), Phase(split, end, last)]

    def _last_move(self, start: int, contact: int) -> int:
        """Where the straight way into a contact begins, not before `start`."""
        end, index = self.stations[contact].lo, contact - 1
        latest = max(self.stations[index].hi, start)
        while index > 0 and self.stations[index].hi > start:
            here, before = self.stations[index], self.stations[index - 1].hi
            if here.stop:
                break
            if self.way(max(before, start), here.lo) @ self.way(here.hi, end) < self.options.straight_cosine:
                return max(here.hi, start)
            index -= 1
        return latest

    def _first_move(self, contact: int, following: int) -> int:
        """Where the straight way out of a contact ends."""
        start, index = self.stations[contact].hi, contact + 1
        while index < following and not self.stations[index].stop:
            here, after = self.stations[index], self.stations[index + 1].lo
            if self.way(start, here.lo) @ self.way(here.hi, after) < self.options.straight_cosine:
                break
            index += 1
        return self.stations[index].hi if index < following else self.stations[following].lo

    def _held(self, grasp: int, following: int) -> list[Phase]:
        """lift, carry, lower; or one move of something that stays where it is guided."""
        start, end = self.stations[grasp].hi, self.stations[following].lo
        lifted = self._first_move(grasp, following)
        if self.along(start, lifted) > -self.options.axis_cosine:
            return [Phase(start, end, self._guided(start, end))]
        if lifted >= end:
            return [Phase(start, end, "lift")]
        lowered = max(self._last_move(start, following), lifted)
        if self.along(lowered, end) < self.options.axis_cosine:
            lowered = end
        return [Phase(start, lifted, "lift"), Phase(lifted, lowered, "carry"), Phase(lowered, end, "lower")]

    def _guided(self, start: int, end: int) -> str:
        """pull comes nearer to the robot's base, push goes away from it, slide crosses."""
        out = _unit(self.path[start] * [1, 1, 0]) @ self.way(start, end)
        return "push" if out > 0.7 else "pull" if out < -0.7 else "slide"

    def _retried(self, contacts: list[tuple[int, str]], number: int) -> bool:
        """Whether the release `number` let go of nothing: grasps before and after it are at the same place."""
        if number + 1 == len(contacts) or contacts[number + 1][1] != "grasp" or number == 0:
            return False
        places = [self.path[self.stations[contacts[n][0]].lo] for n in (number - 1, number, number + 1)]
        axis = self.axis[self.stations[contacts[number][0]].lo]
        aside = [(place - places[0]) - ((place - places[0]) @ axis) * axis for place in places[1:]]
        return all(np.linalg.norm(offset) < self.options.retry_m for offset in aside)

    def _border(self, contact: int, following: int) -> int:
        """Where one subtask ends and the next begins: the last stop before the straight way in, else the sharpest
        turn, else the point that is farthest back along the hand's axis."""
        start, end = self.stations[contact].hi, self.stations[following].lo
        approach = self._last_move(start, following)
        inner = [s for s in self.stations[contact + 1 : following] if start < s.lo and s.hi < approach]
        stops = [station for station in inner if station.stop]
        if stops:
            return stops[-1].hi
        if inner:
            return min(inner, key=lambda s: self.way(start, s.lo) @ self.way(s.hi, end)).hi
        if start < approach < end or end - start < 2:
            return approach
        back = (self.path[start:end] - self.path[start]) @ self.axis[start]
        return start + max(1, int(np.argmin(back)))


def thinned(kept: Sequence[int], steps: Sequence[int], end: int, gap: int) -> list[int]:
    """`kept` and those of `steps`, early ones first, that are no nearer than `gap` to another or to either end."""
    out = {0, end, *kept}
    for step in sorted(set(steps)):
        if all(abs(step - other) >= gap for other in out):
            out.add(step)
    return sorted(out - {0, end})


# -- signals --------------------------------------------------------------------------------------------------------


def knots_of(path: np.ndarray, clock_hz: float, options: Options) -> list[int]:
    """Steps at which a new movement of `path` `[T, 3]` begins: the cheapest cover by cubics, costs as in `Options`.

    Where the longest movement has more than `_SAMPLES` steps, only every second, third ... step is looked at.
    """
    longest = min(len(path), max(5, round(options.longest_s * clock_hz)))
    every = -(-longest // _SAMPLES)
    path, longest = path[::every], -(-longest // every)
    steps = len(path)
    cost = np.full((steps + 1, longest + 1), np.inf)  # by end and length of a piece
    for length in range(min(options.min_steps, steps), longest + 1):
        windows = np.lib.stride_tricks.sliding_window_view(path, length, axis=0)
        windows = windows - windows.mean(axis=-1, keepdims=True)
        basis, _ = np.linalg.qr(np.vander(np.linspace(-1, 1, length), min(4, length)))
        residual = np.square(windows).sum(axis=(1, 2)) - np.square(windows @ basis).sum(axis=(1, 2))
        cost[length:, length] = np.maximum(residual, 0)
    scale = max(options.tolerance_m, _noise(path)) ** 2
    best, previous = np.full(steps + 1, np.inf), np.zeros(steps + 1, int)
    best[0] = 0
    for end in range(1, steps + 1):
        reach = min(end, longest)
        total = best[end - reach : end][::-1] + cost[end, 1 : reach + 1] / scale + options.piece_cost
        best[end] = total.min()
        previous[end] = end - 1 - int(np.flatnonzero(total <= best[end] + _TIE)[-1])  # of two, the earlier joint
    knots, end = [], int(previous[steps])
    while end > 0:
        knots.append(end * every)
        end = int(previous[end])
    return knots[::-1]


def _noise(path: np.ndarray) -> float:
    """Standard deviation per axis of white noise on a smooth path, from the median of its fourth differences."""
    if len(path) < 8:
        return 0.0
    return float(np.median(np.abs(np.diff(path, n=4, axis=0))) / 0.6745 / np.sqrt(70))


@dataclass(frozen=True)
class GripperChange:
    """The gripper opens or closes: last step before it shows, step at which it is half done, first step after it."""

    onset: int
    half: int
    end: int
    closes: bool


def gripper_changes(closing: np.ndarray, least: float) -> list[GripperChange]:
    """Each opening and closing in time order; they alternate."""
    low, high = float(closing.min()), float(closing.max())
    if high - low < least:
        return []
    closed = closing > (low + high) / 2
    moving = (closing > low + _EDGE * (high - low)) & (closing < high - _EDGE * (high - low))
    out = []
    for half in np.flatnonzero(np.diff(closed)) + 1:
        onset, end = int(half) - 1, int(half)
        while onset > 0 and moving[onset]:
            onset -= 1
        while end < len(closing) - 1 and moving[end]:
            end += 1
        out.append(GripperChange(onset, int(half), end, bool(closed[half])))
    return out


def _unit(vector: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector)
    return vector / length if length > 1e-6 else np.zeros(3)
