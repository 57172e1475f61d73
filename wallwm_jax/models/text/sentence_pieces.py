"""Captions as SentencePiece ids, as Wan feeds its UMT5 encoder: cleaned text, end id, padding on the right. No JAX.

The vocabulary is the `spiece.model` that is published with the weights. The null text is the encoding of "".
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from wallwm_jax.console import UserError

MODEL_FILE = "spiece.model"


def clean(text: str) -> str:
    """Wan's rule for UMT5: HTML entities resolved (twice: they come doubled), runs of white space become one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


class Tokenizer:
    """A SentencePiece model read from a folder of weights."""

    def __init__(self, directory: str | Path):
        """Reads `directory/spiece.model`.

        Raises:
          UserError: the file is missing or damaged, or has no end or padding piece; or SentencePiece is not installed.
        """
        file = Path(directory).expanduser() / MODEL_FILE
        if not file.is_file():
            raise UserError(f"no tokenizer {str(file)!r}; copy {MODEL_FILE} from the published tokenizer folder there")
        try:
            import sentencepiece
        except ImportError:
            raise UserError("the UMT5 tokenizer needs SentencePiece: pip install sentencepiece") from None
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise UserError(f"tokenizer {str(file)!r} cannot be read: {error}") from None
        self.pad_id, self.end_id = self._pieces.pad_id(), self._pieces.eos_id()
        if min(self.pad_id, self.end_id) < 0:
            raise UserError(f"tokenizer {str(file)!r} has no padding or no end piece; is it UMT5's?")

    @property
    def vocabulary(self) -> int:
        """Number of pieces."""
        return self._pieces.get_piece_size()

    def encode(self, text: str, length: int) -> tuple[np.ndarray, int]:
        """Returns (`ids [length]` int32, number of ids before the padding).

        The end id is always kept: a longer text loses its tail. "" gives the end id alone.

        Raises:
          ValueError: `length` is less than 1.
        """
        if length < 1:
            raise ValueError(f"text length {length}: at least 1, for the end id")
        pieces = [*self._pieces.encode(clean(text))[: length - 1], self.end_id]
        ids = np.full(length, self.pad_id, np.int32)
        ids[: len(pieces)] = pieces
        return ids, len(pieces)
