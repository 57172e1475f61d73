"""From the features of a frozen VLM into the video tower's text space, and two heads beside (WALL-WM section 3.1).

The text encoder that is to be replaced and the VLM cut text into other tokens. So as many learned queries as the text
encoder has tokens, in its order, read the VLM's features of the prompt (a perceiver resampler, arXiv 2204.14198), and
one more output says which of them are text. The heads say the next event again, and how long it takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wallwm_jax.models.attention import Attention, attend
from wallwm_jax.models.layer_stack import build, remat, run
from wallwm_jax.models.layers import FeedForward, LayerNorm, Linear

Params = dict[str, Any]

_QUERY_STD = 0.02


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector.

    Attributes:
      in_width: of the VLM's features. vocabulary: ids of its text.
      queries: features that the text encoder gives, its padding too. width, heads: of its features.
      depth: blocks.
      compute_dtype, remat: as the VLM's.
    """

    in_width: int
    vocabulary: int
    queries: int
    width: int
    heads: int
    depth: int
    compute_dtype: str = "bfloat16"
    remat: str = "none"


class TextFeatures(NamedTuple):
    """Features `[B, L, Dt]` in the video tower's text space, float32, and logits `[B, L]` of being no padding."""

    features: jax.Array
    present: jax.Array


class ResamplerBlock(nnx.Module):
    """Queries read the memory and each other, then a feed-forward; pre-normed."""

    def __init__(self, config: ProjectorConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.compute_dtype)
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, config.heads, rngs=rngs, dtype=dtype)
        self.ffn_norm = LayerNorm(width)
        self.ffn = FeedForward(width, 4 * width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, memory: jax.Array, key_bias: jax.Array) -> jax.Array:
        """`x [B, L, W]`, `memory [B, S, W]`, `key_bias [B, S + L]`."""
        normed = self.attention_norm(x).astype(memory.dtype)
        keys = jnp.concatenate([memory, normed], 1)
        mixed = attend(
            self.attention.queries(normed), self.attention.keys(keys), self.attention.values(keys), key_bias=key_bias
        )
        x = x + self.attention.merge(mixed)
        return x + self.ffn(self.ffn_norm(x))


class TextProjector(nnx.Module):
    """The modules; the functions below are the interface."""

    def __init__(self, config: ProjectorConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.compute_dtype)
        self.config = config
        self.project = Linear(config.in_width, width, rngs=rngs, dtype=dtype)
        self.memory_norm = LayerNorm(width)
        shape = (config.queries, width)
        self.queries = nnx.Param(_QUERY_STD * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.blocks = build(lambda rngs: ResamplerBlock(config, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(width)
        self.output = Linear(width, width, rngs=rngs, dtype=jnp.float32)
        self.present = Linear(width, 1, rngs=rngs, dtype=jnp.float32)
        self.next = Linear(config.in_width, config.vocabulary, rngs=rngs, dtype=dtype, bias=False)
        self.time = Linear(config.in_width, 1, rngs=rngs, dtype=jnp.float32, std=0.0)

    def resample(self, hidden: jax.Array, mask: jax.Array) -> TextFeatures:
        """See `text_features`."""
        memory = self.memory_norm(self.project(hidden)).astype(self.config.compute_dtype)
        x = jnp.broadcast_to(self.queries[...], (len(hidden), *self.queries.shape)).astype(memory.dtype)
        is_open = jnp.concatenate([mask, jnp.ones(x.shape[:2], bool)], 1)
        key_bias = jnp.where(is_open, 0.0, -jnp.inf)

        def step(x: jax.Array, blocks: tuple[ResamplerBlock, ...], _: None) -> tuple[jax.Array, None]:
            return remat(blocks[0].__call__, self.config.remat)(x, memory, key_bias), None

        x, _ = run(step, x, (self.blocks,))
        normed = self.norm(x)
        return TextFeatures(self.output(normed), self.present(normed)[..., 0])


def init(config: ProjectorConfig, key: jax.Array) -> Params:
    """Random parameters, float32."""
    return nnx.to_pure_dict(nnx.state(TextProjector(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def text_features(params: Params, config: ProjectorConfig, hidden: jax.Array, mask: jax.Array) -> TextFeatures:
    """What the text encoder would say of the next event, of the VLM's features `hidden [B, S, D]`.

    `mask [B, S]` bool is the boundary mask: the positions of the prompt's text.
    """
    return _bind(params, config).resample(hidden, mask)


def text_length(present: jax.Array) -> jax.Array:
    """How many of the features are text, `[B]` int32, by the logits `present [B, L]`: the likeliest, at least one."""
    return 1 + jnp.argmax(jnp.cumsum(present, -1), -1).astype(jnp.int32)


def next_logits(params: Params, config: ProjectorConfig, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]` of the next token, float32, of features `[..., D]`."""
    return _bind(params, config).next(hidden).astype(jnp.float32)


def remaining_time(params: Params, config: ProjectorConfig, hidden: jax.Array) -> jax.Array:
    """Log-seconds `[...]` until the next event has ended, of the features `[..., D]` of the prompt's last token."""
    return _bind(params, config).time(hidden)[..., 0]


def _bind(params: Params, config: ProjectorConfig) -> TextProjector:
    return nnx.merge(_graph(config), params)


@functools.lru_cache(maxsize=8)
def _graph(config: ProjectorConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: TextProjector(config, rngs=nnx.Rngs(0))))[0]
