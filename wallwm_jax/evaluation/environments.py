"""Simulated robots in worker processes: each slot holds one OCBench episode with its scripted planner. No JAX here.

The pool moves in events or chunks, not in control steps: a worker plays all of their commands and answers with the
next `Situation`. Pictures are rendered only where a policy looks, or where a rollout is filmed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from wallwm_jax.events.actions import absolute_commands, relative_actions
from wallwm_jax.sources.simulator.ocbench_env import Observation, OCBenchEnv
from wallwm_jax.sources.simulator.planner import PlannedEvent, ScriptedPlanner

_FINISHING = ("release", "retract")  # actions that may follow the moment in which a subtask is achieved


@dataclass(frozen=True)
class Trial:
    """One closed-loop episode: an environment and the seed of its reset."""

    env_id: str
    seed: int


@dataclass(frozen=True)
class Rules:
    """What the planner says and when an episode ends.

    Attributes:
      level: level of the events that the planner names: "subtask" or "action".
      patience: control steps that a subtask may take, as a multiple of the expert's typical duration; this many tries.
      max_steps: control steps of an episode.
      durations: typical seconds per (level, verb); the planner's own where one is missing.
    """

    level: str = "subtask"
    patience: float = 3.0
    max_steps: int = 600
    durations: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class SubtaskResult:
    """One subtask that was tried: whether it was achieved, and the events and control steps that took."""

    caption: str
    verb: str
    success: bool
    events: int
    steps: int


@dataclass(frozen=True)
class Situation:
    """What a policy is told between two events, and what has happened so far.

    Attributes:
      frames: view name → `[H, W, 3]` uint8; empty once the episode is over.
      pose, gripper: `[G, 4, 4]`, `[G]` measured.
      caption, verb, duration_s: the event that comes next, by the scripted planner, and its typical duration; empty
        once the episode is over.
      over: whether the episode has ended.
      success: whether the episode achieved its task.
      subtasks: the subtasks tried so far; those that were not achieved are listed once the episode is over.
      steps: control steps so far.
      film: view name → frames of what was just played, at the video rate, the last one now: as many as a policy with a
        history looks back at (`recent`), all of them where filming was asked for.
      instruction: the task; empty once the episode is over.
    """

    frames: Mapping[str, np.ndarray]
    pose: np.ndarray
    gripper: np.ndarray
    caption: str = ""
    verb: str = ""
    duration_s: float = 0.0
    over: bool = False
    success: bool = False
    subtasks: tuple[SubtaskResult, ...] = ()
    steps: int = 0
    film: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    instruction: str = ""


class Episode:
    """One closed-loop episode in this process; the pool runs many of them in its workers."""

    def __init__(
        self, env: OCBenchEnv, trial: Trial, rules: Rules, *, video_stride: int, film: bool = False, recent: int = 0
    ) -> None:
        """Resets `env` to the trial; `film` keeps a frame of every `video_stride`-th step, `recent` the last few."""
        self._env, self._rules, self._stride = env, rules, video_stride
        self._filmed = rules.max_steps if film else recent * video_stride  # control steps before an observation
        self._observation = env.reset(trial.seed)
        self._planner = ScriptedPlanner(env, durations=rules.durations)
        self._planner.reset()
        self._tried: list[_Tried] = []
        self._steps, self._ended = 0, False
        self._event = self._next_event()

    def play(self, poses: np.ndarray, grippers: np.ndarray) -> Situation:
        """Plays the commands of one event or chunk, `[T, G, 4, 4]` and `[T, G]`; stops where the episode ends."""
        film: dict[str, list[np.ndarray]] = {view: [] for view in self._env.views} if self._filmed else {}
        count = min(len(poses), self._rules.max_steps - self._steps)
        for step in range(count):
            shown = step >= count - self._filmed and (self._steps + 1) % self._stride == 0
            observation, done, _ = self._env.step(poses[step], grippers[step], render=shown)
            self._steps += 1
            for view in film if shown else ():
                film[view].append(observation.frames[view])
            if done:
                self._ended = True
                break
        current = self._tried[-1]
        current.events += 1
        current.steps += step + 1 if count else 0
        current.success = current.success or current.planned.is_done()
        self._ended |= self._steps >= self._rules.max_steps
        self._ended |= not current.success and current.steps >= current.budget
        self._event = None if self._ended else self._next_event()
        return self.situation(film)

    def end(self) -> Situation:
        """Ends the episode where it stands, as a planner does that takes the task for done."""
        self._event = None
        return self.situation()

    def situation(self, film: Mapping[str, Sequence[np.ndarray]] | None = None) -> Situation:
        """Where the episode stands."""
        over = self._event is None
        self._observation = self._env.observe(render=not over)
        results = [
            SubtaskResult(tried.planned.caption, tried.planned.verb, tried.success, tried.events, tried.steps)
            for tried in self._tried
            if tried.success or over
        ]
        event: dict[str, Any] = {}
        if self._event is not None:
            event = dict(caption=self._event.caption, verb=self._event.verb, duration_s=self._event.duration_s)
            event["instruction"] = self._planner.instruction
        return Situation(
            frames=self._observation.frames,
            pose=self._observation.pose,
            gripper=self._observation.gripper,
            over=over,
            success=self._env.success,
            subtasks=tuple(results),
            steps=self._steps,
            film=film or {},
            **event,
        )

    def _next_event(self) -> PlannedEvent | None:
        """The planner's next event; opens a new subtask where it belongs to one."""
        event = self._planner.next_event(self._rules.level)
        if event is None:
            return None
        caption = event.caption if self._rules.level == "subtask" else event.parent_caption
        current = self._tried[-1] if self._tried else None
        if current is not None and current.planned.caption == caption:
            finishing = self._rules.level == "action" and event.verb in _FINISHING
            if not current.success or finishing:
                return event if current.steps < current.budget else None
        subtask = self._planner.next_event("subtask")
        if subtask is None:
            return None
        again = next((t for t in self._tried if t.planned.caption == subtask.caption and not t.success), None)
        if again is not None:  # one that was left for another comes back: its budget goes on
            self._tried.remove(again)
            again.planned = subtask
        budget = self._rules.patience * subtask.duration_s * self._env.clock_hz
        self._tried.append(again or _Tried(subtask, budget))
        return event if self._rules.level == "action" else subtask


@dataclass
class _Tried:
    planned: PlannedEvent
    budget: float
    success: bool = False
    events: int = 0
    steps: int = 0


def replay_expert(env: OCBenchEnv, trial: Trial, level: str) -> Situation | None:
    """Records the expert, resets, and plays its commands through the canonical actions, one event after the other.

    None where the expert itself fails, as it does in some of a hundred episodes of `chamber`.

    Each event's actions are taken relative to the recorded pose at its start and applied to the pose measured in the
    replay, as a policy's are. Subtasks are judged in the replay, by the expert's own goals.
    """
    from wallwm_jax.sources.simulator import expert
    from wallwm_jax.sources.simulator.ocbench_demos import controller_factory

    goals: dict[int, Any] = {}
    controllers = []

    def make_controller(simulator: Any) -> Any:
        """The expert, which notes the goal of each of its segments where it judges it."""
        controller = controller_factory(trial.env_id)(simulator)
        judge = controller._subtask_success

        def noted(goal: Any, info: Any) -> bool:
            goals[len(controller.segments)] = dict(goal)
            return judge(goal, info)

        controller._subtask_success = noted
        controllers.append((controller, judge))
        return controller

    rollout = expert.roll_out(env, make_controller, trial.seed, 1)
    if not rollout.success:
        return None
    _, judge = controllers[0]
    spans = expert.spans(rollout)
    observation: Observation = env.reset(trial.seed, render=False)
    subtasks: list[SubtaskResult] = []
    for span in spans[level]:
        stretch = slice(span.start, span.end)
        recorded = rollout.observations[span.start].pose
        actions, _ = relative_actions(rollout.command_poses[stretch], rollout.command_grippers[stretch], recorded)
        for pose, gripper in zip(*absolute_commands(actions, observation.pose)):
            observation, _, _ = env.step(pose, gripper, render=False)
        ended = next((s for s in spans["subtask"] if s.end == span.end), None)
        if ended is not None:
            goal = goals.get(rollout.labels[(ended.start + ended.end) // 2].subtask)
            achieved = env.success or (goal is not None and bool(judge(goal, env.info)))
            subtasks.append(SubtaskResult(ended.caption, ended.verb, achieved, 1, ended.length))
    return Situation(
        frames={},
        pose=observation.pose,
        gripper=observation.gripper,
        over=True,
        success=env.success,
        subtasks=tuple(subtasks),
        steps=observation.step,
    )


class EnvironmentPool:
    """Slots `0 .. slots - 1` of closed-loop episodes, spread over worker processes; use it in a `with` block.

    An error in a worker is raised here.
    """

    def __init__(
        self, slots: int, *, views: Sequence[str], size: int, video_stride: int, rules: Rules, processes: int = 2
    ) -> None:
        """`views` and `size` (pixels) as the policy was trained; `video_stride`: control steps per filmed frame."""
        context = multiprocessing.get_context("spawn")
        settings = _Settings(tuple(views), size, video_stride, rules)
        self.slots = slots
        self._workers = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_initialize, initargs=(settings,))
            for _ in range(max(1, min(processes, slots)))
        ]

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)

    def start(
        self, trials: Mapping[int, Trial], *, level: str = "", film: Sequence[int] = (), recent: int = 0
    ) -> dict[int, Situation]:
        """Begins a trial in each given slot.

        Args:
          trials: slot → trial.
          level: of the events that the scripted planner names, where it is not the rules'.
          film: slots that record all their frames.
          recent: frames before each observation that the other slots record.
        """
        jobs = {
            slot: self._submit(slot, _start, slot, trial, level, slot in film, recent) for slot, trial in trials.items()
        }
        return _gather(jobs)

    def play(self, commands: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> dict[int, Situation]:
        """Plays an event or chunk per slot: absolute poses `[T, G, 4, 4]`, grippers `[T, G]`, one per control step."""
        return _gather({slot: self._submit(slot, _play, slot, *pair) for slot, pair in commands.items()})

    def end(self, slots: Sequence[int]) -> dict[int, Situation]:
        """Ends the episodes of these slots where they stand."""
        return _gather({slot: self._submit(slot, _end, slot) for slot in slots})

    def replay_experts(self, trials: Sequence[Trial]) -> list[Situation | None]:
        """`replay_expert` on each trial; the final situations, None where the expert itself fails."""
        results = _gather({number: self._submit(number, _replay, trial) for number, trial in enumerate(trials)})
        return [results[number] for number in range(len(trials))]

    def _submit(self, slot: int, function: Any, *arguments: Any) -> Future:
        return self._workers[slot % len(self._workers)].submit(function, *arguments)


@dataclass(frozen=True)
class _Settings:
    views: tuple[str, ...]
    size: int
    video_stride: int
    rules: Rules


class _Worker:
    """What lives in a worker process: one environment per (slot, environment id), and the slots' episodes."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        self.environments: dict[tuple[int, str], OCBenchEnv] = {}
        self.episodes: dict[int, Episode] = {}

    def environment(self, slot: int, env_id: str) -> OCBenchEnv:
        key = slot, env_id
        if key not in self.environments:
            views = self.settings.views if slot >= 0 else ()  # the expert's replay needs no pictures
            self.environments[key] = OCBenchEnv(env_id, views, self.settings.size)
        return self.environments[key]


_worker: _Worker


def _initialize(settings: _Settings) -> None:
    global _worker
    _worker = _Worker(settings)


def _start(slot: int, trial: Trial, level: str, film: bool, recent: int) -> Situation:
    settings = _worker.settings
    env = _worker.environment(slot, trial.env_id)
    rules = replace(settings.rules, level=level or settings.rules.level)
    episode = Episode(env, trial, rules, video_stride=settings.video_stride, film=film, recent=recent)
    _worker.episodes[slot] = episode
    return episode.situation()


def _play(slot: int, poses: np.ndarray, grippers: np.ndarray) -> Situation:
    return _worker.episodes[slot].play(poses, grippers)


def _end(slot: int) -> Situation:
    return _worker.episodes[slot].end()


def _replay(trial: Trial) -> Situation | None:
    return replay_expert(_worker.environment(-1, trial.env_id), trial, _worker.settings.rules.level)


def _gather(jobs: Mapping[int, Future]) -> dict[int, Any]:
    return {slot: job.result() for slot, job in jobs.items()}
