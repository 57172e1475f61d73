"""Attention kernels under a mesh: each device runs the kernel on its own rows and heads. Outside any mesh the kernel is
simply called.

Where the context axis splits the sequences, it splits heads inside an attention: the compiler exchanges one for the
other by all-to-all, four times an attention (DeepSpeed-Ulysses). Heads that it does not divide stay, and it splits the
queries, for which every device gathers all keys and values: at four devices twice the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from wallwm_jax.parallel.mesh import ROW_AXES

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def per_device(
    kernel: Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    *,
    splits_queries: bool = True,
) -> jax.Array:
    """`kernel(query [B, H, S, D], key and value [B, H, T, D], segments [B, S] and [B, T])` on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value, q_segments, kv_segments)
    rows = tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1) or None
    heads: tuple[str, ...] = ()
    for axis in ("tensor", "context"):
        if mesh.shape[axis] > 1 and query.shape[1] % math.prod(mesh.shape[name] for name in (*heads, axis)) == 0:
            heads += (axis,)
    divides = mesh.shape["context"] > 1 and query.shape[2] % mesh.shape["context"] == 0
    context = "context" if splits_queries and divides and "context" not in heads else None
    of_query, of_key = PartitionSpec(rows, heads, context, None), PartitionSpec(rows, heads, None, None)

    def by_tokens(x: jax.Array) -> jax.Array:
        """`x [B, H, S, D]` split as its sequence is outside, or projections would gather all tokens and give heads."""
        if "context" not in heads or x.shape[2] % mesh.shape["context"]:
            return x
        outside = PartitionSpec(rows, tuple(axis for axis in heads if axis != "context"), "context", None)
        return jax.lax.with_sharding_constraint(x, outside)

    query, key, value = map(by_tokens, (query, key, value))
    mixed = jax.shard_map(
        kernel,
        in_specs=(of_query, of_key, of_key, PartitionSpec(rows, context), PartitionSpec(rows, None)),
        out_specs=of_query,
        check_vma=False,
    )(query, key, value, q_segments, kv_segments)
    return by_tokens(mixed)


def per_frame(kernel: Callable[..., jax.Array], width: int, query: jax.Array, *arrays: jax.Array) -> jax.Array:
    """`kernel(query, *arrays)` on every device, which has its rows, heads and frames of them; frames that the context
    axis does not divide share out their queries instead.

    Args:
      width: of a head.
      query: `[B, F, S, H * width]`.
      arrays: key and value `[B, F, T, H * width]`, bias `[B, F, S or 1, T]`, rotary tables `[B, F, S, width]`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, *arrays)

    def split(size: int, axis: str) -> str | None:
        return axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    rows = tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1) or None
    frames, heads = split(query.shape[1], "context"), split(query.shape[3] // width, "tensor")
    _, _, bias, *tables = arrays
    queries = split(query.shape[2], "context") if frames is None and not tables else None
    of_query, of_key = PartitionSpec(rows, frames, queries, heads), PartitionSpec(rows, frames, None, heads)
    of_bias = PartitionSpec(rows, frames, queries if bias.shape[2] > 1 else None, None)
    specs = (of_query, of_key, of_key, of_bias, *(PartitionSpec(rows, frames, None, None) for _ in tables))
    return jax.shard_map(kernel, in_specs=specs, out_specs=of_query, check_vma=False)(query, *arrays)
