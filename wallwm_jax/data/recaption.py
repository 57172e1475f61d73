"""New captions for an event store that exists: its episodes out of the records, and the layer that holds what was said.

    captioned = captioner.caption(read_episodes("stores/demo"))
    write_layer("stores/demo", (episode.spans for episode in captioned), "templates")

Nothing of the store but the small `store.json` is written again, and that last; see `wallwm_jax.data.caption_files`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wallwm_jax.config import fingerprint
from wallwm_jax.console import UserError, write_text
from wallwm_jax.data.caption_files import (
    CAPTIONS,
    EPISODES,
    LAYERS,
    Wordings,
    parent_of,
    places,
    read_spans,
    save_captions,
    save_spans,
    span_entry,
)
from wallwm_jax.data.event_store import BadRecord, EventStore, WindowRecord, open_store
from wallwm_jax.events.actions import ARM_DIM, absolute_commands
from wallwm_jax.events.captioners import Spans
from wallwm_jax.events.schema import LEVELS, CameraTrack, Episode
from wallwm_jax.events.windows import KINDS, Window
from wallwm_jax.models.text import open_text_encoder


def stored_spans(path: str | Path, episodes: Sequence[int] | None = None) -> list[Spans]:
    """Spans of the episodes of a store as they are captioned now, of all by episode id, or of those that are named.

    Stores of earlier builds name paraphrases only in the records of their windows, which are then read once.
    """
    store = open_store(path)
    chosen = range(len(store.episodes)) if episodes is None else episodes
    entries = {number: store.episodes[number] for number in chosen}
    spans: dict[int, Spans] = {number: read_spans(entry) for number, entry in entries.items()}
    if any("paraphrases" not in span for entry in entries.values() for row in entry["spans"].values() for span in row):
        _recall_paraphrases(store, spans)
    return list(spans.values())


def read_episodes(path: str | Path, episodes: Sequence[int] | None = None) -> Iterator[Episode]:
    """The episodes of a store, all or those that are named, rebuilt from their windows: what a captioner sees.

    It is not the recording. Poses between the windows' observations are the commanded ones, shifted to meet them;
    frames that no record holds (of stores of latents, all but keyframes) are the nearest that one does. Only cameras
    that stand still are there.

    Raises:
      UserError: no record of an episode can be read.
    """
    spans = stored_spans(path, episodes)
    store = open_store(path)
    chosen = range(len(store.episodes)) if episodes is None else episodes
    stores = {split: store if split == store.split else open_store(path, split) for split in store.meta["splits"]}
    windows = {split: _windows_by_episode(one.index["episode"]) for split, one in stores.items()}
    for entry, row in zip((store.episodes[number] for number in chosen), spans):
        yield _rebuild(stores[entry["split"]], entry, row, windows[entry["split"]].get(entry["id"], []))


@dataclass
class LayerSummary:
    """What `write_layer` wrote: the layer's folder, its number of wordings, and captions by level that changed."""

    folder: Path
    wordings: int
    changed: Counter[str] = field(default_factory=Counter)


def write_layer(path: str | Path, spans: Iterable[Spans], captioner: str, *, text_weights: str = "") -> LayerSummary:
    """Puts new captions in use: all or nothing, records untouched.

    Args:
      path: the event store.
      spans: of every episode by episode id; only their words may differ from the store's.
      captioner: who said it, for `store.json`.
      text_weights: of the frozen text encoder, where it has one; by default those that the store was built with.

    Raises:
      UserError: a span that moved, too few or too many episodes, no weights of the text encoder.
    """
    path = Path(path).expanduser()
    store = open_store(path)
    summary = LayerSummary(path, 0)
    revised, entries = [], []
    said = list(spans)
    if len(said) != len(store.episodes):
        raise UserError(f"{len(said)} episodes were captioned, event store {str(path)!r} has {len(store.episodes)}")
    for entry, new in zip(store.episodes, said):
        _check_same(entry, new)
        rows = {level: [span_entry(span) for span in new[level]] for level in LEVELS if level in new}
        for level, row in rows.items():
            before = entry["spans"][level]
            summary.changed[level] += sum(a["caption"] != b["caption"] for a, b in zip(before, row))
        revised.append(new)
        entries.append({**entry, "spans": rows})
    wordings = _wordings(store, revised)
    summary.wordings = len(wordings.ids)
    name = fingerprint({"episodes": entries, "before": store.meta["fingerprint"]})
    summary.folder = path / LAYERS / name
    temporary = path / LAYERS / f".{name}.partial-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        features = _features(store, list(wordings.ids), text_weights) if store.has_text_features else None
        save_captions(temporary / CAPTIONS, list(wordings.ids), features)
        save_spans(temporary, revised, wordings.ids)
        (temporary / EPISODES).write_text(json.dumps(entries))
        shutil.rmtree(summary.folder, ignore_errors=True)
        os.replace(temporary, summary.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    meta = {key: value for key, value in store.meta.items() if key != "fingerprint"}
    meta["captions"] = {"folder": f"{LAYERS}/{name}", "captioner": captioner}
    write_text(path / "store.json", json.dumps({**meta, "fingerprint": fingerprint(meta)}, indent=2) + "\n")
    return summary


def _check_same(entry: Mapping[str, Any], spans: Spans) -> None:
    def shape(rows: Mapping[str, Any], read: Any) -> dict[str, list[Any]]:
        return {
            level: [tuple(read(span, name) for name in ("start", "end", "parent")) for span in row]
            for level, row in rows.items()
        }

    if shape(entry["spans"], lambda span, name: span[name]) != shape(spans, getattr):
        raise UserError(
            f"episode {entry['name']!r} of {entry['source']!r}: the captioner moved, added or left out spans; it may "
            "only name them"
        )


def _wordings(store: EventStore, episodes: list[Spans]) -> Wordings:
    """All that records can then ask for: captions and paraphrases, and with a text encoder their variants."""
    wordings = Wordings()
    for spans in episodes:
        for row in spans.values():
            for span in row:
                for text in (span.caption, *span.paraphrases):
                    wordings.add(text)
    if not store.has_text_features:
        return wordings
    starts = [{level: [span.start for span in row] for level, row in spans.items()} for spans in episodes]
    for split in store.meta["splits"]:
        for row in open_store(store.path, split).index:
            number, level = int(row["episode"]), LEVELS[row["level"]]
            is_event = KINDS[row["kind"]] == "event"
            span = episodes[number][level][row["event_index"] if is_event else 0]
            around, _ = places(starts[number], level, span.start, span.end)
            parent = parent_of(episodes[number], around)
            wordings.add_variants(span.caption, span.paraphrases, parent, float(row["duration_s"]))
    wordings.add("")
    return wordings


def _features(store: EventStore, texts: list[str], weights: str) -> list[np.ndarray]:
    """Features of every text: the store's own where it has them, the others encoded."""
    new = [text for text in texts if store.text_tokens(text) is None]
    encoded = dict(zip(new, open_text_encoder(store.meta, weights).encode(new))) if new else {}
    return [encoded[text] if text in encoded else np.array(store.text_features(text)) for text in texts]


def _windows_by_episode(episodes: np.ndarray) -> dict[int, list[int]]:
    order = np.argsort(episodes, kind="stable")
    numbers, starts = np.unique(episodes[order], return_index=True)
    return {int(n): part.tolist() for n, part in zip(numbers, np.split(order, starts[1:]))}


def _recall_paraphrases(store: EventStore, episodes: dict[int, Spans]) -> None:
    """Puts the paraphrases that the records name into the spans."""
    for split in store.meta["splits"]:
        one = open_store(store.path, split)
        for record in _readable(one, np.flatnonzero(np.isin(one.index["episode"], list(episodes))).tolist()):
            if record.paraphrase_ids:
                number = record.event_index if record.kind == "event" else 0
                row: Any = list(episodes[record.episode_id][record.level])
                texts = tuple(one.caption(caption) for caption in record.paraphrase_ids)
                row[number] = replace(row[number], paraphrases=texts)
                episodes[record.episode_id] = {**episodes[record.episode_id], record.level: tuple(row)}


def _readable(store: EventStore, windows: Iterable[int]) -> Iterator[WindowRecord]:
    for window in windows:
        try:
            yield store.read(window)
        except BadRecord:
            continue


def _rebuild(store: EventStore, entry: Mapping[str, Any], spans: Spans, windows: list[int]) -> Episode:
    meta, steps = store.meta, entry["num_steps"]
    stride = meta["video_stride"]
    frames: dict[str, dict[int, bytes]] = {view: {} for view in entry["views"]}
    commands: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    measured: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    geometry = []
    for record in _readable(store, windows):
        window = _window_of(record, stride)
        kept = np.unique(window.keyframes) if record.latents is not None else np.arange(len(window.frame_indices))
        for view, pictures in record.frames.items():
            frames[view] |= dict(zip(window.frame_indices[kept].tolist(), pictures))
        arms = int(record.state_valid.sum()) // ARM_DIM
        pose, gripper = absolute_commands(record.state[None], np.tile(np.eye(4), (arms, 1, 1)))
        measured[record.start] = pose[0], gripper[0]
        told = zip(*absolute_commands(record.actions, pose[0]))
        commands |= dict(zip(window.action_steps.tolist(), told, strict=True))
        geometry.append(record.geometry)
    if not measured:
        raise UserError(f"no record of episode {entry['name']!r} of event store {str(store.path)!r} can be read")
    ordered = sorted(commands)
    command_poses, command_grippers = (
        np.stack([commands[step][part] for step in _nearest(ordered, steps)]) for part in (0, 1)
    )
    poses, grippers = (
        np.concatenate([start[None], rest])
        for start, rest in zip(measured[min(measured)], (command_poses, command_grippers))
    )
    known = sorted(measured)
    errors = np.stack([measured[step][0][:, :3, 3] - poses[step, :, :3, 3] for step in known])
    for arm, axis in np.ndindex(errors.shape[1:]):
        poses[:, arm, axis, 3] += np.interp(np.arange(steps + 1), known, errors[:, arm, axis])
    grippers[known] = [measured[step][1] for step in known]
    indices = {view: _nearest(sorted(found), entry["num_frames"]) for view, found in frames.items() if found}
    return Episode(
        episode_id=entry["name"],
        source=entry["source"],
        embodiment=entry["embodiment"],
        clock_hz=meta["clock_hz"],
        video_stride=stride,
        size=tuple(meta["size"]),
        frames={view: [frames[view][index] for index in found] for view, found in indices.items()},
        poses=poses,
        grippers=grippers,
        command_poses=command_poses,
        command_grippers=command_grippers,
        spans=spans,
        cameras=_still_cameras(np.concatenate(geometry, axis=1), meta, list(indices), entry["num_frames"]),
        seed=entry["seed"],
        success=entry["success"],
        provenance=(*entry["provenance"], "rebuilt from the windows of an event store"),
        derived_from=entry.get("derived_from", ""),
    )


def _window_of(record: WindowRecord, stride: int) -> Window:
    return Window(
        kind=record.kind,
        level=record.level,
        event_index=record.event_index,
        span_start=record.span_start,
        span_end=record.span_end,
        start=record.start,
        num_frames=len(record.frame_steps),
        stride=stride,
        duration_s=record.duration_s,
        history=record.history,
        kept=None if record.history else tuple((record.frame_steps // stride).tolist()),
    )


def _nearest(known: list[int], count: int) -> list[int]:
    """For each of `count` positions the nearest known one."""
    places = np.array(known)
    return places[np.abs(np.arange(count)[:, None] - places).argmin(1)].tolist()


def _still_cameras(
    geometry: np.ndarray, meta: Mapping[str, Any], views: list[str], frames: int
) -> dict[str, CameraTrack]:
    """Calibrations of the views whose camera does not move, from geometry `[V, n, 21]` of an episode's latents."""
    height, width = meta["size"]
    cameras = {}
    for view in views:
        rows = geometry[meta["views"].index(view)]
        if rows[0].any() and np.ptp(rows, axis=0).max() < 1e-6:
            fx, fy, cx, cy = rows[0, :4] * (width, height, width, height)
            pose = np.concatenate([rows[0, 9:].reshape(3, 4), [[0, 0, 0, 1]]])
            intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
            cameras[view] = CameraTrack(intrinsics, np.tile(pose, (frames, 1, 1)), rows[0, 4:9])
    return cameras
