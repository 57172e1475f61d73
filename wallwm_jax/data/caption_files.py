"""The captions of an event store: every distinct wording once, its features, and layers that say it anew.

A build writes `captions.npz` (and `text_features.npy`), and records refer to its rows. A re-caption leaves all of that
as it is and adds a layer, a folder of its own that `store.json` names:

    captions/<checksum>/captions.npz         the wordings of the layer
    captions/<checksum>/text_features.npy    of stores with a frozen text encoder: their features
    captions/<checksum>/episodes.json        the episodes with the new captions, confidence and provenance
    captions/<checksum>/spans.npz            row of each span's caption and paraphrases, by episode, level and order

Records are then read with the layer's captions in place of their own: videos are neither encoded nor copied. The layer
is in use from the moment `store.json` names it; earlier ones stay for those who have the store open.
"""

from __future__ import annotations

import itertools
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.caption import duration_clause, with_parent
from wallwm_jax.events.schema import LEVELS, Span

if TYPE_CHECKING:
    from wallwm_jax.data.event_store import WindowRecord

CAPTIONS = "captions.npz"
TEXT_FEATURES = "text_features.npy"
EPISODES = "episodes.json"
SPANS = "spans.npz"
LAYERS = "captions"


def save_captions(path: Path, captions: Sequence[str], features: Sequence[np.ndarray] | None = None) -> None:
    """Writes captions as their UTF-8 bytes end to end; the byte ids of the `bytes` text encoder are these plus 3.

    `features`, `[n, Dt]` bfloat16 of each caption, go end to end into `TEXT_FEATURES` beside `path`.
    """
    encoded = [caption.encode() for caption in captions]
    arrays: dict[str, Any] = {
        "utf8": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }
    if features is not None:
        rows = [np.ascontiguousarray(part).view(np.uint16) for part in features]
        ends = np.cumsum([len(part) for part in rows], dtype=np.int64)
        checksums = [zlib.crc32(part.tobytes()) for part in rows]
        arrays["features"] = np.stack([np.concatenate([[0], ends[:-1]]), ends, checksums], 1)
        table = np.lib.format.open_memmap(
            path.with_name(TEXT_FEATURES), "w+", np.uint16, (int(ends[-1]), rows[0].shape[1])
        )
        for part, end in zip(rows, ends):
            table[end - len(part) : end] = part
        table.flush()
    np.savez(path, **arrays)


def load_captions(path: Path) -> list[str]:
    """Reads what `save_captions` wrote. Raises `UserError` where it is missing or damaged."""
    try:
        with np.load(path) as table:
            data, offsets = table["utf8"].tobytes(), table["offsets"].tolist()
        return [data[start:end].decode() for start, end in itertools.pairwise(offsets)]
    except Exception as error:  # a damaged zip raises from several modules
        raise UserError(f"captions {str(path)!r} are missing or damaged ({error}); build the store again") from None


class Wordings:
    """Distinct texts in the order in which they came; `ids` maps each to its row."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def add(self, text: str) -> int:
        """The row of a text."""
        return self.ids.setdefault(text, len(self.ids))

    def add_variants(self, caption: str, paraphrases: Sequence[str], parent: str, duration_s: float) -> None:
        """Every wording that a loader may draw for a window besides the captions themselves: with its parent's
        caption, with its duration, with both."""
        for text in (caption, *paraphrases):
            for wording in (text, duration_clause(text, duration_s)):
                self.add(wording)
                self.add(with_parent(parent, wording))


def places(starts: Mapping[str, Sequence[int]], level: str, start: int, end: int) -> tuple[list[int], list[int]]:
    """Which spans are around and after a stretch `[start, end)` on a level.

    Args:
      starts: level → first step of each of its spans; a level that the episode lacks is absent.

    Returns:
      Per level the index of the span around the stretch, -1 on finer levels, and of the first one that starts at its
      end or later; -1 where there is none.
    """
    around, after = [-1] * len(LEVELS), [-1] * len(LEVELS)
    for depth, name in enumerate(LEVELS):
        firsts = starts.get(name, ())
        if len(firsts):
            if depth <= LEVELS.index(level):
                around[depth] = bisect_right(firsts, start) - 1
            following = bisect_left(firsts, end)
            after[depth] = following if following < len(firsts) else -1
    return around, after


def parent_of(spans: Mapping[str, Sequence[Span]], around: Sequence[int]) -> str:
    """The caption of the nearest coarser span; `around` as `places` gives it. "" for a task."""
    captions = [spans[level][index].caption for level, index in zip(LEVELS, around) if index >= 0]
    return captions[-2] if len(captions) > 1 else ""


def save_spans(folder: Path, episodes: Sequence[Mapping[str, Sequence[Span]]], rows: Mapping[str, int]) -> None:
    """Writes the table of `SpanCaptions`; `rows` maps each caption and paraphrase to its row."""
    counts = [[0, *(len(spans.get(level, ())) for level in LEVELS)] for spans in episodes]
    every = [span for spans in episodes for level in LEVELS for span in spans.get(level, ())]
    ends = np.cumsum(counts).reshape(len(counts), -1)
    np.savez(
        folder / SPANS,
        first=ends.astype(np.int64),
        starts=np.array([span.start for span in every], np.int32),
        captions=np.array([rows[span.caption] for span in every], np.int32),
        bounds=np.cumsum([0, *(len(span.paraphrases) for span in every)], dtype=np.int64),
        paraphrases=np.array([rows[text] for span in every for text in span.paraphrases], np.int32),
    )


class SpanCaptions:
    """The rows of a layer's captions, by episode, level and index; opened from its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` where the table is missing or damaged."""
        try:
            with np.load(folder / SPANS) as table:
                self._first, self._starts, self._captions, self._bounds, self._paraphrases = (
                    table[name] for name in ("first", "starts", "captions", "bounds", "paraphrases")
                )
        except Exception as error:  # a damaged zip raises from several modules
            raise UserError(
                f"{str(folder / SPANS)!r} is missing or damaged ({error}); caption the store again"
            ) from None

    def ids(self, record: WindowRecord) -> dict[str, Any]:
        """What the layer has for the fields of a record that hold caption ids."""
        first, level = self._first[record.episode_id], LEVELS.index(record.level)
        starts = {name: self._starts[first[depth] : first[depth + 1]] for depth, name in enumerate(LEVELS)}
        around, after = places(starts, record.level, record.span_start, record.span_end)

        def rows(indices: Sequence[int]) -> np.ndarray:
            found = [self._captions[first[depth] + index] if index >= 0 else -1 for depth, index in enumerate(indices)]
            return np.array(found, np.int32)

        place = first[level] + (record.event_index if record.kind == "event" else 0)
        before = self._captions[first[level] : place]
        wordings = self._paraphrases[self._bounds[place] : self._bounds[place + 1]]
        return {
            "level_caption_ids": rows(around),
            "next_caption_ids": rows(after),
            "paraphrase_ids": tuple(wordings.tolist()),
            "previous_caption_ids": tuple(before.tolist()),
        }


def span_entry(span: Span) -> dict[str, Any]:
    """A span as `episodes.json` has it."""
    return {
        "start": int(span.start),
        "end": int(span.end),
        "caption": span.caption,
        "verb": span.verb,
        "parent": span.parent,
        "success": span.success,
        "paraphrases": list(span.paraphrases),
        "confidence": span.confidence,
        "provenance": span.provenance,
    }


def read_spans(entry: Mapping[str, Any]) -> dict[str, tuple[Span, ...]]:
    """The spans of an entry of `episodes.json`; stores of earlier builds know no paraphrases there."""
    return {
        level: tuple(Span(**{**span, "paraphrases": tuple(span.get("paraphrases", ()))}) for span in spans)
        for level, spans in entry["spans"].items()
    }
