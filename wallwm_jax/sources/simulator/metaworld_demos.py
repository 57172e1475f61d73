"""Demonstrations from MetaWorld's fifty scripted experts: successful episodes with video, commands and calibration.

    for episode in demonstrations(["push", "drawer-open"], episodes=10, seed=0): ...

A Sawyer arm at 80 Hz, its hand always pointing down. The base frame has x forward, y left, z up, which is MetaWorld's
world turned by a quarter; the pose is that of the point between the finger tips, its z axis out of the hand. Commands
are the positions to which the arm is pulled, the gripper's is the closing effort, 0 to 1.

True events: the action level holds the stages of the expert, told apart by which lines of its policy run at a step, for
the tasks in `STAGED`, whose experts go through the same stages in at least eight of ten episodes. Other tasks have the
task level alone; `events.segment` finds events in all of them.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import CameraTrack, Episode, Span
from wallwm_jax.sources.simulator import rendering
from wallwm_jax.sources.simulator.expert import Run, runs
from wallwm_jax.sources.simulator.ocbench_demos import Demonstrations, FamilyCount, attempt_seed, encode_jpeg, generate

EMBODIMENT = "sawyer"
CLOCK_HZ = 80.0
VIDEO_STRIDE = 4  # 20 frames per second
VIEWS = ("corner4", "gripperPOV")
SHORTEST_STAGE = 4  # control steps; shorter stages join a neighbour

# Task → its instruction.
TASKS = {
    "assembly": "put the wrench onto the peg",
    "basketball": "put the ball into the basket",
    "bin-picking": "move the block into the other bin",
    "box-close": "put the lid onto the box",
    "button-press-topdown": "press the button down",
    "button-press-topdown-wall": "press the button down, over the wall",
    "button-press": "press the button",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the wrench off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hit the nail with the hammer",
    "hand-insert": "move the hand into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "put the peg into the hole in the side",
    "peg-unplug-side": "pull the peg out of the hole in the side",
    "pick-out-of-hole": "take the puck out of the hole",
    "pick-place": "bring the puck to the goal",
    "pick-place-wall": "bring the puck over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet sideways",
    "plate-slide-side": "slide the plate into the cabinet sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the block onto the shelf",
    "soccer": "kick the ball into the goal",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}

# Tasks whose experts go through the same stages in at least eight of ten episodes, as `stage_consistency` found.
STAGED: tuple[str, ...] = (
    "assembly", "bin-picking", "button-press", "button-press-topdown", "button-press-topdown-wall", "coffee-button",
    "coffee-pull", "coffee-push", "dial-turn", "door-open", "drawer-close", "drawer-open", "faucet-close",
    "faucet-open", "hammer", "hand-insert", "pick-out-of-hole", "pick-place", "plate-slide", "plate-slide-back-side",
    "plate-slide-side", "push", "stick-push", "window-close", "window-open",
)  # fmt: skip

_CLOSES = 0.15  # change of the measured closing fraction within a stage that grasps or releases
_SOURCE = "metaworld/"  # an episode's source is this and its task
_STAGE_FUNCTIONS = ("get_action", "_desired_pos", "_grab_effort", "_grab_pow", "_desired_xyz")
_CAPTIONS = {
    "reach": "move the open hand",
    "descend": "move the hand down",
    "retract": "move the hand up",
    "grasp": "close the gripper",
    "release": "open the gripper",
    "lift": "lift with the gripper closed",
    "lower": "move down with the gripper closed",
    "carry": "move with the gripper closed",
}
_BASE_FROM_WORLD = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
_HAND_AXES = np.array(
    [[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]
)  # the body's x axis points out of the hand, the pose's z does


def demonstrations(
    tasks: Sequence[str],
    episodes: int | Mapping[str, int],
    seed: int,
    *,
    size: int = 64,
    views: Sequence[str] = VIEWS,
    workers: int = 2,
) -> Demonstrations:
    """Successful expert episodes, in an order and with contents that depend on the arguments alone, `workers` excepted.

    Args:
      tasks: keys of `TASKS`.
      episodes: to keep of each task, or task → how many; failed attempts are replaced by further ones.
      seed: of the whole set; another seed gives other episodes.
      size: pixels of the square pictures.
      views: MuJoCo camera names.
      workers: spawned processes; 0 records in this process.

    Raises:
      UserError: unknown task, missing simulator or GL, or (while iterating) an expert that keeps failing.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"unknown MetaWorld task {unknown[0]!r}; give some of {', '.join(TASKS)}")
    rendering.check_rendering()
    try:
        import metaworld  # noqa: F401
    except ImportError as error:
        raise UserError(f"MetaWorld is not installed ({error}); run: pip install 'wallwm_jax[sim]'") from error
    counts = {task: FamilyCount() for task in tasks}
    record = functools.partial(record_attempt, seed=seed, size=size, views=tuple(views))
    return Demonstrations(generate({task: (task,) for task in tasks}, counts, episodes, record, workers), counts)


def record_attempt(job: tuple[str, str, int], *, seed: int, size: int, views: tuple[str, ...]) -> Episode | None:
    """Records attempt `job` = (task, task, number); None where the expert failed."""
    task, _, number = job
    episode_seed = attempt_seed(_SOURCE + task, seed, number)
    rollout = _roll_out(task, episode_seed, size, views)
    if rollout is None:
        return None
    steps = len(rollout.stages)
    spans = {"task": [Span(0, steps, TASKS[task], "task", success=True)]}
    if task in STAGED:
        spans["action"] = _stage_spans(rollout)
    return Episode(
        episode_id=f"{_SOURCE}{task}/{seed}/{number}",
        source=_SOURCE + task,
        embodiment=EMBODIMENT,
        clock_hz=CLOCK_HZ,
        video_stride=VIDEO_STRIDE,
        size=(size, size),
        frames=rollout.frames,
        poses=np.stack(rollout.poses)[:, None],
        grippers=np.array(rollout.grippers)[:, None],
        command_poses=np.stack(rollout.command_poses)[:, None],
        command_grippers=np.array(rollout.command_grippers)[:, None],
        spans=spans,
        cameras={
            view: CameraTrack(rollout.intrinsics[view], np.stack(extrinsics))
            for view, extrinsics in rollout.extrinsics.items()
        },
        seed=episode_seed,
        success=True,
    )


@dataclass
class _Rollout:
    """What was recorded: `T` commands and stages, `T + 1` poses and grippers."""

    frames: dict[str, list[bytes]]
    intrinsics: dict[str, np.ndarray]
    extrinsics: dict[str, list[np.ndarray]]
    poses: list[np.ndarray]
    grippers: list[float]
    command_poses: list[np.ndarray]
    command_grippers: list[float]
    stages: list[frozenset[tuple[str, int]]]


def _roll_out(task: str, seed: int, size: int, views: tuple[str, ...]) -> _Rollout | None:
    """The expert's episode until its first success, on to the next stored frame; None where it fails."""
    env, renderer = _environment(task, size)
    env.seed(seed)
    observation, _ = env.reset()
    policy = _policy(task)
    rollout = _Rollout({view: [] for view in views}, {}, {view: [] for view in views}, [], [], [], [], [])

    def observe() -> None:
        pose = _hand(env, env.tcp_center)
        if len(rollout.poses) % VIDEO_STRIDE == 0:
            for view in views:
                _take_picture(rollout, env, renderer, view, size)
        rollout.poses.append(pose)
        rollout.grippers.append(1.0 - float(observation[3]))

    observe()
    success = False
    while not success or len(rollout.stages) % VIDEO_STRIDE:
        if env.curr_path_length >= env.max_path_length:
            return None
        with _executed_lines(policy) as stage, warnings.catch_warnings(action="ignore", category=UserWarning):
            action = np.clip(policy.get_action(observation), -1, 1)
        rollout.stages.append(frozenset(stage))
        offset = env.tcp_center - env.data.body("hand").xpos
        observation, _, _, _, info = env.step(action)
        rollout.command_poses.append(_hand(env, env.data.mocap_pos[0] + offset))
        rollout.command_grippers.append(float(np.clip(action[3], 0, 1)))
        success = success or bool(info["success"])
        observe()
    return rollout


def _hand(env: Any, position: np.ndarray) -> np.ndarray:
    """Pose `[4, 4]` in the base frame of the hand at a position of the world."""
    pose = np.eye(4)
    pose[:3, :3] = env.data.body("hand").xmat.reshape(3, 3) @ _HAND_AXES
    pose[:3, 3] = position
    return _BASE_FROM_WORLD @ pose


def _take_picture(rollout: _Rollout, env: Any, renderer: rendering.SceneRenderer, view: str, size: int) -> None:
    picture, pose = renderer.render(env.data, view), rendering.camera_pose(env.data, view)
    if view.startswith("corner"):  # these cameras hang upside down
        picture, pose = picture[::-1, ::-1], pose @ np.diag([-1.0, -1.0, 1.0, 1.0])
    rollout.frames[view].append(encode_jpeg(np.ascontiguousarray(picture)))
    rollout.intrinsics[view] = rendering.camera_intrinsics(env.model, view, size)
    rollout.extrinsics[view].append(_BASE_FROM_WORLD @ pose)


@contextmanager
def _executed_lines(policy: Any) -> Iterator[set[tuple[str, int]]]:
    """Collects (function, line of the function) of the policy's own decisions that run inside the block."""
    lines: set[tuple[str, int]] = set()
    file = sys.modules[type(policy).__module__].__file__

    def line(frame: Any, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            lines.add((frame.f_code.co_name, frame.f_lineno - frame.f_code.co_firstlineno))
        return line

    def call(frame: Any, event: str, _: Any) -> Callable[..., Any] | None:
        mine = frame.f_code.co_filename == file and frame.f_code.co_name in _STAGE_FUNCTIONS
        return line if mine else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield lines
    finally:
        sys.settrace(before)


def stage_consistency(task: str, seed: int, episodes: int = 10) -> float:
    """Share of successful episodes whose expert goes through the commonest sequence of stages; pictures are not drawn.

    Raises:
      UserError: the expert keeps failing.
    """
    sequences: Counter[tuple[Any, ...]] = Counter()
    for number in range(3 * episodes):
        rollout = _roll_out(task, attempt_seed(_SOURCE + task, seed, number), 32, ())
        if rollout is not None:
            sequences[tuple(rollout.stages[run.of] for run in _stage_runs(rollout))] += 1
        if sequences.total() == episodes:
            return sequences.most_common(1)[0][1] / episodes
    raise UserError(f"the expert of {task} keeps failing: {sequences.total()} of {3 * episodes}; leave this task out")


def _stage_runs(rollout: _Rollout) -> list[Run]:
    return runs(rollout.stages, 0, len(rollout.stages), SHORTEST_STAGE)


def _stage_spans(rollout: _Rollout) -> list[Span]:
    verbs = [(run.start, run.end, _verb(rollout, run.start, run.end)) for run in _stage_runs(rollout)]
    return [Span(start, end, _CAPTIONS[verb], verb, 0) for start, end, verb in verbs]


def _verb(rollout: _Rollout, start: int, end: int) -> str:
    """Named by what the fingers do, else by the way of the hand; fingers that were never open hold nothing."""
    closing = rollout.grippers[end] - rollout.grippers[start]
    if abs(closing) > _CLOSES:
        return "grasp" if closing > 0 else "release"
    holds = rollout.command_grippers[end - 1] > 0 and min(rollout.command_grippers[: start + 1]) == 0
    travel = rollout.poses[end][:3, 3] - rollout.poses[start][:3, 3]
    steep = abs(travel[2]) > np.linalg.norm(travel[:2])
    if holds:
        return ("lift" if travel[2] > 0 else "lower") if steep else "carry"
    return ("retract" if travel[2] > 0 else "descend") if steep else "reach"


@functools.lru_cache(maxsize=8)
def _environment(task: str, size: int) -> tuple[Any, rendering.SceneRenderer]:
    import metaworld

    env = metaworld.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"]()
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    return env, rendering.SceneRenderer(env.model, size)


def _policy(task: str) -> Any:
    import metaworld.policies

    experts: dict[str, Any] = metaworld.policies.ENV_POLICY_MAP
    return experts[f"{task}-v3"]()
