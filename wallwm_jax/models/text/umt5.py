"""The UMT5 encoder (frozen, imported): T5 with a relative position bias in every layer.

The same function as transformers' UMT5EncoderModel. Captions are encoded once, offline, into the event store:
`CaptionEncoder` gives unpadded bfloat16 features. Parameters are a nested dict of arrays as everywhere; blocks carry a
leading layer axis, and weights keep the dtype they were published in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from wallwm_jax.console import UserError, progress
from wallwm_jax.models.layer_stack import build, run
from wallwm_jax.models.layers import RMSNorm
from wallwm_jax.models.text.sentence_pieces import Tokenizer

Params = dict[str, Any]

MASKED = -1e30
LENGTH_STEP = 32  # captions are padded to a multiple of this: few compilations, little waste


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of an encoder; the defaults are UMT5-XXL's, which Wan uses.

    Attributes:
      vocabulary: rows of the embedding. width: of the stream. heads, head_dim: of the attention. ffn: hidden width.
      depth: blocks. buckets, max_distance: of the relative position bias.
      compute_dtype: "float32" or "bfloat16"; norms and softmax are float32 in both.
    """

    vocabulary: int = 256384
    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn: int = 10240
    depth: int = 24
    buckets: int = 32
    max_distance: int = 128
    compute_dtype: str = "bfloat16"


class Projection(nnx.Module):
    """`x @ kernel`, kernel `[in, out]`, computed in `dtype`; no linear map of T5 has a bias."""

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (fan_in, fan_out), jnp.float32) / math.sqrt(fan_in))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)


class UMT5Block(nnx.Module):
    """Self-attention with its own position bias and no logit scale, then a gated-GELU feed-forward; both pre-normed."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        inner = config.heads * config.head_dim
        linear = functools.partial(Projection, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))
        self.config = config
        self.attention_norm = RMSNorm(config.width)
        self.query = linear(config.width, inner)
        self.key = linear(config.width, inner)
        self.value = linear(config.width, inner)
        self.output = linear(inner, config.width)
        self.position_bias = nnx.Param(jax.random.normal(rngs.params(), (config.buckets, config.heads), jnp.float32))
        self.ffn_norm = RMSNorm(config.width)
        self.gate = linear(config.width, config.ffn)
        self.up = linear(config.width, config.ffn)
        self.down = linear(config.ffn, config.width)

    def __call__(self, x: jax.Array, buckets: np.ndarray, mask: jax.Array) -> jax.Array:
        """`x [N, L, D]`, `buckets [L, L]` of (query, key), `mask [N, L]` True where a key is text."""
        normed = self.attention_norm(x)
        query, key, value = (self._split(part(normed)) for part in (self.query, self.key, self.value))
        logits = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32)
        bias = jnp.moveaxis(self.position_bias[...].astype(jnp.float32)[buckets], -1, 0)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits + bias, MASKED), -1)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        x = x + self.output(mixed.reshape(*x.shape[:2], -1))
        normed = self.ffn_norm(x)
        return x + self.down(jax.nn.gelu(self.gate(normed), approximate=True) * self.up(normed))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_dim)


class UMT5Encoder(nnx.Module):
    """Embedding (not scaled), blocks, final norm; the functions below are the interface."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocabulary, config.width), jnp.float32))
        self.blocks = build(lambda rngs: UMT5Block(config, rngs=rngs), config.depth, rngs)
        self.norm = RMSNorm(config.width)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """`ids [N, L]`, `mask [N, L]` to features `[N, L, D]`."""
        buckets = position_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)

        def step(x: jax.Array, blocks: tuple[UMT5Block, ...], _: None) -> tuple[jax.Array, None]:
            return blocks[0](x, buckets, mask), None

        start = self.embedding[...][ids].astype(self.config.compute_dtype)
        x, _ = run(step, start, (self.blocks,))
        return self.norm(x).astype(self.config.compute_dtype)


def init(config: UMT5Config, key: jax.Array) -> Params:
    """Random parameters, float32."""
    return nnx.to_pure_dict(nnx.state(UMT5Encoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: UMT5Config) -> Params:
    """Shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def encode(params: Params, config: UMT5Config, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Features `[N, L, D]` of `ids [N, L]`, where `mask [N, L]` (bool) says which are text.

    Positions outside the mask are closed as keys; their own features mean nothing.
    """
    return nnx.merge(_graph(config), params)(ids, mask)


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket `[L, L]` of each (query, key): half of the buckets for keys after the query, half for the others;
    within a half, one bucket per distance at first, then logarithmically wider ones up to `max_distance`."""
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    wide = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, wide) + half * (offset > 0)


class CaptionEncoder:
    """Captions to features, with the weights and tokenizer of one folder made by `wallwm_jax.convert umt5`."""

    def __init__(self, params: Params, config: UMT5Config, tokenizer: Tokenizer, *, max_length: int = 512):
        """Checks that the parts fit.

        Args:
          params, config: of the encoder.
          tokenizer: its ids must fit the embedding.
          max_length: ids kept of a caption, the end id included.

        Raises:
          UserError: the tokenizer has more pieces than the embedding has rows.
        """
        if tokenizer.vocabulary > config.vocabulary:
            raise UserError(
                f"the tokenizer has {tokenizer.vocabulary} pieces, the encoder only {config.vocabulary} embeddings; "
                "they were not published together"
            )
        self.config, self.max_length = config, max_length
        self._params, self._tokenizer = jax.device_put(params), tokenizer
        self._encode = jax.jit(functools.partial(encode, config=config))

    @classmethod
    def from_directory(cls, directory: str | Path, *, max_length: int = 512) -> CaptionEncoder:
        """Opens the result of `python -m wallwm_jax.convert umt5 --out=directory`.

        Raises:
          UserError: not such a folder.
        """
        from wallwm_jax.models.convert.stream import load

        loaded = load(directory, "umt5")
        return cls(loaded.params, config_from_sizes(loaded.sizes), Tokenizer(directory), max_length=max_length)

    def encode(self, captions: Sequence[str], *, batch: int = 16) -> list[np.ndarray]:
        """Features of each caption, unpadded: bfloat16 `[n, D]` for n ids with the end id; "" has one."""
        tokens = [self._tokenizer.encode(caption, self.max_length) for caption in captions]
        order = sorted(range(len(tokens)), key=lambda i: tokens[i][1])
        features: list[Any] = [None] * len(tokens)
        starts = range(0, len(order), batch)
        for start in progress(starts, unit="batch", label="encode captions"):
            rows = order[start : start + batch]
            longest = max(tokens[row][1] for row in rows)
            length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.max_length)
            ids = np.stack(
                [tokens[row][0][:length] for row in rows] + [tokens[rows[0]][0][:length]] * (batch - len(rows))
            )
            counts = np.array([tokens[row][1] for row in rows] + [1] * (batch - len(rows)))
            encoded = self._encode(self._params, ids=ids, mask=np.arange(length) < counts[:, None])
            host = np.asarray(encoded.astype(jnp.bfloat16)).view(ml_dtypes.bfloat16)
            for row, value in zip(rows, host):
                features[row] = value[: tokens[row][1]].copy()
        return features


def config_from_sizes(sizes: Mapping[str, Any], compute_dtype: str = "bfloat16") -> UMT5Config:
    """The config that a conversion's `sizes` describe."""
    return UMT5Config(**sizes, compute_dtype=compute_dtype)


@functools.lru_cache(maxsize=8)
def _graph(config: UMT5Config) -> Any:
    return nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))[0]
