"""Video codecs: frozen maps between frames and latents, with Wan's causal time layout; chosen by name.

A codec sees `1 + 4N` frames and returns `1 + N` latents: latent 0 is the first frame alone, latent n is frames
`4n - 3 .. 4n` (WALL-WM section 2.1: the first frame is the observation, the rest is the future). Importing this
package does not import JAX; data loader workers use it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.models.codecs.haar import HaarCodec
from wallwm_jax.models.codecs.wan_codec import LAYOUTS, WanCodec


class Codec(Protocol):
    """What the data pipeline and inference need of a codec. Latents are not normalised; the store's statistics do that.

    Attributes:
      name: as given to `get_codec` and written into stores.
      stride: pixels per latent cell over (time, height, width); the first frame is a group of its own.
      channels: `C`, numbers per latent cell.
      stored: whether event stores hold latents of this codec, rather than frames that the loader encodes.
    """

    name: str
    stride: tuple[int, int, int]
    channels: int
    stored: bool

    def encode(self, frames: Any) -> np.ndarray:
        """Frames `[..., 1+4N, H, W, 3]`, uint8 or float in [-1, 1], to latents `[..., 1+N, H/s, W/s, C]` float32."""

    def decode(self, latents: Any) -> np.ndarray:
        """Latents `[..., 1+N, h, w, C]` to frames `[..., 1+4N, h*s, w*s, 3]` float32, nominally in [-1, 1]."""


@functools.cache
def get_codec(name: str, weights: str = "", *, compute_dtype: str = "float32", batch: int = 8) -> Codec:
    """Returns the codec called `name`.

    Args:
      name: `haar8` (the exact wavelet at spatial stride 8), `haar4`, `haar16`, or Wan's autoencoders `wan21`, `wan22`.
      weights: folder with converted weights; the Wan codecs give their layout without, but do not encode or decode.
      compute_dtype: of the Wan codecs, float32 or bfloat16.
      batch: the largest number of videos that a Wan codec runs together.

    Raises:
      UserError: no codec has this name.
    """
    strides = {"haar4": 4, "haar8": 8, "haar16": 16}
    if name in LAYOUTS:
        return WanCodec(name, weights, compute_dtype=compute_dtype, batch=batch)
    if name not in strides:
        raise UserError(f"unknown codec {name!r}; choose one of {', '.join([*strides, *LAYOUTS])}")
    return HaarCodec(strides[name])


def open_codec(store: Mapping[str, Any], weights: str = "") -> Codec:
    """The codec of an event store, ready to encode and decode.

    Args:
      store: the store's description, `store.json`.
      weights: folder with its converted weights; by default the one that the store was built with.

    Raises:
      UserError: no weights there, or others than the store was built with.
    """
    built_with = store.get("codec_weights")
    if built_with is None:
        return get_codec(store["codec"])
    from wallwm_jax.models.convert.stream import same_weights

    return get_codec(store["codec"], same_weights(built_with, weights, "wan_vae", "--codec_weights"))


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [-1, 1] as uint8."""
    return np.clip(np.round((frames + 1.0) * 127.5), 0, 255).astype(np.uint8)
