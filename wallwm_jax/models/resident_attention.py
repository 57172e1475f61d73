"""Attention on TPU whose keys fit the chip's memory: across the views of a frame, to its caption, along one view.

One Pallas kernel takes all keys of some heads and a block of queries, logits included, with masks and the rotary
embedding, and its derivative starts again from queries, keys and values. Written in XLA's operations attention inside
frames is a chain of small products, each with its way to HBM and back. Tokens keep the layout that a projection gives
them, `[S, H * d]`: heads are whole lanes of it, and nothing is transposed or padded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wallwm_jax.models.per_device import per_group

_CLOSED = -1e30
_NO_KEY = -1  # segment of closed keys: no query has it
_LANES = 128
_MOST_KEYS = 2048
_QUERIES = 512  # of a block, at most; so many that all logits of one head are `_LOGITS` bytes
_LOGITS = 2 * 2**20
_ROWS = 16  # of bfloat16 in a register: blocks that are a part of the queries are multiples
_BLOCKS = 12 * 2**20  # bytes that the blocks of the backward kernel may take
_VMEM = 40 * 2**20  # that a kernel may take in all

Array = jax.Array


class Rotary(NamedTuple):
    """Tables `[B, G, S, d]`, float32, of a rotary embedding: `x * cos + swapped halves of x * sin`."""

    cos: Array
    sin: Array

    @classmethod
    def of(cls, angles: Array) -> Rotary:
        """Of angles `[B, G, S, d / 2]`, radians."""
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return cls(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


class _Plan(NamedTuple):
    """What a kernel is compiled for: lanes of a head; segments, not a bias; a gradient of the rotary tables; which
    masks and tables come in blocks of queries; to be interpreted."""

    width: int
    by_segment: bool
    learns: bool
    in_blocks: tuple[bool, ...]
    interpret: bool


def worthwhile(keys: int, width: int) -> bool:
    """Whether the kernel takes sequences of this size: heads of whole lanes, and keys that fit."""
    return width % _LANES == 0 and _LANES // 2 <= keys <= _MOST_KEYS


def attend_resident(
    query: Array,
    key: Array,
    value: Array,
    *,
    heads: int,
    members: Array | None = None,
    bias: Array | None = None,
    segments: Array | None = None,
    rotary: Rotary | None = None,
    learns_rotary: bool = False,
    interpret: bool = False,
) -> Array:
    """Softmax attention of each group's queries to its keys, a group being a frame or a view; float32 inside.

    Args:
      query: `[B, G, S, H * d]`.
      key, value: `[B, G, T, H * d]`, or `[B, E, T, H * d]` with `members`.
      heads: H.
      members: `[B, G, E]`, one-hot: whose keys and values a group has; zeros are those of none.
      bias: `[B, G, S, T]` or `[B, G, 1, T]` float32, added to the logits; -inf closes. It gets no gradient.
      segments: `[B, G, S]` integers of a self-attention, instead of a bias: tokens of one segment attend to each other,
        those of segment 0 to nothing.
      rotary: of a self-attention's queries and keys.
      learns_rotary: whether its tables get a gradient.
      interpret: run the kernels' program on any platform, slowly.

    Returns:
      `[B, G, S, H * d]` in the dtype of `value`; zero where no key is open.
    """
    if bias is not None:
        masks = [jnp.maximum(jax.lax.stop_gradient(bias), _CLOSED)]
        axes = ["bgqk" if bias.shape[2] > 1 else "bg.k"]
    else:
        assert segments is not None
        masks = [segments[..., None], jnp.where(segments > 0, segments, _NO_KEY)[:, :, None]]
        axes = ["bgq.", "bg.k"]
    if rotary is not None:  # learned tables are those of all tokens, else queries and keys have their own
        masks += rotary if learns_rotary else (*rotary, *rotary)
        axes += ["bgk."] * 2 if learns_rotary else ["bgq.", "bgq.", "bgk.", "bgk."]
    in_blocks = tuple(letters[2] == "q" for letters in axes)
    plan = _Plan(query.shape[-1] // heads, bias is None, learns_rotary, in_blocks, interpret)
    kernel, of_key = (_on_device, "bgkh") if members is None else (_of_members, "b.kh")
    if members is not None:
        masks, axes = [members, *masks], ["bg.", *axes]
    return per_group(
        functools.partial(kernel, plan),
        [query, key, value, *masks],
        ["bgqh", of_key, of_key, *axes],
        heads=heads,
        context="g" if learns_rotary else "gq",
    )


def _of_members(plan: _Plan, query: Array, key: Array, value: Array, members: Array, *others: Array) -> Array:
    """On a device: what chips share are keys of members, and so are the gradients that they sum."""
    key, value = (jnp.einsum("bge,be...->bg...", members, x) for x in (key, value))
    return _on_device(plan, query, key, value, *others)


def _on_device(plan: _Plan, *arrays: Array) -> Array:
    return _attend(plan, *(part.reshape(-1, *part.shape[2:]) for part in arrays)).reshape(arrays[0].shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, *arrays: Array) -> Array:
    """`[N, S, H * d]` of N groups; the arrays are queries, keys, values, masks, rotary tables."""
    return _call(plan, arrays)[0]


def _attend_forward(plan: _Plan, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend(plan, *arrays), arrays


def _attend_backward(plan: _Plan, arrays: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    of_query, of_key, of_value, *of_tables = _call(plan, arrays, gradient)
    others = len(arrays) - 3 - len(of_tables)
    return of_query, of_key, of_value, *[None] * others, *of_tables


_attend.defvjp(_attend_forward, _attend_backward)


def _call(plan: _Plan, arrays: Sequence[Array], gradient: Array | None = None) -> list[Array]:
    """The forward kernel, or with a gradient the backward one, over groups, some heads at once, blocks of queries."""
    query, key = arrays[:2]
    (count, queries, features), keys = query.shape, key.shape[1]
    block = queries if plan.learns else _query_block(queries, keys)
    lanes = plan.width * _heads_at_once(features // plan.width, block, keys, plan.width)
    of_query = pl.BlockSpec((1, block, lanes), lambda group, head, part: (group, part, head))
    of_key = pl.BlockSpec((1, keys, lanes), lambda group, head, part: (group, 0, head))

    others = [
        pl.BlockSpec((1, block, array.shape[2]), lambda group, head, part: (group, part, 0))
        if is_block
        else pl.BlockSpec((1, *array.shape[1:]), lambda group, head, part: (group, 0, 0))
        for array, is_block in zip(arrays[3:], plan.in_blocks)
    ]
    qkv, learned = [of_query, of_key, of_key], 2 * plan.learns
    tables = arrays[len(arrays) - learned :]
    like = (query,) if gradient is None else (*arrays[:3], *tables)
    return pl.pallas_call(
        functools.partial(_forward_kernel if gradient is None else _backward_kernel, plan, queries),
        grid=(count, features // lanes, -(-queries // block)),
        in_specs=[*qkv, *others, *([] if gradient is None else [of_query])],
        out_specs=[of_query] if gradient is None else [*qkv, *others[len(others) - learned :]],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in like],
        scratch_shapes=[] if gradient is None else [pltpu.VMEM((keys, lanes), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        name="resident_attention_fwd" if gradient is None else "resident_attention_dkv",
        interpret=plan.interpret,
    )(*arrays, *(() if gradient is None else (gradient,)))


class _Inputs:
    """What both kernels read, head by head."""

    def __init__(self, plan: _Plan, queries: int, refs: Sequence[Any]):
        self.query, self.key, self.value, *others = refs
        masks = others[: 2 if plan.by_segment else 1]
        tables = [ref[0] for ref in others[len(masks) :]]
        self.by_query, self.by_key = tables[:2], tables[-2:]
        self.bias = None if plan.by_segment else masks[0][0]
        self.is_open = masks[0][0] == masks[1][0] if plan.by_segment else True
        block = self.query.shape[1]
        first = pl.program_id(2) * block
        rows = first + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        self.exists = None if queries % block == 0 else rows < queries  # the last block may reach beyond the end

    def real(self, x: Array) -> Array:
        """`x` with zeros in the place of queries that do not exist."""
        return x if self.exists is None else jnp.where(self.exists, x, jnp.zeros_like(x))

    def weights(self, query: Array, key: Array) -> Array:
        """Softmax `[S, T]`, float32; rows without an open key are zero."""
        logits = product(query, key, 1, 1) / math.sqrt(query.shape[-1])
        logits = jnp.where(self.is_open, logits, _CLOSED) if self.bias is None else logits + self.bias
        logits = self.real(logits)
        weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
        weights = jnp.where(logits > 0.5 * _CLOSED, weights, 0.0)
        total = jnp.sum(weights, -1, keepdims=True)
        return weights / jnp.where(total > 0, total, 1.0)


def _forward_kernel(plan: _Plan, queries: int, *refs: Any) -> None:
    *inputs, mixed_ref = refs
    read = _Inputs(plan, queries, inputs)
    for first in range(0, mixed_ref.shape[-1], plan.width):
        lanes = slice(first, first + plan.width)
        query, key = rotated(read.query[0, :, lanes], read.by_query), rotated(read.key[0, :, lanes], read.by_key)
        weights = read.weights(query, key).astype(read.value.dtype)
        mixed_ref[0, :, lanes] = product(weights, read.value[0, :, lanes], 1, 0).astype(mixed_ref.dtype)


def _backward_kernel(plan: _Plan, queries: int, *refs: Any) -> None:
    results = 3 + 2 * plan.learns + 2
    *inputs, gradient_ref = refs[:-results]
    of_query_ref, of_key_ref, of_value_ref, *of_tables, key_sum, value_sum = refs[-results:]
    read = _Inputs(plan, queries, inputs)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for of_table in of_tables:
            of_table[...] = jnp.zeros_like(of_table)

    def of_unrotated(of_rotated: Array, x: Array, tables: Sequence[Array]) -> Array:
        """The gradient before the rotation; that of its tables is added to theirs."""
        if not tables:
            return of_rotated
        x = x.astype(jnp.float32)
        for of_table, turned in zip(of_tables, (x, _swapped(x))):
            of_table[0] += of_rotated * turned
        return of_rotated * tables[0] + _swapped(of_rotated * tables[1])

    for first in range(0, gradient_ref.shape[-1], plan.width):
        lanes = slice(first, first + plan.width)
        query, key, gradient = read.query[0, :, lanes], read.key[0, :, lanes], read.real(gradient_ref[0, :, lanes])
        turned_query, turned_key = read.real(rotated(query, read.by_query)), rotated(key, read.by_key)
        weights = read.weights(turned_query, turned_key)
        of_weights = product(gradient, read.value[0, :, lanes], 1, 1)
        mean = jnp.sum(weights * of_weights, -1, keepdims=True)
        of_logits = (weights * (of_weights - mean) / math.sqrt(plan.width)).astype(query.dtype)
        of_query = of_unrotated(product(of_logits, turned_key, 1, 0), query, read.by_query)
        of_query_ref[0, :, lanes] = of_query.astype(of_query_ref.dtype)
        key_sum[:, lanes] += of_unrotated(product(of_logits, turned_query, 0, 0), key, read.by_key)
        value_sum[:, lanes] += product(weights.astype(query.dtype), gradient, 0, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        of_key_ref[0] = key_sum[...].astype(of_key_ref.dtype)
        of_value_ref[0] = value_sum[...].astype(of_value_ref.dtype)


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """In a kernel: the sum over one axis of each, accumulated in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def rotated(x: Array, tables: Sequence[Array]) -> Array:
    """In a kernel: a head `[S, d]`, rotated by the tables `[S, d]`, if there are any."""
    if not tables:
        return x
    wide, (cos, sin) = x.astype(jnp.float32), tables
    return (wide * cos + _swapped(wide) * sin).astype(x.dtype)


def _swapped(x: Array) -> Array:
    """The halves of a head `[S, d]` in each other's place."""
    return pltpu.roll(x, x.shape[-1] // 2, 1)


def _query_block(queries: int, keys: int) -> int:
    """All queries if they are few, else blocks of about one size."""
    most = min(_QUERIES, max(_LANES, _LOGITS // (4 * keys)))
    parts = -(-queries // most)
    return queries if parts == 1 else -(-queries // (parts * _ROWS)) * _ROWS


def _heads_at_once(heads: int, queries: int, keys: int, width: int) -> int:
    """The most heads of a block that fit: three arrays of queries and four of keys, twice, and two float32 sums."""
    one = 2 * 2 * width * (3 * queries + 4 * keys) + 2 * 4 * width * keys
    return max(size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * one <= _BLOCKS))
