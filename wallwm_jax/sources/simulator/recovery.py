"""Recoveries: an OCBench expert is disturbed just before a contact and goes on from there (WALL-WM section 1.7).

The expert acts a demonstration again up to shortly before a grasp, a press, a pull, a lowering or a release. That
restores the simulator exactly, what its wrappers and the expert remember included. Then one thing goes wrong, within
bounds: a draw from a small ball around the nominal contact. What follows is recorded: the expert's way back and the
rest of the subtask. The recording begins when the disturbance is over, because its commands are mistakes: no window
may hold them as a target, and the paper perturbs where the robot starts, not what it learns to do.

    hand      arm pushed aside by 2 to 6 cm, never down, and turned by up to 20 degrees
    gripper   open fingers closed too early, closed ones opened too early
    object    the block to grasp moved on the table by 2 to 5 cm

With something in its hand that has only been pushed aside, the expert moves back and replays its plan from where it
was; otherwise it plans the same subtask anew. Only recoveries that achieve it are kept. Their spans are those of this
one subtask, so training of a planner, which learns what comes before and after, leaves them out by `data.mixture`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wallwm_jax.events.caption import Facts
from wallwm_jax.sources.simulator import expert
from wallwm_jax.sources.simulator.expert import Rollout
from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv
from wallwm_jax.sources.simulator.scene import task_of

KINDS = ("hand", "gripper", "object")
HAND_M = (0.02, 0.06)  # radius of the ball around the contact pose
HAND_YAW = 0.35  # radians
OBJECT_M = (0.02, 0.05)
_LEAD = (1, 5)  # control steps before the contact, half-open
_STEPS = 6  # control steps that the disturbance takes, until hand and objects are at rest again
_LEAST_M, _LEAST_GRIPPER = 0.01, 0.2  # a smaller effect is nothing to recover from
_BACK_M = 0.02  # the hand is back where it was
_SLIP_M = 0.01  # how much further than it is pushed a block may go

_MOVING = ("pull", "push", "slide")

# What can go wrong before an action, by its verb; "object" for loose blocks alone.
_DISTURBED = {
    "press": ("hand",),
    "grasp": ("hand", "gripper", "object"),
    **dict.fromkeys(_MOVING, ("hand", "gripper")),
    "lower": ("hand", "gripper"),
    "release": ("hand",),
}


@dataclass(frozen=True)
class Contact:
    """An action that makes or breaks contact: its verb, what can go wrong before it, the control step at which it
    starts, and the earliest at which something goes wrong: at a handle its own, else in the action before."""

    verb: str
    kinds: tuple[str, ...]
    step: int
    earliest: int


@dataclass(frozen=True)
class Disturbance:
    """What goes wrong: `kind` of `KINDS`, before control step `step`, on the way to an action of verb `contact`; the
    hand or the object goes `[3]` metres `shift`, the hand turns by `yaw` radians. The expert goes on with `seed`."""

    kind: str
    contact: str
    step: int
    seed: int
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0

    @property
    def resumes(self) -> bool:
        """Whether the expert still holds what it held, and goes on with its plan."""
        return self.kind == "hand" and self.contact in ("lower", "release")

    @property
    def recovers(self) -> str:
        """Verb of the action that sets things right again: what was in the hand must be grasped anew."""
        return self.contact if self.resumes or self.contact == "press" else "grasp"


@dataclass(frozen=True)
class Recovery:
    """What came of a disturbance.

    Attributes:
      outcome: "kept"; "failed" where the expert did not achieve the subtask; "void" where the disturbance changed
        nothing, or the subtask was achieved all the same.
      rollout: from the end of the disturbance to the end of the subtask; None unless kept.
      told: what went wrong, in words, with what was measured.
    """

    outcome: str
    rollout: Rollout | None = None
    told: str = ""


def contacts(rollout: Rollout) -> list[Contact]:
    """The contacts of a successful demonstration at which it can be disturbed, in time order."""
    spans, found = expert.spans(rollout), []
    for before, action in itertools.pairwise(spans["action"]):
        goal = rollout.subtasks[rollout.labels[action.start].subtask].goal
        subtask = spans["subtask"][action.parent or 0]
        known = action.verb in _DISTURBED and before.parent == action.parent
        if not known or action.success is False or not subtask.success:
            continue
        if action.verb == "release" and subtask.verb != "place":
            continue  # a drawer or window is already where it belongs
        kinds = _DISTURBED[action.verb]
        if task_of(goal) != "cube" or before.verb != "descend":
            kinds = tuple(kind for kind in kinds if kind != "object")
        if task_of(goal) == "hanoi" and action.verb == "lower":  # no longer on the peg that the caption would name
            kinds = tuple(kind for kind in kinds if kind != "gripper")
        earliest = action.start if action.verb in _MOVING else before.start + 1  # the controller has begun the subtask
        found.append(Contact(action.verb, kinds, action.start, earliest))
    return found


def draw(found: list[Contact], random: np.random.Generator) -> Disturbance:
    """One disturbance of one of these contacts: first its kind, then the contact, each evenly."""
    kinds = [kind for kind in KINDS if any(kind in contact.kinds for contact in found)]
    kind = kinds[random.integers(len(kinds))]
    fit = [contact for contact in found if kind in contact.kinds]
    contact = fit[random.integers(len(fit))]
    step, seed = max(contact.earliest, contact.step - int(random.integers(*_LEAD))), int(random.integers(2**31))
    if kind == "gripper":
        return Disturbance(kind, contact.verb, step, seed)
    direction = random.normal(size=3)
    if kind == "object":  # while the hand is still above it
        direction[2] = 0.0
        shift = direction / np.linalg.norm(direction) * random.uniform(*OBJECT_M)
        return Disturbance(kind, contact.verb, contact.earliest, seed, tuple(shift.tolist()))
    direction[2] = abs(direction[2])
    shift = direction / np.linalg.norm(direction) * random.uniform(*HAND_M)
    yaw = float(random.uniform(-HAND_YAW, HAND_YAW))
    return Disturbance(kind, contact.verb, step, seed, tuple(shift.tolist()), yaw)


def recover(
    env: OCBenchEnv,
    make_controller: Callable[[Any], Any],
    seed: int,
    nominal: Rollout,
    disturbance: Disturbance,
    stride: int,
) -> Recovery:
    """Disturbs the demonstration `nominal` of scene `seed` and records how the expert recovers. Deterministic."""
    told = ""

    def disturb(env: OCBenchEnv, controller: Any) -> Facts | None:
        nonlocal told
        told = disturb_expert(env, controller, nominal, disturbance)
        np.random.seed(disturbance.seed)  # noqa: NPY002  (OCBench's experts draw from numpy's global generator)
        if not disturbance.resumes:
            _plan_anew(env, controller)
            return None
        _resume(env, controller)
        return nominal.subtasks[nominal.labels[disturbance.step].subtask].facts

    try:
        rollout = expert.roll_out(env, make_controller, seed, stride, disturb=disturb)
    except _NothingToRecoverError:
        return Recovery("void")
    except _EpisodeOverError:
        return Recovery("failed")
    if not rollout.subtasks[0].success:
        return Recovery("failed")
    return Recovery("kept", replace(rollout, recovers=disturbance.recovers), told)


def slid(way: np.ndarray) -> bool:
    """Whether a block that went `way [3]`, metres, stayed on the table: neither fell, climbed nor was thrown."""
    return bool(np.linalg.norm(way[:2]) <= OBJECT_M[1] + _SLIP_M and abs(way[2]) <= _SLIP_M)


def disturb_expert(env: OCBenchEnv, controller: Any, nominal: Rollout, disturbance: Disturbance) -> str:
    """Lets a reset controller act up to the disturbance, and disturbs it; returns what went wrong, in words."""
    for step in range(disturbance.step):
        env.step_joints(controller.select_action(None, env.info, transition_idx=step), render=False)
    start, simulator, kind = env.observe(render=False), env.env.unwrapped, disturbance.kind
    pose, gripper = start.pose.copy(), nominal.command_grippers[disturbance.step - 1]
    subgoal, name = controller._active_subgoal, f"privileged/block_{controller._active_subgoal.get('block')}_pos"
    if kind == "hand":
        cos, sin = np.cos(disturbance.yaw), np.sin(disturbance.yaw)
        pose[0, :3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ pose[0, :3, :3]
        pose[0, :3, 3] += disturbance.shift
    elif kind == "gripper":
        gripper = 1.0 - gripper.round()
    else:
        before = env.info[name]
        simulator._data.joint(f"object_joint_{subgoal['block']}").qpos[:3] += disturbance.shift
    for _ in range(_STEPS):
        end, over, _ = env.step(pose, gripper, render=False)
        if over:
            raise _NothingToRecoverError if env.success else _EpisodeOverError
    if kind == "gripper":
        effect, least = abs(float(end.gripper[0] - start.gripper[0])), _LEAST_GRIPPER
        told = f"the gripper {'closed' if gripper[0] else 'opened'} too early"
    else:
        way = end.pose[0, :3, 3] - start.pose[0, :3, 3] if kind == "hand" else env.info[name] - before
        if kind == "object" and not slid(way):
            raise _NothingToRecoverError
        effect, least = float(np.linalg.norm(way)), _LEAST_M
        what = "hand" if kind == "hand" else "block"
        told = f"the {what} was pushed aside by {1000 * effect:.0f} mm"
    if effect < least or controller._subtask_success(subgoal, env.info):
        raise _NothingToRecoverError
    return f"{told} before the {disturbance.contact}"


def _plan_anew(env: OCBenchEnv, controller: Any) -> None:
    """Plans the subtask under way from where things are now."""
    describe = getattr(controller, "_planner_target", controller._target_info)
    _agent(controller).reset(None, env.info, describe(controller._active_subgoal, env.info))


def _resume(env: OCBenchEnv, controller: Any) -> None:
    """Stops the plan's clock until the hand is back where it was: a gate, as OCBench's primitives have them."""
    agent = _agent(controller)
    agent._last_time = env.info["time"][0]
    planned = agent._plan[min(int((agent._plan_time + 1e-7) // agent._env_dt), len(agent._plan) - 1)]
    agent._gates.insert(0, dict(time=agent._plan_time, xyz=planned[:3].copy(), pos_tol=_BACK_M, passed=False))


def _agent(controller: Any) -> Any:
    return getattr(controller, "_active_agent", None) or controller._agent


class _NothingToRecoverError(Exception):
    """The disturbance left things as good as they were."""


class _EpisodeOverError(Exception):
    """The disturbance ended the episode."""
