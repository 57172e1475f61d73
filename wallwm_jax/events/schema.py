"""Episodes and their events: the types that every source yields and everything downstream reads.

An `Episode` is one synchronised recording on one clock, in **control steps** at `clock_hz`. It has `T` commands and
`T + 1` observations; video exists at every `video_stride`-th step (`ceil((T + 1) / video_stride)` frames per view).

A `Span` is a half-open stretch `[start, end)` of control steps on one of four nested levels,
task ⊃ subtask ⊃ action ⊃ segment. Spans of a level are gap-free over `[0, T)`, and each lies inside exactly one span of
the next coarser level (`parent`, an index into that level's list).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LEVELS = ("task", "subtask", "action", "segment")
LEFT_OUT = "left out"  # in each line of an episode's provenance that tells of labels which were not used


class EpisodeError(ValueError):
    """An episode that breaks the contract; the message names episode, level and step."""


@dataclass(frozen=True)
class Span:
    """One event: control steps `[start, end)`, its caption, paraphrases of it, and its place in the tree.

    Attributes:
      start, end: control steps of the episode clock, half-open.
      caption: plain natural language, no duration clause.
      verb: the field's term for the behaviour, for example "reach", "grasp", "press"; the cluster key of reports.
      parent: index of the containing span on the next coarser level; None on the task level.
      paraphrases: other wordings of the same caption, the caption itself excluded.
      success: whether the source says that the event achieved its goal; None where it does not say.
      confidence: 0 to 1, how far the caption can be trusted; None where nobody said.
      provenance: who wrote the caption, for example "templates", "vlm:<model>" or "human"; "" for the source itself.
    """

    start: int
    end: int
    caption: str
    verb: str
    parent: int | None = None
    paraphrases: tuple[str, ...] = ()
    success: bool | None = None
    confidence: float | None = None
    provenance: str = ""

    @property
    def length(self) -> int:
        """Length in control steps."""
        return self.end - self.start


@dataclass(frozen=True)
class CameraTrack:
    """Calibration of one view, in the OpenCV convention (x right, y down, z forward).

    Attributes:
      intrinsics: `[3, 3]`, pixels of the stored frames.
      extrinsics: `[N, 4, 4]` world-from-camera pose at each stored frame, metres (wrist cameras move).
      distortion: `[5]` k1 k2 p1 p2 k3, zeros for a pinhole camera.
    """

    intrinsics: np.ndarray
    extrinsics: np.ndarray
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(5))


@dataclass(frozen=True)
class Episode:
    """One synchronised recording. `T` is the number of commands; arms are counted by `G` grippers.

    Attributes:
      episode_id: unique inside its source.
      source: where it came from, for example "ocbench/chamber-cpu-lite-easy-task1-v0".
      embodiment: name of the robot, for example "ur5e_2f85".
      seed: what reproduces it, where the source is a simulator.
      clock_hz: control steps per second.
      video_stride: control steps between stored frames.
      size: (height, width) of the stored frames, pixels.
      frames: view name → `N` JPEG-encoded RGB frames, at steps 0, stride, 2·stride ...
      poses: `[T + 1, G, 4, 4]` measured end-effector poses in the base frame, metres.
      grippers: `[T + 1, G]` measured closing fraction, 0 open to 1 closed.
      command_poses, command_grippers: `[T, G, 4, 4]`, `[T, G]` commanded targets, reached at step k + 1.
      spans: level → spans in time order.
      cameras: view name → calibration; a view without calibration is absent.
      success: whether the whole episode achieved its task.
      provenance: every repair made to the recording, in order, in words; `LEFT_OUT` where labels were not used.
      derived_from: `episode_id` of the recording that it was made from, for example of the demonstration that it is a
        recovery of; both are always in one split.
    """

    episode_id: str
    source: str
    embodiment: str
    clock_hz: float
    video_stride: int
    size: tuple[int, int]
    frames: Mapping[str, Sequence[bytes]]
    poses: np.ndarray
    grippers: np.ndarray
    command_poses: np.ndarray
    command_grippers: np.ndarray
    spans: Mapping[str, Sequence[Span]]
    cameras: Mapping[str, CameraTrack] = field(default_factory=dict)
    seed: int | None = None
    success: bool = True
    provenance: tuple[str, ...] = ()
    derived_from: str = ""

    def __post_init__(self) -> None:
        _check_arrays(self)
        _check_spans(self)

    @property
    def num_steps(self) -> int:
        """`T`, the number of commands."""
        return len(self.command_poses)

    @property
    def num_frames(self) -> int:
        """Stored video frames per view."""
        return self.num_steps // self.video_stride + 1

    @property
    def instruction(self) -> str:
        """The task-level caption."""
        return self.spans["task"][0].caption


def _check_arrays(episode: Episode) -> None:
    steps = len(episode.command_poses)
    if steps == 0:
        raise EpisodeError(f"episode {episode.episode_id!r} has no commands")
    grippers = episode.grippers.shape[-1]
    expected = {
        "poses": (steps + 1, grippers, 4, 4),
        "grippers": (steps + 1, grippers),
        "command_poses": (steps, grippers, 4, 4),
        "command_grippers": (steps, grippers),
    }
    for name, shape in expected.items():
        array = getattr(episode, name)
        if array.shape != shape:
            raise EpisodeError(f"episode {episode.episode_id!r}: {name} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            step = int(np.argwhere(~np.isfinite(array))[0][0])
            raise EpisodeError(f"episode {episode.episode_id!r}: {name} is not finite at step {step}")
    if not episode.frames:
        raise EpisodeError(f"episode {episode.episode_id!r} has no views")
    for view, frames in episode.frames.items():
        if len(frames) != episode.num_frames:
            raise EpisodeError(
                f"episode {episode.episode_id!r}: view {view!r} has {len(frames)} frames, "
                f"expected {episode.num_frames} for {steps} steps at stride {episode.video_stride}"
            )
    for view, camera in episode.cameras.items():
        if view not in episode.frames:
            raise EpisodeError(f"episode {episode.episode_id!r}: camera {view!r} has no frames")
        if len(camera.extrinsics) != episode.num_frames:
            raise EpisodeError(
                f"episode {episode.episode_id!r}: camera {view!r} has {len(camera.extrinsics)} extrinsics, "
                f"expected one for each of {episode.num_frames} frames"
            )


def _check_spans(episode: Episode) -> None:
    if set(episode.spans) - set(LEVELS) or "task" not in episode.spans:
        raise EpisodeError(
            f"episode {episode.episode_id!r}: levels {sorted(episode.spans)}; need 'task' and others of {LEVELS}"
        )
    present = [level for level in LEVELS if level in episode.spans]
    for depth, level in enumerate(present):
        where = f"episode {episode.episode_id!r}, level {level!r}"
        cursor = 0
        for span in episode.spans[level]:
            if span.start != cursor:
                raise EpisodeError(f"{where}: expected a span to start at step {cursor}, found {span.start}")
            if span.end <= span.start:
                raise EpisodeError(f"{where}: empty span at step {span.start}")
            if not span.caption.strip():
                raise EpisodeError(f"{where}: empty caption at step {span.start}")
            if span.confidence is not None and not 0 <= span.confidence <= 1:
                raise EpisodeError(f"{where}: confidence {span.confidence} at step {span.start}, must be in 0..1")
            _check_parent(span, episode.spans[present[depth - 1]] if depth else None, where)
            cursor = span.end
        if cursor != episode.num_steps:
            raise EpisodeError(f"{where}: spans end at step {cursor}, the episode at {episode.num_steps}")


def _check_parent(span: Span, parents: Sequence[Span] | None, where: str) -> None:
    if parents is None:
        if span.parent is not None:
            raise EpisodeError(f"{where}: the coarsest level has no parent, step {span.start} names {span.parent}")
        return
    if span.parent is None or not 0 <= span.parent < len(parents):
        raise EpisodeError(f"{where}: span at step {span.start} has no parent ({span.parent})")
    parent = parents[span.parent]
    if not (parent.start <= span.start and span.end <= parent.end):
        raise EpisodeError(
            f"{where}: span [{span.start}, {span.end}) is not inside its parent [{parent.start}, {parent.end})"
        )
