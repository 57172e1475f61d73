"""The vision tower of Qwen3.5: images to tokens as wide as the language model.

The same function as the `visual` part of transformers' Qwen3_5Model on single frames. Patches are embedded together
with a learned grid of positions, interpolated to the image's grid; blocks attend within an image, with rotary row and
column positions; every `merge` x `merge` patches become one token. An image's size is static, and so is its grid.
Parameters are a nested dict of arrays as everywhere; blocks carry a leading layer axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallwm_jax.console import UserError
from wallwm_jax.models.attention import attend
from wallwm_jax.models.convert.rules import read_size, require
from wallwm_jax.models.layer_stack import build, remat, run
from wallwm_jax.models.layers import FeedForward, LayerNorm, Linear
from wallwm_jax.models.rope import THETA, position_angles, rotate

Params = dict[str, Any]

CHANNELS = 3


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower; the defaults are those of the 9B model's.

    Attributes:
      width: of the stream. heads: of the attention. ffn: hidden width. depth: blocks.
      patch: pixels of a patch's side. frames: frames of a patch; a single image fills all of them.
      merge: patches of a token's side. out_width: of a token, the language model's width.
      positions: rows of the learned position table, the square of its side.
      compute_dtype: "float32" or "bfloat16"; norms and softmax are float32 in both.
      remat: what the backward pass recomputes, `layer_stack.REMAT`.
    """

    width: int = 1152
    heads: int = 16
    ffn: int = 4304
    depth: int = 27
    patch: int = 16
    frames: int = 2
    merge: int = 2
    out_width: int = 4096
    positions: int = 2304
    compute_dtype: str = "bfloat16"
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"vision width {self.width} over {self.heads} heads: each head needs a multiple of four dimensions"
            )
        if math.isqrt(self.positions) ** 2 != self.positions:
            raise UserError(f"{self.positions} vision positions: the learned grid must be a square")

    @classmethod
    def tiny(cls, **changes: Any) -> VisionConfig:
        """A tower that trains on a CPU: tokens of 16 x 16 pixels, 128 wide."""
        sizes: dict[str, Any] = dict(
            width=32, heads=2, ffn=64, depth=2, patch=8, out_width=128, positions=16, compute_dtype="float32"
        )
        return cls(**(sizes | changes))

    @classmethod
    def from_json(cls, config: Mapping[str, Any], **changes: Any) -> VisionConfig:
        """From the `vision_config` of a published config.json.

        Raises:
          UserError: a size is missing, or it is a variant that this tower is not.
        """
        require(config, "hidden_act", ["gelu_pytorch_tanh"], "gelu_pytorch_tanh")
        require(config, "in_channels", [CHANNELS], CHANNELS)
        require(config, "deepstack_visual_indexes", [[], None], None)
        require(config.get("rope_parameters") or {}, "rope_theta", [THETA], THETA)
        return cls(
            width=read_size(config, "hidden_size"),
            heads=read_size(config, "num_heads"),
            ffn=read_size(config, "intermediate_size"),
            depth=read_size(config, "depth"),
            patch=read_size(config, "patch_size"),
            frames=read_size(config, "temporal_patch_size"),
            merge=read_size(config, "spatial_merge_size"),
            out_width=read_size(config, "out_hidden_size"),
            positions=read_size(config, "num_position_embeddings"),
            **changes,
        )

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return self.frames * self.patch**2 * CHANNELS

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image of `height` x `width` pixels.

        Raises:
          UserError: the size is no multiple of a token's side.
        """
        side = self.patch * self.merge
        if height % side or width % side or not height or not width:
            raise UserError(
                f"images of {height} x {width} pixels: height and width must be multiples of {side}; "
                "models.vlm.images.fit resizes them"
            )
        return height // side, width // side


class VisionBlock(nnx.Module):
    """Attention within an image, then a feed-forward; both pre-normed."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.compute_dtype)
        self.heads = config.heads
        self.attention_norm = LayerNorm(width)
        self.qkv = Linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.output = Linear(width, width, rngs=rngs, dtype=dtype)
        self.ffn_norm = LayerNorm(width)
        self.ffn = FeedForward(width, config.ffn, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """`x [N, S, D]` of N images, `angles [S, d / 2]`."""
        query, key, value = jnp.split(self.qkv.to_heads(self.attention_norm(x), 3 * self.heads), 3, -3)
        x = x + self.output.from_heads(attend(rotate(query, angles), rotate(key, angles), value))
        return x + self.ffn(self.ffn_norm(x))


class Merger(nnx.Module):
    """`merge` x `merge` normed patches, side by side, through an MLP with the exact GELU, to one token."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        hidden, dtype = config.width * config.merge**2, jnp.dtype(config.compute_dtype)
        self.merge = config.merge
        self.norm = LayerNorm(config.width)
        self.up = Linear(hidden, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, config.out_width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, rows: int, columns: int) -> jax.Array:
        """`x [N, rows * merge * columns * merge, D]` to `[N, rows * columns, out_width]`."""
        x = self.norm(x).reshape(len(x), rows, self.merge, columns, self.merge, -1)
        x = jnp.swapaxes(x, 2, 3).reshape(len(x), rows * columns, -1)
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class VisionTower(nnx.Module):
    """The modules; the functions below are the interface."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embedding = Linear(
            config.patch_values, config.width, rngs=rngs, dtype=jnp.dtype(config.compute_dtype)
        )
        table = (config.positions, config.width)
        self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), table, jnp.float32))
        self.blocks = build(lambda rngs: VisionBlock(config, rngs=rngs), config.depth, rngs)
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`images [N, H, W, 3]` in [-1, 1] to tokens `[N, rows * columns, out_width]`."""
        config = self.config
        rows, columns = config.token_grid(*images.shape[1:3])
        patch_rows, patch_columns = rows * config.merge, columns * config.merge
        patches = images.reshape(len(images), patch_rows, config.patch, patch_columns, config.patch, CHANNELS)
        patches = jnp.swapaxes(patches, 2, 3).reshape(len(images), patch_rows * patch_columns, -1)
        x = self.patch_embedding(jnp.tile(patches, config.frames)) + self._positions(patch_rows, patch_columns)
        angles = axial_angles(patch_rows, patch_columns, config.width // config.heads)

        def step(x: jax.Array, blocks: tuple[VisionBlock, ...], _: None) -> tuple[jax.Array, None]:
            return remat(blocks[0].__call__, config.remat)(x, angles), None

        x, _ = run(step, x, (self.blocks,))
        return self.merger(x, rows, columns)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """The learned grid, interpolated to `[rows * columns, D]`, in the compute dtype."""
        side = math.isqrt(self.config.positions)
        table = self.position_embedding[...].astype(jnp.float32).reshape(side, side, -1)
        weights = interpolation(rows, side), interpolation(columns, side)
        grid = jnp.einsum("rs,ct,std->rcd", *weights, table, precision=jax.lax.Precision.HIGHEST)
        return grid.reshape(rows * columns, -1).astype(self.config.compute_dtype)


def init(config: VisionConfig, key: jax.Array) -> Params:
    """Random parameters, float32."""
    return nnx.to_pure_dict(nnx.state(VisionTower(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: VisionConfig) -> Params:
    """Shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def encode(params: Params, config: VisionConfig, images: jax.Array) -> jax.Array:
    """Tokens of images.

    Args:
      params, config: of the tower.
      images: `[B, N, H, W, 3]` in [-1, 1], as `images.normalise` gives them: N images in each of B rows.

    Returns:
      `[B, N, rows * columns, out_width]` in the compute dtype, row by row of the image.

    Raises:
      UserError: the size is no multiple of a token's side.
    """
    tokens = nnx.merge(_graph(config), params)(images.reshape(-1, *images.shape[2:]))
    return tokens.reshape(*images.shape[:2], *tokens.shape[1:])


def interpolation(size: int, side: int) -> np.ndarray:
    """Weights `[size, side]` of linear interpolation from `side` points to `size`, the outermost ones kept."""
    source = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    return np.maximum(0, 1 - np.abs(source[:, None] - np.arange(side, dtype=np.float32)))


def axial_angles(rows: int, columns: int, head_dim: int) -> jax.Array:
    """Rotary angles `[rows * columns, head_dim / 2]`: half of the pairs turn with the row, half with the column."""
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [position_angles(position.reshape(-1), head_dim // 2) for position in (row, column)]
    return jnp.concatenate(angles, -1)


@functools.lru_cache(maxsize=8)
def _graph(config: VisionConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))[0]
