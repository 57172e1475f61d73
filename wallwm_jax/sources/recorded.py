"""Recorded sets as episodes: rows and pictures of any format through one embodiment description onto one clock.

    dataset, embodiment = LeRobotSet("sets/kitchen"), load_embodiment("droid")
    for episode in read_episodes(dataset, embodiment, choose_clock(embodiment, video_fps=5), size=64): ...

A format is a `RecordedSet`. An episode that cannot be read is skipped, counted and named with file and field; too many
of them end the build.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np

from wallwm_jax.console import UserError, progress
from wallwm_jax.events.schema import Episode
from wallwm_jax.sources.clock import RATE_TOLERANCE, Clock, check_times, control_steps, nearest_rows, resample
from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.embodiment import FLIPS, Camera, Embodiment
from wallwm_jax.sources.labels import Label, spans

JPEG_QUALITY = 92
_AHEAD = 2  # episodes per worker that are read before they are asked for


@dataclass(frozen=True)
class Recording:
    """One episode as its file has it.

    Attributes:
      name: unique inside its set, for example "episode_000012".
      file: where its rows are, for messages.
      times: `[N]` seconds of the rows.
      columns: key → `[N, ...]` of the numbers that the embodiment reads.
      labels: level → labels in seconds from the first row; at least "task".
      pictures: gives the RGB pictures `[H, W, 3]` uint8 of a camera's column at rows in rising order.
      notes: what the reader left out of the labels, in words.
    """

    name: str
    file: str
    times: np.ndarray
    columns: Mapping[str, np.ndarray]
    labels: Mapping[str, Sequence[Label]]
    pictures: Callable[[str, Sequence[int]], Iterator[np.ndarray]]
    notes: tuple[str, ...] = ()


class RecordedSet(Protocol):
    """A set of recordings on disk; it travels to worker processes, so it holds no open files."""

    name: str  # "lerobot/kitchen": the source of its episodes
    fps: float | None  # rows per second that the set itself states
    path: str

    def __len__(self) -> int:
        """Number of episodes."""

    def check(self, embodiment: Embodiment) -> None:
        """Raises `UserError` where the set has not the columns and pictures that a description names."""

    def recording(self, number: int, embodiment: Embodiment) -> Recording:
        """Rows of one episode, no picture decoded; raises `BadRecording`."""

    def picture_rate(self, number: int, key: str) -> float | None:
        """Pictures per second that a camera's file states; None where it does not."""


@dataclass
class ReadCount:
    """Episodes that were read, and those that were not, each with its file, field and reason."""

    kept: int = 0
    damaged: list[str] = field(default_factory=list)


class RecordedEpisodes(Iterator[Episode]):
    """Iterates over the readable episodes of a set; `count` tells how many so far, and what ails the others."""

    def __init__(self, generator: Iterator[Episode], count: ReadCount) -> None:
        self._generator = generator
        self.count = count

    def __next__(self) -> Episode:
        return next(self._generator)


def read_episodes(
    dataset: RecordedSet,
    embodiment: Embodiment,
    clock: Clock,
    *,
    size: int = 64,
    episodes: int | None = None,
    workers: int = 2,
    damage_limit: float = 0.1,
) -> RecordedEpisodes:
    """Episodes of a set in its own order, whatever the number of worker processes.

    Args:
      clock: what the episodes are brought to; see `choose_clock`.
      size: pixels of the square frames.
      episodes: take the first so many; None takes all.
      workers: spawned processes; 0 reads in this process.
      damage_limit: share of the episodes that may be damaged.

    Raises:
      UserError: set and description do not fit, or (while iterating) more episodes than `damage_limit` are damaged.
    """
    dataset.check(embodiment)
    if dataset.fps and abs(dataset.fps / embodiment.control_hz - 1) > RATE_TOLERANCE:
        raise UserError(
            f"{dataset.path} says {dataset.fps:g} rows per second, the embodiment {embodiment.robot!r} has control_hz "
            f"= {embodiment.control_hz:g}; correct the one that is wrong (python -m wallwm_jax.sources.lint compares "
            "both with the timestamps)"
        )
    total = len(dataset) if episodes is None else min(episodes, len(dataset))
    if total < 1:
        raise UserError(f"{dataset.path} holds {len(dataset)} episodes, {episodes} asked for; at least one is needed")
    count = ReadCount()
    limit = math.ceil(damage_limit * total)
    job = _Job(dataset, embodiment, clock, size)

    def generate() -> Iterator[Episode]:
        for outcome in progress(_map(job, total, workers), total=total, unit="episode", label=dataset.name):
            if isinstance(outcome, Episode):
                count.kept += 1
                yield outcome
                continue
            count.damaged.append(outcome)
            if len(count.damaged) > limit:
                raise UserError(
                    f"{len(count.damaged)} of the first {count.kept + len(count.damaged)} episodes of {dataset.path} "
                    f"are damaged, more than {damage_limit:.0%} of {total}: {'; '.join(count.damaged[:3])} "
                    "(repair them, or allow more by --damage_limit)"
                )
        if not count.kept:
            raise UserError(f"no episode of {dataset.path} can be read: {'; '.join(count.damaged[:3])}")

    return RecordedEpisodes(generate(), count)


def to_episode(recording: Recording, source: str, embodiment: Embodiment, clock: Clock, size: int) -> Episode:
    """One recording as an episode; raises `BadRecording` where it cannot be one."""
    check_times(recording.times, embodiment.control_hz)
    motion, resampled = resample(embodiment.motion(recording.columns), recording.times, clock)
    steps = control_steps(recording.times, clock)
    levels, repairs = spans(recording.labels, steps, clock.hz)
    frame_rows = nearest_rows(recording.times, np.arange(0, steps + 1, clock.video_stride), clock).tolist()
    frames = {}
    for view, camera in embodiment.cameras.items():
        pictures = recording.pictures(camera.column, frame_rows)
        frames[view] = [_jpeg(fit_picture(picture, camera, size)) for picture in pictures]
    rate = f"resampled from {embodiment.control_hz:g} to {clock.hz:g} Hz"
    return Episode(
        episode_id=recording.name,
        source=source,
        embodiment=embodiment.robot,
        clock_hz=clock.hz,
        video_stride=clock.video_stride,
        size=(size, size),
        frames=frames,
        poses=motion.poses,
        grippers=motion.grippers,
        command_poses=motion.command_poses,
        command_grippers=motion.command_grippers,
        spans=levels,
        provenance=((rate,) if resampled else ()) + recording.notes + repairs,
    )


def fit_picture(picture: np.ndarray, camera: Camera, size: int) -> np.ndarray:
    """An RGB picture `[H, W, 3]` turned upright and brought to `[size, size, 3]`."""
    picture = np.flip(picture, FLIPS[camera.flip])
    height, width = picture.shape[:2]
    shorter, longer = min(height, width), max(height, width)
    if camera.fit == "crop" and height != width:
        top, left = (height - shorter) // 2, (width - shorter) // 2
        picture = picture[top : top + shorter, left : left + shorter]
    if camera.fit == "pad" and height != width:
        top, left = (longer - height) // 2, (longer - width) // 2
        picture = cv2.copyMakeBorder(
            np.ascontiguousarray(picture),
            top,
            longer - height - top,
            left,
            longer - width - left,
            cv2.BORDER_CONSTANT,
            value=(0, 0, 0),
        )
    if picture.shape[:2] == (size, size):
        return picture
    shrinks = picture.shape[0] > size
    return cv2.resize(
        np.ascontiguousarray(picture), (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


@dataclass(frozen=True)
class _Job:
    """What a worker needs to read any episode of a set."""

    dataset: RecordedSet
    embodiment: Embodiment
    clock: Clock
    size: int

    def read(self, number: int) -> Episode | str:
        """The episode, or in words what is wrong with it."""
        name, file = f"episode {number}", ""
        try:
            recording = self.dataset.recording(number, self.embodiment)
            name, file = recording.name, recording.file
            return to_episode(recording, self.dataset.name, self.embodiment, self.clock, self.size)
        except BadRecording as error:
            return f"{name}: {BadRecording(error.field, error.what, error.file or file)}"
        except (ArithmeticError, LookupError, ValueError, OSError, cv2.error) as error:  # an invalid `Episode` too
            return f"{name}: {file}: rows: {error}"


def _map(job: _Job, total: int, workers: int) -> Iterator[Episode | str]:
    """Reads episodes 0 .. total - 1 in order, a few per worker ahead, so memory is bounded."""
    if not workers:
        yield from map(job.read, range(total))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(job,)
    )
    waiting: collections.deque[concurrent.futures.Future[Episode | str]] = collections.deque()
    try:
        for number in range(total):
            waiting.append(pool.submit(_read, number))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            f"a process that read {job.dataset.path} was killed, most likely for memory; give fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: _Job | None = None  # of this worker process


def _begin(job: _Job) -> None:
    global _job
    _job = job
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed build leaves no worker behind: executors tell theirs only of an orderly end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(number: int) -> Episode | str:
    assert _job is not None
    return _job.read(number)


def _jpeg(picture: np.ndarray) -> bytes:
    bgr = np.ascontiguousarray(picture[..., ::-1])
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
