"""Cross-view attention (WALL-WM's view-interaction self-attention, section 2.2) and its camera rotary axis (2.3).

After the within-view attention of a block, the cells of all cameras of one latent frame attend to each other. The
branch starts from the block's own within-view attention and modulation, with a zero output projection: at first it
changes nothing, and its gradient is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wallwm_jax.models.attention import Attention
from wallwm_jax.models.layers import gated
from wallwm_jax.models.norms import norm_modulated
from wallwm_jax.models.rope import axis_dims, grid_angles

UNKNOWN_CAMERA = 0
COPIED = ("query", "key", "value", "query_norm", "key_norm")  # from the block's own within-view attention


class CameraTable(nnx.Module):
    """One learnable angle vector per camera, shared by all blocks; row 0 serves every camera the table does not know.

    The angles take the frame's share of the head (44 of 128), which is constant inside one latent frame. They start at
    zero: all cameras alike.
    """

    def __init__(self, max_views: int, head_dim: int):
        self.head_dim = head_dim
        self.angles = nnx.Param(jnp.zeros((max_views, axis_dims(head_dim)[0] // 2), jnp.float32))

    def __call__(self, view_id: jax.Array, rows: int, columns: int) -> jax.Array:
        """Angles `[..., V * rows * columns, d / 2]` for `view_id [..., V]`; ids outside the table use row 0."""
        known = (view_id > 0) & (view_id < self.angles.shape[0])
        angles = grid_angles(self.angles[...][jnp.where(known, view_id, UNKNOWN_CAMERA)], rows, columns, self.head_dim)
        return angles.reshape(*view_id.shape[:-1], -1, angles.shape[-1])


class ViewAttention(nnx.Module):
    """The cross-view branch of one block."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention = Attention(width, heads, rngs=rngs, dtype=dtype, zero_output=True)
        self.modulation = nnx.Param(jnp.zeros((3, width), jnp.float32))

    def start_from(self, attention: Attention, modulation: jax.Array) -> None:
        """Copies q, k, v and their norms from `attention`, and shift, scale, gate `[3, D]`."""
        for name in COPIED:
            nnx.update(getattr(self.attention, name), nnx.state(getattr(attention, name)))
        self.modulation[...] = modulation

    def __call__(
        self, x: jax.Array, time: jax.Array, angles: jax.Array, key_bias: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """The stream after the branch.

        Args:
          x: `[B, F, V*h*w, D]`.
          time: `[B, F, 3, D]` shift, scale and gate of the self-attention, from the timestep.
          angles: `[B, F, V*h*w, d/2]` from the camera table.
          key_bias: `[B, F, V*h*w]`, -inf for the cells of absent views.
          mask: `[B, F, V*h*w, V*h*w]`, False closes a pair of cells (`sight_cone.py`); None closes none.
        """
        shift, scale, gate = jnp.split(self.modulation[...] + time, 3, 2)
        normed, x = norm_modulated(x, shift, scale, self.attention.dtype)
        mixed = self.attention.in_frames(normed, normed, angles=angles, key_bias=key_bias, mask=mask)
        return gated(x, mixed, gate)


def from_self_attention(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The branch's parameters from those of a tower's blocks that has none: all but the output projection, which stays
    zero, so that the multi-view model starts as the single-view one (WALL-WM section 2.2).
    """
    attention = {name: blocks["self_attention"][name] for name in COPIED}
    return {"attention": attention, "modulation": blocks["modulation"][:, :3]}
