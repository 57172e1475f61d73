"""Captions as byte ids: the tokenizer-free vocabulary of the `bytes` text encoder. numpy only, no JAX.

Byte `b` of the UTF-8 text has id `b + 3`; 0 is padding, 1 ends the text. The null text is the encoding of "".
"""

from __future__ import annotations

import numpy as np

PAD_ID = 0
EOS_ID = 1
BYTE_OFFSET = 3
VOCABULARY = 256 + BYTE_OFFSET


def encode_bytes(text: str, length: int) -> tuple[np.ndarray, int]:
    """Returns (`ids [length]` int32, number of ids before the padding).

    The end id is always kept: a text of more than `length - 1` bytes loses its tail. "" gives `[1, 0, 0, ...]`, 1.

    Raises:
      ValueError: `length` is less than 1.
    """
    if length < 1:
        raise ValueError(f"text length {length}: at least 1, for the end id")
    raw = np.frombuffer(text.encode("utf-8")[: length - 1], np.uint8)
    ids = np.full(length, PAD_ID, np.int32)
    ids[: len(raw)] = raw.astype(np.int32) + BYTE_OFFSET
    ids[len(raw)] = EOS_ID
    return ids, len(raw) + 1


def decode_bytes(ids: np.ndarray) -> str:
    """The text of `ids [length]`, up to the end id; a character cut by truncation is dropped."""
    ids = np.asarray(ids)
    raw = ids[ids >= BYTE_OFFSET] - BYTE_OFFSET
    return raw.astype(np.uint8).tobytes().decode("utf-8", errors="ignore")
