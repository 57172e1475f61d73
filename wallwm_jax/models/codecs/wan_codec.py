"""The Wan codecs by name: layout and latent statistics for everybody, encoding for those who have the weights.

Importing this file, or asking a `WanCodec` for its layout, does not import JAX: loader workers read stores of latents
without it. The autoencoder itself is `wan_vae.py`; it is loaded at the first `encode` or `decode`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from wallwm_jax.console import UserError

if TYPE_CHECKING:
    from wallwm_jax.models.codecs.wan_vae import BatchCodec

_WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_WAN22_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_WAN22_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is published of a codec beside its weights: strides, channels, and mean and deviation of each channel."""

    stride: tuple[int, int, int]
    channels: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]


WAN21 = Layout((4, 8, 8), 16, _WAN21_MEAN, _WAN21_STD)
WAN22 = Layout((4, 16, 16), 48, _WAN22_MEAN, _WAN22_STD)
LAYOUTS = {"wan21": WAN21, "wan22": WAN22}


class WanCodec:
    """Wan's video autoencoder behind the `Codec` interface.

    Attributes:
      name, stride, channels, stored: as every codec.
      latent_mean, latent_std: `[C]` float32; Wan's transformers expect latents normalised with them.
    """

    def __init__(self, name: str, weights: str = "", *, compute_dtype: str = "float32", batch: int = 8):
        """`name` is wan21 or wan22; `weights` the folder that `python -m wallwm_jax.convert wan_vae` wrote.

        `compute_dtype` is float32 or bfloat16; `batch` the largest number of videos that run together.

        Raises:
          UserError: another `compute_dtype`.
        """
        if compute_dtype not in ("float32", "bfloat16"):
            raise UserError(f"codec {name!r} computes in float32 or bfloat16, not {compute_dtype!r}")
        layout = LAYOUTS[name]
        self.name, self.stride, self.channels, self.stored = name, layout.stride, layout.channels, True
        self.latent_mean = np.array(layout.latent_mean, np.float32)
        self.latent_std = np.array(layout.latent_std, np.float32)
        self._weights, self._compute_dtype, self._batch = weights, compute_dtype, batch

    def encode(self, frames: Any) -> np.ndarray:
        """Means of the latents `[..., 1+N, H/s, W/s, C]` float32 of frames `[..., 1+4N, H, W, 3]`, uint8 or in [-1, 1].

        Raises:
          UserError: the number of frames is not `1 + 4N`, the sides do not divide by the stride, no RGB, no weights.
        """
        return self._autoencoder.encode(frames)

    def encode_videos(self, videos: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Latents `[1+N, h, w, C]` of each of many videos `[1+4N, H, W, 3]`: one frame size, any lengths, in order.

        They run in full batches; videos of similar lengths next to each other save work.
        """
        return self._autoencoder.encode_videos(videos)

    def decode(self, latents: Any) -> np.ndarray:
        """Frames `[..., 1+4N, h*s, w*s, 3]` float32 in [-1, 1] of un-normalised latents `[..., 1+N, h, w, C]`.

        Raises:
          UserError: the last axis is not `C`, or an axis is missing; no weights.
        """
        return self._autoencoder.decode(latents)

    @functools.cached_property
    def _autoencoder(self) -> BatchCodec:
        if not self._weights:
            raise UserError(
                f"codec {self.name!r} needs its weights to encode or decode; convert the published ones with "
                "`python -m wallwm_jax.convert wan_vae` and give their folder (--codec_weights)"
            )
        from wallwm_jax.models.codecs import wan_vae

        loaded = wan_vae.load(self._weights, compute_dtype=self._compute_dtype, batch=self._batch)
        if (loaded.config.stride, loaded.config.latent_channels) != (self.stride, self.channels):
            raise UserError(
                f"{self._weights!r} holds an autoencoder of stride {loaded.config.stride} and "
                f"{loaded.config.latent_channels} channels; codec {self.name!r} has {self.stride} and {self.channels}"
            )
        return loaded
