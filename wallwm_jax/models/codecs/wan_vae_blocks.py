"""Building blocks of the Wan video autoencoders: convolutions that are causal in time and remember between chunks.

Video is `[B, T, H, W, C]`. It passes in chunks: one frame alone, then any numbers of frames that the temporal stride
divides. Everything in the first chunk is one frame long and has no past, so the convolutions there are images' (only
their last time slice meets data) and the changes of frame rate are skipped. What later chunks need of earlier ones goes
through a `FeatureCache`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from wallwm_jax.models.attention import attend
from wallwm_jax.models.layers import Linear

REACH = 2  # frames of the past that a convolution over three frames reads
NORM_FLOOR = 1e-24  # smallest squared length of a feature vector that the norm divides by

Cache = tuple[jax.Array, ...]


class FeatureCache:
    """The last frames that each convolution over time has seen, in the order in which a forward pass reaches them.

    `saved` is what `state()` gave after the previous chunk, None before the first one.
    """

    def __init__(self, saved: Cache | None):
        self.is_first = saved is None
        self._saved = iter(saved or ())
        self._kept: list[jax.Array] = []

    def swap(self, x: jax.Array, frames: int) -> jax.Array | None:
        """Keeps the last `frames` frames of past and `x [B, T, ...]`; returns the past, None in the first chunk."""
        if self.is_first:
            missing = [(0, 0), (frames - 1, 0)] + [(0, 0)] * (x.ndim - 2)
            self._kept.append(jnp.pad(x, missing))  # a video begins after zeros
            return None
        past = next(self._saved)
        self._kept.append(jnp.concatenate([past, x], 1)[:, -frames:])
        return past

    def state(self) -> Cache:
        """The kept frames, `[B, frames, H, W, C]` each; their shapes do not depend on the length of a chunk."""
        return tuple(self._kept)


class Conv(nnx.Module):
    """Convolution of each frame, kernel `[h, w, in, out]`, computed in `dtype`."""

    def __init__(self, fan_in: int, fan_out: int, size: tuple[int, ...] = (3, 3), *, rngs: nnx.Rngs, dtype: jnp.dtype):
        std = 1.0 / math.sqrt(fan_in * math.prod(size))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*size, fan_in, fan_out), jnp.float32) * std)
        self.bias = nnx.Param(jnp.zeros((fan_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, stride: int = 1, padding: tuple[int, int] = (1, 1)) -> jax.Array:
        """`x [B, T, H, W, C]`; `padding` is zeros before and after, over height and width alike."""
        return self._convolve(x, self.kernel[...], (stride, stride), padding)

    def _convolve(
        self, x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, int]
    ) -> jax.Array:
        """Convolution without padding over time: of frames for a kernel of rank 4, of video for rank 5."""
        lead = x.shape[:2]
        over_time = kernel.ndim == 5
        x = x if over_time else x.reshape(-1, *x.shape[2:])
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=strides,
            padding=[(0, 0)] * (kernel.ndim - 4) + [padding, padding],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC") if over_time else ("NHWC", "HWIO", "NHWC"),
        )
        y = y + self.bias[...].astype(self.dtype)
        return y if over_time else y.reshape(*lead, *y.shape[1:])


class CausalConv(Conv):
    """Convolution over the current and two earlier frames, kernel `[3, h, w, in, out]`; keeps height and width."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        size: tuple[int, ...] = (3, 3, 3),
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        stride: int = 1,
    ):
        super().__init__(fan_in, fan_out, size, rngs=rngs, dtype=dtype)
        self.stride = stride

    def __call__(self, x: jax.Array, past: jax.Array | None) -> jax.Array:  # type: ignore[override]
        """`x [B, T, H, W, C]` after the frames `past`; None stands for zeros before a single frame."""
        side = self.kernel.shape[1] // 2
        if past is None:
            return self._convolve(x, self.kernel[-1], (1, 1), (side, side))
        x = jnp.concatenate([past, x.astype(past.dtype)], 1)
        return self._convolve(x, self.kernel[...], (self.stride, 1, 1), (side, side))


class ChannelNorm(nnx.Module):
    """Root-mean-square norm over the channels of each cell with a scale; float32 inside, dtype kept."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        squared = jnp.maximum(jnp.sum(y * y, -1, keepdims=True), NORM_FLOOR)
        return (y * jax.lax.rsqrt(squared) * math.sqrt(x.shape[-1]) * self.scale[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two norm-SiLU-convolution layers around a shortcut, which is a linear map where the width changes."""

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm_1 = ChannelNorm(fan_in)
        self.conv_1 = CausalConv(fan_in, fan_out, rngs=rngs, dtype=dtype)
        self.norm_2 = ChannelNorm(fan_out)
        self.conv_2 = CausalConv(fan_out, fan_out, rngs=rngs, dtype=dtype)
        self.shortcut = None if fan_in == fan_out else Linear(fan_in, fan_out, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for norm, conv in ((self.norm_1, self.conv_1), (self.norm_2, self.conv_2)):
            x = jax.nn.silu(norm(x))
            x = conv(x, cache.swap(x, REACH))
        return x + shortcut


class FrameAttention(nnx.Module):
    """Self-attention with one head over the cells of each frame, around a shortcut."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = ChannelNorm(width)
        self.qkv = Linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.output = Linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, h, w, width = x.shape
        query, key, value = jnp.split(self.qkv(self.norm(x)).reshape(b * t, 1, h * w, 3 * width), 3, -1)
        mixed = attend(query, key, value)
        return x + self.output(mixed.reshape(x.shape))


class Middle(nnx.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.block_1 = ResidualBlock(width, width, rngs=rngs, dtype=dtype)
        self.attention = FrameAttention(width, rngs=rngs, dtype=dtype)
        self.block_2 = ResidualBlock(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x, cache)), cache)


class Downsample(nnx.Module):
    """Halves height and width, and with `over_time` the frame rate of all but the first frame."""

    def __init__(self, width: int, over_time: bool, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.conv = Conv(width, width, rngs=rngs, dtype=dtype)
        self.time_conv = CausalConv(width, width, (3, 1, 1), rngs=rngs, dtype=dtype, stride=2) if over_time else None

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        x = self.conv(x, stride=2, padding=(0, 1))
        if self.time_conv is None:
            return x
        past = cache.swap(x, 1)
        return x if past is None else self.time_conv(x, past)


class Upsample(nnx.Module):
    """Doubles height and width, and with `over_time` the frame rate of all but the first frame."""

    def __init__(self, fan_in: int, fan_out: int, over_time: bool, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.time_conv = CausalConv(fan_in, 2 * fan_in, (3, 1, 1), rngs=rngs, dtype=dtype) if over_time else None
        self.conv = Conv(fan_in, fan_out, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        if self.time_conv is not None:
            # The first frame is not part of the past that the later ones see here: they begin after zeros.
            past = cache.swap(jnp.zeros_like(x) if cache.is_first else x, REACH)
            if past is not None:
                b, t, h, w, c = x.shape
                pairs = self.time_conv(x, past).reshape(b, t, h, w, 2, c)
                x = jnp.moveaxis(pairs, 4, 2).reshape(b, 2 * t, h, w, c)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 2), 2, 3))


class DownStage(nnx.Module):
    """Residual blocks of one encoder width, then a `Downsample` (but for the last stage).

    With `averaging` (Wan 2.2), the stage's input, averaged over cells and groups of channels, is added to its output.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        blocks: int,
        *,
        shrink: bool,
        over_time: bool,
        averaging: bool,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        widths = [fan_in] + [fan_out] * blocks
        self.blocks = numbered(ResidualBlock(i, o, rngs=rngs, dtype=dtype) for i, o in itertools.pairwise(widths))
        self.downsample = Downsample(fan_out, over_time, rngs=rngs, dtype=dtype) if shrink else None
        self.factors = ((2 if over_time else 1, 2 if shrink else 1), fan_out) if averaging else None

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        start = x
        for block in self.blocks.values():
            x = block(x, cache)
        if self.downsample is not None:
            x = self.downsample(x, cache)
        return x if self.factors is None else x + average_down(start, *self.factors)


class UpStage(nnx.Module):
    """Residual blocks of one decoder width, then an `Upsample` to width `fan_up` (but for the last stage).

    With `duplicating` (Wan 2.2), the stage's input, its channels dealt out to the new cells, is added to its output.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        blocks: int,
        *,
        fan_up: int,
        grow: bool,
        over_time: bool,
        duplicating: bool,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        widths = [fan_in] + [fan_out] * blocks
        self.blocks = numbered(ResidualBlock(i, o, rngs=rngs, dtype=dtype) for i, o in itertools.pairwise(widths))
        self.upsample = Upsample(fan_out, fan_up, over_time, rngs=rngs, dtype=dtype) if grow else None
        self.factors = ((2 if over_time else 1, 2), fan_up) if duplicating and grow else None

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        start = x
        for block in self.blocks.values():
            x = block(x, cache)
        if self.upsample is not None:
            x = self.upsample(x, cache)
        if self.factors is None:
            return x
        return x + duplicate_up(start, *self.factors, drop_first=cache.is_first)


def average_down(x: jax.Array, factors: tuple[int, int], width: int) -> jax.Array:
    """Means `[B, T/t, H/s, W/s, width]` of `x [B, T, H, W, C]` for factors (t, s).

    The `C t s s` numbers of a new cell, channels slowest, are averaged in `width` equal groups. Where t does not divide
    T, zero frames come before.
    """
    t, s = factors
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % t, 0), (0, 0), (0, 0), (0, 0)))
    b, frames, h, w, c = x.shape
    cells = x.reshape(b, frames // t, t, h // s, s, w // s, s, c)
    cells = jnp.transpose(cells, (0, 1, 3, 5, 7, 2, 4, 6))
    return jnp.mean(cells.reshape(*cells.shape[:4], width, -1), -1)


def duplicate_up(x: jax.Array, factors: tuple[int, int], width: int, *, drop_first: bool) -> jax.Array:
    """`[B, T t, H s, W s, width]` of `x [B, T, H, W, C]` for factors (t, s).

    Each number is repeated `width t s s / C` times, then the channels are read as (width, t, s, s). `drop_first` drops
    the first t - 1 frames.
    """
    t, s = factors
    b, frames, h, w, c = x.shape
    cells = jnp.repeat(x, width * t * s * s // c, -1).reshape(b, frames, h, w, width, t, s, s)
    y = jnp.transpose(cells, (0, 1, 5, 2, 6, 3, 7, 4)).reshape(b, frames * t, h * s, w * s, width)
    return y[:, t - 1 :] if drop_first else y


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Modules under the names "0", "1", ...: parameter paths of strings only, as checkpoints have them."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})
