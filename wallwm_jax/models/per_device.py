"""Attention kernels under a mesh: each device runs the kernel on its own rows and heads. Outside any mesh the kernel is
simply called.

Where the context axis splits the sequences, it splits heads inside an attention: the compiler exchanges one for the
other by all-to-all, four times an attention (DeepSpeed-Ulysses). Heads that it does not divide stay, and it splits the
queries, for which every device gathers all keys and values: at four devices twice the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from wallwm_jax.parallel.mesh import ROW_AXES
from wallwm_jax.parallel.sharding import constrain

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def target() -> tuple[str, int]:
    """(platform, number of devices) that this trace is for: of the mesh in context, else the default ones."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend(), jax.device_count()
    return mesh.abstract_device.platform, mesh.size


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
        return constrain(x, "batch", "heads", "tokens", None)

    query, key, value = map(by_tokens, (query, key, value))
    mixed = jax.shard_map(
        kernel,
        in_specs=(of_query, of_key, of_key, PartitionSpec(rows, context), PartitionSpec(rows, None)),
        out_specs=of_query,
        check_vma=False,
    )(query, key, value, q_segments, kv_segments)
    return by_tokens(mixed)


def per_group(
    kernel: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[str], *, heads: int, context: str
) -> jax.Array:
    """`kernel(*arrays)` on every device, which has its part of them.

    Args:
      arrays: the first are queries `[B, G, S, H * d]`, whose shape and split the result has.
      axes: of each array, a letter per dimension: b rows, g groups, q queries, h features of heads; others stay whole.
      heads: H.
      context: "g", "q" or both: what the context axis may split; it takes the first that it divides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(*arrays)
    tensor = tuple(axis for axis in ("tensor",) if mesh.shape[axis] > 1 and heads % mesh.shape[axis] == 0)
    where = {"b": tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1) or None, "h": tensor or None}
    sizes, parts = {"g": arrays[0].shape[1], "q": arrays[0].shape[2]}, mesh.shape["context"]
    where |= {letter: ("context",) for letter in [one for one in context if parts > 1 and sizes[one] % parts == 0][:1]}
    specs = tuple(PartitionSpec(*(where.get(letter) for letter in letters)) for letters in axes)
    return jax.shard_map(kernel, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
