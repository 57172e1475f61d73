"""Captions and pictures as the programs of both decoding modes take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.models.text import open_text_encoder
from wallwm_jax.models.text.byte_ids import encode_bytes

if TYPE_CHECKING:
    from wallwm_jax.models.text.umt5 import CaptionEncoder

_KEPT_CAPTIONS = 256  # features of 512 tokens of UMT5 take 4 MB


def open_captions(config: ConfigDict, store: Mapping[str, Any], weights: str = "") -> ByteCaptions | FeatureCaptions:
    """Captions as the model of `config` reads them; `weights` is where its frozen text encoder has moved."""
    if config.model.text.kind == "features":
        return FeatureCaptions(open_text_encoder(store, weights), config)
    return ByteCaptions(config)


class ByteCaptions:
    """Captions as byte ids."""

    def __init__(self, config: ConfigDict) -> None:
        self._length = int(config.data.text_length)

    def tokens(self, caption: str) -> int:
        """Bytes and the end id."""
        return len(caption.encode()) + 1

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """`text_ids [N, L]`, `text_length [N]`."""
        ids, lengths = zip(*(encode_bytes(caption, self._length) for caption in captions))
        return {"text_ids": np.stack(ids), "text_length": np.array(lengths, np.int32)}


class FeatureCaptions:
    """Captions as features of the frozen encoder, each encoded once; beyond `_KEPT_CAPTIONS` the memory begins anew."""

    def __init__(self, encoder: CaptionEncoder, config: ConfigDict) -> None:
        self._encoder, self._length = encoder, int(config.data.text_length)
        self._known: dict[str, np.ndarray] = {}

    def tokens(self, caption: str) -> int:
        """Tokens with the end id, as far as the encoder reads."""
        self.encode([caption])
        return len(self._known[caption])

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """`text_features [N, L, Dt]`, `text_length [N]`."""
        if len(self._known) > _KEPT_CAPTIONS:
            self._known = {}
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        self._known |= dict(zip(new, self._encoder.encode(new)))
        rows = [self._known[caption][: self._length] for caption in captions]
        features = np.zeros((len(rows), self._length, rows[0].shape[1]), np.float32)
        for place, row in zip(features, rows):
            place[: len(row)] = row
        return {"text_features": features, "text_length": np.array([len(row) for row in rows], np.int32)}


def fit_picture(frame: np.ndarray, size: tuple[int, int], view: str) -> np.ndarray:
    """A picture of a camera at the size of the store's; raises UserError where it is none."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise UserError(f"view {view!r}: expected a [H, W, 3] uint8 picture, got {frame.dtype} {list(frame.shape)}")
    if frame.shape[:2] == size:
        return frame
    return cv2.resize(frame, (size[1], size[0]), interpolation=cv2.INTER_AREA)
