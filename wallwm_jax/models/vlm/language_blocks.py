"""The two blocks of the language model: a gated delta net or gated full attention, each with a gated feed-forward."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallwm_jax.models.attention import attend
from wallwm_jax.models.layers import NORM_EPS, GatedFeedForward, Linear, RMSNorm
from wallwm_jax.models.rope import frequencies, rotate
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.gated_delta import causal_conv, delta_rule

_L2_EPS = 1e-6
_DECAY_RATES = (1.0, 16.0)  # initial range of exp(A_log), and of the steps that multiply it: as Mamba 2 starts
_STEPS = (1e-3, 1e-1)


class LinearState(NamedTuple):
    """What a delta net hands from token to token; with a leading layer axis in a stack.

    `conv [B, taps - 1, C]`: the last inputs of its convolution. `state [B, heads, K, V]`, float32.
    """

    conv: jax.Array
    state: jax.Array


class KeyValue(NamedTuple):
    """Keys and values of a full attention, `[B, kv_heads, T, d]`, rotated; with a leading layer axis in a stack."""

    key: jax.Array
    value: jax.Array


class Slots(NamedTuple):
    """Where S new tokens go among T kept keys: from slot `used` on, `[]`; `is_open [B, S, T]` what each may read."""

    used: jax.Array
    is_open: jax.Array


class OffsetNorm(nnx.Module):
    """Root-mean-square norm over the last axis, times `1 + scale`, in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPS) * (1.0 + self.scale[...])


class DeltaNet(nnx.Module):
    """A short convolution, the gated delta rule per head, a gated norm."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, dtype=jnp.dtype(config.compute_dtype), bias=False)
        heads, channels = config.linear_value_heads, config.linear_channels
        inner = heads * config.linear_value_dim
        self.config = config
        self.qkv = linear(config.width, channels)
        self.gate = linear(config.width, inner)
        self.beta = linear(config.width, heads)
        self.decay = linear(config.width, heads)
        self.output = linear(inner, config.width)
        taps = (config.linear_conv, channels)
        self.conv = nnx.Param(jax.random.normal(rngs.params(), taps, jnp.float32) / math.sqrt(config.linear_conv))
        low, high = _DECAY_RATES
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high)))
        low, high = map(math.log, _STEPS)
        step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        self.dt_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)))  # softplus of it is the step
        self.norm = RMSNorm(config.linear_value_dim)

    def __call__(self, x: jax.Array, mask: jax.Array, before: LinearState) -> tuple[jax.Array, LinearState]:
        """`x [B, S, D]` and the state before it to outputs `[B, S, D]` and the state after the last token in `mask`."""
        config, (batch, length) = self.config, x.shape[:2]
        x = jnp.where(mask[..., None], x, 0)
        end = jnp.max(jnp.where(mask, jnp.arange(1, length + 1), 0), 1)
        mixed, conv = causal_conv(self.qkv(x), self.conv[...], before.conv, end)
        keys = config.linear_key_heads * config.linear_key_dim
        query, key, value = jnp.split(jax.nn.silu(mixed), [keys, 2 * keys], -1)
        query, key = (_unit(part.reshape(batch, length, config.linear_key_heads, -1)) for part in (query, key))
        value = value.reshape(batch, length, config.linear_value_heads, -1)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        log_decay = -jnp.exp(self.A_log[...].astype(jnp.float32)) * step
        beta, log_decay = (jnp.where(mask[..., None], part, 0.0) for part in (beta, log_decay))
        query = query / math.sqrt(config.linear_key_dim)
        out, state = delta_rule(query, key, value, log_decay, beta, before.state)
        gate = self.gate(x).astype(jnp.float32).reshape(out.shape)
        return self.output((self.norm(out) * jax.nn.silu(gate)).reshape(batch, length, -1)), LinearState(conv, state)


class GatedAttention(nnx.Module):
    """Softmax attention with normed queries and keys, rotated in part, shared keys, and a sigmoid gate per output."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, dtype=jnp.dtype(config.compute_dtype), bias=False)
        self.config = config
        self.query = linear(config.width, 2 * config.heads * config.head_dim)  # of each head: query, then gate
        self.key = linear(config.width, config.kv_heads * config.head_dim)
        self.value = linear(config.width, config.kv_heads * config.head_dim)
        self.output = linear(config.heads * config.head_dim, config.width)
        self.query_norm = OffsetNorm(config.head_dim)
        self.key_norm = OffsetNorm(config.head_dim)

    def __call__(self, x: jax.Array, angles: jax.Array, slots: Slots, before: KeyValue) -> tuple[jax.Array, KeyValue]:
        """`x [B, S, D]` and the keys before it to outputs `[B, S, D]` and the keys of `x` alone.

        Args:
          x: normed stream. angles: `[B, S, rotary_dim / 2]`.
          slots: where the new keys go, and what is open.
          before: kept keys `[B, kv_heads, T, d]`; T = 0 where nothing came before.
        """
        heads, shared = self.config.heads, self.config.heads // self.config.kv_heads
        query, gate = jnp.split(self.query.to_heads(x, heads), 2, -1)
        query = self._place(query, self.query_norm, angles)
        key = self._place(self.key.to_heads(x, self.config.kv_heads), self.key_norm, angles)
        fresh = KeyValue(key, self.value.to_heads(x, self.config.kv_heads))
        kept = KeyValue(*(written(old, new, slots.used, -2) for old, new in zip(before, fresh)))
        batch, _, length, dim = query.shape  # queries that share a key line up as one longer sequence
        mixed = attend(
            query.reshape(batch, -1, shared * length, dim),
            kept.key.astype(query.dtype),
            kept.value.astype(query.dtype),
            mask=jnp.tile(slots.is_open, (1, shared, 1)),
        ).reshape(query.shape)
        return self.output.from_heads(mixed * jax.nn.sigmoid(gate)), fresh

    def _place(self, x: jax.Array, norm: OffsetNorm, angles: jax.Array) -> jax.Array:
        """Heads `[B, H, S, d]`, normed and rotated."""
        normed = norm(x).astype(x.dtype)
        turned, rest = jnp.split(normed, [self.config.rotary_dim], -1)
        return jnp.concatenate([rotate(turned, angles), rest], -1)


class LinearBlock(nnx.Module):
    """Delta net and feed-forward, both pre-normed."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        self.mixer_norm, self.ffn_norm = OffsetNorm(config.width), OffsetNorm(config.width)
        self.delta = DeltaNet(config, rngs=rngs)
        self.ffn = _feed_forward(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, before: LinearState) -> tuple[jax.Array, LinearState]:
        """As `DeltaNet`, on the stream `[B, S, D]`."""
        update, after = self.delta(self.mixer_norm(x).astype(x.dtype), mask, before)
        x = x + update
        return x + self.ffn(self.ffn_norm(x)), after


class FullBlock(nnx.Module):
    """Attention and feed-forward, both pre-normed."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        self.mixer_norm, self.ffn_norm = OffsetNorm(config.width), OffsetNorm(config.width)
        self.attention = GatedAttention(config, rngs=rngs)
        self.ffn = _feed_forward(config, rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, slots: Slots, before: KeyValue) -> tuple[jax.Array, KeyValue]:
        """As `GatedAttention`, on the stream `[B, S, D]`."""
        update, fresh = self.attention(self.mixer_norm(x), angles, slots, before)
        x = x + update
        return x + self.ffn(self.ffn_norm(x)), fresh


def mrope_angles(positions: jax.Array, config: LanguageConfig) -> jax.Array:
    """Angles `[B, S, rotary_dim / 2]` of (time, row, column) `positions [3, B, S]`.

    Rotations take turns: of every three, as long as an axis has some left in `mrope_section`, the second follows the
    row and the third the column; all others follow time.
    """
    _, rows, columns = config.mrope_section
    turn = np.arange(config.rotary_dim // 2)
    axis = np.where((turn % 3 == 1) & (turn < 3 * rows), 1, np.where((turn % 3 == 2) & (turn < 3 * columns), 2, 0))
    moved = jnp.moveaxis(positions.astype(jnp.float32), 0, -1)
    return moved[..., axis] * frequencies(config.rotary_dim, config.rope_theta)


def written(buffer: jax.Array, new: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """`buffer` with `new` from slot `at` on; `new` itself where the buffer has no slots."""
    if not buffer.shape[axis]:
        return new
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), at, axis)


def _feed_forward(config: LanguageConfig, rngs: nnx.Rngs) -> GatedFeedForward:
    return GatedFeedForward(config.width, config.ffn, rngs=rngs, dtype=jnp.dtype(config.compute_dtype), bias=False)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _L2_EPS)
