"""Event labels of LeRobot sets: three ways to write them, one way to read them.

    episodes  columns `[sparse_|dense_]subtask_names, _start_frames, _end_frames` of `meta/episodes` (end exclusive), or
              `_start_times, _end_times` in seconds; without ends each holds until the next. Unprefixed ones are the old
              name of the sparse ones
    language  columns `language_persistent` (repeated on every row) and `language_events` (on the row where it is said):
              styles "subtask" and "motion" hold until the next of the style, "task_aug" rewords the task
    rows      `subtask_index` and `meta/subtasks.parquet`, like tasks; -1 is unlabelled

Subtasks become level "subtask"; motions, and dense subtasks beside sparse ones, level "action". Where several ways
label a level, the first of this list is taken: it says how fine its labels are. Labels are an extra: what cannot be
used of them is left out with its reason, the recording stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from wallwm_jax.events.schema import LEFT_OUT
from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.labels import Label, runs

COLUMNS = ("subtask_index", "language_events")  # of the rows, both optional

_STYLES = {"subtask": "subtask", "motion": "action"}
_WHOLE_S = 0.05  # how far a whole second may be off, as a frame


@dataclass(frozen=True)
class EventLabels:
    """Labels of one episode by level, "task" always among them, and in words what was left out of them."""

    levels: dict[str, list[Label]]
    notes: tuple[str, ...]


def labels(
    table: pa.Table,
    said: Any,
    entry: Mapping[str, Any],
    texts: Mapping[str, Mapping[int, str]],
    times: np.ndarray,
    file: str,
) -> EventLabels:
    """What a set says about the events of one episode.

    Args:
      table: its rows: `task_index`, and those of `COLUMNS` that the set has.
      said: what its `language_persistent` holds.
      entry: its row of `meta/episodes`.
      texts: "tasks" and "subtasks": index → text.
      times: `[N]` seconds of the rows.
      file: for messages.

    Raises:
      BadRecording: a `task_index` names no text.
    """
    seconds, notes = times - times[0], list[str]()
    persistent, events = _spoken(said), _emitted(table, seconds)
    for row in persistent:
        row["second"] = _second(row, times[0])
    ways = {
        "meta/episodes": _of_episode(entry, seconds, notes),
        "language_persistent": _of_language(persistent, "language_persistent", notes),
        "language_events": _of_language(events, "language_events", notes),
        "subtask_index": _of_rows(table, texts["subtasks"], seconds, notes),
    }
    levels = {"task": runs(_tasks(table, texts["tasks"], file), seconds)}
    source: dict[str, str] = {}
    for way, given in ways.items():
        for level, found in given.items():
            chosen = levels.setdefault(level, found)
            source.setdefault(level, way)
            if [(it.start_s, it.caption) for it in chosen] != [(it.start_s, it.caption) for it in found]:
                notes.append(f"{level} labels of {way} {LEFT_OUT}: those of {source[level]} come first")
    first, *others = levels["task"]
    reworded = [row.get("content") for row in persistent if row.get("style") == "task_aug"]
    wordings = tuple(dict.fromkeys(text for text in reworded if text and text != first.caption))
    levels["task"] = [Label(first.start_s, first.caption, first.end_s, wordings), *others]
    return EventLabels(levels, tuple(notes))


def _tasks(table: pa.Table, texts: Mapping[int, str], file: str) -> list[str]:
    indices = table["task_index"].to_pylist()
    for index in indices:
        if index not in texts:
            raise BadRecording("task_index", f"is {index}, which meta does not name ({len(texts)} are named)", file)
    return [texts[index] for index in indices]


def _of_rows(
    table: pa.Table, texts: Mapping[int, str], seconds: np.ndarray, notes: list[str]
) -> dict[str, list[Label]]:
    if "subtask_index" not in table.column_names:
        return {}
    indices = table["subtask_index"].to_pylist()
    unknown = sorted({str(index) for index in indices if index not in (None, -1) and not texts.get(index, "").strip()})
    if unknown:
        notes.append(f"subtask labels of subtask_index {LEFT_OUT}: meta/subtasks names no {', '.join(unknown[:3])}")
        return {}
    found = runs([texts.get(index) for index in indices], seconds)
    return {"subtask": found} if found else {}


def _of_language(rows: Sequence[Mapping[str, Any]], column: str, notes: list[str]) -> dict[str, list[Label]]:
    found = {}
    for style, level in _STYLES.items():
        mine = [row for row in rows if row.get("style") == style]
        if not np.isfinite([row["second"] for row in mine]).all():
            notes.append(f"{style} labels of {column} {LEFT_OUT}: a row has no timestamp")
            continue
        held = _held([row["second"] for row in mine], [row.get("content") for row in mine])
        if held:
            found[level] = held
    others = Counter(_kind(row) for row in rows if row.get("style") not in ("task_aug", *_STYLES))
    if others:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        notes.append(f"rows of {column} {LEFT_OUT}, they name no event: {counted}")
    return found


def _of_episode(entry: Mapping[str, Any], seconds: np.ndarray, notes: list[str]) -> dict[str, list[Label]]:
    """Labels in the row of `meta/episodes`; the finer kind is the level "action" where there are both kinds."""
    sparse = "sparse_" if entry.get("sparse_subtask_names") else ""
    kinds = []
    for kind in (sparse, "dense_"):
        found = _of_kind(entry, f"{kind}subtask", seconds, notes)
        if found:
            kinds.append(found)
    return dict(zip(("subtask", "action"), kinds))


def _of_kind(entry: Mapping[str, Any], name: str, seconds: np.ndarray, notes: list[str]) -> list[Label]:
    names = entry.get(f"{name}_names")
    if not names:
        return []
    names = names if isinstance(names, list) else [names]
    if names == ["task"]:  # what LeRobot's annotator writes where nobody gave sparse labels
        notes.append(f"{name}_names {LEFT_OUT}: 'task' alone names no event")
        return []
    bounds = np.append(seconds, np.inf)
    for unit in ("frames", "times"):
        starts, ends = (_numbers(entry.get(f"{name}_{edge}_{unit}")) for edge in ("start", "end"))
        if starts is None or len(starts) != len(names) or (ends is not None and len(ends) != len(names)):
            continue
        ends = np.full(len(names), np.nan) if ends is None else ends
        if unit == "frames":
            starts, ends = (
                np.array([bounds[int(min(frame, len(seconds)))] if frame >= 0 else np.nan for frame in edge])
                for edge in (starts, ends)
            )
        break
    else:
        notes.append(f"{name}_names {LEFT_OUT}: no {name}_start_frames or _start_times fit {len(names)} names")
        return []
    kept = (starts >= 0) & (starts <= seconds[-1]) & ~(ends <= starts)
    if not kept.all():
        notes.append(f"{(~kept).sum()} of {len(names)} {name}_names {LEFT_OUT}: they hold no row of the episode")
    starts, ends, names = starts[kept], ends[kept], [name for name, keep in zip(names, kept) if keep]
    rest = seconds[-1] - ends.max(initial=-np.inf)
    edges = np.concatenate([starts, ends[np.isfinite(ends)]])
    if 0 < rest < 1 and (np.abs(edges - edges.round()) < _WHOLE_S).all():  # of an annotator who reads whole seconds
        notes.append(f"{name}_names extended over {rest:.2f} s at the end: they are in whole seconds")
        ends[ends.argmax()] = np.inf
    return _held(starts, names, np.where(ends > seconds[-1], np.nan, ends))


def _held(starts: Sequence[float] | np.ndarray, names: Sequence[Any], ends: np.ndarray | None = None) -> list[Label]:
    """Labels in time order; without an end (NaN) each holds until the next, and one without a name ends the last."""
    order = np.argsort(starts, kind="stable").tolist()
    out = []
    for n, following in zip(order, [*order[1:], None]):
        end = None if following is None else float(starts[following])
        if ends is not None and np.isfinite(ends[n]):
            end = float(ends[n])
        if isinstance(names[n], str) and names[n].strip():
            out.append(Label(max(float(starts[n]), 0.0), names[n], end))
    return out


def _numbers(values: Any) -> np.ndarray | None:
    """`[n]` float64, NaN where one is missing; None where they are no list of numbers."""
    try:
        numbers = np.array(values, np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.ndim == 1 and len(numbers) else None


def _spoken(said: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in said if isinstance(row, Mapping)] if isinstance(said, list) else []


def _emitted(table: pa.Table, seconds: np.ndarray) -> list[dict[str, Any]]:
    """The rows of `language_events`, each with the second at which it is said."""
    if "language_events" not in table.column_names:
        return []
    cells = table["language_events"].to_pylist()
    return [row | {"second": float(second)} for second, cell in zip(seconds, cells) for row in _spoken(cell)]


def _second(row: Mapping[str, Any], start: float) -> float:
    timestamp = row.get("timestamp")
    return float(timestamp) - float(start) if isinstance(timestamp, float | int) else float("nan")


def _kind(row: Mapping[str, Any]) -> str:
    return str(row.get("style") or ("speech" if row.get("tool_calls") else "without style"))
