"""One OCBench expert episode as a list of labelled steps, and those steps as nested spans with captions.

The expert follows plans of named keyframes. For each control step we keep the plan it follows, its place between two
keyframes and whether it waits at a gate, which gives the action level (phases) and the segment level (raw intervals,
retries, waits); the controller's own log gives subtasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wallwm_jax.events.caption import Facts
from wallwm_jax.events.schema import Span
from wallwm_jax.sources.simulator.ocbench_env import Observation, OCBenchEnv
from wallwm_jax.sources.simulator.scene import Scene, wording

MIN_STEPS = 2  # shorter spans join a neighbour inside the same parent

# Keyframe that an interval leads to → phase; numbered midpoints are looked up without their number.
_PHASES = {
    "CubePrimitive": dict(
        pick="reach", pick_start="descend", pick_end="grasp", pick_hold="grasp", postpick="lift", clearance="carry",
        place="carry", place_start="lower", place_end="release", postplace="retract", final="retract",
    ),
    "HanoiPrimitive": dict(
        lift="reach", pick="reach", pick_start="descend", pick_end="grasp", extract="lift", postpick="lift",
        clearance="carry", place="carry", insert="lower", place_start="lower", place_end="release",
        postplace="retract", final="retract",
    ),
    "ButtonPrimitive": dict(
        approach_midpoint="reach", press_start="reach", press="press", press_end="retract", final="retract",
    ),
    "DrawerPrimitive": dict(
        approach="reach", grasp_start="descend", grasp_end="grasp", move_midpoint="move", move="move",
        release="release", clearance="retract", final="retract",
    ),
}  # fmt: skip
_PHASES["WindowPrimitive"] = _PHASES["DrawerPrimitive"]
_PICKING = ("reach", "descend", "grasp")


@dataclass(frozen=True)
class StepLabel:
    """What the expert does in one control step."""

    subtask: int  # index of the controller's subgoal
    plan: int  # counts plans of the episode; a new one in the same subtask is a retry
    interval: int  # keyframe interval of that plan
    verb: str  # phase
    waiting: bool = False  # holds at a gate until the arm has come close enough
    retry: bool = False


@dataclass(frozen=True)
class Subtask:
    """One subgoal of the controller with what captions may say about it, as it stood when the subgoal began.

    `goal` is the controller's own description of the subgoal, which `Rollout.achieved` takes.
    """

    verb: str
    facts: Facts
    success: bool
    goal: dict[str, Any]


@dataclass(frozen=True)
class Rollout:
    """A recorded expert episode: `T` steps, `T + 1` observations (with pictures at every `stride`-th).

    `achieved(goal, info)` is the controller's judgement of a subtask's goal in any privileged state `info`.
    `recovers` is, of a recovery, the verb of the contact that was disturbed and that it leads back to.
    """

    instruction: tuple[str, ...]
    observations: list[Observation]
    command_poses: np.ndarray
    command_grippers: np.ndarray
    labels: list[StepLabel]
    subtasks: list[Subtask]
    success: bool
    achieved: Callable[[dict[str, Any], dict[str, Any]], bool]
    held: bool  # the last command was repeated once, so that the final state is a stored frame
    recovers: str = ""


def roll_out(
    env: OCBenchEnv,
    make_controller: Callable[[Any], Any],
    seed: int,
    stride: int,
    *,
    expert_seed: int | None = None,
    disturb: Callable[[OCBenchEnv, Any], Facts | None] | None = None,
) -> Rollout:
    """Lets the expert act until the episode is over. Deterministic, also on a used environment, from the scene's `seed`
    and the expert's own, by default the same.

    `disturb` is called with the environment and its controller before anything is recorded: it lets the controller act,
    disturbs what it does, and leaves it with a plan. The recording then starts there and ends with the subtask that is
    under way. It may return what captions say about that subtask, where that is not how things stand now.
    """
    observation = env.reset(seed, render=disturb is None)
    # OCBench's experts draw from numpy's global generator.
    np.random.seed((seed if expert_seed is None else expert_seed) % 2**32)  # noqa: NPY002
    scene = Scene(env.env)
    controller = make_controller(env.env)
    labels: list[StepLabel] = []
    subtasks: list[tuple[str, Facts, dict[str, Any], int]] = []  # the last is the index of its first plan
    poses: list[np.ndarray] = []
    grippers: list[float] = []
    subgoal, done, success = None, False, False
    with _recorded_plans() as plans, _recorded_commands(env) as commands:
        controller.reset(None, env.info, transition_idx=0)
        known = None
        if disturb is not None:
            known = disturb(env, controller)
            observation = env.observe()
            commands.clear()
        observations, earlier = [observation], len(controller.segments)
        while not done:
            action = controller.select_action(None, env.info, transition_idx=len(poses))
            if controller.done:
                break
            if controller._active_subgoal is not subgoal:
                if disturb is not None and subgoal is not None:
                    break
                subgoal = controller._active_subgoal
                facts = known or scene.facts(subgoal, env.info)
                subtasks.append((scene.subtask_verb(subgoal), facts, dict(subgoal), len(plans) - 1))
            pose, gripper = commands.pop() if commands else (observation.pose[0], float(observation.gripper[0]))
            poses.append(pose)
            grippers.append(gripper)
            labels.append(_label(scene, controller, plans, subtasks, subgoal))
            observation, done, success = env.step_joints(action, render=len(poses) % stride == 0)
            observations.append(observation)
        controller.finish_episode(len(poses) - 1, env.info)
    segments = controller.segments[earlier:]
    complete = success if disturb is None else segments[0]["subtask_success"]
    held = complete and len(poses) % stride != 0
    while complete and len(poses) % stride:
        poses.append(poses[-1])
        grippers.append(grippers[-1])
        labels.append(labels[-1])
        observation, _, _ = env.step(poses[-1], np.array(grippers[-1]), render=len(poses) % stride == 0)
        observations.append(observation)
    return Rollout(
        instruction=scene.instruction(),
        observations=observations,
        command_poses=np.array(poses).reshape(-1, 1, 4, 4),
        command_grippers=np.array(grippers).reshape(-1, 1),
        labels=labels,
        subtasks=[
            Subtask(verb, facts, bool(segment["subtask_success"]), goal)
            for (verb, facts, goal, _), segment in zip(subtasks, segments)
        ],
        success=success,
        achieved=controller._subtask_success,
        held=held,
    )


def _label(scene: Scene, controller: Any, plans: list[Any], subtasks: list[Any], subgoal: dict[str, Any]) -> StepLabel:
    agent = getattr(controller, "_active_agent", None) or controller._agent
    plan = len(plans) - 1
    if getattr(controller, "_active_settle_steps", 0):
        return StepLabel(len(subtasks) - 1, plan, -1, "wait")
    names, times = plans[-1]
    waiting = any(not gate["passed"] and gate["time"] == agent._plan_time for gate in agent._gates)
    passed = times < agent._plan_time if waiting else times <= agent._plan_time  # a gate's keyframe lies still ahead
    interval = int(np.clip(passed.sum() - 1, 0, len(times) - 2))
    keyframe = names[interval + 1].rstrip("0123456789").rstrip("_")
    verb = _PHASES[type(agent).__name__][keyframe]
    if verb == "move":
        verb = scene.move_verb(subgoal)
    retry = plan > subtasks[-1][-1] and verb in _PICKING
    return StepLabel(len(subtasks) - 1, plan, interval, verb, waiting, retry)


@contextlib.contextmanager
def _recorded_plans() -> Iterator[list[tuple[list[str], np.ndarray]]]:
    """Collects (keyframe names, their plan times in seconds) of every plan that an OCBench primitive makes."""
    from ocbench.oracles.primitives.primitive import Primitive

    plans: list[tuple[list[str], np.ndarray]] = []
    original = Primitive.reset_plan

    def recording(self: Any, info: Any, times: dict[str, float], poses: Any, grasps: Any) -> None:
        plans.append((list(times), np.array(list(times.values()))))
        original(self, info, times, poses, grasps)

    Primitive.reset_plan = recording
    try:
        yield plans
    finally:
        Primitive.reset_plan = original


@contextlib.contextmanager
def _recorded_commands(env: OCBenchEnv) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Collects (pose `[4, 4]`, gripper) of every command that the expert turns into a joint action."""
    from ocbench import lie

    simulator = env.env.unwrapped
    commands: list[tuple[np.ndarray, float]] = []
    original = simulator.joint_position_action

    def recording(position: Any, yaw: Any, gripper: Any, effector_rotation: Any = None) -> np.ndarray:
        rotation = lie.SO3.from_z_radians(yaw) if effector_rotation is None else effector_rotation
        pose = np.eye(4)
        pose[:3, :3] = (rotation @ simulator._effector_down_rotation).as_matrix()
        pose[:3, 3] = np.clip(position, *simulator._workspace_bounds)
        commands[:] = [(pose, float(np.clip(gripper, 0.0, 1.0)))]
        return original(position, yaw, gripper, effector_rotation=effector_rotation)

    simulator.joint_position_action = recording
    try:
        yield commands
    finally:
        del simulator.joint_position_action


def spans(rollout: Rollout) -> dict[str, list[Span]]:
    """The four levels of a successful rollout, gap-free over its steps.

    A recovery's actions are segments "recover" up to the one that makes the disturbed contact, that one included.
    """
    labels, steps, recovers = rollout.labels, len(rollout.labels), rollout.recovers
    wordings = rollout.instruction
    levels = {"task": [Span(0, steps, wordings[0], "task", None, wordings[1:], rollout.success or None)]}
    levels |= {"subtask": [], "action": [], "segment": []}

    def add(level: str, run: Run, verb: str, parent: int, success: bool | None, phase: str = "") -> int:
        texts = wording(level, verb, rollout.subtasks[labels[run.of].subtask].facts, phase=phase)
        levels[level].append(Span(run.start, run.end, texts[0], verb, parent, texts[1:], success))
        return len(levels[level]) - 1

    for sub in runs([label.subtask for label in labels], 0, steps):
        subtask = rollout.subtasks[labels[sub.of].subtask]
        in_subtask = add("subtask", sub, subtask.verb, 0, subtask.success)
        for act in runs([(label.plan, label.verb) for label in labels], sub.start, sub.end):
            verb = labels[act.of].verb
            retried = any(label.plan != labels[act.of].plan for label in labels[act.end : sub.end])
            failed = retried and verb in ("grasp", "lift")
            in_action = add("action", act, verb, in_subtask, False if failed else None)
            if recovers == "grasp" and verb not in _PICKING and not failed:
                recovers = ""  # too short a grasp has no action of its own
            if recovers:
                add("segment", act, "recover", in_action, None, wording("action", recovers, subtask.facts)[0])
                recovers = "" if verb == recovers and not failed else recovers
                continue
            keys = [(label.plan, label.verb, label.interval, label.waiting) for label in labels]
            for seg in runs(keys, act.start, act.end):
                label = labels[seg.of]
                name = "settle" if label.waiting else "regrasp" if label.retry else label.verb
                facts = rollout.subtasks[label.subtask].facts
                phase = wording("action", label.verb, facts)[0] if name in ("settle", "regrasp") else ""
                add("segment", seg, name, in_action, None, phase)
    return levels


@dataclass(frozen=True)
class Run:
    """Half-open steps `[start, end)` that share the label of step `of`."""

    start: int
    end: int
    of: int


def runs(keys: Sequence[Any], start: int, end: int, shortest: int = MIN_STEPS) -> list[Run]:
    """Runs of equal keys in `[start, end)`; one below `shortest` joins the run before it, or after it where it
    is the first, and takes over its label."""
    merged: list[Run] = []
    for step in range(start, end):
        if merged and keys[step] == keys[merged[-1].of]:
            merged[-1] = Run(merged[-1].start, step + 1, merged[-1].of)
        else:
            merged.append(Run(step, step + 1, step))
    while len(merged) > 1:
        short = next((index for index, run in enumerate(merged) if run.end - run.start < shortest), None)
        if short is None:
            break
        host = short - 1 if short else 1
        first, last = min(short, host), max(short, host)
        label = merged[host].of
        if last + 1 < len(merged) and keys[merged[last + 1].of] == keys[label]:
            last += 1
        merged[first : last + 1] = [Run(merged[first].start, merged[last].end, label)]
    return merged
