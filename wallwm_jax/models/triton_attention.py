"""Self-attention over packed events on GPU: JAX's Pallas kernel (Triton) behind the contract of `attention.attend`.

The kernel masks by one list of segments for queries and keys alike, so it serves attention of a sequence to itself.
Padding attends to padding there and is set to zero here.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from wallwm_jax.models.per_device import per_device

_BLOCK = 128
_BACKWARD_BLOCK = 32
_WORTHWHILE = 512  # tokens per row, below which XLA's dense attention is as good


def worthwhile(queries: int, is_self: bool) -> bool:
    """Whether the kernel serves this attention and rows are long enough for it."""
    return is_self and queries >= _WORTHWHILE


def attend_triton(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """As `attention.attend` where queries and keys are `[B, H, S, D]` with the same `segments [B, S]`.

    `interpret` runs the kernel's program on any platform, slowly.
    """
    kernel = functools.partial(_attend, interpret=interpret)
    return per_device(kernel, query, key, value, segments, segments, splits_queries=False)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, _: jax.Array, *, interpret: bool
) -> jax.Array:
    """What one device does."""
    from jax.experimental.pallas.ops.gpu import attention as pallas_attention  # brings Triton in; only GPUs need it

    length = query.shape[2]
    padding = -length % _BLOCK
    sizes = pallas_attention.BlockSizes(
        block_q=_BLOCK,
        block_k=_BLOCK,
        block_q_dkv=_BACKWARD_BLOCK,
        block_kv_dkv=_BACKWARD_BLOCK,
        block_q_dq=_BACKWARD_BLOCK,
        block_kv_dq=_BACKWARD_BLOCK,
    )
    mixed = pallas_attention.mha(
        *(jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value)),
        jnp.pad(segments, ((0, 0), (0, padding))),
        sm_scale=1.0 / math.sqrt(query.shape[-1]),
        block_sizes=sizes,
        interpret=interpret,
    )
    mixed = jnp.where((segments > 0)[..., None, None], mixed[:, :length], 0)
    return jnp.swapaxes(mixed, 1, 2).astype(value.dtype)
