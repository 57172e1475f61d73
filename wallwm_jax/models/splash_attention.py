"""Attention over packed events on TPU: the public splash kernel behind the contract of `attention.attend`.

The kernel (Pallas, fused backward) masks by segment ids. It knows no closed query, no logit scale and only lengths that
its blocks divide, so queries are scaled, all is padded, and what has no open key is set to zero here.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from wallwm_jax.models.per_device import per_device

_BLOCKS = (512, 384, 256, 128)
_PADDING = 1.1  # a larger block may pad this much more than the smallest one
_WORTHWHILE = 256 * 256  # logits per row and head, below which XLA's dense attention is as good
_MOST_KEYS = 2048  # that fit the backward kernel at once; it writes the gradient of the queries once per block of keys
_NO_KEY = -1  # segment of closed keys: no query has it


def worthwhile(queries: int, keys: int) -> bool:
    """Whether the kernel beats dense attention for rows of this size."""
    return queries * keys >= _WORTHWHILE


def attend_splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    num_segments: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend` with segments 1..`num_segments`: `[B, H, S, D]`, zero where no key is open.

    `interpret` runs the kernel's program on any platform, slowly.
    """
    kernel = functools.partial(_attend, num_segments=num_segments, interpret=interpret)
    return per_device(kernel, query, key, value, q_segments, kv_segments)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    *,
    num_segments: int,
    interpret: bool,
) -> jax.Array:
    """What one device does."""
    (heads, queries, width), keys = query.shape[1:], key.shape[2]
    q_block, k_block = block_size(queries), block_size(keys)
    q_length, k_length = -(-queries // q_block) * q_block, -(-keys // k_block) * k_block
    sizes = splash.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_kv_compute=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=max(size for size in range(k_block, _MOST_KEYS + 1, k_block) if k_length % size == 0),
        block_kv_dkv_compute=k_block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.FullMask((q_length, k_length))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    scaled = (query.astype(jnp.float32) / math.sqrt(width)).astype(query.dtype)
    open_keys = jnp.where(kv_segments > 0, kv_segments, _NO_KEY)
    mixed = jax.vmap(kernel)(
        _long(scaled, q_length),
        _long(key, k_length),
        _long(value, k_length),
        splash.SegmentIds(_padded(q_segments, q_length, 0), _padded(open_keys, k_length, _NO_KEY)),
    )
    is_open = _has_keys(q_segments, kv_segments, num_segments)
    return jnp.where(is_open[:, None, :, None], mixed[:, :, :queries], 0).astype(value.dtype)


def block_size(length: int) -> int:
    """The largest block of the kernel that pads `length` little more than the smallest block does."""
    least = -(-length // _BLOCKS[-1]) * _BLOCKS[-1]
    return next(block for block in _BLOCKS if -(-length // block) * block <= _PADDING * least)


def _long(array: jax.Array, length: int) -> jax.Array:
    """`[B, H, N, D]` to `[B, H, length, D]`, padded with zeros."""
    return jnp.pad(array, ((0, 0), (0, 0), (0, length - array.shape[2]), (0, 0)))


def _padded(segments: jax.Array, length: int, fill: int) -> jax.Array:
    return jnp.pad(segments, ((0, 0), (0, length - segments.shape[1])), constant_values=fill)


def _has_keys(q_segments: jax.Array, kv_segments: jax.Array, num_segments: int) -> jax.Array:
    """`[B, S]`: whether any key is open to a query."""
    present = jnp.any(kv_segments[:, :, None] == jnp.arange(num_segments + 1), 1).at[:, 0].set(False)
    return jnp.take_along_axis(present, q_segments, 1)
