"""The `bytes` text encoder: a small bidirectional transformer over UTF-8 bytes, trained with the model; no tokenizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import FrozenConfigDict

from wallwm_jax.models.attention import Attention, attend
from wallwm_jax.models.layer_stack import build, remat, run
from wallwm_jax.models.layers import FeedForward, LayerNorm
from wallwm_jax.models.rope import position_angles
from wallwm_jax.models.text.byte_ids import VOCABULARY


class ByteBlock(nnx.Module):
    """Pre-norm attention inside a caption, with rotary positions, and a feed-forward."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        width, dtype = config.text.width, jnp.dtype(config.compute_dtype)
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, config.text.heads, rngs=rngs, dtype=dtype)
        self.ffn_norm = LayerNorm(width)
        self.ffn = FeedForward(width, 4 * width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, angles: jax.Array, key_bias: jax.Array) -> jax.Array:
        """`x [N, L, D]`, `angles [L, d/2]`, `key_bias [N, L]`."""
        normed = self.attention_norm(x)
        query, key = self.attention.queries(normed, angles=angles), self.attention.keys(normed, angles=angles)
        x = x + self.attention.merge(attend(query, key, self.attention.values(normed), key_bias=key_bias))
        return x + self.ffn(self.ffn_norm(x))


class ByteEncoder(nnx.Module):
    """Byte ids to features, one per byte."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, config.text.width), jnp.float32))
        self.blocks = build(lambda rngs: ByteBlock(config, rngs=rngs), config.text.depth, rngs)
        self.norm = LayerNorm(config.text.width)

    def __call__(self, ids: jax.Array, length: jax.Array) -> jax.Array:
        """`ids [B, E, L]`, `length [B, E]` (end id included) to features `[B, E, L, Dt]`, zero beyond the length."""
        text, dtype = self.config.text, jnp.dtype(self.config.compute_dtype)
        tokens = ids.shape[-1]
        is_token = jnp.arange(tokens) < length[..., None]
        key_bias = jnp.where(is_token, 0.0, -jnp.inf).reshape(-1, tokens)
        angles = position_angles(jnp.arange(tokens), text.width // text.heads)
        one_hot = jax.nn.one_hot(ids.reshape(-1, tokens), VOCABULARY, dtype=dtype)

        def step(x: jax.Array, blocks: tuple[ByteBlock, ...], _: None) -> tuple[jax.Array, None]:
            return remat(blocks[0].__call__, self.config.remat)(x, angles, key_bias), None

        x, _ = run(step, one_hot @ self.embedding[...].astype(dtype), (self.blocks,))
        return jnp.where(is_token[..., None], self.norm(x).reshape(*ids.shape, -1), 0.0).astype(dtype)
