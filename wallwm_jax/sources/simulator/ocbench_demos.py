"""Demonstrations from OCBench's scripted experts: successful episodes with video, commands, calibration, true events.

    for episode in demonstrations(["chamber", "block"], episodes=20, seed=0): ...

Each may be followed by its recoveries: the expert is disturbed at a contact and goes on from there (`recovery`).
Episodes are a pure function of (family, seed, number), whatever the number of worker processes.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import cv2
import numpy as np

from wallwm_jax.console import UserError, progress
from wallwm_jax.events.schema import CameraTrack, Episode
from wallwm_jax.sources.simulator import expert, recovery, rendering
from wallwm_jax.sources.simulator.ocbench_env import CLOCK_HZ, EMBODIMENT, VIEWS, OCBenchEnv

VIDEO_STRIDE = 2  # control steps per frame: 5 Hz
JPEG_QUALITY = 92

# Environments of a family, taken in turn.
FAMILIES: dict[str, tuple[str, ...]] = {
    "chamber": (
        "chamber-cpu-lite-easy-task1-v0",
        "chamber-cpu-lite-easy-task2-v0",
        "chamber-cpu-lite-easy-task3-v0",
    ),
    "block": (
        "block-cpu-lite-single-task1-v0",
        "block-cpu-lite-double-task1-v0",
        "block-cpu-lite-double-task2-v0",
    ),
    "switch": ("switch-cpu-lite-3x3-task1-v0", "switch-cpu-lite-3x3-task2-v0"),
    "hanoi": (
        "hanoi-cpu-lite-single-task1-v0",
        "hanoi-cpu-lite-single-task2-v0",
        "hanoi-cpu-lite-double-task1-v0",
    ),
}
_MAX_ATTEMPTS_PER_EPISODE = 5
_SOURCE = "ocbench/"  # an episode's source is this and its environment id
RECOVERY_SOURCE = "ocbench-recovery/"  # likewise of a recovery, so that data.mixture sets their share

T = TypeVar("T")


@dataclass
class RecoveryCount:
    """Disturbances of one kind in a family: recoveries `kept`, those in which the expert `failed`, those left `void`
    because there was nothing to recover from, and the seconds that all of them took."""

    kept: int = 0
    failed: int = 0
    void: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass
class FamilyCount:
    """How many episodes of a family were tried, kept and dropped because the expert failed; its recoveries by kind."""

    attempted: int = 0
    kept: int = 0
    recoveries: dict[str, RecoveryCount] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Attempts that did not succeed."""
        return self.attempted - self.kept


class Demonstrations(Iterator[Episode]):
    """Iterates over successful episodes and their recoveries; `counts` tells per family how many attempts that took."""

    def __init__(self, generator: Iterator[Episode], counts: dict[str, FamilyCount]):
        self._generator = generator
        self.counts = counts

    def __next__(self) -> Episode:
        return next(self._generator)


def demonstrations(
    families: Sequence[str],
    episodes: int | Mapping[str, int],
    seed: int,
    *,
    size: int = 64,
    views: Sequence[str] = VIEWS,
    workers: int = 2,
    recoveries: int = 0,
) -> Demonstrations:
    """Successful expert episodes, in an order and with contents that depend on the arguments alone, `workers` excepted.

    Args:
      families: keys of `FAMILIES`, or OCBench environment ids such as "chamber-cpu-lite-easy-task1-v0".
      episodes: to keep of each family, or family → how many; failed attempts are replaced by further ones.
      seed: of the whole set; another seed gives other episodes.
      size: pixels of the square pictures.
      views: MuJoCo camera names.
      workers: spawned processes; 0 records in this process.
      recoveries: disturbances to try of each kept episode; what the expert recovers from follows it.

    Raises:
      UserError: unknown family, missing simulator or GL, or (while iterating) an expert that keeps failing.
    """
    rendering.check_rendering()
    pools = {family: environments(family) for family in families}
    counts = {family: FamilyCount() for family in families}
    record = functools.partial(record_attempt, seed=seed, size=size, views=tuple(views), recoveries=recoveries)

    def recorded() -> Iterator[Episode]:
        for attempt in generate(pools, counts, episodes, record, workers):
            yield attempt.episode
            for tried in attempt.recoveries:
                count = counts[attempt.family].recoveries.setdefault(tried.kind, RecoveryCount())
                setattr(count, tried.outcome, getattr(count, tried.outcome) + 1)
                count.seconds += tried.seconds
                if tried.episode is not None:
                    yield tried.episode

    return Demonstrations(recorded(), counts)


@dataclass(frozen=True)
class TriedRecovery:
    """One disturbance of an episode: its kind, what came of it (see `recovery.Recovery`), and the seconds it took."""

    kind: str
    outcome: str
    seconds: float
    episode: Episode | None


@dataclass(frozen=True)
class Attempt:
    """A successful episode and the recoveries that were tried of it."""

    family: str
    episode: Episode
    recoveries: list[TriedRecovery]


def record_attempt(
    job: tuple[str, str, int], *, seed: int, size: int, views: tuple[str, ...], recoveries: int = 0
) -> Attempt | None:
    """Records attempt `job` = (family, environment id, number); None where the expert failed."""
    family, env_id, number = job
    episode_seed = attempt_seed(family, seed, number)
    env, make_controller = _environment(env_id, size, views), controller_factory(env_id)
    rollout = expert.roll_out(env, make_controller, episode_seed, VIDEO_STRIDE)
    if not rollout.success:
        return None
    name, tried = f"{env_id}/{seed}/{number}", []
    contacts = recovery.contacts(rollout)
    for turn in range(recoveries if contacts else 0):
        start = time.monotonic()
        disturbance = recovery.draw(contacts, np.random.default_rng([episode_seed, turn]))
        found = recovery.recover(env, make_controller, episode_seed, rollout, disturbance, VIDEO_STRIDE)
        recovered = None
        if found.rollout is not None:
            recovered = _episode(
                found.rollout,
                episode_id=f"{name}/recovery-{turn}",
                source=RECOVERY_SOURCE + env_id,
                provenance=(f"recovery of {name} from step {disturbance.step} on: {found.told}",),
                derived_from=name,
            )
        tried.append(TriedRecovery(disturbance.kind, found.outcome, time.monotonic() - start, recovered))
    return Attempt(family, _episode(rollout, episode_id=name, source=_SOURCE + env_id, seed=episode_seed), tried)


def _episode(rollout: expert.Rollout, *, provenance: tuple[str, ...] = (), **origin: Any) -> Episode:
    """A rollout as an episode; `origin`: what says where it comes from."""
    rendered = rollout.observations[::VIDEO_STRIDE]
    first = rendered[0].frames
    held = ("last command held for one step, so that the final state is a stored frame",) * rollout.held
    return Episode(
        embodiment=EMBODIMENT,
        clock_hz=CLOCK_HZ,
        video_stride=VIDEO_STRIDE,
        size=next(iter(first.values())).shape[:2],
        frames={view: [encode_jpeg(observation.frames[view]) for observation in rendered] for view in first},
        poses=np.stack([observation.pose for observation in rollout.observations]),
        grippers=np.stack([observation.gripper for observation in rollout.observations]),
        command_poses=rollout.command_poses,
        command_grippers=rollout.command_grippers,
        spans=expert.spans(rollout),
        cameras={
            view: CameraTrack(
                intrinsics=rendered[0].cameras[view][0],
                extrinsics=np.stack([observation.cameras[view][1] for observation in rendered]),
            )
            for view in first
        },
        success=rollout.success,
        provenance=provenance + held,
        **origin,
    )


def attempt_seed(family: str, seed: int, number: int) -> int:
    """The simulator's seed of attempt `number` of a family: 31 bits."""
    digest = hashlib.sha256(f"{family}/{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def controller_factory(env_id: str) -> Callable[[Any], Any]:
    """Makes the expert of an environment's family, free of deliberate mistakes."""
    from ocbench.oracles import controllers

    family = env_id.split("-", 1)[0]
    if family == "switch":
        return functools.partial(controllers.SwitchController, p_mistake_range=(0.0, 0.0))
    experts = {
        "chamber": controllers.ChamberController,
        "block": controllers.BlockController,
        "hanoi": controllers.HanoiController,
    }
    return functools.partial(experts[family], p_mistake=0.0)


def environments(family: str) -> tuple[str, ...]:
    """Environment ids of a family, or of an id itself; raises `UserError` for an unknown one."""
    if family in FAMILIES:
        return FAMILIES[family]
    if family.split("-", 1)[0] in FAMILIES and "-cpu-lite-" in family:
        return (family,)
    raise UserError(
        f"unknown OCBench family {family!r}; give one of {', '.join(FAMILIES)} or an id like {FAMILIES['block'][0]}"
    )


def recorded_environments(sources: Sequence[str]) -> list[str]:
    """Environment ids among the sources that a store names."""
    return [source.removeprefix(_SOURCE) for source in sources if source.startswith(_SOURCE)]


def generate(
    pools: dict[str, tuple[str, ...]],
    counts: dict[str, FamilyCount],
    episodes: int | Mapping[str, int],
    record: Callable[[tuple[str, str, int]], T | None],
    workers: int,
) -> Iterator[T]:
    """Records in rounds: each asks every family for as many attempts as it still lacks, so timing decides nothing."""
    wanted = dict.fromkeys(pools, episodes) if isinstance(episodes, int) else episodes
    context = multiprocessing.get_context("spawn")
    pool = context.Pool(workers) if workers else None

    def kept() -> Iterator[T]:
        while any(count.kept < wanted[family] for family, count in counts.items()):
            jobs = []
            for family, count in counts.items():
                numbers = range(count.attempted, count.attempted + wanted[family] - count.kept)
                jobs.append([(family, pools[family][n % len(pools[family])], n) for n in numbers])
            ordered = [job for turn in _interleaved(jobs) for job in turn]
            results = pool.imap(record, ordered) if pool else map(record, ordered)
            for (family, env_id, _), recorded in zip(ordered, results):
                counts[family].attempted += 1
                if recorded is not None:
                    counts[family].kept += 1
                    yield recorded
                elif counts[family].attempted >= _MAX_ATTEMPTS_PER_EPISODE * (counts[family].kept + 1) + 10:
                    raise UserError(f"the expert of {env_id} keeps failing: {counts[family]}; leave this family out")

    try:
        yield from progress(kept(), total=sum(wanted.values()), unit="episode", label="demonstrations")
    finally:
        if pool is not None:
            pool.terminate()
            pool.join()


def _interleaved(rows: list[list[Any]]) -> Iterator[list[Any]]:
    """First entries of all rows, then second ones, and so on."""
    for index in range(max(map(len, rows))):
        yield [row[index] for row in rows if index < len(row)]


@functools.lru_cache(maxsize=16)
def _environment(env_id: str, size: int, views: tuple[str, ...]) -> OCBenchEnv:
    return OCBenchEnv(env_id, views, size)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """One `[H, W, 3]` uint8 RGB frame as a JPEG."""
    _, encoded = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return encoded.tobytes()
