"""Episodes and their events as a LeRobot set of version 3.0, for tools that read those.

A row is one control step: the observation at that step, the command that follows it as `action`, the subtask that it
lies in as `subtask_index`. Rows have no gap: the last one, the final observation, repeats the last command and subtask.
Video is stored at every `video_stride`-th step; the steps between show the frame before them.

    data/chunk-000/file-000.parquet                rows of several episodes
    videos/<camera>/chunk-000/file-000.mp4         their videos end to end, H.264
    meta/info.json, stats.json, tasks.parquet      what LeRobot needs to open the set
    meta/subtasks.parquet                          text of each subtask_index
    meta/episodes/chunk-000/file-000.parquet       where each episode is, its statistics, and its events: columns
                                                   sparse_subtask_* hold the subtasks, dense_subtask_* the actions, with
                                                   names, start_frames and (exclusive) end_frames

Poses are written as position, unit quaternion (x, y, z, w; without jumps of sign) and gripper, 0 open to 1 closed, per
arm, in float32.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial.transform import Rotation

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import Episode, Span

FILES_PER_CHUNK = 1000
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_POSE = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper")
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_CODEC, _QUALITY, _KEYFRAMES = "libx264", "18", 2  # every second frame can be sought, as LeRobot does
_PICTURES = 16  # per episode and camera that statistics see
_EVENTS = {"sparse": "subtask", "dense": "action"}  # LeRobot's names of a coarse and a fine annotation


@dataclass(frozen=True)
class ExportSizes:
    """When a file is full, bytes; an episode is never cut."""

    data: int = 100 << 20
    video: int = 200 << 20


@dataclass
class ExportSummary:
    """What was written: episodes, rows, distinct tasks and subtasks, bytes."""

    episodes: int = 0
    rows: int = 0
    tasks: int = 0
    subtasks: int = 0
    bytes: int = 0


def write_lerobot(
    out: str | Path, episodes: Iterable[Episode], *, level: str = "subtask", sizes: ExportSizes | None = None
) -> ExportSummary:
    """Writes a set, taking episodes one at a time; it appears at `out` when it is complete.

    Args:
      out: folder to make; it must not exist.
      episodes: of one embodiment, clock, frame size and set of views.
      level: of the spans that `subtask_index` names.
      sizes: of files.

    Raises:
      UserError: `out` exists, no episodes, episodes that do not fit together, or frames with an odd side.
    """
    out = Path(out).expanduser().absolute()
    if out.exists():
        raise UserError(f"{str(out)!r} already exists; give another path, or delete it first")
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        writer = _Writer(temporary, level, sizes or ExportSizes())
        for episode in episodes:
            writer.add(episode)
        summary = writer.finish()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


class _Writer:
    """State of one export."""

    def __init__(self, root: Path, level: str, sizes: ExportSizes) -> None:
        self._root, self._level, self._sizes = root, level, sizes
        self._first: Episode | None = None
        self._tasks: dict[str, int] = {}
        self._subtasks: dict[str, int] = {}
        self._rows = 0
        self._entries: list[dict[str, Any]] = []
        self._stats: list[dict[str, dict[str, np.ndarray]]] = []
        self._data: pq.ParquetWriter | None = None
        self._data_file = 0
        self._videos: dict[str, _VideoFiles] = {}

    def add(self, episode: Episode) -> None:
        if self._first is None:
            self._begin(episode)
        self._check_fits(episode)
        spans = episode.spans[self._level]
        states, actions = _vectors(episode)
        count, number = len(states), len(self._entries)
        subtasks = [self._subtasks.setdefault(span.caption, len(self._subtasks)) for span in spans]
        columns: dict[str, np.ndarray] = {
            "observation.state": states,
            "action": actions,
            "subtask_index": np.array(subtasks)[_containing(spans, count)],
            "timestamp": (np.arange(count) / episode.clock_hz).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": np.arange(self._rows, self._rows + count),
            "task_index": np.full(count, self._tasks.setdefault(episode.instruction, len(self._tasks))),
        }
        entry = {
            "episode_index": number,
            "tasks": [episode.instruction],
            "length": count,
            "dataset_from_index": self._rows,
            "dataset_to_index": self._rows + count,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            "source": episode.source,
            "source_episode": episode.episode_id,
            **_annotations(episode, count),
        }
        entry |= {f"data/{name}": place for name, place in self._write_rows(columns).items()}
        stats = {name: _statistics(values) for name, values in columns.items()}
        for key, view in zip(self._videos, self._first_views()):
            shown = np.arange(count) // episode.video_stride
            entry |= {
                f"videos/{key}/{name}": value
                for name, value in self._videos[key].add(_Frames(episode, view), shown).items()
            }
            stats[key] = _picture_statistics(_Frames(episode, view))
        self._entries.append(entry)
        self._stats.append(stats)
        self._rows += count

    def _first_views(self) -> list[str]:
        assert self._first is not None
        return list(self._first.frames)

    def _begin(self, episode: Episode) -> None:
        keys = ["observation.images." + re.sub(r"\W", "_", view) for view in episode.frames]
        if len(set(keys)) < len(keys):
            raise UserError(f"view names {list(episode.frames)} differ only in punctuation; rename one")
        if any(side % 2 for side in episode.size):
            raise UserError(
                f"frames of {episode.size[0]}x{episode.size[1]} pixels: H.264 needs even sides; resize them"
            )
        self._first = episode
        self._videos = {
            key: _VideoFiles(self._root, key, episode.size, episode.clock_hz, self._sizes.video) for key in keys
        }

    def _check_fits(self, episode: Episode) -> None:
        assert self._first is not None
        name = f"episode {episode.episode_id!r} of {episode.source!r}"
        for what in ("clock_hz", "video_stride", "size", "embodiment"):
            here, there = getattr(episode, what), getattr(self._first, what)
            if here != there:
                raise UserError(f"{name} has {what} {here!r}, the first episode {there!r}; export them apart")
        if list(episode.frames) != self._first_views() or episode.grippers.shape[1] != self._first.grippers.shape[1]:
            raise UserError(
                f"{name} has views {list(episode.frames)} and {episode.grippers.shape[1]} arms, the first episode "
                f"{self._first_views()} and {self._first.grippers.shape[1]}; a LeRobot set has the same in all: export "
                "them apart"
            )
        if self._level not in episode.spans:
            raise UserError(f"{name} has no spans on level {self._level!r}; it has {', '.join(episode.spans)}")

    def _write_rows(self, columns: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Appends rows; returns chunk and file that they went to."""
        table = pa.table({name: _arrow(values) for name, values in columns.items()})
        path = self._root / _DATA_PATH.format(**_place(self._data_file))
        if self._data is not None and path.stat().st_size >= self._sizes.data:
            self._data.close()
            self._data_file, self._data = self._data_file + 1, None
            path = self._root / _DATA_PATH.format(**_place(self._data_file))
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, table.schema)
        self._data.write_table(table)
        return _place(self._data_file)

    def finish(self) -> ExportSummary:
        """Closes the files and writes `meta`."""
        if self._first is None:
            raise UserError("no episodes; nothing to export")
        if self._data is not None:
            self._data.close()
        for video in self._videos.values():
            video.close()
        meta = self._root / "meta"
        (self._root / _EPISODES_PATH).parent.mkdir(parents=True)
        flat = [
            {f"stats/{key}/{name}": value.tolist() for key, row in stats.items() for name, value in row.items()}
            for stats in self._stats
        ]
        pq.write_table(
            pa.Table.from_pylist([entry | more for entry, more in zip(self._entries, flat)]),
            self._root / _EPISODES_PATH,
        )
        _write_texts(meta / "tasks.parquet", "task", self._tasks)
        _write_texts(meta / "subtasks.parquet", "subtask", self._subtasks)
        merged = {key: _merge([row[key] for row in self._stats]) for key in self._stats[0]}
        plain = {key: {name: value.tolist() for name, value in row.items()} for key, row in merged.items()}
        (meta / "stats.json").write_text(json.dumps(plain, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        size = sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())
        return ExportSummary(len(self._entries), self._rows, len(self._tasks), len(self._subtasks), size)

    def _info(self) -> dict[str, Any]:
        first = self._first
        assert first is not None
        arms = first.grippers.shape[1]
        names = [f"arm{arm}.{name}" if arms > 1 else name for arm in range(arms) for name in _POSE]
        fps = int(first.clock_hz) if first.clock_hz == int(first.clock_hz) else first.clock_hz
        vector = {"dtype": "float32", "shape": [len(names)], "names": names}
        picture = {
            "dtype": "video",
            "shape": [*first.size, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": first.size[0],
                "video.width": first.size[1],
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }
        number = {"dtype": "int64", "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": first.embodiment,
            "total_episodes": len(self._entries),
            "total_frames": self._rows,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": self._sizes.data >> 20,
            "video_files_size_in_mb": self._sizes.video >> 20,
            "fps": fps,
            "splits": {"train": f"0:{len(self._entries)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": {
                "observation.state": vector,
                "action": vector,
                "subtask_index": number,
                "timestamp": {"dtype": "float32", "shape": [1], "names": None},
                **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
                **dict.fromkeys(self._videos, picture),
            },
        }


@dataclass(frozen=True)
class _Frames:
    """The stored frames of a view, decoded one at a time."""

    episode: Episode
    view: str

    def __len__(self) -> int:
        return self.episode.num_frames

    def __getitem__(self, position: int) -> np.ndarray:
        """`[H, W, 3]` uint8 RGB."""
        jpeg = self.episode.frames[self.view][position]
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        if picture is None or picture.shape[:2] != tuple(self.episode.size):
            raise UserError(
                f"frame {position} of view {self.view!r} of episode {self.episode.episode_id!r} is no JPEG picture of "
                f"{self.episode.size[0]}x{self.episode.size[1]} pixels"
            )
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


@dataclass
class _VideoFiles:
    """The MP4 files of one camera: episodes end to end, a new file where one is full."""

    root: Path
    key: str
    size: tuple[int, int]
    fps: float
    full: int
    _number: int = 0
    _frames: int = 0  # in the open file
    _open: Any = field(default=None, repr=False)

    def add(self, frames: _Frames, shown: np.ndarray) -> dict[str, float]:
        """Appends an episode whose rows show the stored frames `shown`; returns where it is."""
        if self._open is not None and self._path.stat().st_size >= self.full:
            self.close()
            self._number += 1
        if self._open is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            container = av.open(str(self._path), "w", options={"movflags": "faststart"})
            options = {"crf": _QUALITY, "g": str(_KEYFRAMES), "bf": "0"}
            stream: Any = container.add_stream(_CODEC, rate=self._rate, options=options)
            stream.height, stream.width = self.size
            stream.pix_fmt = "yuv420p"
            self._open, self._frames = (container, stream), 0
        container, stream = self._open
        start = self._frames
        picture = None
        for row, position in enumerate(shown.tolist()):
            if row == 0 or position != shown[row - 1]:
                picture = av.VideoFrame.from_ndarray(frames[position], format="rgb24").reformat(format="yuv420p")
            assert picture is not None
            picture.pts, picture.time_base = self._frames, 1 / self._rate
            container.mux(stream.encode(picture))
            self._frames += 1
        return {**_place(self._number), "from_timestamp": start / self.fps, "to_timestamp": self._frames / self.fps}

    def close(self) -> None:
        """Ends the open file."""
        if self._open is not None:
            container, stream = self._open
            self._open = None
            with container:
                container.mux(stream.encode())

    @property
    def _rate(self) -> Fraction:
        return Fraction(self.fps).limit_denominator(1001)

    @property
    def _path(self) -> Path:
        return self.root / _VIDEO_PATH.format(video_key=self.key, **_place(self._number))


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}


def _vectors(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """States and actions `[T + 1, 8 G]` float32; the last action repeats the one before it."""
    actions = _pose_vectors(episode.command_poses, episode.command_grippers)
    return _pose_vectors(episode.poses, episode.grippers), np.concatenate([actions, actions[-1:]])


def _pose_vectors(poses: np.ndarray, grippers: np.ndarray) -> np.ndarray:
    quaternions = Rotation.from_matrix(poses[..., :3, :3].reshape(-1, 3, 3)).as_quat().reshape(*poses.shape[:2], 4)
    turns = (quaternions[1:] * quaternions[:-1]).sum(-1) < 0  # q and -q are the same rotation; stay near the last one
    signs = np.concatenate([np.ones((1, poses.shape[1])), np.where(np.cumsum(turns, axis=0) % 2, -1.0, 1.0)])
    vectors = np.concatenate([poses[..., :3, 3], quaternions * signs[..., None], grippers[..., None]], axis=-1)
    return vectors.reshape(len(poses), -1).astype(np.float32)


def _containing(spans: Sequence[Span], rows: int) -> np.ndarray:
    """`[rows]` int: index of the span that each step lies in; the final observation belongs to the last one."""
    return np.searchsorted([span.end for span in spans[:-1]], np.arange(rows), side="right")


def _annotations(episode: Episode, rows: int) -> dict[str, list[Any]]:
    """Subtasks and actions as LeRobot's `meta/episodes` knows them; the last end is that of the rows."""
    found: dict[str, list[Any]] = {}
    for prefix, level in _EVENTS.items():
        spans = episode.spans.get(level, ())
        if spans:
            found[f"{prefix}_subtask_names"] = [span.caption for span in spans]
            found[f"{prefix}_subtask_start_frames"] = [span.start for span in spans]
            found[f"{prefix}_subtask_end_frames"] = [*(span.end for span in spans[:-1]), rows]
    return found


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write_texts(path: Path, name: str, rows: Mapping[str, int]) -> None:
    """A table of texts and their numbers, the text as index for those who read it with pandas."""
    table = pa.table({f"{name}_index": pa.array(list(rows.values()), pa.int64()), name: list(rows)})
    columns = [
        {"name": column, "field_name": column, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for column, kind, numpy in ((f"{name}_index", "int64", "int64"), (name, "unicode", "object"))
    ]
    described = {"index_columns": [name], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(described)}), path)


def _statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std, count and quantiles of rows, one value per dimension."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
        **{name: np.quantile(rows, share, axis=0) for name, share in _QUANTILES.items()},
    }


def _picture_statistics(frames: _Frames) -> dict[str, np.ndarray]:
    """The same of a sample of frames per channel, 0 to 1, in the shape `[3, 1, 1]` that LeRobot gives them."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, _PICTURES).round().astype(int)).tolist()
    found = _statistics(np.concatenate([frames[position].reshape(-1, 3) for position in chosen]) / np.float32(255))
    shaped = {name: value.reshape(3, 1, 1) for name, value in found.items() if name != "count"}
    return {**shaped, "count": np.array([len(chosen)])}


def _merge(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of episodes together, as LeRobot does it: quantiles are the means of those of the episodes."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = counts / counts.sum()
    mean = np.tensordot(weights, np.stack([part["mean"] for part in parts]), 1)
    second = np.tensordot(weights, np.stack([part["std"] ** 2 + part["mean"] ** 2 for part in parts]), 1)
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(np.maximum(second - mean**2, 0)),
        "count": np.array([int(counts.sum())]),
        **{name: np.tensordot(weights, np.stack([part[name] for part in parts]), 1) for name in _QUANTILES},
    }
