"""Event labels of LeRobot sets: three ways to write them, one way to read them.

    rows      `subtask_index` and `meta/subtasks.parquet`, like tasks; -1 is unlabelled
    language  column `language_persistent` (repeated on every row): style "subtask" and "motion" hold from their
              timestamp until the next of the style; style "task_aug" rewords the task
    episodes  columns `[sparse_|dense_]subtask_names, _start_frames, _end_frames` of `meta/episodes` (end exclusive)

Subtasks become level "subtask"; motions, and dense subtasks beside sparse ones, level "action".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.labels import Label, runs

_STYLES = {"subtask": "subtask", "motion": "action"}


def labels(
    table: pa.Table,
    said: Sequence[Mapping[str, Any]],
    entry: Mapping[str, Any],
    texts: Mapping[str, Mapping[int, str]],
    times: np.ndarray,
    file: str,
) -> dict[str, list[Label]]:
    """Labels of one episode by level, "task" always among them.

    Args:
      table: its rows: `task_index`, and `subtask_index` where the set has it.
      said: what its `language_persistent` holds.
      entry: its row of `meta/episodes`.
      texts: "tasks" and "subtasks": index → text.
      times: `[N]` seconds of the rows.
      file: for messages.

    Raises:
      BadRecording: a label names no text, or a frame outside the episode.
    """
    seconds = times - times[0]
    tasks = [_text(index, texts["tasks"], "task_index", file) for index in table["task_index"].to_pylist()]
    found = {"task": runs(tasks, seconds)}
    rewordings: tuple[str, ...] = ()
    if "subtask_index" in table.column_names:
        indices = table["subtask_index"].to_pylist()
        named = [None if i in (None, -1) else _text(i, texts["subtasks"], "subtask_index", file) for i in indices]
        found["subtask"] = runs(named, seconds)
    if said:
        for style, level in _STYLES.items():
            found[level] = [_said(row, times[0], file) for row in said if row.get("style") == style] or found.get(
                level, []
            )
        rewordings = tuple(row["content"] for row in said if row.get("style") == "task_aug" and row.get("content"))
    found |= _of_episode(entry, seconds, file)
    first, *others = found["task"]
    wordings = tuple(dict.fromkeys(text for text in rewordings if text != first.caption))
    found["task"] = [Label(first.start_s, first.caption, first.end_s, wordings), *others]
    return {level: given for level, given in found.items() if given}


def _text(index: Any, texts: Mapping[int, str], column: str, file: str) -> str:
    if index not in texts:
        raise BadRecording(column, f"is {index}, which meta does not name ({len(texts)} are named)", file)
    return texts[index]


def _said(row: Mapping[str, Any], start: float, file: str) -> Label:
    try:
        return Label(max(float(row["timestamp"]) - float(start), 0.0), str(row["content"] or ""))
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecording("language_persistent", f"a row lacks timestamp or content: {error!r}", file) from None


def _of_episode(entry: Mapping[str, Any], seconds: np.ndarray, file: str) -> dict[str, list[Label]]:
    """Labels in the row of `meta/episodes`; the finer kind is the level "action" where there are both kinds."""
    kinds = [kind for kind in ("sparse_", "dense_", "") if entry.get(f"{kind}subtask_names")]
    found = {}
    for kind, level in zip(kinds[:2], ("subtask", "action")):
        names = entry[f"{kind}subtask_names"]
        starts, ends = (entry.get(f"{kind}subtask_{edge}_frames") or [] for edge in ("start", "end"))
        if not len(names) == len(starts) == len(ends) or not all(
            0 <= start < len(seconds) and start < end for start, end in zip(starts, ends)
        ):
            raise BadRecording(f"{kind}subtask_start_frames", f"{starts} to {ends} do not fit {len(names)} names", file)
        found[level] = [
            Label(float(seconds[start]), name, float(seconds[end]) if end < len(seconds) else None)
            for name, start, end in zip(names, starts, ends)
        ]
    return found
