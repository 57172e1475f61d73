"""Contact sheets: one event as one picture, its views below each other, time from left to right."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wallwm_jax.events.schema import Episode, Span

_GAP, _LABEL, _HEADER, _TEXT = 3, 16, 20, 13  # pixels
_QUALITY = 85


def moments(episode: Episode, span: Span, columns: int) -> list[int]:
    """Stored frames at equally spaced times from the event's first to the first of the next one, without repeats."""
    stride = episode.video_stride
    first, last = (min(round(step / stride), episode.num_frames - 1) for step in (span.start, span.end))
    return np.unique(np.linspace(first, last, columns).round().astype(int)).tolist()


def contact_sheet(episode: Episode, span: Span, *, columns: int = 6, height: int = 160) -> bytes:
    """A JPEG of an event: a row per view with its name, a column per moment with its time from the event's start.

    Args:
      episode: with frames.
      span: the event.
      columns: moments at most; a short event has fewer stored frames.
      height: of a frame, pixels; smaller frames are enlarged.

    Raises:
      OSError: a frame is no picture.
    """
    chosen = moments(episode, span, columns)
    font = ImageFont.load_default(_TEXT)
    rows = [[_frame(frames[index], height) for index in chosen] for frames in episode.frames.values()]
    width = max(picture.width for row in rows for picture in row)
    page = Image.new(
        "RGB", (len(chosen) * (width + _GAP) - _GAP, _HEADER + len(rows) * (_LABEL + height + _GAP)), "white"
    )
    draw = ImageDraw.Draw(page)
    for column, index in enumerate(chosen):
        seconds = (index * episode.video_stride - span.start) / episode.clock_hz
        draw.text((column * (width + _GAP) + width / 2, _HEADER / 2), f"{seconds:.1f} s", "black", font, anchor="mm")
    for number, (view, row) in enumerate(zip(episode.frames, rows)):
        top = _HEADER + number * (_LABEL + height + _GAP)
        draw.text((2, top + _LABEL / 2), view, "black", font, anchor="lm")
        for column, picture in enumerate(row):
            page.paste(picture, (column * (width + _GAP), top + _LABEL))
    out = io.BytesIO()
    page.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


def sheet_frames(episode: Episode, span: Span, columns: int) -> Sequence[bytes]:
    """The JPEG frames that `contact_sheet` draws."""
    chosen = moments(episode, span, columns)
    return [frames[index] for frames in episode.frames.values() for index in chosen]


def _frame(jpeg: bytes, height: int) -> Image.Image:
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)
