"""Closed loop: the model acts in OCBench, by events or by chunks, on seeds that nobody trained on.

The loops of WALL-WM section 5. Event mode: observe, let a planner name the next event (the scripted one, or a VLM that
sees pictures and what it named before), act for the whole event, observe again. Unified mode: observe with the recent
past, act for a chunk of fixed length, or its beginning, observe again. Who acts is an `actors.Actor`. A group of
episodes moves in lock-step, so that inference is one batch per event or chunk; their simulators run in worker
processes. A group that was started is finished: stopping episodes halfway would favour the short ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wallwm_jax.console import UserError, progress
from wallwm_jax.data.event_store import EventStore
from wallwm_jax.evaluation.actors import Actor
from wallwm_jax.evaluation.environments import EnvironmentPool, Rules, Situation, SubtaskResult, Trial
from wallwm_jax.evaluation.statistics import success_rate


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


def run_actor(
    pool: EnvironmentPool,
    actor: Actor,
    trials: Sequence[Trial],
    *,
    label: str,
    films: int = 0,
    deadline: float = float("inf"),
) -> tuple[list[EpisodeResult], list[Film]]:
    """Lets an actor act on the trials, in groups of the pool's slots; the scripted planner's goals judge the subtasks.

    Args:
      pool: where the episodes run.
      actor: how it acts; its model's batch size should be the pool's slots.
      trials: in the order in which they are run.
      label: of the progress bar.
      films: how many episodes of the first group to film.
      deadline: `time.monotonic()` by which to be done; a group is started only if the longest one so far would fit. The
        first is always run.

    Returns:
      results of all episodes that were run, and the films.
    """
    results: list[EpisodeResult] = []
    reels: list[Film] = []
    longest = 0.0
    groups = grouped(trials, pool.slots)
    for number, group in enumerate(progress(groups, total=len(groups), unit="group", label=label)):
        begun = time.monotonic()
        if number and begun + longest > deadline:
            break
        finished, filmed = run_group(pool, actor, group, films=0 if number else films)
        results, reels = results + finished, reels + filmed
        longest = max(longest, time.monotonic() - begun)
    return results, reels


def grouped(trials: Sequence[Trial], slots: int) -> list[Sequence[Trial]]:
    """The trials in groups of the pool's slots."""
    return [trials[start : start + slots] for start in range(0, len(trials), slots)]


def run_group(
    pool: EnvironmentPool, actor: Actor, group: Sequence[Trial], *, films: int = 0
) -> tuple[list[EpisodeResult], list[Film]]:
    """One group of trials, at most the pool's slots, from beginning to end; the first `films` are filmed."""
    filmed = range(min(films, len(group)))
    situations = pool.start(dict(enumerate(group)), level=actor.level, film=filmed, recent=actor.recent)
    reels = {slot: Film() for slot in filmed}
    for slot, reel in reels.items():
        _expose(reel, situations[slot].caption, {view: [frame] for view, frame in situations[slot].frames.items()})
    actor.begin(situations)
    while running := {slot: now for slot, now in situations.items() if not now.over}:
        chosen = actor.act(running, {slot: group[slot].seed for slot in running})
        moves = {slot: move for slot, move in chosen.items() if move is not None}
        ended = [slot for slot in running if slot not in moves]
        following = pool.play({slot: (move.poses, move.grippers) for slot, move in moves.items()})
        following |= pool.end(ended) if ended else {}
        actor.follow(moves, following)
        for slot in set(moves) & set(reels):
            _expose(reels[slot], moves[slot].caption, following[slot].film)
        situations |= following
    results = [_result(trial, situations[slot]) for slot, trial in enumerate(group)]
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


def open_pool(
    store: EventStore, slots: int, *, views: Sequence[str], level: str = "subtask", patience: float, processes: int
) -> EnvironmentPool:
    """Simulators as the store was recorded in: its picture size and clock, its experts' typical durations."""
    return EnvironmentPool(
        slots,
        views=views,
        size=int(store.meta["size"][0]),
        video_stride=int(store.meta["video_stride"]),
        rules=Rules(level, patience, durations=typical_durations(store)),
        processes=processes,
    )


def draw_trials(store: EventStore, families: Sequence[str], episodes: int, seed: int) -> list[Trial]:
    """Trials in OCBench: environments in turn, seeds that no episode of the store has.

    Args:
      store: of the demonstrations.
      families: or environment ids; none takes those of the store.
      episodes: how many; none needs no simulator.
      seed: that the trials' seeds are drawn from; more episodes of one seed begin with the same.

    Raises:
      UserError: the simulator is not there, the store has another clock, or it was not recorded in the simulator and
        no family is given.
    """
    if not episodes:
        return []
    from wallwm_jax.sources.simulator.ocbench_demos import attempt_seed, environments, recorded_environments
    from wallwm_jax.sources.simulator.ocbench_env import CLOCK_HZ
    from wallwm_jax.sources.simulator.rendering import check_rendering

    if store.meta["clock_hz"] != CLOCK_HZ:
        raise UserError(
            f"event store {str(store.path)!r} has {store.meta['clock_hz']:g} control steps per second, OCBench takes "
            f"{CLOCK_HZ:g}: build it without --video_fps to act there"
        )
    check_rendering()
    asked = [env_id for family in families for env_id in environments(family)]
    env_ids = asked or recorded_environments(store.meta["sources"])
    if not env_ids:
        raise UserError(
            f"event store {str(store.path)!r} was not recorded in OCBench ({store.meta['sources']}); "
            "name --families to act in, or pass --episodes=0"
        )
    used = {episode["seed"] for episode in store.episodes}
    return held_out_trials(env_ids, episodes, seed, attempt_seed, used)


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
