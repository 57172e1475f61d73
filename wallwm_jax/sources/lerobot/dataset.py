"""LeRobot sets on disk, `codebase_version` 2.0, 2.1 and 3.x, as `RecordedSet`.

    <set>/meta/info.json              version, fps, features, where data and videos are
    v2: meta/episodes.jsonl, tasks.jsonl; one parquet file and one MP4 per camera and episode
    v3: meta/episodes/*/*.parquet, tasks.parquet; several episodes per parquet file and per MP4

Event labels are read where a set has them; see `wallwm_jax.sources.lerobot.event_labels`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import LEFT_OUT
from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.embodiment import Embodiment
from wallwm_jax.sources.lerobot import event_labels, video
from wallwm_jax.sources.recorded import Recording

_LANGUAGE = "language_persistent"
_TABLES = ("tasks", "subtasks")  # index → text


class LeRobotSet:
    """A LeRobot set in a folder.

    Raises:
      UserError: it is no LeRobot set, of another version, or its `meta` cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path).expanduser()
        self.path = str(self._root)
        self.name = f"lerobot/{self._root.resolve().name}"
        try:
            info = json.loads((self._root / "meta" / "info.json").read_text(encoding="utf-8"))
            version = str(info["codebase_version"])
            self.features: dict[str, dict[str, Any]] = info["features"]
            self.fps: float | None = float(info["fps"])
            self._data_path, self._video_path = str(info["data_path"]), str(info.get("video_path") or "")
            self._chunks_size = int(info.get("chunks_size", 1000))
            kinds = {key: feature["dtype"] for key, feature in self.features.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path!r} is no LeRobot set: meta/info.json: {error!r}") from None
        if not version.startswith(("v2.", "v3.")) or not self.fps > 0:
            raise UserError(
                f"{self.path!r} is a LeRobot set of version {version} at {self.fps} fps; versions 2 and 3 are read, "
                "and LeRobot's own scripts convert older ones"
            )
        self.version = 2 if version.startswith("v2.") else 3
        self.pictures = {key for key, kind in kinds.items() if kind in ("video", "image")}
        self._videos = {key for key, kind in kinds.items() if kind == "video"}
        self._texts = {name: _texts(self._root / "meta", name) for name in _TABLES}
        self._episodes = _episodes(self._root / "meta", self.version)

    def __len__(self) -> int:
        return len(self._episodes)

    def check(self, embodiment: Embodiment) -> None:
        """Raises `UserError` where the set has not the columns and pictures that a description names."""
        numbers = sorted(set(self.features) - self.pictures)
        for key in sorted(embodiment.columns - set(numbers)):
            raise UserError(
                f"{self.path} has no column {key!r}, which the embodiment names; it has {', '.join(numbers)}"
            )
        for view, camera in embodiment.cameras.items():
            if camera.column not in self.pictures:
                raise UserError(
                    f"{self.path} has no pictures {camera.column!r}, which the embodiment names for view {view!r}; "
                    f"it has {', '.join(sorted(self.pictures)) or 'none'}"
                )

    def recording(self, number: int, embodiment: Embodiment) -> Recording:
        """Rows of one episode, no picture decoded; raises `BadRecording`."""
        try:
            return self._recording(number, embodiment)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            OSError,
            TypeError,
            ValueError,
            pa.ArrowException,
        ) as error:
            raise BadRecording("rows", f"of episode {number} cannot be read: {error!r}", self.path) from None

    def picture_rate(self, number: int, key: str) -> float | None:
        """Pictures per second that a camera's MP4 states; None where pictures are no video, or it cannot be read."""
        if key not in self._videos:
            return None
        try:
            return video.frame_rate(self._video_of(self._entry(number), key)[0], key)
        except BadRecording:
            return None

    def _recording(self, number: int, embodiment: Embodiment) -> Recording:
        entry = self._entry(number)
        index = int(entry["episode_index"])
        file = self._root / self._fill(self._data_path, entry, "data")
        numbers = sorted(embodiment.columns)
        labelled = [key for key in event_labels.COLUMNS if key in self.features]
        table = self._rows(file, index, ["timestamp", "task_index", *numbers], labelled)
        if table.num_rows != entry["length"]:
            raise BadRecording("length", f"meta says {entry['length']} rows, there are {table.num_rows}", str(file))
        if not table.num_rows:
            raise BadRecording("length", "no rows", str(file))
        columns = {key: _numbers(table[key], key, str(file)) for key in numbers}
        times = _numbers(table["timestamp"], "timestamp", str(file)).reshape(-1).astype(np.float64)
        said, missing = None, [key for key in labelled if key not in table.column_names]
        if _LANGUAGE in self.features:
            try:
                said = _said(file, index)
            except (LookupError, OSError, ValueError, pa.ArrowException):
                missing.append(_LANGUAGE)
        found = event_labels.labels(table, said, entry, self._texts, times, str(file))
        return Recording(
            name=f"{self.name.partition('/')[2]}/episode_{index:06d}",
            file=str(file),
            times=times,
            columns=columns,
            labels=found.levels,
            pictures=functools.partial(self._pictures, entry, file, times),
            notes=(*(f"{key} {LEFT_OUT}: {file.name} has none that can be read" for key in missing), *found.notes),
        )

    def _entry(self, number: int) -> dict[str, Any]:
        entry = self._episodes.slice(number, 1).to_pylist()[0]
        if entry.get("episode_index") is None or entry.get("length") is None:
            raise BadRecording("episode_index, length", f"missing in row {number} of meta/episodes", self.path)
        return entry

    def _fill(self, pattern: str, entry: dict[str, Any], what: str, **more: Any) -> str:
        """The path of an episode's file; `what` is the prefix of its numbers in the episodes table of version 3."""
        index = int(entry["episode_index"])
        try:
            numbers = (
                {"episode_chunk": index // self._chunks_size, "episode_index": index}
                if self.version == 2
                else {name: int(entry[f"{what}/{name}"]) for name in ("chunk_index", "file_index")}
            )
            return pattern.format(**numbers, **more)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadRecording(
                f"{what}/chunk_index, file_index", f"cannot be filled in {pattern!r}: {error}", self.path
            ) from None

    def _rows(self, file: Path, index: int, wanted: list[str], optional: list[str]) -> pa.Table:
        """The rows of one episode."""
        table = _table(file, tuple(sorted({"episode_index", *wanted, *optional})))
        for key in wanted:
            if key not in table.column_names:
                raise BadRecording(key, "is missing", str(file))
        if "episode_index" not in table.column_names:
            return table if self.version == 2 else table.slice(0, 0)
        return table.filter(pc.equal(table["episode_index"], index))

    def _pictures(
        self, entry: dict[str, Any], file: Path, times: np.ndarray, key: str, rows: Sequence[int]
    ) -> Iterator[np.ndarray]:
        found = self._video_of(entry, key) if key in self._videos else None
        if found is None:
            return _stored_images(file, int(entry["episode_index"]), key, rows)
        path, start = found
        assert self.fps
        return video.pictures_at(path, key, [start + float(times[row]) for row in rows], 0.5 / self.fps)

    def _video_of(self, entry: dict[str, Any], key: str) -> tuple[Path, float]:
        path = self._root / self._fill(self._video_path, entry, f"videos/{key}", video_key=key)
        start = 0.0 if self.version == 2 else entry.get(f"videos/{key}/from_timestamp")
        if not isinstance(start, float | int):
            raise BadRecording(f"videos/{key}/from_timestamp", f"is {start!r} in meta/episodes", self.path)
        return path, float(start)


def _episodes(meta: Path, version: int) -> pa.Table:
    """The table of episodes in their order, without statistics."""
    files = [meta / "episodes.jsonl"] if version == 2 else sorted((meta / "episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{str(meta)!r} holds no episodes/*/*.parquet; the set is not whole")
    try:
        if version == 2:
            table = pa.Table.from_pylist(_json_lines(files[0]))
        else:
            wanted = [[name for name in pq.read_schema(file).names if not name.startswith("stats/")] for file in files]
            parts = [pq.read_table(file, columns=names, use_threads=False) for file, names in zip(files, wanted)]
            table = pa.concat_tables(parts, promote_options="permissive")
        table.validate(full=True)
        return table.select(list(dict.fromkeys(["episode_index", "length", *table.column_names]))).sort_by(
            "episode_index"
        )
    except (LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"the episodes of {str(meta)!r} cannot be read: {' '.join(str(error).split())}") from None


def _texts(meta: Path, name: str) -> dict[int, str]:
    """index → text of `tasks` or `subtasks`; the text is a parquet file's index column, however pandas named it."""
    key = f"{name[:-1]}_index"
    parquet, lines = meta / f"{name}.parquet", meta / f"{name}.jsonl"
    rows: list[dict[str, Any]] = []
    if parquet.exists():
        try:
            rows = pq.read_table(parquet, use_threads=False).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{str(parquet)!r} cannot be read: {error}") from None
    elif lines.exists():
        rows = _json_lines(lines)
    texts = {}
    for row in rows:
        words = [value for other, value in row.items() if other != key and isinstance(value, str)]
        whole = isinstance(row.get(key), int) and bool(words)
        if not whole and name == "subtasks":  # an extra: who names it is told that it is missing
            continue
        if not whole:
            raise UserError(f"{str(meta)!r}: a row of {name} has no {key} or no text: {row}")
        texts[row[key]] = words[0]
    return texts


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{str(path)!r} holds lines that are no JSON objects")
    return rows


@functools.lru_cache(maxsize=1)
def _table(file: Path, columns: tuple[str, ...]) -> pa.Table:
    """Those of the columns that a data file has; kept, because several episodes of version 3 share a file."""
    try:
        present = set(pq.read_schema(file).names)
        return pq.read_table(file, columns=[name for name in columns if name in present], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise BadRecording("rows", f"cannot be read: {' '.join(str(error).split())}", str(file)) from None


def _said(file: Path, index: int) -> list[dict[str, Any]]:
    """The language rows of an episode. Every frame repeats them, so the column is not kept as `_table` keeps others."""
    first = [("episode_index", "=", index), ("frame_index", "=", 0)]
    found = pq.read_table(file, columns=[_LANGUAGE], use_threads=False, filters=first)[_LANGUAGE].to_pylist()
    return (found[0] if found else None) or []


def _numbers(column: pa.ChunkedArray, key: str, file: str) -> np.ndarray:
    """`[N, ...]` of a column of numbers or lists of numbers of one length; missing values become NaN."""
    try:
        array = column.combine_chunks()
        rows = len(array)
        while (
            pa.types.is_list(array.type)
            or pa.types.is_large_list(array.type)
            or pa.types.is_fixed_size_list(array.type)
        ):
            if array.null_count or len(set(pc.list_value_length(array).to_pylist())) > 1:
                raise BadRecording(key, "its rows differ in length", file)
            array = array.flatten()
        return array.to_numpy(zero_copy_only=False).reshape(rows, -1)
    except (pa.ArrowException, ValueError) as error:
        raise BadRecording(key, f"holds no numbers: {error}", file) from None


def _stored_images(file: Path, index: int, key: str, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """RGB pictures that are kept in the parquet file itself (`dtype` image)."""
    try:
        table = pq.read_table(file, columns=[key], use_threads=False, filters=[("episode_index", "=", index)])
    except (OSError, pa.ArrowException) as error:
        raise BadRecording(key, f"cannot be read: {' '.join(str(error).split())}", str(file)) from None
    for row in rows:
        stored = table[key][row].as_py()
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        picture = (
            cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            if isinstance(content, bytes) and content
            else None
        )
        if picture is None:
            raise BadRecording(key, f"no picture at row {row}", str(file))
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
