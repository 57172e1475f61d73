"""Event labels as recordings carry them, turned into the gap-free, nested spans of an episode."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wallwm_jax.events.schema import LEFT_OUT, LEVELS, Span
from wallwm_jax.sources.columns import BadRecording

MAX_GAP_S = 0.5  # of unlabelled time that the event before it takes over
_SNAP_S = 0.25  # boundaries of two levels closer than this are one boundary

_VERB = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Label:
    """A caption that holds from `start_s` until `end_s`, seconds from the first row; `end_s` None: until the next."""

    start_s: float
    caption: str
    end_s: float | None = None
    paraphrases: tuple[str, ...] = ()


def runs(texts: Sequence[str | None], times: np.ndarray) -> list[Label]:
    """Labels of a column with one text per row, None where there is none; `times` `[N]` seconds from the first row."""
    labels: list[Label] = []
    starts = [row for row in range(len(texts)) if row == 0 or texts[row] != texts[row - 1]]
    for start, end in zip(starts, [*starts[1:], None]):
        text = texts[start]
        if text is not None:
            labels.append(Label(float(times[start]), text, None if end is None else float(times[end])))
    return labels


def spans(
    labels: Mapping[str, Sequence[Label]], steps: int, hz: float
) -> tuple[dict[str, list[Span]], tuple[str, ...]]:
    """Spans of every labelled level over control steps `[0, steps)`, and in words what was repaired for that.

    Unlabelled time of up to half a second goes to the event before it (at the start: after it); a level with more, or
    with an empty caption, is left out. Boundaries of a finer level are moved on to those of a coarser one where they
    are within a quarter of a second; elsewhere a finer event is cut where a coarser one ends, so that each lies in one
    parent.

    Raises:
      BadRecording: there is no task text, or an empty one.
    """
    levels: dict[str, list[Span]] = {}
    repairs: list[str] = []
    cuts = np.array([0, steps])
    for level in (level for level in LEVELS if labels.get(level)):
        given = sorted(labels[level], key=lambda label: label.start_s)
        empty = [label for label in given if not label.caption.strip()]
        if empty:
            where = f"empty caption at {empty[0].start_s:.2f} s"
            if level == "task":
                raise BadRecording(level, f"has an {where}")
            repairs.append(f"{level} labels {LEFT_OUT}: an {where}")
            continue
        edges, chosen, gap_s = _tile(given, steps, hz)
        if gap_s > MAX_GAP_S:
            repairs.append(f"{level} labels {LEFT_OUT}: {gap_s:.2f} s without one")
            continue
        if gap_s > 0.5 / hz:
            repairs.append(f"{level} labels extended over {gap_s:.2f} s without one")
        if len(chosen) < len(given):
            repairs.append(f"{len(given) - len(chosen)} {level} labels {LEFT_OUT}: shorter than a control step")
        snapped = edges.copy()
        for cut in cuts[1:-1]:  # one boundary moves to each, so that no event vanishes; the first stays at 0
            closest = int(np.abs(edges - cut).argmin())
            if closest and abs(edges[closest] - cut) <= _SNAP_S * hz and edges[closest] not in cuts:
                snapped[closest] = cut
        parents = levels[next(reversed(levels))] if levels else None
        bounds = np.union1d(snapped, cuts)
        levels[level] = []
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            label = chosen[int(np.searchsorted(snapped, start, side="right")) - 1]
            parent = None if parents is None else next(n for n, span in enumerate(parents) if start < span.end)
            levels[level].append(Span(start, end, label.caption, _verb(label.caption), parent, label.paraphrases))
        cuts = bounds
    if "task" not in levels:
        raise BadRecording("task", "has no text")
    return levels, tuple(repairs)


def _tile(given: Sequence[Label], steps: int, hz: float) -> tuple[np.ndarray, list[Label], float]:
    """Start steps of the labels that get at least one step, those labels, and the longest unlabelled time."""
    bounds = [*(label.start_s for label in given), steps / hz]
    gaps = [
        given[0].start_s,
        *(after - label.end_s for label, after in zip(given, bounds[1:]) if label.end_s is not None),
    ]
    starts = np.array([min(round(label.start_s * hz), steps) for label in given])
    starts[0] = 0
    kept = [n for n in range(len(given)) if starts[n] < (starts[n + 1] if n + 1 < len(given) else steps)]
    edges = starts[kept]
    edges[0] = 0
    return edges, [given[n] for n in kept], max(gaps)


def _verb(caption: str) -> str:
    """The first word of an English caption, which names the behaviour: captions of labelled sets are imperatives."""
    word = _VERB.match(caption.strip().lower())
    return word[0] if word else "unknown"
