"""Captioners: who says what the events of an episode are. They put words on spans and never move them.

`templates` writes from the motion alone, `vlm` asks a vision-language model, `human` takes what people edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from wallwm_jax.events.schema import Episode, Span

Spans = Mapping[str, Sequence[Span]]
"""Level → its spans in time order, as an episode has them."""


@dataclass(frozen=True)
class Caption:
    """What a captioner says of one span; the fields are those of `Span`. `verb` None keeps the span's own."""

    caption: str
    paraphrases: tuple[str, ...] = ()
    confidence: float | None = None
    provenance: str = ""
    verb: str | None = None


class Captioner(Protocol):
    """Gives episodes new captions, paraphrases, confidence and provenance."""

    def caption(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """The same episodes in the same order; start, end and parent of every span are as they were."""
        ...


def with_captions(spans: Spans, captions: Mapping[tuple[str, int], Caption]) -> dict[str, tuple[Span, ...]]:
    """The spans with new captions at `(level, index)`; all others, and all starts, ends and parents, as they were.

    Raises:
      KeyError: a caption for a span that is not there.
    """
    left = dict(captions)
    captioned = {
        level: tuple(_said(span, left.pop((level, index), None)) for index, span in enumerate(row))
        for level, row in spans.items()
    }
    if left:
        raise KeyError(f"captions for spans that are not there: {sorted(left)}")
    return captioned


def _said(span: Span, caption: Caption | None) -> Span:
    if caption is None:
        return span
    paraphrases = tuple(text for text in dict.fromkeys(caption.paraphrases) if text != caption.caption)
    return replace(
        span,
        caption=caption.caption,
        paraphrases=paraphrases,
        confidence=caption.confidence,
        provenance=caption.provenance,
        verb=span.verb if caption.verb is None else caption.verb,
    )
