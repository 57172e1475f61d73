"""Attention on TPU along sequences whose keys do not fit the chip's memory: flash attention over packed events.

Tokens keep the layout that a projection gives them, `[S, H * d]`: a head is whole lanes of it, and nothing is
transposed or padded. A kernel of their own rotates queries and keys, and lays heads out for other chips. One more goes
over blocks of keys with a running softmax, and its derivative over blocks of keys and, inside, of queries: it sums the
gradient of one head's queries in float32 in the chip's own memory, so that each product of two blocks is computed once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wallwm_jax.models.per_device import per_group
from wallwm_jax.models.resident_attention import Rotary, product, rotated

Array = jax.Array

_CLOSED = -1e30
_NO_KEY = -1  # segment of closed keys: no query has it
_LANES = 128
_BLOCKS = range(512, 1281, _LANES)  # sizes to choose from
_BACKWARD_KEYS = range(256, 513, _LANES)  # of blocks of keys in the backward kernel
_BEYOND = 1.002  # a larger block may reach this much further than the one that reaches least
_WORTHWHILE = 512  # tokens
_ROWS = 16  # of a register, in bfloat16
_PLACED = 2 * 2**20  # bytes of tokens that are placed at once
_MOST_QUERIES = 80 * 1024  # of a head of 128 whose gradient fits the chip's memory; more are cut into parts
_VMEM = 60 * 2**20


class _Plan(NamedTuple):
    """What the kernels are compiled for: lanes of a head; devices that the tokens of a group are split over, and
    whether these exchange heads; to be interpreted."""

    width: int
    context: int
    exchanges: bool
    interpret: bool


class _OfQueries(NamedTuple):
    """What the gradient of some queries reads of them: they, what they mixed, its gradient, all `[N, S, H * d]`,
    segments `[N, S]`, normalisers `[N, H, 1, S]`."""

    query: Array
    mixed: Array
    gradient: Array
    segments: Array
    normaliser: Array


def worthwhile(tokens: int, width: int) -> bool:
    """Whether the kernels take sequences of this size: heads of whole lanes, and enough of them."""
    return width % _LANES == 0 and tokens >= _WORTHWHILE


def attend_flash(
    query: Array, key: Array, value: Array, *, heads: int, segments: Array, rotary: Rotary, interpret: bool = False
) -> Array:
    """Softmax attention of each group's tokens to those of their own segment, a group being a view; float32 inside.

    A context axis splits the tokens outside. Inside it splits groups or, by all-to-all, heads (DeepSpeed-Ulysses);
    where it divides neither, queries, for which every device gathers all keys and values.

    Args:
      query, key, value: `[B, G, S, H * d]`.
      heads: H.
      segments: `[B, G, S]` integers; tokens of segment 0 attend to nothing and are open to none.
      rotary: of queries and keys.
      interpret: run the kernels' program on any platform, slowly.

    Returns:
      `[B, G, S, H * d]` in the dtype of `value`; zero in segment 0.
    """
    plan, scale = _plan(query.shape, heads, interpret), 1.0 / math.sqrt(query.shape[-1] // heads)
    of_queries = "bgk" if plan.exchanges else "bgq"
    return per_group(
        functools.partial(_on_device, plan),
        [query, key, value, rotary.cos * scale, rotary.sin * scale, *rotary, segments, segments],
        [*["bgqh"] * 3, *["bgq."] * 4, of_queries, "bgk"],
        heads=heads,
        context="gq",
    )


def _plan(shape: tuple[int, ...], heads: int, interpret: bool) -> _Plan:
    """For queries of that shape under the mesh in context; as `per_group` splits them."""
    mesh = jax.sharding.get_abstract_mesh()
    _, groups, tokens, features = shape
    context, tensor = (1, 1) if mesh.empty else (mesh.shape["context"], mesh.shape["tensor"])
    if groups % context == 0 or tokens % context:
        context = 1
    own = heads // tensor if heads % tensor == 0 else heads
    return _Plan(features // heads, context, context > 1 and own % context == 0, interpret)


def _on_device(plan: _Plan, query: Array, *others: Array) -> Array:
    """`[B, G, S, H * d]`, from queries, keys, values, their rotary tables, segments of queries and of all keys."""
    arrays = (x.reshape(-1, *x.shape[2:]) for x in (query, *others))
    queries, key, value, *tables, q_segments, k_segments = arrays
    if plan.exchanges:  # some tokens of all heads for all tokens of some heads
        queries = _exchanged(_place(plan, plan.context, queries[:, None], *tables[:2]))
        key = _exchanged(_place(plan, plan.context, key[:, None], *tables[2:]))
        value = _exchanged(_place(plan, plan.context, value[:, None], None, None))
        mixed = _attend(plan, queries, key, value, q_segments, k_segments)
        parts = mixed.reshape(len(mixed), plan.context, -1, mixed.shape[-1])
        return _place(plan, 1, jax.lax.all_to_all(parts, "context", 1, 1, tiled=True), None, None).reshape(query.shape)
    queries, key = (
        _place(plan, 1, queries[:, None], *tables[:2])[:, 0],
        _place(plan, 1, key[:, None], *tables[2:])[:, 0],
    )
    if plan.context > 1:
        key, value = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (key, value))
    return _attend(plan, queries, key, value, q_segments, k_segments).reshape(query.shape)


def _exchanged(parts: Array) -> Array:
    """Of parts of heads `[N, C, S / C, H / C * d]` the own one, of all tokens, `[N, S, H / C * d]`."""
    parts = jax.lax.all_to_all(parts, "context", 1, 1, tiled=True)
    return parts.reshape(len(parts), -1, parts.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _place(plan: _Plan, parts: int, x: Array, cos: Array | None, sin: Array | None) -> Array:
    """Heads `[N, P, S, H / P * d]` in so many parts, each rotated by the tables `[N, S, d]` if there are any."""
    count, before, tokens, features = x.shape
    after, width = before * features // parts, plan.width
    block = max(_ROWS, min(-(-tokens // _ROWS) * _ROWS, _PLACED // (2 * before * features) // _ROWS * _ROWS))

    def kernel(x_ref: Any, *refs: Any) -> None:
        *tables, placed_ref = refs
        for first in range(0, before * features, width):
            (source, at), (target, to) = divmod(first, features), divmod(first, after)
            placed_ref[0, target, :, to : to + width] = rotated(
                x_ref[0, source, :, at : at + width], [table[0] for table in tables]
            )

    def of_heads(parts: int, features: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, parts, block, features), lambda group, part: (group, 0, part, 0))

    tables = [] if cos is None or sin is None else [cos, sin]
    return pl.pallas_call(
        kernel,
        grid=(count, -(-tokens // block)),
        in_specs=[
            of_heads(before, features),
            *[pl.BlockSpec((1, block, width), lambda group, part: (group, part, 0))] * len(tables),
        ],
        out_specs=of_heads(parts, after),
        out_shape=jax.ShapeDtypeStruct((count, parts, tokens, after), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM),
        name="place_heads",
        interpret=plan.interpret,
    )(x, *tables)


def _place_forward(
    plan: _Plan, parts: int, x: Array, cos: Array | None, sin: Array | None
) -> tuple[Array, tuple[Array | None, Array | None]]:
    return _place(plan, parts, x, cos, sin), (cos, sin)


def _place_backward(
    plan: _Plan, parts: int, tables: tuple[Array | None, Array | None], gradient: Array
) -> tuple[Array, None, None]:
    before = plan.context if plan.exchanges and parts == 1 else 1
    cos, sin = tables
    return _place(plan, before, gradient, cos, None if sin is None else -sin), None, None


_place.defvjp(_place_forward, _place_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, query: Array, key: Array, value: Array, q_segments: Array, k_segments: Array) -> Array:
    """`[N, S, H * d]` of N groups; queries are scaled, segments `[N, S]` and `[N, T]`."""
    return _forward(plan, query, key, value, q_segments, k_segments)[0]


def _attend_forward(plan: _Plan, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    mixed, normaliser = (checkpoint_name(x, "attention") for x in _forward(plan, *arrays))
    return mixed, (*arrays, mixed, normaliser)


def _attend_backward(plan: _Plan, kept: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    query, key, value, q_segments, k_segments, mixed, normaliser = kept
    most = _MOST_QUERIES * _LANES // plan.width
    summed = value.dtype if query.shape[1] <= most else jnp.dtype(jnp.float32)
    found = []
    for first in range(0, query.shape[1], most):
        part = slice(first, first + most)
        of_queries = _OfQueries(
            query[:, part], mixed[:, part], gradient[:, part], q_segments[:, part], normaliser[..., part]
        )
        found.append(_backward(plan, summed, of_queries, key, value, k_segments))
    of_query, of_key, of_value = zip(*found)
    return (
        jnp.concatenate(of_query, 1),
        *(sum(of[1:], of[0]).astype(key.dtype) for of in (of_key, of_value)),
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    plan: _Plan, query: Array, key: Array, value: Array, q_segments: Array, k_segments: Array
) -> tuple[Array, Array]:
    """What is mixed, `[N, S, H * d]`, and the logarithms of the normalisers, `[N, H, 1, S]`."""
    (count, queries, features), keys, width = query.shape, key.shape[1], plan.width
    q_block, k_block = _block_size(queries), _block_size(keys)
    q_blocks, k_blocks = -(-queries // q_block), -(-keys // k_block)
    of_query = pl.BlockSpec((1, q_block, width), lambda group, head, i, j: (group, i, head))
    of_key = pl.BlockSpec((1, k_block, width), lambda group, head, i, j: (group, j, head))
    return pl.pallas_call(
        functools.partial(_forward_kernel, keys),
        grid=(count, features // width, q_blocks, k_blocks),
        in_specs=[
            of_query,
            of_key,
            of_key,
            pl.BlockSpec((1, q_block, 1), lambda group, head, i, j: (group, i, 0)),
            pl.BlockSpec((1, 1, k_block), lambda group, head, i, j: (group, 0, j)),
        ],
        out_specs=[of_query, pl.BlockSpec((1, 1, 1, q_block), lambda group, head, i, j: (group, head, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct((count, features // width, 1, queries), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((q_block, size), jnp.float32) for size in (1, 1, width)],
        compiler_params=_parameters(),
        cost_estimate=_cost(2, count * features, q_blocks * q_block, k_blocks * k_block),
        name="flash_attention_fwd",
        interpret=plan.interpret,
    )(query, key, value, _of_blocks(q_segments, q_block, 0)[..., None], _keys_of_blocks(k_segments, k_block)[:, None])


def _forward_kernel(
    keys: int,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    query_segment: Any,
    key_segment: Any,
    mixed_ref: Any,
    normaliser_ref: Any,
    peak_ref: Any,
    total_ref: Any,
    sum_ref: Any,
) -> None:
    part, parts = pl.program_id(3), pl.num_programs(3)

    @pl.when(part == 0)
    def _() -> None:
        peak_ref[...] = jnp.full_like(peak_ref, 0.5 * _CLOSED)  # above closed logits, whose weights are then zero
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(_may_meet(query_segment[0], key_segment[0]))
    def _() -> None:
        logits = product(query_ref[0], key_ref[0], 1, 1)
        logits = jnp.where(query_segment[0] == key_segment[0], logits, _CLOSED)
        peak = jnp.maximum(peak_ref[...], jnp.max(logits, -1, keepdims=True))
        weights, shrunk = jnp.exp(logits - peak), jnp.exp(peak_ref[...] - peak)
        value = _real(value_ref[0], part, keys)
        peak_ref[...] = peak
        total_ref[...] = shrunk * total_ref[...] + jnp.sum(weights, -1, keepdims=True)
        sum_ref[...] = shrunk * sum_ref[...] + product(weights.astype(value.dtype), value, 1, 0)

    @pl.when(part == parts - 1)
    def _() -> None:
        total = jnp.where(total_ref[...] > 0, total_ref[...], 1.0)
        mixed_ref[0] = (sum_ref[...] / total).astype(mixed_ref.dtype)
        normaliser = peak_ref[...] + jnp.log(total)
        normaliser_ref[0, 0] = jnp.broadcast_to(normaliser, (len(normaliser), _LANES)).T[:1]


def _backward(
    plan: _Plan, summed: jnp.dtype, of_queries: _OfQueries, key: Array, value: Array, k_segments: Array
) -> tuple[Array, Array, Array]:
    """Gradients of some queries, and theirs of keys and values in the type `summed`."""
    query, mixed, gradient, q_segments, normaliser = of_queries
    (count, queries, features), keys, width = query.shape, key.shape[1], plan.width
    q_block, k_block = _block_size(queries), _block_size(keys, _BACKWARD_KEYS)
    q_blocks, k_blocks = -(-queries // q_block), -(-keys // k_block)
    of_query = pl.BlockSpec((1, q_block, width), lambda group, head, j, i: (group, i, head))
    of_key = pl.BlockSpec((1, k_block, width), lambda group, head, j, i: (group, j, head))

    def at_first(group: Any, head: Any, j: Any, i: Any) -> tuple[Any, ...]:
        return group, jnp.where(j == 0, i, q_blocks - 1), head  # read once, with the first keys

    def at_last(group: Any, head: Any, j: Any, i: Any) -> tuple[Any, ...]:
        return group, jnp.where(j == k_blocks - 1, i, 0), head  # written once, with the last keys

    return pl.pallas_call(
        functools.partial(_backward_kernel, queries, keys),
        grid=(count, features // width, k_blocks, q_blocks),
        in_specs=[
            of_query,
            pl.BlockSpec((1, q_block, width), at_first),
            of_query,
            pl.BlockSpec((1, 1, 1, q_block), lambda group, head, j, i: (group, head, 0, i)),
            pl.BlockSpec((1, 1, q_block), lambda group, head, j, i: (group, 0, i)),
            of_key,
            of_key,
            pl.BlockSpec((1, k_block, 1), lambda group, head, j, i: (group, j, 0)),
        ],
        out_specs=[pl.BlockSpec((1, q_block, width), at_last), of_key, of_key],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), *[jax.ShapeDtypeStruct(key.shape, summed)] * 2],
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32)
            for shape in ((q_blocks * q_block, width), (q_blocks, q_block), (k_block, width), (k_block, width))
        ],
        compiler_params=_parameters(),
        cost_estimate=_cost(5, count * features, q_blocks * q_block, k_blocks * k_block),
        name="flash_attention_dkv",
        interpret=plan.interpret,
    )(
        query,
        mixed,
        gradient,
        normaliser,
        _of_blocks(q_segments, q_block, 0)[:, None],
        key,
        value,
        _keys_of_blocks(k_segments, k_block)[..., None],
    )


def _backward_kernel(
    queries: int,
    keys: int,
    query_ref: Any,
    mixed_ref: Any,
    gradient_ref: Any,
    normaliser_ref: Any,
    query_segment: Any,
    key_ref: Any,
    value_ref: Any,
    key_segment: Any,
    of_query_ref: Any,
    of_key_ref: Any,
    of_value_ref: Any,
    query_sum: Any,
    means: Any,
    key_sum: Any,
    value_sum: Any,
) -> None:
    """Logits and weights are transposed, `[T, S]`, so that what belongs to a query is a row."""
    (j, i), (k_blocks, q_blocks) = (pl.program_id(2), pl.program_id(3)), (pl.num_programs(2), pl.num_programs(3))
    rows = pl.ds(pl.multiple_of(i * query_ref.shape[1], query_ref.shape[1]), query_ref.shape[1])
    query, gradient = _real(query_ref[0], i, queries), _real(gradient_ref[0], i, queries)

    @pl.when(j == 0)
    def _() -> None:
        query_sum[rows] = jnp.zeros_like(query, jnp.float32)
        both = _real(mixed_ref[0], i, queries).astype(jnp.float32) * gradient.astype(jnp.float32)
        means[pl.ds(i, 1)] = product(jnp.ones((8, both.shape[1]), jnp.float32), both, 1, 1)[:1]

    @pl.when(i == 0)
    def _() -> None:
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    @pl.when(_may_meet(query_segment[0], key_segment[0]))
    def _() -> None:
        key, value = _real(key_ref[0], j, keys), _real(value_ref[0], j, keys)
        is_open = key_segment[0] == query_segment[0]
        weights = jnp.where(is_open, jnp.exp(product(key, query, 1, 1) - normaliser_ref[0, 0]), 0.0)
        value_sum[...] += product(weights.astype(gradient.dtype), gradient, 1, 0)
        of_logits = (weights * (product(value, gradient, 1, 1) - means[pl.ds(i, 1)])).astype(query.dtype)
        key_sum[...] += product(of_logits, query, 1, 0)
        query_sum[rows] += product(of_logits, key, 0, 0)

    @pl.when(i == q_blocks - 1)
    def _() -> None:
        of_key_ref[0] = key_sum[...].astype(of_key_ref.dtype)
        of_value_ref[0] = value_sum[...].astype(of_value_ref.dtype)

    @pl.when(j == k_blocks - 1)
    def _() -> None:
        of_query_ref[0] = query_sum[rows].astype(of_query_ref.dtype)


def _may_meet(queries: Array, keys: Array) -> Array:
    """Whether two blocks of segments overlap as intervals; where they do not, there is nothing to compute."""
    return (jnp.min(queries) <= jnp.max(keys)) & (jnp.min(keys) <= jnp.max(queries))


def _real(x: Array, part: Array, tokens: int) -> Array:
    """Block `part` of an array of so many tokens, with zeros beyond its end."""
    if tokens % len(x) == 0:
        return x
    row = part * len(x) + jax.lax.broadcasted_iota(jnp.int32, (len(x), 1), 0)
    return jnp.where(row < tokens, x, jnp.zeros_like(x))


def _parameters() -> pltpu.CompilerParams:
    """Groups and heads may run beside each other."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
    )


def _cost(products: int, features: int, queries: int, keys: int) -> pl.CostEstimate:
    """What the kernel computes, all of its blocks, whichever are open: the scheduler asks, and so does `aot`."""
    moved = 2 * products * features * (queries + keys)  # bytes, about
    return pl.CostEstimate(flops=2 * products * features * queries * keys, transcendentals=0, bytes_accessed=moved)


def _of_blocks(segments: Array, block: int, beyond: int) -> Array:
    """`[N, S]` up to a multiple of `block`, with `beyond` after the end."""
    return jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), constant_values=beyond)


def _keys_of_blocks(segments: Array, block: int) -> Array:
    return _of_blocks(jnp.where(segments > 0, segments, _NO_KEY), block, _NO_KEY)


def _block_size(tokens: int, sizes: range = _BLOCKS) -> int:
    """The largest of some sizes of blocks that reach little beyond the end."""
    reach = {size: -(-tokens // size) * size for size in sizes}
    return max(size for size in sizes if reach[size] <= _BEYOND * min(reach.values()))
