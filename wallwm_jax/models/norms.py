"""Norms of wide arrays of tokens which the next product reads: on TPU in one pass over the tokens.

XLA reads a stream three times for its mean, its variance and its values, and more often for the gradients of these.
Here one Pallas kernel reads it once, and another adds up all gradients, that of the stream behind the norm included.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from wallwm_jax.models.layers import NORM_EPS, modulate, settled
from wallwm_jax.models.per_device import target
from wallwm_jax.parallel.sharding import spec_for

Array = jax.Array
Axes = tuple[str | None, str | None, str | None, str | None]

STREAM: Axes = ("batch", "frames", "cells", None)
"""Logical axes of the video tower's stream, `[B, F, N, D]`."""
FRAMES: Axes = ("batch", "frames", "cells", "heads")
VIEWS: Axes = ("batch", None, "tokens", "heads")
"""Of what is projected from it: by frames, `[B, F, S, H * d]`, and by views, `[B, V, S, H * d]`."""
_LANES, _ROWS = 128, 16  # of a register, in bfloat16
_BLOCK = 2**19  # elements that are at hand at once
_VMEM = 48 * 2**20


class _Plan(NamedTuple):
    """What the kernels are compiled for: layer norm, or root mean square; whether `x` goes on beside the norm, with a
    gradient of its own; logical axes of the tokens; to be interpreted."""

    centred: bool
    beside: bool
    axes: Axes = STREAM
    interpret: bool = False


def norm_modulated(x: Array, shift: Array, scale: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """AdaLN: `layer_norm(x) * (1 + scale) + shift`, in float32 inside.

    Args:
      x: the stream, `[B, F, N, D]`.
      shift, scale: `[B, F, 1, D]` float32, or what broadcasts to it.

    Returns:
      (what is normalised and modulated, in `dtype`; `x` to go on with, so that its gradient joins that of the norm).
    """
    if _worthwhile(x, dtype, STREAM):
        return normalise(_Plan(centred=True, beside=True), x, *_of_groups(x, shift, scale))
    return settled(modulate(x, shift, scale), dtype), x


def rms_scaled(x: Array, scale: Array, dtype: jnp.dtype, axes: Axes) -> Array:
    """`x / sqrt(mean(x^2)) * scale` over the last axis of `[B, G, S, D]`, in float32 inside.

    Args:
      scale: `[D]` float32.
      axes: logical axes of `x`.
    """
    if _worthwhile(x, dtype, axes):
        return normalise(_Plan(centred=False, beside=False, axes=axes), x, *_of_groups(x, jnp.zeros(()), scale - 1.0))
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + NORM_EPS) * scale).astype(dtype)


def _worthwhile(x: Array, dtype: jnp.dtype, axes: Axes) -> bool:
    """Whether the kernels take these tokens: many, whole on one chip, in the type that comes out."""
    if target()[0] != "tpu" or x.shape[-1] % _LANES or x.dtype != dtype or x.shape[2] < _ROWS:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or spec_for(axes, x.shape, mesh)[-1] is None


def _of_groups(x: Array, *arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_to(array, (*x.shape[:2], 1, x.shape[-1])) for array in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(plan: _Plan, x: Array, shift: Array, scale: Array) -> Any:
    """The kernel: `[B, G, S, D]` normalised, times `1 + scale [B, G, 1, D]`, plus `shift`; with `beside` also `x`."""
    normed = _forward(plan, x, shift, scale)
    return (normed, x) if plan.beside else normed


def _normalise_forward(plan: _Plan, x: Array, shift: Array, scale: Array) -> tuple[Any, tuple[Array, Array]]:
    return normalise(plan, x, shift, scale), (x, scale)


def _normalise_backward(plan: _Plan, kept: tuple[Array, Array], gradients: Any) -> tuple[Array, ...]:
    return _backward(plan, *kept, *(gradients if plan.beside else [gradients]))


normalise.defvjp(_normalise_forward, _normalise_backward)


def _forward(plan: _Plan, x: Array, shift: Array, scale: Array) -> Array:
    def on_device(x: Array, shift: Array, scale: Array) -> Array:
        grid, tokens, of_group = _blocks(x)
        return pl.pallas_call(
            functools.partial(_forward_kernel, plan),
            grid=grid,
            in_specs=[tokens, of_group, of_group],
            out_specs=tokens,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=_parameters(),
            name="norm",
            interpret=plan.interpret,
        )(x, shift, scale)

    return _per_device(on_device, plan, [x, shift, scale], sums=0)


def _forward_kernel(plan: _Plan, x_ref: Any, shift_ref: Any, scale_ref: Any, normed_ref: Any) -> None:
    normed, _ = _normed(plan, x_ref[0, 0])
    normed_ref[0, 0] = (normed * (1.0 + scale_ref[0, 0]) + shift_ref[0, 0]).astype(normed_ref.dtype)


def _backward(plan: _Plan, x: Array, scale: Array, *gradients: Array) -> tuple[Array, ...]:
    def on_device(x: Array, scale: Array, *gradients: Array) -> tuple[Array, ...]:
        grid, tokens, of_group = _blocks(x)
        found = pl.pallas_call(
            functools.partial(_backward_kernel, plan, x.shape[2]),
            grid=grid,
            in_specs=[tokens, of_group, *[tokens] * len(gradients)],
            out_specs=[tokens, of_group, of_group],
            out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, scale, scale)],
            compiler_params=_parameters(),
            name="norm_gradient",
            interpret=plan.interpret,
        )(x, scale, *gradients)
        return tuple(found)

    return _per_device(on_device, plan, [x, scale, *gradients], sums=2)


def _backward_kernel(plan: _Plan, rows: int, x_ref: Any, scale_ref: Any, *refs: Any) -> None:
    """The gradients are of what is normalised and, with `beside`, of what goes on beside it."""
    gradient_ref, *beside, of_x_ref, of_shift, of_scale = refs
    part, block = pl.program_id(2), x_ref.shape[2]
    normed, inverse = _normed(plan, x_ref[0, 0])
    gradient = gradient_ref[0, 0].astype(jnp.float32)
    if rows % block:  # the last block reaches beyond the end
        exists = part * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < rows
        normed, gradient = jnp.where(exists, normed, 0.0), jnp.where(exists, gradient, 0.0)
    of_normed = gradient * (1.0 + scale_ref[0, 0])
    of_x = of_normed - normed * jnp.mean(of_normed * normed, -1, keepdims=True)
    if plan.centred:
        of_x -= jnp.mean(of_normed, -1, keepdims=True)
    of_x_ref[0, 0] = sum((ref[0, 0].astype(jnp.float32) for ref in beside), inverse * of_x).astype(of_x_ref.dtype)

    @pl.when(part == 0)
    def _() -> None:
        of_shift[...] = jnp.zeros_like(of_shift)
        of_scale[...] = jnp.zeros_like(of_scale)

    of_shift[0, 0] += jnp.sum(gradient, 0, keepdims=True)
    of_scale[0, 0] += jnp.sum(gradient * normed, 0, keepdims=True)


def _normed(plan: _Plan, x: Array) -> tuple[Array, Array]:
    """In a kernel: rows `[n, D]` normalised, float32, and what they were multiplied by, `[n, 1]`."""
    x = x.astype(jnp.float32)
    if plan.centred:
        x = x - jnp.mean(x, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPS)
    return x * inverse, inverse


def _blocks(x: Array) -> tuple[tuple[int, ...], pl.BlockSpec, pl.BlockSpec]:
    """The grid, and the blocks of tokens `[B, G, S, D]` and of what a group has, `[B, G, 1, D]`."""
    rows, groups, count, width = x.shape
    parts = -(-count * width // _BLOCK)
    block = count if parts == 1 else -(-count // (parts * _ROWS)) * _ROWS
    tokens = pl.BlockSpec((1, 1, block, width), lambda row, group, part: (row, group, part, 0))
    of_group = pl.BlockSpec((1, 1, 1, width), lambda row, group, part: (row, group, 0, 0))
    return (rows, groups, -(-count // block)), tokens, of_group


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM)


def _per_device(kernel: Any, plan: _Plan, arrays: list[Array], *, sums: int) -> Any:
    """`kernel(*arrays)` on every device's part of the tokens, the first array; the last `sums` results are sums over
    the tokens of a group."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(*arrays)
    whole = spec_for(plan.axes, arrays[0].shape, mesh)
    of_group = PartitionSpec(*whole[:2], None, None)

    def on_device(*arrays: Array) -> Any:
        if not sums or whole[2] is None:
            return kernel(*arrays)
        of_x, *of_groups = kernel(*arrays)
        return of_x, *jax.lax.psum(of_groups, whole[2])

    return jax.shard_map(
        on_device,
        in_specs=tuple(whole if array.shape == arrays[0].shape else of_group for array in arrays),
        out_specs=(whole, *[of_group] * sums) if sums else whole,
        check_vma=False,
    )(*arrays)
