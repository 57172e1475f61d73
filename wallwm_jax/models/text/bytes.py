"""The `bytes` text encoder: a small bidirectional transformer over UTF-8 bytes, trained with the model; no tokenizer.

A byte is embedded together with hashes of the n-grams that end there (BLT, arXiv 2412.09871, section 3.2.1), so that a
word has a vector of its own before anything is learned. A strided convolution then merges `text.stride` bytes into one
token, from a window twice as wide, so that the later layers and every text cross-attention of the video tower see a
sequence as short as words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import FrozenConfigDict

from wallwm_jax.models.attention import Attention, attend
from wallwm_jax.models.layer_stack import build, remat, run
from wallwm_jax.models.layers import FeedForward, LayerNorm, Linear
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
    """Byte ids to features, one per `text.stride` bytes."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        text, dtype = config.text, jnp.dtype(config.compute_dtype)
        self.config = config
        byte_width = max(1, text.width // 4)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, byte_width), jnp.float32))
        rows = (len(text.ngrams), text.ngram_rows, byte_width)
        self.ngram_embedding = nnx.Param(jax.random.normal(rngs.params(), rows, jnp.float32)) if text.ngrams else None
        self.merge = Linear(2 * text.stride * byte_width, text.width, rngs=rngs, dtype=dtype)
        self.blocks = build(lambda rngs: ByteBlock(config, rngs=rngs), text.depth, rngs)
        self.norm = LayerNorm(text.width)

    def __call__(self, ids: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes captions.

        Args:
          ids: `[B, E, L]` byte ids. length: `[B, E]` how many of them are text, end id included.

        Returns:
          (features `[B, E, ceil(L / stride), Dt]`, zero beyond the text; how many of them are text, `[B, E]`).
        """
        text = self.config.text
        tokens = self._merged(ids.reshape(-1, ids.shape[-1]), length.reshape(-1, 1))
        length = -(-length // text.stride)
        is_token = jnp.arange(tokens.shape[1]) < length.reshape(-1, 1)
        key_bias = jnp.where(is_token, 0.0, -jnp.inf)
        angles = position_angles(jnp.arange(tokens.shape[1]), text.width // text.heads)

        def step(x: jax.Array, blocks: tuple[ByteBlock, ...], _: None) -> tuple[jax.Array, None]:
            return remat(blocks[0].__call__, self.config.remat)(x, angles, key_bias), None

        x, _ = run(step, tokens, (self.blocks,))
        features = jnp.where(is_token[..., None], self.norm(x), 0.0).astype(tokens.dtype)
        return features.reshape(*ids.shape[:2], *features.shape[1:]), length

    def _merged(self, ids: jax.Array, length: jax.Array) -> jax.Array:
        """`ids [N, L]` to `[N, ceil(L / stride), Dt]`; token i sees bytes (i - 1/2) stride to (i + 3/2) stride."""
        stride, dtype = self.config.text.stride, jnp.dtype(self.config.compute_dtype)
        one_hot = jax.nn.one_hot(ids, VOCABULARY, dtype=dtype)
        embedded = one_hot @ self.embedding[...].astype(dtype)
        if self.ngram_embedding is not None:
            for table, n in zip(self.ngram_embedding[...].astype(dtype), self.config.text.ngrams):
                embedded = embedded + table[ngram_rows(ids, n, len(table))]
        embedded = jnp.where((jnp.arange(ids.shape[1]) < length)[..., None], embedded, 0)
        before, short = stride // 2, -ids.shape[1] % stride
        embedded = jnp.pad(embedded, ((0, 0), (before, stride - before + short), (0, 0)))
        chunks = embedded.reshape(len(ids), -1, stride * embedded.shape[-1])
        return self.merge(jnp.concatenate([chunks[:, :-1], chunks[:, 1:]], -1))


def ngram_rows(ids: jax.Array, n: int, rows: int) -> jax.Array:
    """Row of a table of `rows` for the n bytes that end at each position of `ids [N, L]`: a rolling polynomial hash.

    Before the text there is padding (id 0), so the first n - 1 positions hash what there is.
    """
    ids = ids.astype(jnp.uint32)
    value = jnp.zeros_like(ids)
    for back in reversed(range(n)):
        value = value * jnp.uint32(1000003) + jnp.pad(ids, ((0, 0), (back, 0)))[:, : ids.shape[1]]
    value = (value ^ (value >> 15)) * jnp.uint32(0x85EBCA6B)
    return ((value ^ (value >> 13)) % jnp.uint32(rows)).astype(jnp.int32)
