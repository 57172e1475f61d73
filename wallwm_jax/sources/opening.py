"""Sources of episodes by name, as `python -m wallwm_jax.build_events --source=...` knows them.

ocbench:FAMILY[,FAMILY...]   demonstrations of OCBench's scripted experts, recorded now
metaworld:TASK[,TASK...]     demonstrations of MetaWorld's scripted experts, recorded now
lerobot:DIR                  a LeRobot set of version 2 or 3
rlds:DIR                     an RLDS set (Open X-Embodiment)

A simulator records as many episodes of each family or task, or shares of one total: ocbench:chamber=80,switch=20.
Several sources, of any formats, are read one after the other, where they have one clock and the same views.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import Episode

if TYPE_CHECKING:
    from wallwm_jax.sources.clock import Clock
    from wallwm_jax.sources.recorded import RecordedSet
    from wallwm_jax.sources.simulator.ocbench_demos import RecoveryCount

NAMES = {
    "ocbench": "ocbench:FAMILY[=SHARE][,FAMILY[=SHARE]...], for example ocbench:chamber,block",
    "metaworld": "metaworld:TASK[=SHARE][,TASK[=SHARE]...]",
    "lerobot": "lerobot:DIR",
    "rlds": "rlds:DIR",
}
SETS = ("lerobot", "rlds")  # of these, recordings that an embodiment describes
_EPISODES = 40  # of each family that is recorded, where the command does not say


@dataclass
class FamilyCount:
    """Episodes of one family or set: those the source kept, those it dropped, and why, where it says so; and what came
    of its recoveries in the simulator, by kind. A recovery that is too short for the clock is among the dropped."""

    kept: int = 0
    dropped: int = 0
    reasons: tuple[str, ...] = ()
    recoveries: dict[str, RecoveryCount] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceOptions:
    """What a source may be told.

    Attributes:
      episodes: to record of each family (default 40), of all together where the source names their shares (default 40
        times their number), or the first so many of a set (default all).
      seed: of recorded demonstrations.
      size: pixels of the square frames.
      views: cameras that a simulator renders; () takes all.
      workers: processes; 0 does the work in this one.
      embodiment: what the columns of a set mean: a name or the path of a TOML file.
      video_fps: frames per second of the episodes, with two control steps per frame; 0 keeps the
        source's own rates.
      damage_limit: share of a set's episodes that may be damaged before the build ends.
      recoveries: disturbances to try of each recorded episode, see `sources.simulator.recovery`.
    """

    episodes: int | None = None
    seed: int = 0
    size: int = 64
    views: tuple[str, ...] = ()
    workers: int = 2
    embodiment: str = ""
    video_fps: float = 0.0
    damage_limit: float = 0.1
    recoveries: int = 0


Opened = tuple[Iterable[Episode], Callable[[], dict[str, FamilyCount]]]


@dataclass(frozen=True)
class _Source:
    """Episodes, a function that tells the count per family, and what all episodes of one store must share."""

    episodes: Iterable[Episode]
    counts: Callable[[], dict[str, FamilyCount]]
    clock: Clock
    views: tuple[str, ...]


def open_source(source: str, options: SourceOptions) -> Opened:
    """The episodes of a source, and a function that tells the count per family once they are all read.

    Raises:
      UserError: an unknown source, options that do not fit it, or what the source itself finds.
    """
    opened = _open(source, options)
    return opened.episodes, opened.counts


def open_sources(sources: Sequence[str], options: SourceOptions, embodiments: Sequence[str] = ()) -> Opened:
    """The episodes of several sources, one source after the other, as `open_source` has those of one.

    Args:
      sources: each as `open_source` takes it; `options` hold for each, recoveries for those that can be disturbed.
      embodiments: of the recorded sets, in their order; one is for all of them.

    Raises:
      UserError: before anything is read, what `open_source` finds in any of them; embodiments without a set; and
        sources with the same family, another clock, or a view that the first lacks.
    """
    sets = [source for source in sources if source.partition(":")[0] in SETS]
    if len(embodiments) not in ((0, 1, len(sets)) if sets else (0,)):
        raise UserError(
            f"--embodiment describes recorded sets, here {len(sets)}, and is given {len(embodiments)} times; "
            "give it once for all of them, or once for each in their order"
        )
    described = itertools.cycle(embodiments or [options.embodiment])
    disturbed = any(source.startswith("ocbench:") for source in sources)
    opened: list[_Source] = []
    for source in sources:
        own = replace(options, embodiment=next(described) if source in sets else "")
        if disturbed and not source.startswith("ocbench:"):
            own = replace(own, recoveries=0)
        opened.append(_open(source, own))
    families = Counter(name for one in opened for name in one.counts())
    if twice := [name for name, count in families.items() if count > 1]:
        raise UserError(f"two sources are called {twice[0]!r}, so no mixture could tell them apart; rename one")
    first = opened[0]
    for source, one in zip(sources, opened):
        if one.clock != first.clock:
            raise UserError(
                f"{source} has {one.clock}, {sources[0]} {first.clock}; a store has one clock, bring both to it by "
                "--video_fps"
            )
        if extra := set(one.views) - set(first.views):
            raise UserError(
                f"{source} has views {sorted(extra)} that {sources[0]} lacks ({', '.join(first.views)}); name the "
                "source with all views first, or give views that show the same one name in the embodiments"
            )
    return (
        itertools.chain.from_iterable(one.episodes for one in opened),
        lambda: {name: count for one in opened for name, count in one.counts().items()},
    )


def _open(source: str, options: SourceOptions) -> _Source:
    name, _, argument = source.partition(":")
    if name not in NAMES or not argument:
        raise UserError(f"unknown source {source!r}; give {' or '.join(NAMES.values())}")
    if options.episodes is not None and options.episodes < 1:
        raise UserError(f"--episodes is {options.episodes}; at least one is needed")
    if options.recoveries and name != "ocbench":
        raise UserError(f"--recoveries needs an expert that can be disturbed, which ocbench alone has; not {name}")
    if name in ("ocbench", "metaworld"):
        return _open_simulator(name, families_of(argument, options.episodes), options)
    return _open_set(source, options)


def open_set(source: str) -> RecordedSet:
    """The recorded set that `lerobot:DIR` or `rlds:DIR` names; raises `UserError` where there is none."""
    name, _, argument = source.partition(":")
    try:
        if name == "lerobot" and argument:
            from wallwm_jax.sources.lerobot.dataset import LeRobotSet

            return LeRobotSet(argument)
        if name == "rlds" and argument:
            from wallwm_jax.sources.rlds import RldsSet

            return RldsSet(argument)
    except ImportError as error:
        raise UserError(f"{name} sets need more packages ({error}): pip install 'wallwm_jax[data]'") from None
    raise UserError(f"unknown set {source!r}; give {NAMES['lerobot']} or {NAMES['rlds']}")


def families_of(argument: str, episodes: int | None) -> dict[str, int]:
    """Episodes to record of each family of `FAMILY,FAMILY` or `FAMILY=SHARE,FAMILY=SHARE`.

    Args:
      argument: the families; shares are positive numbers that need not add up to anything.
      episodes: of each family; of all together where there are shares.

    Raises:
      UserError: a family twice, a share that is no positive number or that only some families have, or so few episodes
        that a family would get none.
    """
    pairs = [entry.partition("=") for entry in argument.split(",")]
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError(f"{argument!r} names a family twice; name each once, with its share")
    if not any(equals for _, equals, _ in pairs):
        return dict.fromkeys(names, _EPISODES if episodes is None else episodes)
    try:
        shares = np.array([float(share) for _, _, share in pairs])
    except ValueError:
        shares = np.array([np.nan])
    if not (np.isfinite(shares) & (shares > 0)).all():
        raise UserError(f"{argument!r}: give every family a positive share, as in chamber=80,switch=15,block=5")
    total = _EPISODES * len(names) if episodes is None else episodes
    exact = total * shares / shares.sum()
    counts = np.floor(exact + 1e-9).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1  # the largest remainders
    if not counts.all():
        name = names[int(counts.argmin())]
        raise UserError(f"of {total} episodes in all, {name!r} would have none; raise --episodes or its share")
    return dict(zip(names, counts.tolist()))


def _open_simulator(name: str, families: dict[str, int], options: SourceOptions) -> _Source:
    from wallwm_jax.sources.clock import Clock, resample_episode, two_step_clock
    from wallwm_jax.sources.columns import BadRecording
    from wallwm_jax.sources.simulator import metaworld_demos, ocbench_demos

    if options.embodiment:
        raise UserError(f"--embodiment describes recorded sets; {name} has its own")
    simulator = {"ocbench": ocbench_demos, "metaworld": metaworld_demos}[name]
    if unknown := set(options.views) - set(simulator.VIEWS):
        raise UserError(f"--views names {min(unknown)!r}; {name} has {', '.join(simulator.VIEWS)}")
    clock = two_step_clock(options.video_fps) if options.video_fps else None
    own = simulator.CLOCK_HZ / simulator.VIDEO_STRIDE
    if options.video_fps > own:
        raise UserError(
            f"--video_fps={options.video_fps:g}: {name} draws {own:g} frames per second; give at most that, or 0 for "
            f"its own clock of {simulator.CLOCK_HZ:g} control steps per second"
        )
    more = {"recoveries": options.recoveries} if options.recoveries else {}
    stream = simulator.demonstrations(
        list(families),
        families,
        options.seed,
        size=options.size,
        views=options.views or simulator.VIEWS,
        workers=options.workers,
        **more,
    )
    short: dict[str, list[str]] = {family: [] for family in families}  # why, of each episode
    lost: Counter[str] = Counter()  # of those, demonstrations

    def resampled() -> Iterator[Episode]:
        for episode in stream:
            try:
                slower = resample_episode(episode, clock) if clock else episode
            except BadRecording as error:
                place = episode.source.partition("/")[2]  # a family's environment, or what was asked for itself
                family = place if place in families else place.partition("-")[0]
                short[family].append(f"{episode.episode_id}: {error}")
                lost[family] += not episode.derived_from
            else:
                yield slower

    def counts() -> dict[str, FamilyCount]:
        return {
            name: FamilyCount(
                count.kept - lost[name], count.dropped + len(short[name]), tuple(short[name]), count.recoveries
            )
            for name, count in stream.counts.items()
        }

    own_clock = Clock(simulator.CLOCK_HZ, simulator.VIDEO_STRIDE)
    return _Source(resampled(), counts, clock or own_clock, tuple(options.views or simulator.VIEWS))


def _open_set(source: str, options: SourceOptions) -> _Source:
    dataset = open_set(source)
    from wallwm_jax.sources.clock import choose_clock
    from wallwm_jax.sources.embodiment import load_embodiment
    from wallwm_jax.sources.recorded import read_episodes

    embodiment = load_embodiment(options.embodiment)
    clock = choose_clock(embodiment, options.video_fps)
    stream = read_episodes(
        dataset,
        embodiment,
        clock,
        size=options.size,
        episodes=options.episodes,
        workers=options.workers,
        damage_limit=options.damage_limit,
    )

    def counts() -> dict[str, FamilyCount]:
        return {dataset.name: FamilyCount(stream.count.kept, len(stream.count.damaged), tuple(stream.count.damaged))}

    return _Source(stream, counts, clock, tuple(embodiment.cameras))
