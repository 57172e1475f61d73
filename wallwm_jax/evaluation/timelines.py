"""What pages show of an episode: its spans as bars along the time, frames along its way, true boundaries beside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.data.event_store import BadRecord, EventStore
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.segment import match_boundaries, tolerance_s
from wallwm_jax.events.windows import KINDS

FOUND, MISSED = "#2e8b57", "#c0392b"  # edges of true boundaries
_PASTELS = (
    "#cfe2f3",
    "#fce5cd",
    "#d9ead3",
    "#ead1dc",
    "#fff2cc",
    "#d0e0e3",
    "#e6d7f2",
    "#f4cccc",
    "#dfe6c8",
    "#d7dbe0",
)
_THUMBNAILS = 12


def level_bars(
    entry: Mapping[str, Any], clock_hz: float, truth: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Rows of bars for the template `timeline.html.j2`.

    Args:
      entry: an episode as `EventStore.episodes` has it.
      clock_hz: control steps per second.
      truth: the same episode with true spans, drawn in a row of their own below each level; their right edges say
        whether the boundary was found.

    Returns:
      Per row `name`, `kind` and `bars`; a level that the episode lacks is an empty row.
    """
    colours: dict[str, str] = {}
    rows = []
    for level in LEVELS:
        spans = entry["spans"].get(level, ())
        rows.append({"name": level, "kind": level, "bars": _bars(spans, entry["num_steps"], clock_hz, colours, level)})
        true = truth["spans"].get(level) if truth and level != "task" else None
        if true:
            within = tolerance_s([(span["end"] - span["start"]) / clock_hz for span in true]) * clock_hz
            found = {end for _, end in match_boundaries(boundaries(spans), boundaries(true), within)}
            bars = _bars(true, entry["num_steps"], clock_hz, colours, level)
            for bar, span in zip(bars[:-1], true):
                bar["edge"] = FOUND if span["end"] in found else MISSED
            rows.append({"name": "true", "kind": "true", "bars": bars})
    return rows


def boundaries(spans: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps at which one span ends and the next begins."""
    return [span["start"] for span in spans[1:]]


def frames_along(store: EventStore, episode: int, count: int = _THUMBNAILS) -> list[np.ndarray]:
    """Frames of the first view at equally spaced moments, read from the windows that hold them."""
    index = store.index
    windows = np.flatnonzero((index["episode"] == episode) & (index["kind"] == KINDS.index("event")))
    view, stride = store.meta["views"][0], store.meta["video_stride"]
    found: dict[int, np.ndarray] = {}
    wanted = np.linspace(0, store.episodes[episode]["num_steps"], count)
    for window in windows:
        try:
            record = store.read(int(window))
        except BadRecord:
            continue
        if view not in record.frames or record.latents is not None:  # keyframes alone do not say when they were
            continue
        for moment, step in enumerate(wanted):
            position = int(np.abs(record.frame_steps - step).argmin())
            if moment not in found and abs(record.frame_steps[position] - step) <= stride / 2:
                found[moment] = record.picture(view, position)
    return [found[moment] for moment in sorted(found)]


def data_uri(data: bytes, kind: str) -> str:
    """A picture of a kind ("png", "jpeg", "gif") as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _bars(
    spans: Sequence[Mapping[str, Any]], steps: int, clock_hz: float, colours: dict[str, str], level: str
) -> list[dict[str, Any]]:
    bars = []
    for span in spans:
        width = 100 * (span["end"] - span["start"]) / steps
        text = span["caption"] if level in ("task", "subtask") else span["verb"]
        bars.append(
            {
                "left": 100 * span["start"] / steps,
                "width": width,
                "text": text if width > 0.8 * len(span["verb"]) else "",
                "caption": span["caption"],
                "note": _told(span),
                "seconds": (span["end"] - span["start"]) / clock_hz,
                "colour": colours.setdefault(span["verb"], _PASTELS[len(colours) % len(_PASTELS)]),
                "edge": "",
            }
        )
    return bars


def _told(span: Mapping[str, Any]) -> str:
    """Who said it and how far it can be trusted, where the store knows."""
    confidence = span.get("confidence")
    sure = "" if confidence is None else f"confidence {confidence:.2f}"
    return ", ".join(part for part in (span.get("provenance", ""), sure) if part)
