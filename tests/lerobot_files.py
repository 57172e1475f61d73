"""Writes LeRobot sets of versions 2.1 and 3.0 for tests, from the documented layout alone, with pyarrow and PyAV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from recorded_motion import FPS, SUBTASKS, Raw

_PATHS = {
    "v2.1": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3.0": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}
_SAID = pa.list_(
    pa.struct(
        [
            pa.field("role", pa.string(), nullable=False),
            pa.field("content", pa.string()),
            pa.field("style", pa.string()),
            pa.field("timestamp", pa.float32(), nullable=False),
            pa.field("camera", pa.string()),
            pa.field("tool_calls", pa.list_(pa.string())),
        ]
    )
)


def write_set(
    root: Path,
    raws: Sequence[Raw],
    version: str = "v3.0",
    *,
    labels: str = "",
    per_file: int = 2,
    fps: float = FPS,
    as_images: bool = False,
    videos_of: Path | None = None,
) -> Path:
    """Writes a set; `labels`: "", "rows", "language" or "episodes"; version 3 puts `per_file` episodes into a file.

    Its videos are those of another set, where `videos_of` is given.
    """
    write = (lambda path, pictures, fps: None) if videos_of else write_video
    tasks = sorted({raw.task for raw in raws})
    tables = [_rows(raw, number, tasks, labels, as_images) for number, raw in enumerate(raws)]
    offsets = np.cumsum([0, *(len(raw.times) for raw in raws)]).tolist()
    entries: list[dict[str, Any]] = []
    for number, raw in enumerate(raws):
        entries.append({"episode_index": number, "tasks": [raw.task], "length": len(raw.times)})
        if labels == "episodes":
            starts = [row for row in range(len(raw.times)) if row == 0 or raw.subtasks[row] != raw.subtasks[row - 1]]
            entries[-1] |= {
                "sparse_subtask_names": [raw.subtasks[row] for row in starts],
                "sparse_subtask_start_frames": starts,
                "sparse_subtask_end_frames": [*starts[1:], len(raw.times)],
            }
    if version == "v2.1":
        for number, (raw, table) in enumerate(zip(raws, tables)):
            _write_table(root / _PATHS[version][0].format(episode_chunk=0, episode_index=number), table)
            for key, pictures in raw.pictures.items() if not as_images else ():
                path = _PATHS[version][1].format(episode_chunk=0, episode_index=number, video_key=key)
                write(root / path, pictures, fps)
    for file in range(0, len(raws), per_file) if version == "v3.0" else ():
        members = range(file, min(file + per_file, len(raws)))
        place = {"chunk_index": 0, "file_index": file // per_file}
        _write_table(root / _PATHS[version][0].format(**place), pa.concat_tables([tables[n] for n in members]))
        for key in raws[0].pictures if not as_images else ():
            path = root / _PATHS[version][1].format(**place, video_key=key)
            write(path, np.concatenate([raws[n].pictures[key] for n in members]), fps)
        for n in members:
            entries[n] |= {f"data/{name}": value for name, value in place.items()}
            entries[n] |= {"dataset_from_index": offsets[n], "dataset_to_index": offsets[n + 1]}
            for key in raws[0].pictures:
                entries[n] |= {f"videos/{key}/{name}": value for name, value in place.items()}
                entries[n][f"videos/{key}/from_timestamp"] = (offsets[n] - offsets[file]) / fps
                entries[n][f"videos/{key}/to_timestamp"] = (offsets[n + 1] - offsets[file]) / fps
            entries[n]["stats/action/count"] = [len(raws[n].times)]
    if videos_of:
        (root / "videos").symlink_to(videos_of / "videos")
    _write_meta(root / "meta", version, tasks, entries, labels)
    _write_info(root, version, raws, tables[0], fps, as_images)
    return root


def write_video(path: Path, pictures: np.ndarray, fps: float) -> None:
    """H.264 with B-frames and a key frame every 12 pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        stream.options = {"g": "12", "crf": "20", "preset": "veryfast"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def change_info(root: Path, **values: Any) -> None:
    """Overwrites entries of meta/info.json."""
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _rows(raw: Raw, number: int, tasks: list[str], labels: str, as_images: bool) -> pa.Table:
    rows = len(raw.times)
    columns: dict[str, Any] = {
        "observation.state": _lists(raw.state),
        "action": _lists(raw.action),
        "timestamp": pa.array(raw.times, pa.float32()),
        "frame_index": pa.array(range(rows), pa.int64()),
        "episode_index": pa.array([number] * rows, pa.int64()),
        "task_index": pa.array([tasks.index(raw.task)] * rows, pa.int64()),
        **{key: pa.array(values) for key, values in raw.extra.items()},
    }
    if labels == "rows":
        columns["subtask_index"] = pa.array([_index(text) for text in raw.subtasks], pa.int64())
    if labels == "language":
        starts = [row for row in range(rows) if row == 0 or raw.subtasks[row] != raw.subtasks[row - 1]]
        said = [_said("subtask", raw.subtasks[row], raw.times[row]) for row in starts]
        said += [_said("motion", f"move {row}", raw.times[row]) for row in sorted({*starts, rows // 3})]
        said += [_said("task_aug", "move the block to the left side", 0.0), _said("memory", "nothing yet", 0.0)]
        columns["language_persistent"] = pa.array([said] * rows, _SAID)
    if as_images:
        for key, pictures in raw.pictures.items():
            stored = [
                {"bytes": cv2.imencode(".png", picture[..., ::-1])[1].tobytes(), "path": ""} for picture in pictures
            ]
            columns[key] = pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def _index(text: str) -> int:
    return SUBTASKS.index(text) if text in SUBTASKS else -1


def _lists(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.reshape(-1).astype(np.float32))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _said(style: str, content: str, timestamp: float) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "style": style, "timestamp": timestamp, "camera": None}


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_meta(meta: Path, version: str, tasks: list[str], entries: list[dict[str, Any]], labels: str) -> None:
    meta.mkdir(parents=True, exist_ok=True)
    if version == "v2.1":
        lines = [json.dumps({"task_index": n, "task": task}, ensure_ascii=False) for n, task in enumerate(tasks)]
        (meta / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
        rows = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        (meta / "episodes.jsonl").write_text("\n".join(rows), encoding="utf-8")
    else:  # the text is the index of a pandas frame, which has a name in some sets only
        _write_table(meta / "tasks.parquet", pa.table({"task_index": range(len(tasks)), "__index_level_0__": tasks}))
        _write_table(meta / "episodes" / "chunk-000" / "file-000.parquet", pa.Table.from_pylist(entries[::-1]))
    if labels == "rows":
        table = pa.table({"subtask_index": range(len(SUBTASKS)), "subtask": list(SUBTASKS)})
        _write_table(meta / "subtasks.parquet", table)


def _write_info(root: Path, version: str, raws: Sequence[Raw], table: pa.Table, fps: float, as_images: bool) -> None:
    kind = "image" if as_images else "video"
    height, width = next(iter(raws[0].pictures.values())).shape[1:3]
    names = ["height", "width", "channels"]
    features: dict[str, Any] = {
        key: {"dtype": kind, "shape": [height, width, 3], "names": names} for key in raws[0].pictures
    }
    for column in table.schema:
        if column.name not in features:
            size = column.type.list_size if pa.types.is_fixed_size_list(column.type) else 1
            features[column.name] = {"dtype": "float32", "shape": [size], "names": None}
    info = {
        "codebase_version": version,
        "robot_type": "test_arm",
        "total_episodes": len(raws),
        "total_frames": sum(len(raw.times) for raw in raws),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(raws)}"},
        "data_path": _PATHS[version][0],
        "video_path": None if as_images else _PATHS[version][1],
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
