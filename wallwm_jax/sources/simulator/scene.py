"""What captions say about an OCBench scene: names, colours, places and directions as seen by camera `front_pixels`.

Demonstrations and the planner both describe subgoals through this file, so a policy is prompted in the words it has
learned. A subgoal is the dictionary that OCBench's controllers choose (`task`, `block`, `target_pos`, `name` ...).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events import caption as captions
from wallwm_jax.events.caption import Facts, Thing
from wallwm_jax.sources.simulator import rendering

CAMERA = "front_pixels"
LOCK_COLOURS = ("red", "white")  # chamber: locked, unlocked
SWITCH_COLOURS = ("blue", "grey")
_TABLE_CENTRE = np.array([0.425, 0.0, 0.03])  # metres, base frame
_DEPTH_UNIT = 0.06  # metres from the centre of the table that count as its back or front

# Task instructions; {blocks} reads "the blue block" or "all blocks".
_INSTRUCTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("chamber", "open_all"): (
        "open the drawer and the window, then lock both",
        "make sure the drawer and the window are open and locked",
    ),
    ("chamber", "put_in"): (
        "put {blocks} in the drawer, close it, open the window, and lock both",
        "store {blocks} in the closed drawer, open the window, lock the drawer and the window",
    ),
    ("chamber", "take_out"): (
        "take {blocks} out of the drawer, close the drawer and the window, and lock both",
        "get {blocks} out of the drawer, then leave the drawer and the window closed and locked",
    ),
    ("chamber", "stack_anywhere"): (
        "stack {blocks} on the table, close the drawer and the window, and lock both",
        "build one tower of {blocks}, then leave the drawer and the window closed and locked",
    ),
    ("block", "stack_anywhere"): ("stack {blocks} into one tower", "build a tower out of {blocks}"),
    ("block", "grid"): (
        "build a wall two blocks wide and two blocks high, blue and red below, orange and green on top",
    ),
    ("switch", "monochrome"): ("make all buttons the same colour", "press buttons until all of them match in colour"),
    ("hanoi", "move"): (
        "move the tower from the middle peg to the left or the right peg",
        "rebuild the tower on another peg, no disk on a smaller one",
    ),
    ("hanoi", "move_one"): (
        "move the blue disk from the middle peg to the left or the right peg",
        "put the blue disk on another peg",
    ),
}


class Scene:
    """Reads one OCBench environment; all answers hold for its present state unless an `info` is given."""

    def __init__(self, env: Any):
        """`env`: an OCBench environment (wrapped or not) after its first `reset`."""
        self._env = env.unwrapped
        self.family = type(self._env).__name__.removesuffix("Env").lower()
        self._names = {tuple(rgba): name for name, rgba in self._env._colors.items()}

    def instruction(self) -> tuple[str, ...]:
        """Wordings of the current task, the canonical one first."""
        task = self._env.cur_task_info["task_name"]
        if self.family == "hanoi":
            return _INSTRUCTIONS["hanoi", "move" if self._env._num_disks > 1 else "move_one"]
        if self.family == "switch":
            return _INSTRUCTIONS["switch", "monochrome"]
        count = self._env._num_cubes
        blocks = "the blue block" if count == 1 else "all blocks"
        template = _INSTRUCTIONS.get((self.family, {"put_all_in": "put_in"}.get(task, task)))
        if template is not None:
            return tuple(text.format(blocks=blocks) for text in template)
        goals = self._env.cur_task_info["goal_xyzs"]
        places = [f"the {self._block(i)} block {self._table(goals[i])}" for i in range(count)]
        listed = places[0] if count == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
        return (f"move {listed}", f"bring {listed}")

    def subtask_verb(self, subgoal: dict[str, Any]) -> str:
        """press, open, close or place."""
        task = task_of(subgoal)
        if task == "drawer":
            return "open" if subgoal["target_pos"] < -0.08 else "close"
        if task == "window":
            return "open" if subgoal["target_pos"] > 0.1 else "close"
        return "press" if task == "button" else "place"

    def move_verb(self, subgoal: dict[str, Any]) -> str:
        """The action that moves a drawer (pull, push) or a window (slide)."""
        if task_of(subgoal) == "window":
            return "slide"
        return "pull" if self.subtask_verb(subgoal) == "open" else "push"

    def facts(self, subgoal: dict[str, Any], info: dict[str, Any]) -> Facts:
        """What captions may say about this subgoal, given the privileged state `info` before it begins."""
        return getattr(self, f"_{task_of(subgoal)}_facts")(subgoal, info)

    def pixel(self, point: np.ndarray) -> np.ndarray:
        """Base-frame points `[..., 3]` as positions `[..., 2]` in camera `front_pixels`, 0..1 inside the picture."""
        intrinsics = rendering.camera_intrinsics(self._env._model, CAMERA, 1)
        return rendering.project(point, intrinsics, rendering.camera_pose(self._env._data, CAMERA))

    def _button_facts(self, subgoal: dict[str, Any], info: dict[str, Any]) -> Facts:
        env, button = self._env, int(subgoal["button"])
        state = int(info[f"privileged/button_{button}_state"])
        tops = self.pixel(env._data.site_xpos[env._button_site_ids])
        if self.family == "switch":
            grid = tops.reshape(env._num_rows, env._num_cols, 2)
            row = int(np.argsort(np.argsort(grid[..., 1].mean(axis=1)))[button // env._num_cols])
            column = int(np.argsort(np.argsort(grid[..., 0].mean(axis=0)))[button % env._num_cols])
            where = captions.place_in_grid(row, env._num_rows, column, env._num_cols)
            return Facts(Thing("button", SWITCH_COLOURS[state], where))
        where = f"on the {captions.order_in_row(tops[:, 0])[button]}"
        lock = "unlock" if subgoal["target_state"] == 1 else "lock"
        purpose = f"{lock} the {('drawer', 'window')[button]}"
        return Facts(Thing("button", LOCK_COLOURS[state], where), purpose=purpose)

    def _drawer_facts(self, subgoal: dict[str, Any], info: dict[str, Any]) -> Facts:
        handle = info["privileged/drawer_handle_pos"]
        moved = handle.copy()
        moved[1] += self._env._drawer_slide_y_sign() * (subgoal["target_pos"] - info["privileged/drawer_pos"][0])
        return self._opening_facts("drawer", subgoal, handle, moved)

    def _window_facts(self, subgoal: dict[str, Any], info: dict[str, Any]) -> Facts:
        handle = info["privileged/window_handle_pos"]
        moved = handle.copy()
        moved[0] += self._env._window_slide_x_sign() * (subgoal["target_pos"] - info["privileged/window_pos"][0])
        return self._opening_facts("window", subgoal, handle, moved)

    def _opening_facts(self, name: str, subgoal: dict[str, Any], handle: np.ndarray, moved: np.ndarray) -> Facts:
        start, end = self.pixel(handle), self.pixel(moved)
        return Facts(
            Thing(name),
            handle=Thing(f"{name} handle", where=captions.side_in_image(start[0])),
            direction=captions.direction_in_image(start, end),
            result="open" if self.subtask_verb(subgoal) == "open" else "closed",
        )

    def _cube_facts(self, subgoal: dict[str, Any], info: dict[str, Any]) -> Facts:
        block = int(subgoal.get("block", 0))
        thing = Thing("block", self._block(block), self._block_place(block, info))
        target = np.asarray(subgoal["target_pos"])
        if subgoal["name"] == "put_cube_in_drawer":
            return Facts(thing, toward="to the drawer", onto="into the drawer")
        support = self._support(block, target, info)
        if support is not None:
            other = f"the {self._block(support)} block"
            return Facts(thing, toward=f"to {other}", onto=f"onto {other}")
        toward = self._table(target)
        return Facts(thing, toward=toward, onto=toward.replace("to the", "onto the", 1))

    def _hanoi_facts(self, subgoal: dict[str, Any], info: dict[str, Any]) -> Facts:
        env = self._env
        pegs = captions.order_in_row(self.pixel(env._peg_body_positions())[:, 0])
        source, target = pegs[subgoal["source"]], pegs[subgoal["target"]]
        colour = self._names[tuple(env._disk_colors[subgoal["disk"]])]
        disk = Thing("disk", colour, f"on the {source} peg")
        return Facts(
            disk, toward=f"to the {target} peg", onto=f"onto the {target} peg", origin=f"from the {source} peg"
        )

    def _block(self, index: int) -> str:
        """The colour of a block, which names it."""
        return self._names[tuple(self._env._cube_colors[index])]

    def _block_place(self, block: int, info: dict[str, Any]) -> str:
        position = info[f"privileged/block_{block}_pos"]
        if self.family == "chamber" and self._env._is_in_drawer(position):
            return "in the drawer"
        if position[2] > 2 * self._env._cube_size:
            support = self._support(block, position, info)
            if support is not None:
                return f"on top of the {self._block(support)} block"
            if self.family == "chamber":
                return "on top of the drawer"
        return captions.side_in_image(self.pixel(position)[0])

    def _support(self, block: int, position: np.ndarray, info: dict[str, Any]) -> int | None:
        """The block right under `position`, if any."""
        size = self._env._cube_size
        for other in range(self._env._num_cubes):
            below = position - info[f"privileged/block_{other}_pos"]
            if other != block and np.linalg.norm(below[:2]) < size and size < below[2] < 3 * size:
                return other
        return None

    def _table(self, position: np.ndarray) -> str:
        """A place on the table, for example "to the back left of the table"."""
        depth = (position[0] - _TABLE_CENTRE[0]) / _DEPTH_UNIT  # the camera looks along -x: larger x is nearer
        return f"to the {captions.place_in_image(self.pixel(position)[0], depth)} of the table"


def task_of(subgoal: dict[str, Any]) -> str:
    """button, drawer, window, cube or hanoi; only the chamber's subgoals say so themselves."""
    if "task" in subgoal:
        return subgoal["task"]
    for key, task in (("button", "button"), ("disk", "hanoi"), ("block", "cube")):
        if key in subgoal:
            return task
    raise UserError(f"unknown OCBench subgoal {subgoal}")


def wording(level: str, verb: str, facts: Facts, *, phase: str = "") -> tuple[str, ...]:
    """The captions of one event, canonical first: `caption.describe`, but a pressed button is named without its colour,
    which the press has changed."""
    if verb == "retract" and facts.thing.name == "button":
        facts = facts.with_thing(Thing("button"))
    return captions.describe(level, verb, facts, phase=phase)
