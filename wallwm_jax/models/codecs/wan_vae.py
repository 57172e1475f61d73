"""Wan's causal video autoencoders, 2.1 (4x8x8, 16 channels) and 2.2 (4x16x16, 48 channels), as frozen codecs.

Frames `[B, 1+4N, H, W, 3]` and latents `[B, 1+N, h, w, C]`: latent 0 is the first frame alone, latent n frames
`4n-3 .. 4n`. Parameters are a nested dict of arrays. `encode` and `decode` scan over latents with the feature cache as
carry, so that memory beside input and result does not grow with the number of frames; `encode_chunk` and
`decode_chunk` are one step of that scan, for streams. `BatchCodec` is what stores and policies use through `WanCodec`:
host arrays in and out, one compilation per frame size and batch, whatever the number of frames. WALL-WM section 2.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallwm_jax.console import UserError
from wallwm_jax.models.codecs.wan_vae_blocks import (
    REACH,
    Cache,
    CausalConv,
    ChannelNorm,
    DownStage,
    FeatureCache,
    Middle,
    UpStage,
    numbered,
)
from wallwm_jax.models.layers import Linear

Params = dict[str, Any]

COLOURS = 3
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class WanVaeConfig:
    """Sizes of one autoencoder.

    Attributes:
      encoder_width, decoder_width: channels at full resolution; each stage has `multipliers` times as many.
      latent_channels: C.
      averaging: the stages have Wan 2.2's parameter-free shortcuts.
      patch: side of the squares of pixels that are folded into channels before anything else.
      multipliers: of the encoder's stages; height and width are halved between stages.
      blocks: residual blocks per encoder stage; the decoder has one more.
      over_time: for each halving, whether it halves the frame rate too.
      compute_dtype: of convolutions and linear maps, "float32" or "bfloat16"; norms and softmax are float32.
    """

    encoder_width: int
    decoder_width: int
    latent_channels: int
    averaging: bool
    patch: int
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    over_time: tuple[bool, ...] = (False, True, True)
    compute_dtype: str = "float32"

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames and pixels per latent cell over (time, height, width)."""
        side = self.patch * 2 ** len(self.over_time)
        return (2 ** sum(self.over_time), side, side)


PUBLISHED = {
    "wan21": WanVaeConfig(96, 96, 16, averaging=False, patch=1),
    "wan22": WanVaeConfig(160, 256, 48, averaging=True, patch=2),
}


def load(weights: str, *, compute_dtype: str = "float32", batch: int = 8) -> BatchCodec:
    """The autoencoder whose weights `python -m wallwm_jax.convert wan_vae` wrote into the folder `weights`.

    Raises:
      UserError: no such folder, or not the weights of a Wan autoencoder.
    """
    from wallwm_jax.models.convert import stream

    loaded = stream.load(weights, "wan_vae")
    return BatchCodec(from_sizes(loaded.sizes, compute_dtype), loaded.params, batch=batch)


def from_sizes(sizes: Mapping[str, Any], compute_dtype: str = "float32") -> WanVaeConfig:
    """The config of weights whose conversion recorded `sizes` (lists, where they have been through JSON)."""
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
    return WanVaeConfig(**known, compute_dtype=compute_dtype)


class Posterior(NamedTuple):
    """Diagonal Gaussian of the latents, `[B, 1+N, h, w, C]` float32 each. The mean is the mode, the latent to use."""

    mean: jax.Array
    log_variance: jax.Array


class Encoder(nnx.Module):
    """Patches of pixels to the two halves (mean, log-variance) of the posterior, `[B, t, h, w, 2C]`."""

    def __init__(self, config: WanVaeConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        widths = [config.encoder_width * m for m in (1, *config.multipliers)]
        over_time = (*config.over_time, False)
        self.conv_in = CausalConv(COLOURS * config.patch**2, widths[0], rngs=rngs, dtype=dtype)
        self.stages = numbered(
            DownStage(
                *(fan_in, fan_out, config.blocks),
                shrink=i < len(config.over_time),
                over_time=over_time[i],
                averaging=config.averaging,
                rngs=rngs,
                dtype=dtype,
            )
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths))
        )
        self.middle = Middle(widths[-1], rngs=rngs, dtype=dtype)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, rngs=rngs, dtype=dtype)
        self.moments = Linear(2 * config.latent_channels, 2 * config.latent_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        x = self.conv_in(x, cache.swap(x, REACH))
        for stage in self.stages.values():
            x = stage(x, cache)
        x = jax.nn.silu(self.norm_out(self.middle(x, cache)))
        return self.moments(self.conv_out(x, cache.swap(x, REACH)))


class Decoder(nnx.Module):
    """Latents `[B, t, h, w, C]` to patches of pixels."""

    def __init__(self, config: WanVaeConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        widths = [config.decoder_width * m for m in reversed(config.multipliers)]
        over_time = (*reversed(config.over_time), False)
        self.latents = Linear(config.latent_channels, config.latent_channels, rngs=rngs, dtype=dtype)
        self.conv_in = CausalConv(config.latent_channels, widths[0], rngs=rngs, dtype=dtype)
        self.middle = Middle(widths[0], rngs=rngs, dtype=dtype)
        ups = [width if config.averaging else width // 2 for width in widths]  # width after each stage's upsampling
        self.stages = numbered(
            UpStage(
                *(fan_in, width, config.blocks + 1),
                fan_up=ups[i],
                grow=i < len(config.over_time),
                over_time=over_time[i],
                duplicating=config.averaging,
                rngs=rngs,
                dtype=dtype,
            )
            for i, (fan_in, width) in enumerate(zip((widths[0], *ups), widths))
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], COLOURS * config.patch**2, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        x = self.latents(x)
        x = self.middle(self.conv_in(x, cache.swap(x, REACH)), cache)
        for stage in self.stages.values():
            x = stage(x, cache)
        x = jax.nn.silu(self.norm_out(x))
        return self.conv_out(x, cache.swap(x, REACH))


class WanVae(nnx.Module):
    """The modules; the functions below are the interface."""

    def __init__(self, config: WanVaeConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)


def init(config: WanVaeConfig, key: jax.Array) -> Params:
    """Random float32 parameters, with top-level keys "encoder" and "decoder"."""
    return nnx.to_pure_dict(nnx.state(WanVae(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def encode(params: Params, config: WanVaeConfig, frames: jax.Array) -> Posterior:
    """Posterior of the latents of frames `[B, 1+4N, H, W, 3]`, uint8 or float in [-1, 1].

    Raises:
      UserError: the number of frames is not `1 + 4N`, or the sides do not divide by the stride.
    """
    _check_frames(config, frames.shape)
    return _scan(functools.partial(encode_chunk, params, config), frames, config.stride[0], 1)


def decode(params: Params, config: WanVaeConfig, latents: jax.Array) -> jax.Array:
    """Frames `[B, 1+4N, H, W, 3]` float32 in [-1, 1] from un-normalised latents `[B, 1+N, h, w, C]`.

    Raises:
      UserError: the latents do not have C channels.
    """
    _check_latents(config, latents.shape)
    return _scan(functools.partial(decode_chunk, params, config), latents, 1, config.stride[0])


def encode_chunk(
    params: Params, config: WanVaeConfig, frames: jax.Array, cache: Cache | None = None
) -> tuple[Posterior, Cache]:
    """The next frames of a stream: the first frame alone (no cache), then `[B, 4n, H, W, 3]` with the last cache.

    Returns:
      The posterior of the chunk's latents (1, then n of them), and the cache for the next chunk.
    """
    if frames.dtype == jnp.uint8:
        frames = frames.astype(jnp.float32) / 127.5 - 1.0
    memory = FeatureCache(cache)
    with _precision(config):
        moments = _bind(params, config).encoder(_fold(frames, config.patch), memory)
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)), memory.state()


def decode_chunk(
    params: Params, config: WanVaeConfig, latents: jax.Array, cache: Cache | None = None
) -> tuple[jax.Array, Cache]:
    """The next latents of a stream: the first one alone (no cache), then `[B, n, h, w, C]` with the last cache.

    Returns:
      The frames of the chunk (1, then 4n of them) in [-1, 1], and the cache for the next chunk.
    """
    memory = FeatureCache(cache)
    with _precision(config):
        patches = _bind(params, config).decoder(latents, memory)
    return jnp.clip(_unfold(patches.astype(jnp.float32), config.patch), -1.0, 1.0), memory.state()


class BatchCodec:
    """An autoencoder at work on host arrays: batches spread over local devices, one chunk of frames at a time.

    Two programs per direction, frame size and batch are compiled: the first frame, and a chunk of later ones.
    """

    def __init__(
        self,
        config: WanVaeConfig,
        params: Mapping[str, Any],
        *,
        batch: int = 8,
        devices: Sequence[jax.Device] | None = None,
    ):
        """`batch` is the largest number of videos that run together over all `devices` (default: all local ones)."""
        mesh = jax.sharding.Mesh(np.array(devices or jax.local_devices()), ("videos",))
        self.config = config
        self._devices = mesh.size
        self._batch = -(-batch // mesh.size) * mesh.size
        self._rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("videos"))
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._params = jax.device_put(_in_compute_dtype(params, config), replicated)

    def encode(self, frames: Any) -> np.ndarray:
        """Means of the latents `[..., 1+N, h, w, C]` float32 of frames `[..., 1+4N, H, W, 3]`, uint8 or in [-1, 1].

        Raises:
          UserError: the number of frames is not `1 + 4N`, the sides do not divide by the stride, or no RGB.
        """
        frames = np.asarray(frames)
        _check_frames(self.config, frames.shape)
        return self._in_batches(_encode_step, frames, self.config.stride[0])

    def decode(self, latents: Any) -> np.ndarray:
        """Frames `[..., 1+4N, H, W, 3]` float32 in [-1, 1] of un-normalised latents `[..., 1+N, h, w, C]`.

        Raises:
          UserError: the last axis is not `C`, or an axis is missing.
        """
        latents = np.asarray(latents, np.float32)
        _check_latents(self.config, latents.shape)
        return self._in_batches(_decode_step, latents, 1)

    def encode_videos(self, videos: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Latents `[1+N, h, w, C]` of each of many videos `[1+4N, H, W, 3]`: one frame size, any lengths, in order.

        Full batches whatever the lengths: shorter videos are held at their last frame, which leaves their own latents
        unchanged. Videos of similar lengths next to each other save work.
        """
        videos = iter(videos)
        while group := list(itertools.islice(videos, self._batch)):
            for video in group:
                _check_frames(self.config, video.shape)
                if video.shape[1:] != group[0].shape[1:]:
                    raise UserError(
                        f"Wan codec: frames of {group[0].shape[1:3]} and {video.shape[1:3]} pixels together"
                    )
            longest = max(len(video) for video in group)
            stacked = np.stack([_hold_last(video, longest) for video in group])
            for video, latents in zip(group, self.encode(_hold_rows(stacked, self._batch))):
                yield latents[: 1 + len(video) // self.config.stride[0]]

    def _in_batches(self, step: Callable[..., Any], videos: np.ndarray, chunk: int) -> np.ndarray:
        """`step` over videos `[..., T, h, w, c]`, `chunk` frames at a time after the first, in equal batches."""
        flat = videos.reshape(-1, *videos.shape[-4:])
        rows = min(self._batch, -(-len(flat) // self._devices) * self._devices)
        done = [self._stream(step, _hold_rows(flat[i : i + rows], rows), chunk) for i in range(0, len(flat), rows)]
        result = np.concatenate(done)[: len(flat)]
        return result.reshape(*videos.shape[:-4], *result.shape[1:])

    def _stream(self, step: Callable[..., Any], videos: np.ndarray, chunk: int) -> np.ndarray:
        """One batch; the device holds one chunk while the host fetches the one before."""
        done: list[np.ndarray] = []
        result, cache = None, None
        for start, stop in [(0, 1), *((i, i + chunk) for i in range(1, videos.shape[1], chunk))]:
            part = jax.device_put(np.ascontiguousarray(videos[:, start:stop]), self._rows)
            following, cache = step(self._params, self.config, part, cache)
            if result is not None:
                done.append(np.asarray(result))
            result = following
        return np.concatenate([*done, np.asarray(result)], 1)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def _encode_step(params: Params, config: WanVaeConfig, frames: jax.Array, cache: Cache | None) -> Any:
    posterior, cache = encode_chunk(params, config, frames, cache)
    return posterior.mean, cache


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def _decode_step(params: Params, config: WanVaeConfig, latents: jax.Array, cache: Cache | None) -> Any:
    return decode_chunk(params, config, latents, cache)


def _scan(step: Callable[..., Any], inputs: jax.Array, taken: int, given: int) -> Any:
    """Runs `step(chunk, cache)` over axis 1: the first element, then `taken` at a time, which give `given` results.

    The results are written in place into the carry, and each chunk is read where it lies: nothing else grows.
    """
    first, cache = step(inputs[:, :1])
    chunks = (inputs.shape[1] - 1) // taken
    if chunks == 0:
        return first

    def write(whole: jax.Array, part: jax.Array, start: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)

    def body(carry: Any, n: jax.Array) -> tuple[Any, None]:
        results, cache = carry
        part, cache = step(jax.lax.dynamic_slice_in_dim(inputs, 1 + n * taken, taken, axis=1), cache)
        return (jax.tree.map(lambda whole, new: write(whole, new, 1 + n * given), results, part), cache), None

    empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0], 1 + chunks * given, *x.shape[2:]), x.dtype), first)
    start = jax.tree.map(lambda whole, part: write(whole, part, 0), empty, first)
    return jax.lax.scan(body, (start, cache), jnp.arange(chunks))[0][0]


def _fold(frames: jax.Array, patch: int) -> jax.Array:
    """`[B, T, H, W, 3]` to `[B, T, H/p, W/p, 3pp]`: channels are (colour, column, row), the order of Wan's weights."""
    b, t, h, w, c = frames.shape
    cells = frames.reshape(b, t, h // patch, patch, w // patch, patch, c)
    return jnp.transpose(cells, (0, 1, 2, 4, 6, 5, 3)).reshape(b, t, h // patch, w // patch, c * patch * patch)


def _unfold(patches: jax.Array, patch: int) -> jax.Array:
    """Inverse of `_fold`."""
    b, t, h, w, c = patches.shape
    cells = patches.reshape(b, t, h, w, c // patch**2, patch, patch)
    return jnp.transpose(cells, (0, 1, 2, 6, 3, 5, 4)).reshape(b, t, h * patch, w * patch, c // patch**2)


def _precision(config: WanVaeConfig) -> contextlib.AbstractContextManager[Any]:
    """Accelerators round the operands of float32 products unless told otherwise."""
    return jax.default_matmul_precision("highest" if config.compute_dtype == "float32" else "default")


def _bind(params: Params, config: WanVaeConfig) -> WanVae:
    return nnx.merge(_graph(config), params)


@functools.lru_cache(maxsize=8)
def _graph(config: WanVaeConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: WanVae(config, rngs=nnx.Rngs(0))))[0]


def _in_compute_dtype(params: Mapping[str, Any], config: WanVaeConfig) -> Any:
    """Weights in the dtype they are used in; scales of norms stay float32."""

    def cast(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        return np.asarray(leaf, np.float32 if path[-1].key == "scale" else jnp.dtype(config.compute_dtype))

    return jax.tree_util.tree_map_with_path(cast, dict(params))


def _hold_last(video: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([video, np.repeat(video[-1:], count - len(video), axis=0)])


def _hold_rows(videos: np.ndarray, rows: int) -> np.ndarray:
    return _hold_last(videos, rows) if len(videos) < rows else videos


def _check_frames(config: WanVaeConfig, shape: Sequence[int]) -> None:
    group, side, _ = config.stride
    if len(shape) < 4 or shape[-1] != COLOURS or 0 in shape:
        raise UserError(f"Wan codec: frames have shape {tuple(shape)}, expected [..., 1+{group}N, H, W, 3]")
    count, height, width = shape[-4:-1]
    if (count - 1) % group:
        raise UserError(f"Wan codec: {count} frames; the causal layout needs 1 + {group}N (1, {1 + group}, ...)")
    if height % side or width % side:
        raise UserError(f"Wan codec: frames of {height}x{width} pixels do not divide into cells of {side}x{side}")


def _check_latents(config: WanVaeConfig, shape: Sequence[int]) -> None:
    if len(shape) < 4 or shape[-1] != config.latent_channels or 0 in shape:
        raise UserError(
            f"Wan codec: latents have shape {tuple(shape)}, expected [..., 1+N, h, w, {config.latent_channels}]"
        )
