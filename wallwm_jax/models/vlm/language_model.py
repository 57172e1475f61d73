"""The Qwen3.5 language model: embedding, groups of delta nets closed by full attention, norm, head.

The same function as transformers' Qwen3_5ForCausalLM. Parameters are a nested dict: `embedding [V, D]`, `blocks` with
the stacks `linear` and `full` in the order of the layers, `norm`, and `head` unless tied. Tokens stand in slots:
causality goes by the order of the slots, while the positions that rotate keys are given apart. Padding may stand on
either side of a text; it leaves no trace.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wallwm_jax.models import layer_stack
from wallwm_jax.models.layers import Linear
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.language_blocks import (
    FullBlock,
    KeyValue,
    LinearBlock,
    LinearState,
    OffsetNorm,
    Slots,
    mrope_angles,
    written,
)

Params = dict[str, Any]


class LayerStates(NamedTuple):
    """States of consecutive layers, stacked in their order.

    `linear`: of the delta nets, leaves `[L, B, ...]`. `full`: keys and values `[L, B, kv_heads, T, d]`.
    """

    linear: LinearState
    full: KeyValue


class Cache(NamedTuple):
    """All that later tokens need of earlier ones.

    Attributes:
      layers: of every layer; keys and values have T slots.
      is_open: `[B, T]`, the slots that hold a token.
      used: `[]`, slots written so far, padding too.
      position: `[B]`, of the next token of text.
    """

    layers: LayerStates
    is_open: jax.Array
    used: jax.Array
    position: jax.Array


class Blocks(nnx.Module):
    """The two stacks of layers."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        self.linear = layer_stack.build(lambda rngs: LinearBlock(config, rngs=rngs), config.linear_depth, rngs)
        self.full = layer_stack.build(lambda rngs: FullBlock(config, rngs=rngs), config.full_depth, rngs)


class LanguageModel(nnx.Module):
    """Holds the parameters; the functions below are the interface."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        shape = (config.vocabulary, config.width)
        std = config.width**-0.5  # logits of a tied head start near unit variance, whatever the width
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.blocks = Blocks(config, rngs=rngs)
        self.norm = OffsetNorm(config.width)
        dtype = jnp.dtype(config.compute_dtype)
        self.head = None if config.tied else Linear(*reversed(shape), rngs=rngs, dtype=dtype, bias=False)


def init(config: LanguageConfig, key: jax.Array) -> Params:
    """Random parameters, float32."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: LanguageConfig) -> Params:
    """Shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def embed(params: Params, config: LanguageConfig, ids: jax.Array) -> jax.Array:
    """Embeddings `[B, S, D]` of `ids [B, S]`, in the compute dtype; the caller puts in those of images."""
    return params["embedding"][ids].astype(config.compute_dtype)


def forward(
    params: Params,
    config: LanguageConfig,
    inputs: jax.Array,
    *,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Features `[B, S, D]` after the final norm, in the compute dtype.

    Args:
      params: of the model.
      config: its sizes.
      inputs: token ids `[B, S]`, or embeddings `[B, S, D]`.
      positions: (time, row, column) `[3, B, S]`; None counts the tokens of the mask.
      mask: `[B, S]`, False is padding, before or after a row's tokens; None is none. Features of padding mean nothing.
    """
    return _run(params, config, inputs, empty_cache(config, len(inputs), 0), positions, mask)[0]


def logits(params: Params, config: LanguageConfig, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]`, float32, of features `[..., D]` from `forward`."""
    kernel = params["embedding"].T if config.tied else params["head"]["kernel"]
    dtype = jnp.dtype(config.compute_dtype)
    return jnp.matmul(hidden.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def prefill(
    params: Params,
    config: LanguageConfig,
    inputs: jax.Array,
    *,
    slots: int,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """`forward`, and a cache of `slots` slots, of which the first S are used.

    The recurrent and convolution states in it are those after each row's last token, whatever the padding.

    Raises:
      ValueError: fewer slots than inputs.
    """
    if slots < inputs.shape[1]:
        raise ValueError(f"{inputs.shape[1]} tokens do not fit into {slots} slots")
    hidden, states, mask, positions = _run(params, config, inputs, empty_cache(config, len(inputs), 0), positions, mask)
    return hidden, append(empty_cache(config, len(inputs), slots), states, positions, mask)


def extend(
    params: Params,
    config: LanguageConfig,
    inputs: jax.Array,
    cache: Cache,
    *,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Features `[B, S, D]` of further inputs, and the cache with them.

    As `forward`; S = 1 is a step of decoding. Padding in `mask` may stand only after a row's tokens. Without S free
    slots in the cache all features are NaN: the count is known only where the program runs.
    """
    hidden, states, mask, positions = _run(params, config, inputs, cache, positions, mask)
    return hidden, append(cache, states, positions, mask)


def run_layers(
    blocks: Params,
    config: LanguageConfig,
    hidden: jax.Array,
    positions: jax.Array,
    cache: Cache,
    *,
    mask: jax.Array | None = None,
    first: int = 0,
    last: int | None = None,
) -> tuple[jax.Array, LayerStates]:
    """Runs S positions through the layers `first <= layer < last`, after what the cache holds of these layers.

    The cache is read, not changed: a branch with parameters of its own may run from the backbone's cache, one range of
    layers after the other, with more positions in later ranges. Without S free slots, in a cache that has any, the
    result is NaN.

    Args:
      blocks: `params["blocks"]`, of all layers.
      config: of the model.
      hidden: stream before layer `first`, `[B, S, D]`, not normed.
      positions: (time, row, column) of each, `[3, B, S]`.
      cache: of all layers, from `prefill`, `extend` or `empty_cache`.
      mask: `[B, S]`, False is padding; None is none.
      first, last: static, at least one layer; None is the depth.

    Returns:
      (stream after layer `last - 1`, states of the layers run: the delta nets' after the last position, and keys and
      values of the S positions alone, as `append` takes them).
    """
    batch, length = hidden.shape[:2]
    last = config.depth if last is None else last
    mask = jnp.ones((batch, length), bool) if mask is None else mask
    angles = mrope_angles(positions, config)
    held = written(cache.is_open, mask, cache.used, 1)
    causal = jnp.arange(held.shape[1]) <= cache.used + jnp.arange(length)[:, None]
    slots = Slots(cache.used, held[:, None, :] & causal)
    hidden = jnp.where(cache.used + length <= held.shape[1], hidden, jnp.nan)
    modules = nnx.merge(_graph(config)["blocks"], blocks)

    def linear_layer(hidden: jax.Array, block: tuple[LinearBlock], before: LinearState) -> Any:
        return layer_stack.remat(block[0].__call__, config.remat)(hidden, mask, before)

    def full_layer(hidden: jax.Array, block: tuple[FullBlock], before: KeyValue) -> Any:
        return layer_stack.remat(block[0].__call__, config.remat)(hidden, angles, slots, before)

    def group(hidden: jax.Array, stacks: tuple[LinearBlock, FullBlock], before: LayerStates) -> Any:
        hidden, linear = layer_stack.run(linear_layer, hidden, stacks[:1], before.linear)
        hidden, full = layer_stack.run(full_layer, hidden, stacks[1:], before.full)
        return hidden, LayerStates(linear, full)

    pieces = []
    for start, groups, linears, fulls in _groups(first, last, config.interval):
        full = start // config.interval
        linear = start - full
        stacks = (
            layer_stack.group(modules.linear, linear, groups, linears),
            layer_stack.group(modules.full, full, groups, fulls),
        )
        before = LayerStates(
            layer_stack.group_leaves(cache.layers.linear, linear, groups, linears),
            layer_stack.group_leaves(cache.layers.full, full, groups, fulls),
        )
        hidden, after = layer_stack.run(group, hidden, stacks, before)
        pieces.append(jax.tree.map(lambda leaf: leaf.reshape(-1 if leaf.size else 0, *leaf.shape[2:]), after))
    return hidden, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)


def empty_cache(config: LanguageConfig, batch: int, slots: int) -> Cache:
    """The cache before the first token, with room for `slots` of them, padding included."""
    dtype, linear, full = jnp.dtype(config.compute_dtype), (config.linear_depth, batch), (config.full_depth, batch)
    key = jnp.zeros((*full, config.kv_heads, slots, config.head_dim), dtype)
    shape = (config.linear_value_heads, config.linear_key_dim, config.linear_value_dim)
    state = LinearState(
        jnp.zeros((*linear, config.linear_conv - 1, config.linear_channels), dtype),
        jnp.zeros((*linear, *shape), jnp.float32),
    )
    counts = jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return Cache(LayerStates(state, KeyValue(key, key)), jnp.zeros((batch, slots), bool), *counts)


def append(cache: Cache, states: LayerStates, positions: jax.Array, mask: jax.Array) -> Cache:
    """The cache with S tokens more.

    Args:
      cache: with S free slots.
      states: of all layers, from `run_layers`.
      positions: `[3, B, S]`. mask: `[B, S]`.
    """
    kept = KeyValue(*(written(old, new, cache.used, -2) for old, new in zip(cache.layers.full, states.full)))
    return Cache(
        LayerStates(states.linear, kept),
        written(cache.is_open, mask, cache.used, 1),
        cache.used + mask.shape[1],
        jnp.maximum(cache.position, jnp.max(jnp.where(mask, positions + 1, 0), (0, 2))),
    )


def _run(
    params: Params,
    config: LanguageConfig,
    inputs: jax.Array,
    cache: Cache,
    positions: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, LayerStates, jax.Array, jax.Array]:
    """(normed features, states of all layers, mask, positions) with the defaults filled in."""
    mask = jnp.ones(inputs.shape[:2], bool) if mask is None else mask
    if positions is None:
        counted = cache.position[:, None] + jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        positions = jnp.broadcast_to(counted, (3, *counted.shape))
    hidden = embed(params, config, inputs) if inputs.ndim == 2 else inputs.astype(config.compute_dtype)
    hidden, states = run_layers(params["blocks"], config, hidden, positions, cache, mask=mask)
    norm = nnx.merge(_graph(config)["norm"], params["norm"])
    return norm(hidden).astype(hidden.dtype), states, mask, positions


def _groups(first: int, last: int, interval: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts a range of layers into (start, groups, delta nets of each group, full attentions of each group)."""
    while first < last:
        groups = (last - first) // interval if first % interval == 0 else 0
        stop = first + groups * interval if groups else min(last, first - first % interval + interval)
        groups, fulls = max(groups, 1), int(stop % interval == 0)
        yield first, groups, (stop - first) // groups - fulls, fulls
        first = stop


@functools.lru_cache(maxsize=8)
def _graph(config: LanguageConfig) -> dict[str, Any]:
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return {"blocks": nnx.split(model.blocks)[0], "norm": nnx.split(model.norm)[0]}
