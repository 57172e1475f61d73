"""Names the next event from the simulator's privileged state, for closed-loop evaluation of a policy that acts.

It keeps nothing but OCBench's goal order and the current subgoal: if the policy drops the block, the next action is to
reach for it again. Events are named in the canonical wording of the demonstrations.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.caption import Facts
from wallwm_jax.events.schema import Episode
from wallwm_jax.sources.simulator.ocbench_demos import controller_factory
from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv
from wallwm_jax.sources.simulator.scene import Scene, task_of, wording

Durations = Mapping[tuple[str, str], float]  # (level, verb) → seconds

LEVELS = ("subtask", "action")

# Actions of each kind of subgoal in order; "done" follows the last. "move" stands for pull, push or slide.
_ORDER = {
    "button": ("reach", "press", "retract", "done"),
    "drawer": ("reach", "descend", "grasp", "move", "release", "retract", "done"),
    "cube": ("reach", "descend", "grasp", "lift", "carry", "lower", "release", "retract", "done"),
}
_ORDER["window"] = _ORDER["drawer"]
_ORDER["hanoi"] = _ORDER["cube"]
_COMMITTED = ("lift", "carry", "lower", "release", "retract")  # with something in hand, or just let go: finish this


@dataclass(frozen=True)
class _Limits:
    """When an action is over, in metres from the point to grasp or press; read off the experts' keyframes."""

    above: float  # horizontally close enough to descend
    over: float  # height that still counts as above
    at: float  # horizontally at the point
    down: float  # height that counts as having descended
    near: float  # within this the gripper has not retracted


_LIMITS = {
    "button": _Limits(above=0.03, over=0.10, at=0.03, down=0.03, near=0.045),
    "drawer": _Limits(above=0.075, over=0.20, at=0.03, down=0.035, near=0.06),
    "window": _Limits(above=0.06, over=0.15, at=0.03, down=0.035, near=0.06),
    "cube": _Limits(above=0.05, over=0.27, at=0.03, down=0.035, near=0.08),
    "hanoi": _Limits(above=0.03, over=0.32, at=0.025, down=0.035, near=0.10),
}
_HELD_GRIPPER = 0.2  # closing fraction: around a block it is 0.33, a disk 0.38, a handle at least 0.24
_LIFTED = 0.05  # metres above where it rested
_OVER_TARGET = {"cube": 0.09, "hanoi": 0.02}  # horizontal metres from the target at which carrying ends
_AT_TARGET = {"cube": 0.05, "hanoi": 0.02}
_DROP_HEIGHT = 0.09  # metres: blocks are let fall into the drawer from here
_SET_DOWN = 0.035  # metres above its place at which lowering ends


def _seconds(level: str, **by_verb: float) -> dict[tuple[str, str], float]:
    return {(level, verb): seconds for verb, seconds in by_verb.items()}


# Medians over eight expert episodes per family, for planning without a store of demonstrations.
EXPERT_SECONDS: dict[str, Durations] = {
    "chamber": _seconds("subtask", press=2.4, open=3.7, close=3.4, place=6.5)
    | _seconds("action", reach=0.9, descend=0.4, grasp=0.3, lift=0.6, carry=1.4, lower=0.7, release=0.3, retract=1.2)
    | _seconds("action", press=0.4, pull=0.8, push=0.6, slide=0.6),
    "block": _seconds("subtask", place=8.0)
    | _seconds("action", reach=0.9, descend=1.0, grasp=0.6, lift=0.5, carry=1.8, lower=0.7, release=0.5, retract=2.1),
    "switch": _seconds("subtask", press=2.4) | _seconds("action", reach=1.1, press=0.5, retract=1.3),
    "hanoi": _seconds("subtask", place=15.9)
    | _seconds("action", reach=3.8, descend=1.8, grasp=0.6, lift=3.8, carry=3.0, lower=1.6, release=0.6, retract=3.5),
}


@dataclass(frozen=True)
class PlannedEvent:
    """What to do next.

    Attributes:
      level: "subtask" or "action".
      verb: of the demonstrations' vocabulary.
      caption: canonical wording, no duration clause.
      parent_caption: the subtask's caption for an action, the instruction for a subtask.
      duration_s: how long the expert typically takes.
      is_done: whether the simulator's present state says that this event has been achieved.
    """

    level: str
    verb: str
    caption: str
    parent_caption: str
    duration_s: float
    is_done: Callable[[], bool]


class ScriptedPlanner:
    """Plans for one `OCBenchEnv`; call `reset` after each reset of the environment."""

    def __init__(self, env: OCBenchEnv, *, durations: Durations | None = None, seed: int = 0):
        """`durations`: typical seconds per (level, verb), of the demonstrations; `seed`: of the goal order."""
        self._env = env
        self._durations = durations or {}
        self._random = np.random.RandomState(seed).get_state()
        self._seed = seed

    def reset(self) -> None:
        """Draws the goal order of the new episode (from this planner's seed and the episode)."""
        env = self._env
        self._scene = Scene(env.env)
        self._random = np.random.RandomState(self._seed).get_state()
        self._controller = controller_factory(env.env_id)(env.env)
        with self._own_random():
            self._controller.reset(None, env.info)
        self._subgoal: dict[str, Any] | None = None
        self._facts_of: dict[str, Any] | None = None
        self._rest_height: dict[tuple[str, int], float] = {}

    @property
    def instruction(self) -> str:
        """The task in words."""
        return self._scene.instruction()[0]

    def next_event(self, level: str) -> PlannedEvent | None:
        """The event to do now; None where nothing is left to do or the episode has failed.

        Raises:
          UserError: a level that is neither "subtask" nor "action".
        """
        if level not in LEVELS:
            raise UserError(f"the planner plans on levels {LEVELS}, not {level!r}")
        subgoal = self._current_subgoal(level)
        if subgoal is None:
            return None
        facts = self._current_facts(subgoal)
        subtask_verb = self._scene.subtask_verb(subgoal)
        subtask_caption = wording("subtask", subtask_verb, facts)[0]
        if level == "subtask":
            return PlannedEvent(
                level=level,
                verb=subtask_verb,
                caption=subtask_caption,
                parent_caption=self.instruction,
                duration_s=self._duration(level, subtask_verb),
                is_done=lambda: self._achieved(subgoal),
            )
        action = self._action(subgoal)
        order = _ORDER[task_of(subgoal)]
        verb = self._scene.move_verb(subgoal) if action == "move" else action
        return PlannedEvent(
            level=level,
            verb=verb,
            caption=wording("action", verb, facts)[0],
            parent_caption=subtask_caption,
            duration_s=self._duration(level, verb),
            is_done=lambda: order.index(self._action(subgoal)) > order.index(action),
        )

    def _current_subgoal(self, level: str) -> dict[str, Any] | None:
        """The running subgoal while it makes sense, else the controller's choice."""
        env, controller = self._env, self._controller
        if env.success or env.info["failure"] or not env.info["healthy"]:
            return None
        old = self._subgoal
        if level == "action" and old is not None and self._action(old) in _COMMITTED:
            return old
        with self._own_random():
            if hasattr(controller, "_update_plan_from_info"):
                controller._update_plan_from_info(env.info)
            new = controller._choose_subgoal(env.info)
            possible = [new]
            if self._scene.family == "chamber":  # here the controller draws one of two
                possible = [controller._drawer_subgoal(env.info), controller._window_subgoal(env.info)]
        if old is not None and not self._achieved(old):
            same = (subgoal for subgoal in possible if subgoal is not None and _key(subgoal) == _key(old))
            kept = next(same, None)
            if kept is not None:  # keep the same dictionary, with the target where it is now
                if kept["name"] != "clear_obstacle":  # whose target is drawn at random
                    old.update(kept)
                new = old
        self._subgoal = new
        return new

    def _current_facts(self, subgoal: dict[str, Any]) -> Facts:
        """As in the demonstrations, what captions say stays as it was before the object was taken in hand."""
        if subgoal is not self._facts_of or self._action(subgoal) == "reach":
            self._facts, self._facts_of = self._scene.facts(subgoal, self._env.info), subgoal
        return self._facts

    def _achieved(self, subgoal: dict[str, Any]) -> bool:
        return self._env.success or self._controller._subtask_success(subgoal, self._env.info)

    def _action(self, subgoal: dict[str, Any]) -> str:
        """The action that the present state calls for, a member of the subgoal's `_ORDER`."""
        if self._env.success:
            return "done"
        task = task_of(subgoal)
        if task == "button":
            return self._button_action(subgoal)
        return self._grasp_action(task, subgoal)

    def _button_action(self, subgoal: dict[str, Any]) -> str:
        simulator, info, limits = self._env.env.unwrapped, self._env.info, _LIMITS["button"]
        button = subgoal["button"]
        across, height = self._offset(simulator._data.site_xpos[simulator._button_site_ids[button]])
        near = across < limits.at and height < limits.near
        if self._achieved(subgoal):
            return "retract" if near else "done"
        if info[f"privileged/button_{button}_pos"][0] < -0.015 and near:
            return "retract"  # pressed down without effect: it must come up before it can be pressed again
        return "press" if across < limits.above and height < limits.over else "reach"

    def _grasp_action(self, task: str, subgoal: dict[str, Any]) -> str:
        info, limits = self._env.info, _LIMITS[task]
        point = self._grasp_point(task, subgoal)
        across, height = self._offset(point)
        closed = info["proprio/gripper_opening"][0] > _HELD_GRIPPER
        held = closed and across < limits.at + 0.01 and abs(height) < limits.down + 0.01
        if task in ("drawer", "window"):
            if held:
                return "release" if self._achieved(subgoal) else "move"
        elif held:
            return self._carry_action(task, subgoal, self._object_position(task, subgoal))
        else:
            self._rest_height[task, self._object(subgoal)] = float(self._object_position(task, subgoal)[2])
        if self._achieved(subgoal):
            return "retract" if across < limits.near and height < limits.near else "done"
        if closed or across > limits.above or not -limits.down < height < limits.over:
            return "reach"
        return "grasp" if across < limits.at and height < limits.down else "descend"

    def _carry_action(self, task: str, subgoal: dict[str, Any], position: np.ndarray) -> str:
        target = np.asarray(subgoal["target_pos"], np.float64).copy()
        across = float(np.linalg.norm(position[:2] - target[:2]))
        if task == "hanoi":
            env = self._env.env.unwrapped
            peg_top = 2 * env._peg_half_height
            lifted, low = position[2] > peg_top + env._disk_half_height, position[2] < peg_top - 0.01
        else:
            rest = self._rest_height.get((task, self._object(subgoal)), float(position[2]))
            lifted = position[2] > rest + _LIFTED
            drop = _DROP_HEIGHT if subgoal["name"] == "put_cube_in_drawer" else 0.0
            low = position[2] < target[2] + drop + _SET_DOWN
        if across < _AT_TARGET[task] and low:
            return "release"
        if across < _OVER_TARGET[task]:
            return "lower"
        return "carry" if lifted else "lift"

    def _offset(self, point: np.ndarray) -> tuple[float, float]:
        """Horizontal distance of the gripper from `point`, and its height above it, metres."""
        delta = self._env.info["proprio/effector_pos"] - point
        return float(np.linalg.norm(delta[:2])), float(delta[2])

    def _grasp_point(self, task: str, subgoal: dict[str, Any]) -> np.ndarray:
        info = self._env.info
        if task in ("drawer", "window"):
            return info[f"privileged/{task}_handle_pos"]
        position = self._object_position(task, subgoal)
        if task == "cube":
            return position
        env = self._env.env.unwrapped  # a disk is grasped at either end of its long side
        yaw = info[f"privileged/disk_{subgoal['disk']}_yaw"][0]
        across = [env._disk_grasp_offset(subgoal["disk"], yaw, sign, 0.775) for sign in (-1, 1)]
        ends = [position + np.array([*offset, 0.8 * env._disk_half_height]) for offset in across]
        return min(ends, key=lambda end: self._offset(end)[0])

    def _object_position(self, task: str, subgoal: dict[str, Any]) -> np.ndarray:
        kind = "disk" if task == "hanoi" else "block"
        return self._env.info[f"privileged/{kind}_{self._object(subgoal)}_pos"]

    def _object(self, subgoal: dict[str, Any]) -> int:
        return int(subgoal.get("disk", subgoal.get("block", 0)))

    def _duration(self, level: str, verb: str) -> float:
        known = EXPERT_SECONDS.get(self._scene.family, {})
        return self._durations.get((level, verb), known.get((level, verb), 1.0))

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Lets OCBench draw from this planner's generator in place of numpy's global one."""
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._random)  # noqa: NPY002
        try:
            yield
        finally:
            self._random = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002


def expert_durations(episodes: Iterable[Episode]) -> dict[tuple[str, str], float]:
    """Median seconds per (level, verb) over the subtask and action events of demonstrations."""
    lengths: dict[tuple[str, str], list[float]] = defaultdict(list)
    for episode in episodes:
        for level in LEVELS:
            for span in episode.spans[level]:
                lengths[level, span.verb].append(span.length / episode.clock_hz)
    return {key: float(np.median(values)) for key, values in sorted(lengths.items())}


def _key(subgoal: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two subgoals the same goal; exact positions may differ as the world moves on."""
    return tuple(subgoal.get(name) for name in ("task", "name", "button", "block", "disk", "source", "target"))
