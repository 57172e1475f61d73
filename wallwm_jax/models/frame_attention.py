"""Attention inside one latent frame on TPU: across its views, and to its event's caption.

A few hundred tokens fit the chip's memory whole, logits included, so one Pallas kernel does a frame and some heads at
once, with any mask and the rotary embedding, and its derivative starts again from queries, keys and values. Written in
XLA's operations the same attention is a chain of small products, each with its way to HBM and back. Tokens keep the
layout that a projection gives them, `[S, H * d]`: heads are whole lanes of it, and nothing is transposed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wallwm_jax.models.per_device import per_frame

_CLOSED = -1e30
_LANES = 128
_MOST_KEYS = 1024
_QUERIES = 512  # of a block, at most
_ROWS = 16  # of bfloat16 in a register: blocks that are a part of a frame are multiples
_VMEM = 12 * 2**20  # bytes that the blocks of the backward kernel may take

Array = jax.Array


class Rotary(NamedTuple):
    """Tables `[B, F, S, d]`, float32, of a rotary embedding: `x * cos + swapped halves of x * sin`."""

    cos: Array
    sin: Array

    @classmethod
    def of(cls, angles: Array) -> Rotary:
        """Of angles `[B, F, S, d / 2]`, radians."""
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return cls(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def worthwhile(keys: int, width: int) -> bool:
    """Whether the kernel takes frames of this size: heads of whole lanes, and keys that fit."""
    return width % _LANES == 0 and _LANES // 2 <= keys <= _MOST_KEYS


def attend_frames(
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    rotary: Rotary | None = None,
    *,
    heads: int,
    interpret: bool = False,
) -> Array:
    """Softmax attention of every frame's queries to its keys; softmax and sums in float32.

    Args:
      query: `[B, F, S, H * d]`.
      key, value: `[B, F, T, H * d]`.
      bias: `[B, F, S, T]` or `[B, F, 1, T]` float32, added to the logits; -inf closes. It gets no gradient.
      rotary: of queries and keys alike, for `S = T`.
      heads: H.
      interpret: run the kernels' program on any platform, slowly.

    Returns:
      `[B, F, S, H * d]` in the dtype of `value`; zero where no key is open.
    """
    bias = jnp.maximum(jax.lax.stop_gradient(bias), _CLOSED)
    width = query.shape[-1] // heads
    kernel = functools.partial(_on_device, width=width, interpret=interpret)
    return checkpoint_name(per_frame(kernel, width, query, key, value, bias, *(rotary or ())), "mixed")


def _on_device(*arrays: Array, width: int, interpret: bool) -> Array:
    query, key, value, bias, *tables = (part.reshape(-1, *part.shape[2:]) for part in arrays)
    queries, block = query.shape[1], _query_block(query.shape[1], whole=bool(tables))
    padding = ((0, 0), (0, -queries % block), (0, 0))
    bias = jnp.pad(bias, padding) if bias.shape[1] == queries else bias
    mixed = _attend(width, interpret, jnp.pad(query, padding), key, value, bias, *tables)
    return mixed[:, :queries].reshape(arrays[0].shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(width: int, interpret: bool, *frames: Array) -> Array:
    """`[G, S, H * d]`, of queries, keys, values, bias `[G, S or 1, T]` and maybe rotary tables `[G, S, d]`."""
    return _call(_forward_kernel, width, interpret, frames, (), frames[:1])[0]


def _attend_forward(width: int, interpret: bool, *frames: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend(width, interpret, *frames), frames


def _attend_backward(
    width: int, interpret: bool, frames: tuple[Array, ...], gradient: Array
) -> tuple[Array | None, ...]:
    found = _call(_backward_kernel, width, interpret, frames, (gradient,), (*frames[:3], *frames[4:]))
    return *found[:3], None, *found[3:]


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any, width: int, interpret: bool, frames: Sequence[Array], gradient: Sequence[Array], like: Sequence[Array]
) -> list[Array]:
    """Runs `kernel` over frames, groups of heads and blocks of queries; its results have shape and dtype of `like`."""
    query, key, _, bias, *tables = frames
    count, queries, features = query.shape
    keys, block = key.shape[1], _query_block(queries, whole=bool(tables))
    group = width * _heads_at_once(features // width, block, keys, width)
    of_query = pl.BlockSpec((1, block, group), lambda frame, head, part: (frame, part, head))
    of_key = pl.BlockSpec((1, keys, group), lambda frame, head, part: (frame, 0, head))
    of_bias = (
        pl.BlockSpec((1, block, keys), lambda frame, head, part: (frame, part, 0))
        if bias.shape[1] == queries
        else pl.BlockSpec((1, 1, keys), lambda frame, head, part: (frame, 0, 0))
    )
    of_tables = [pl.BlockSpec((1, block, width), lambda frame, head, part: (frame, 0, 0))] * len(tables)
    qkv = [of_query, of_key, of_key]
    backward = bool(gradient)
    return pl.pallas_call(
        functools.partial(kernel, width, len(tables) > 0),
        grid=(count, features // group, queries // block),
        in_specs=[*qkv, of_bias, *of_tables, *([of_query] if backward else [])],
        out_specs=[*qkv, *of_tables] if backward else [of_query],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in like],
        scratch_shapes=[pltpu.VMEM((keys, group), jnp.float32)] * (2 if backward else 0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="frame_attention_dkv" if backward else "frame_attention_fwd",
        interpret=interpret,
    )(*frames, *gradient)


def _forward_kernel(width: int, rotates: bool, query_ref, key_ref, value_ref, bias_ref, *refs) -> None:
    *tables, mixed_ref = refs
    rotation = tuple(table[0] for table in tables)
    for first in range(0, query_ref.shape[-1], width):
        lanes = slice(first, first + width)
        query, key = (_rotated(ref[0, :, lanes], *rotation) for ref in (query_ref, key_ref))
        weights = _weights(query, key, bias_ref[0])
        mixed = _product(weights.astype(value_ref.dtype), value_ref[0, :, lanes], 1, 0)
        mixed_ref[0, :, lanes] = mixed.astype(mixed_ref.dtype)


def _backward_kernel(width: int, rotates: bool, query_ref, key_ref, value_ref, bias_ref, *refs) -> None:
    if rotates:
        cos_ref, sin_ref, gradient_ref, *of_refs, of_cos_ref, of_sin_ref, key_sum, value_sum = refs
        rotation = (cos_ref[0], sin_ref[0])
    else:
        gradient_ref, *of_refs, key_sum, value_sum = refs
        rotation = ()
    of_query_ref, of_key_ref, of_value_ref = of_refs
    group, part, parts, dtype = pl.program_id(1), pl.program_id(2), pl.num_programs(2), query_ref.dtype

    @pl.when(part == 0)
    def _() -> None:
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    if rotates:

        @pl.when(group == 0)
        def _() -> None:
            of_cos_ref[...] = jnp.zeros_like(of_cos_ref)
            of_sin_ref[...] = jnp.zeros_like(of_sin_ref)

    def of_unrotated(of_rotated: Array, x: Array) -> Array:
        """The gradient before the rotation; that of its tables is added to theirs."""
        if not rotates:
            return of_rotated
        x = x.astype(jnp.float32)
        of_cos_ref[0] += of_rotated * x
        of_sin_ref[0] += of_rotated * _swapped(x)
        return of_rotated * rotation[0] + _swapped(of_rotated * rotation[1])

    for first in range(0, query_ref.shape[-1], width):
        lanes = slice(first, first + width)
        query, key, gradient = (ref[0, :, lanes] for ref in (query_ref, key_ref, gradient_ref))
        turned_query, turned_key = _rotated(query, *rotation), _rotated(key, *rotation)
        weights = _weights(turned_query, turned_key, bias_ref[0])
        of_weights = _product(gradient, value_ref[0, :, lanes], 1, 1)
        mean = jnp.sum(weights * of_weights, -1, keepdims=True)
        of_logits = (weights * (of_weights - mean) / math.sqrt(width)).astype(dtype)
        of_query = of_unrotated(_product(of_logits, turned_key, 1, 0), query)
        of_query_ref[0, :, lanes] = of_query.astype(of_query_ref.dtype)
        key_sum[:, lanes] += of_unrotated(_product(of_logits, turned_query, 0, 0), key)
        value_sum[:, lanes] += _product(weights.astype(dtype), gradient, 0, 0)

    @pl.when(part == parts - 1)
    def _() -> None:
        of_key_ref[0] = key_sum[...].astype(of_key_ref.dtype)
        of_value_ref[0] = value_sum[...].astype(of_value_ref.dtype)


def _weights(query: Array, key: Array, bias: Array) -> Array:
    """Softmax `[S, T]`, float32; rows without an open key are zero."""
    logits = _product(query, key, 1, 1) / math.sqrt(query.shape[-1]) + bias
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    weights = jnp.where(logits > 0.5 * _CLOSED, weights, 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Sum over one axis of each, accumulated in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _rotated(x: Array, *rotation: Array) -> Array:
    if not rotation:
        return x
    wide, (cos, sin) = x.astype(jnp.float32), rotation
    return (wide * cos + _swapped(wide) * sin).astype(x.dtype)


def _swapped(x: Array) -> Array:
    """The halves of a head `[S, d]` in each other's place."""
    return pltpu.roll(x, x.shape[-1] // 2, 1)


def _query_block(queries: int, *, whole: bool) -> int:
    """All queries if they are few or rotate with their keys, else blocks of about one size."""
    parts = 1 if whole else -(-queries // _QUERIES)
    return queries if parts == 1 else -(-queries // (parts * _ROWS)) * _ROWS


def _heads_at_once(heads: int, queries: int, keys: int, width: int) -> int:
    """The most heads of a block that fit: three arrays of queries and four of keys, twice, and two float32 sums."""
    one = 2 * 2 * width * (3 * queries + 4 * keys) + 2 * 4 * width * keys
    most = max(1, (_VMEM - 4 * 4 * queries * keys) // one)  # beside some arrays of one head's logits
    return max(size for size in range(1, heads + 1) if heads % size == 0 and size <= most)
