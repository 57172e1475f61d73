"""Rotary position embeddings: Wan's three axes (frame, row, column), a camera axis, and one dimension for actions.

Rotate-half layout: a head of `d` dimensions is `d / 2` pairs (i, i + d / 2), the frame's pairs first, then the row's,
then the column's. Wan's public weights interleave pairs; they are permuted once, at import.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Wan's split of a head over (frame, row, column): 128 gives 44, 42, 42.

    Raises:
      ValueError: `head_dim` is odd or less than 6.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head dimension {head_dim}: rotary embeddings need an even number, at least 6")
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def frequencies(dim: int, theta: float = THETA) -> np.ndarray:
    """Angular frequencies `[dim / 2]` of an axis that owns `dim` dimensions."""
    return (theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def position_angles(position: jax.Array, dim: int) -> jax.Array:
    """Angles `[..., dim / 2]`, radians, of signed positions `[...]`."""
    return position.astype(jnp.float32)[..., None] * frequencies(dim)


def grid_angles(frame_angles: jax.Array, rows: int, columns: int, head_dim: int) -> jax.Array:
    """Angles `[..., rows * columns, head_dim / 2]` of all cells of a frame.

    Args:
      frame_angles: `[..., d_frame / 2]`, the first axis of the head: of the frame's position within a view, of the
        camera across views.
      rows, columns: tokens of one frame.
      head_dim: dimensions of a head.
    """
    _, row_dim, column_dim = axis_dims(head_dim)
    row = jnp.broadcast_to(position_angles(jnp.arange(rows), row_dim)[:, None], (rows, columns, row_dim // 2))
    column = jnp.broadcast_to(position_angles(jnp.arange(columns), column_dim)[None], (rows, columns, column_dim // 2))
    cells = jnp.concatenate([row, column], -1).reshape(rows * columns, -1)
    lead = frame_angles.shape[:-1]
    return jnp.concatenate(
        [
            jnp.broadcast_to(frame_angles[..., None, :], (*lead, rows * columns, frame_angles.shape[-1])),
            jnp.broadcast_to(cells, (*lead, *cells.shape)),
        ],
        -1,
    )


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates heads `x [..., H, S, d]` by `angles [..., S, d / 2]`, the same for all; float32 inside, dtype kept."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    half = x.shape[-1] // 2
    if x.dtype == jnp.bfloat16:  # a permutation of bfloat16 is exact, and the matrix unit moves lanes for nothing
        swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, -1)
        swapped = jnp.matmul(x, swap, preferred_element_type=jnp.float32)
    else:
        swapped = jnp.roll(x, half, -1)
    return (x.astype(jnp.float32) * cos[..., None, :, :] + swapped * sin[..., None, :, :]).astype(x.dtype)
