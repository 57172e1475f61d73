"""Closed loop: the model acts in OCBench, event by event, on seeds that nobody trained on.

The loop of event mode (WALL-WM section 5): observe, let a planner name the next event (the scripted one, or a VLM that
sees pictures and what it named before), act for the whole event, observe again. A group of episodes moves in lock-step,
so that inference is one batch per event; their simulators run in worker processes. A group that was started is
finished: stopping episodes halfway would favour the short ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wallwm_jax.console import progress
from wallwm_jax.data.event_store import EventStore
from wallwm_jax.evaluation.environments import EnvironmentPool, Situation, SubtaskResult, Trial
from wallwm_jax.evaluation.statistics import success_rate
from wallwm_jax.events.actions import absolute_commands
from wallwm_jax.events.planning_text import Plan
from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.inference.planner import Planner, PlanRequest
from wallwm_jax.inference.policy import request


@dataclass(frozen=True)
class EpisodeResult:
    """One finished closed-loop episode."""

    trial: Trial
    success: bool
    subtasks: tuple[SubtaskResult, ...]
    steps: int

    @property
    def family(self) -> str:
        """The environment's family, for example "chamber"."""
        return self.trial.env_id.split("-", 1)[0]


@dataclass
class Film:
    """A filmed episode: the caption that was being played at each frame, and the frames of each view."""

    result: EpisodeResult | None = None
    captions: list[str] = field(default_factory=list)
    frames: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))


def run_model(
    pool: EnvironmentPool,
    mode: EventMode,
    trials: Sequence[Trial],
    *,
    label: str,
    planner: Planner | None = None,
    level: str = "subtask",
    own_duration: bool = False,
    films: int = 0,
    deadline: float = float("inf"),
) -> tuple[list[EpisodeResult], list[Film]]:
    """Lets a model act on the trials, in groups of the pool's slots.

    Args:
      pool: where the episodes run.
      mode: the model; its batch size should be the pool's slots.
      trials: in the order in which they are run.
      label: of the progress bar.
      planner: names the events and ends an episode that it takes for done; None is the scripted one. Subtasks are
        judged by the scripted planner's goals in any case.
      level: of the events, for the planner.
      own_duration: ask the model how long each event takes, in place of the planner.
      films: how many episodes of the first group to film.
      deadline: `time.monotonic()` by which to be done; a group is started only if the longest one so far would fit. The
        first is always run.

    Returns:
      results of all episodes that were run, and the films.
    """
    results: list[EpisodeResult] = []
    reels: dict[int, Film] = {}
    groups = [trials[start : start + pool.slots] for start in range(0, len(trials), pool.slots)]
    longest = 0.0
    for number, group in enumerate(progress(groups, total=len(groups), unit="group", label=label)):
        begun = time.monotonic()
        if number and begun + longest > deadline:
            break
        filmed = range(min(films, len(group))) if number == 0 else range(0)
        situations = pool.start(dict(enumerate(group)), film=filmed)
        for slot in filmed:
            reels[slot] = Film()
            _expose(reels[slot], situations[slot].caption, {k: [f] for k, f in situations[slot].frames.items()})
        named = {slot: _Named() for slot in situations}
        while running := [slot for slot, situation in situations.items() if not situation.over]:
            plans = _name(planner, [situations[slot] for slot in running], [named[slot] for slot in running], level)
            ended = [slot for slot, plan in zip(running, plans) if plan.done]
            acting = {slot: plan for slot, plan in zip(running, plans) if not plan.done}
            now = [situations[slot] for slot in acting]
            seeds = [group[slot].seed for slot in acting]
            commands = _act(mode, now, list(acting.values()), seeds, own_duration) if acting else []
            following = pool.play(dict(zip(acting, commands))) | (pool.end(ended) if ended else {})
            for slot in set(acting) & set(filmed):
                _expose(reels[slot], acting[slot].caption, following[slot].film)
            situations |= following
        results += [_result(trial, situations[slot]) for slot, trial in enumerate(group)]
        longest = max(longest, time.monotonic() - begun)
    for slot, reel in reels.items():
        reel.result = results[slot]
    return results, list(reels.values())


def replay_experts(pool: EnvironmentPool, trials: Sequence[Trial]) -> list[EpisodeResult]:
    """Expert commands through the canonical actions, on the same trials: what the action representation allows.

    Trials on which the expert itself fails are left out.
    """
    played = zip(trials, pool.replay_experts(trials))
    return [_result(trial, situation) for trial, situation in played if situation is not None]


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """`subtask` and `episode` success with Wilson 95 % intervals, progress, and counts by family and verb.

    A subtask that was tried counts once, however many events it took. `progress` is the mean number of achieved
    subtasks per episode.
    """
    subtasks = [subtask for result in results for subtask in result.subtasks]
    achieved = sum(subtask.success for subtask in subtasks)
    return {
        "subtask": success_rate(achieved, len(subtasks)).to_json(),
        "episode": success_rate(sum(result.success for result in results), len(results)).to_json(),
        "progress": achieved / max(1, len(results)),
        "by_family": _counts((result.family, subtask.success) for result in results for subtask in result.subtasks),
        "by_verb": _counts((subtask.verb, subtask.success) for subtask in subtasks),
        "trials": [
            {
                "env_id": result.trial.env_id,
                "seed": result.trial.seed,
                "success": result.success,
                "steps": result.steps,
                "subtasks": [[subtask.caption, subtask.success] for subtask in result.subtasks],
            }
            for result in results
        ],
    }


def best_film(films: Iterable[Film]) -> Film | None:
    """The film that shows most: a success first, then most subtasks achieved, then the shortest."""

    def merit(film: Film) -> tuple[bool, int, int]:
        assert film.result is not None
        return film.result.success, sum(s.success for s in film.result.subtasks), -film.result.steps

    return max(films, key=merit, default=None)


@dataclass
class _Named:
    """The events that a planner named in an episode so far, an event tried again once; the frames at the last one."""

    captions: list[str] = field(default_factory=list)
    frames: Mapping[str, np.ndarray] | None = None


def _name(planner: Planner | None, situations: Sequence[Situation], named: Sequence[_Named], level: str) -> list[Plan]:
    """The next event of each situation; adds it to `named`."""
    if planner is None:
        return [Plan(now.caption, now.duration_s, False) for now in situations]
    plans = planner.plan(
        [
            PlanRequest(now.frames, now.instruction, tuple(before.captions), level, before.frames)
            for now, before in zip(situations, named)
        ]
    )
    for now, before, plan in zip(situations, named, plans):
        before.frames = now.frames
        if before.captions[-1:] != [plan.caption]:
            before.captions.append(plan.caption)
    return plans


def _act(
    mode: EventMode, situations: Sequence[Situation], events: Sequence[Plan], seeds: Sequence[int], own_duration: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Absolute commands of the next event of each situation."""
    requests = [
        request(now, event.caption, None if own_duration else event.duration_s)
        for now, event in zip(situations, events)
    ]
    noise = [(seed + now.steps) % 2**32 for seed, now in zip(seeds, situations)]
    plans = mode.plan(requests, seeds=noise)
    return [absolute_commands(plan.actions, now.pose) for plan, now in zip(plans, situations)]


def _expose(film: Film, caption: str, frames: Any) -> None:
    for view, shots in frames.items():
        film.frames[view] += shots
    film.captions += [caption] * (max(map(len, film.frames.values()), default=0) - len(film.captions))


def _result(trial: Trial, situation: Situation) -> EpisodeResult:
    return EpisodeResult(trial, situation.success, situation.subtasks, situation.steps)


def _counts(outcomes: Iterable[tuple[str, bool]]) -> dict[str, list[int]]:
    """name → [successes, attempts], most attempts first."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, success in outcomes:
        counts[name][0] += success
        counts[name][1] += 1
    return dict(sorted(counts.items(), key=lambda item: -item[1][1]))


def typical_durations(store: EventStore) -> dict[tuple[str, str], float]:
    """Median seconds per (level, verb) of the store's training episodes, for the planner."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for episode in store.episodes:
        for level, spans in episode["spans"].items() if episode["split"] == "train" else ():
            for span in spans:
                seconds[level, span["verb"]].append((span["end"] - span["start"]) / store.meta["clock_hz"])
    return {key: float(np.median(values)) for key, values in seconds.items()}


def held_out_trials(
    env_ids: Sequence[str], episodes: int, seed: int, draw: Callable[[str, int, int], int], used: set[int]
) -> list[Trial]:
    """`episodes` trials, environments in turn, with seeds from `draw(env_id, seed, number)` that are not in `used`."""
    trials: list[Trial] = []
    number = 0
    while len(trials) < episodes:
        env_id = env_ids[len(trials) % len(env_ids)]
        candidate = draw(env_id, seed, number)
        if candidate not in used:
            trials.append(Trial(env_id, candidate))
        number += 1
    return trials
