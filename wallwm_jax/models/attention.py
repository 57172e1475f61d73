"""Attention: `attend`, the one door to it, and the projections around it.

On TPU attention with heads of 128 runs in kernels of our own, by token: where all keys fit the chip's memory in one
(`resident_attention`), along longer events in another (`flash_attention`). Other attention inside packed events runs on
TPU in the splash kernel, on GPU in a Pallas kernel where a sequence attends to itself, on one CPU device tile by tile;
all else is dense, in XLA.

Keys can be closed to a query in three ways, which combine: segment ids (packing: attention stays inside an event), a
bias per key (text padding, absent views) and a dense mask. A query without any open key gets exactly zero.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from wallwm_jax.models import (
    event_attention,
    flash_attention,
    norms,
    resident_attention,
    splash_attention,
    triton_attention,
)
from wallwm_jax.models.layers import NORM_EPS, Linear, RMSNorm
from wallwm_jax.models.per_device import target
from wallwm_jax.models.rope import rotate
from wallwm_jax.parallel.sharding import context_size

CLOSED = -1e30


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    num_segments: int | None = None,
    key_bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, softmax in float32.

    Args:
      query: `[B, H, S, D]`.
      key, value: `[B, H, T, D]`.
      q_segments, kv_segments: `[B, S]`, `[B, T]` integers; a key is open to the queries of its own segment; segment 0
        is padding, closed to all. Both or neither.
      num_segments: largest segment id, where known; lets closed parts be skipped.
      key_bias: `[B, T]` float32 added to the logits of a key; -inf closes it.
      mask: `[B, S, T]` bool, False closes.

    Returns:
      `[B, H, S, D]` in the dtype of `value`; exactly zero where no key is open.
    """
    if q_segments is not None and kv_segments is not None and num_segments and key_bias is None and mask is None:
        sizes, (platform, devices) = (query.shape[2], key.shape[2]), target()
        if platform == "tpu" and splash_attention.worthwhile(*sizes):
            return splash_attention.attend_splash(query, key, value, q_segments, kv_segments, num_segments)
        if platform in ("gpu", "cuda") and triton_attention.worthwhile(sizes[0], q_segments is kv_segments):
            return triton_attention.attend_triton(query, key, value, q_segments)
        if platform == "cpu" and devices == 1 and event_attention.worthwhile(*sizes, num_segments):
            return event_attention.attend_events(query, key, value, q_segments, kv_segments, num_segments)
    scale = 1.0 / math.sqrt(query.shape[-1])
    logits = scale * jnp.einsum("bhsd,bhtd->bhst", query, key, preferred_element_type=jnp.float32)
    allowed = None if mask is None else mask[:, None]
    if q_segments is not None and kv_segments is not None:
        same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments != 0)[:, None, :]
        allowed = same[:, None] if allowed is None else allowed & same[:, None]
    if key_bias is not None:
        is_open = (key_bias > CLOSED)[:, None, None, :]
        allowed = is_open if allowed is None else allowed & is_open
        logits = logits + jnp.maximum(key_bias, CLOSED)[:, None, None, :]
    if allowed is not None:
        logits = jnp.where(allowed, logits, CLOSED)
    peak = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    weights = jnp.exp(logits - peak)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    total = jnp.sum(weights, -1)
    mixed = jnp.einsum("bhst,bhtd->bhsd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    total = jnp.where(total > 0, total, 1.0)
    return (mixed / total[..., None]).astype(value.dtype)


class Attention(nnx.Module):
    """Projections of one multi-head attention, with RMS norms over the full width of q and k (Wan's qk-norm).

    `key_width` is the width of what keys and values are projected from; `zero_output` starts with no effect.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        key_width: int | None = None,
        zero_output: bool = False,
    ):
        key_width = width if key_width is None else key_width
        self.heads = heads
        self.query = Linear(width, width, rngs=rngs, dtype=dtype)
        self.key = Linear(key_width, width, rngs=rngs, dtype=dtype)
        self.value = Linear(key_width, width, rngs=rngs, dtype=dtype)
        self.output = Linear(width, width, rngs=rngs, dtype=dtype, std=0.0 if zero_output else None)
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)
        self.dtype = dtype

    def queries(self, x: jax.Array, *, angles: jax.Array | None = None, offset: jax.Array | None = None) -> jax.Array:
        """`[..., S, D]` to queries `[..., H, S, d]`: normalised, plus `offset [..., S, D]`, rotated by `angles [..., S,
        d / 2]`."""
        return self._place(self._normed(self.query.to_heads(x, self.heads, "query"), self.query_norm), angles, offset)

    def keys(self, x: jax.Array, *, angles: jax.Array | None = None, offset: jax.Array | None = None) -> jax.Array:
        """`[..., S, Dk]` to keys `[..., H, S, d]`, as `queries`."""
        return self._place(self._normed(self.key.to_heads(x, self.heads), self.key_norm), angles, offset)

    def values(self, x: jax.Array, *, offset: jax.Array | None = None) -> jax.Array:
        """`[..., S, Dk]` to values `[..., H, S, d]`, plus `offset [..., S, D]`."""
        return self._place(self.value.to_heads(x, self.heads), None, offset)

    def merge(self, mixed: jax.Array) -> jax.Array:
        """Attended heads `[..., H, S, d]` through the output projection, `[..., S, D]`."""
        return self.output.from_heads(mixed)

    def in_views(self, x: jax.Array, *, angles: jax.Array, segments: jax.Array, events: int) -> jax.Array:
        """The whole self-attention along each view, `[B, V, S, D]`, after the output projection.

        Args:
          x: `[B, V, S, D]`, all tokens of a view.
          angles: `[B, V, S, d / 2]`.
          segments: `[B, V, S]` event of a token, at most `events`; 0 is closed.
        """
        b, v, tokens, width = x.shape
        if self._fits(tokens, width) and context_size() == 1:
            rotary = resident_attention.Rotary.of(angles)
            return self._resident(x, x, segments=segments, rotary=rotary)
        if target()[0] == "tpu" and flash_attention.worthwhile(tokens, width // self.heads):
            rotary = resident_attention.Rotary.of(angles)
            return self._flash(x, segments=segments, rotary=rotary)
        x, angles, segments = (part.reshape(b * v, *part.shape[2:]) for part in (x, angles, segments))
        mixed = attend(
            self.queries(x, angles=angles),
            self.keys(x, angles=angles),
            self.values(x),
            q_segments=segments,
            kv_segments=segments,
            num_segments=events,
        )
        return self.merge(mixed).reshape(b, v, tokens, -1)

    def in_frames(
        self,
        x: jax.Array,
        context: jax.Array,
        *,
        key_bias: jax.Array,
        angles: jax.Array | None = None,
        mask: jax.Array | None = None,
        frame_event: jax.Array | None = None,
    ) -> jax.Array:
        """The whole attention of every latent frame's tokens, `[B, F, S, D]`, after the output projection.

        Args:
          x: `[B, F, S, D]`.
          context: `[B, F, T, Dk]`, or `[B, E, T, Dk]` of events, of which `frame_event [B, F, E]`, one-hot, gives each
            frame its own.
          key_bias: `[B, F, T]`. mask: `[B, F, S, T]`. As in `attend`; neither gets a gradient.
          angles: `[B, F, S, d / 2]` of a self-attention's queries and keys, learned.
        """
        (b, f, tokens, width), keys = x.shape, context.shape[2]
        if self._fits(keys, width):
            bias = key_bias[:, :, None] if mask is None else jnp.where(mask, key_bias[:, :, None], CLOSED)
            rotary = None if angles is None else resident_attention.Rotary.of(angles)
            learns = angles is not None
            return self._resident(x, context, members=frame_event, bias=bias, rotary=rotary, learns_rotary=learns)
        query, key, value = self.queries(x, angles=angles), self.keys(context, angles=angles), self.values(context)
        if frame_event is not None:
            key, value = (jnp.einsum("bfe,be...->bf...", frame_event, of_event) for of_event in (key, value))
        frames = (part.reshape(b * f, *part.shape[2:]) for part in (query, key, value))
        mask = None if mask is None else mask.reshape(b * f, tokens, keys)
        mixed = attend(*frames, key_bias=key_bias.reshape(b * f, keys), mask=mask)
        return self.merge(mixed.reshape(b, f, *mixed.shape[1:]))

    def _fits(self, keys: int, width: int) -> bool:
        return target()[0] == "tpu" and resident_attention.worthwhile(keys, width // self.heads)

    def _resident(self, x: jax.Array, context: jax.Array, **how: Any) -> jax.Array:
        """Through `resident_attention`."""
        query, key, value = self._by_token(x, context, norms.FRAMES)
        mixed = resident_attention.attend_resident(query, key, value, heads=self.heads, **how)
        return checkpoint_name(self.output(mixed), "projection")

    def _flash(self, x: jax.Array, **how: Any) -> jax.Array:
        """Through `flash_attention`."""
        query, key, value = self._by_token(x, x, norms.VIEWS)
        mixed = flash_attention.attend_flash(query, key, value, heads=self.heads, **how)
        return checkpoint_name(self.output(mixed), "projection")

    def _by_token(self, x: jax.Array, context: jax.Array, axes: norms.Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[..., S, H * d]`, kept by name as `Linear.to_heads` does; `axes` of `x`."""
        query, key = checkpoint_name(self.query(x), "query"), checkpoint_name(self.key(context), "projection")
        query = norms.rms_scaled(query, self.query_norm.scale[...], self.dtype, axes)
        if context is x:
            key = norms.rms_scaled(key, self.key_norm.scale[...], self.dtype, axes)
        else:  # few
            key = self.key_norm(key).astype(self.dtype)
        return query, key, checkpoint_name(self.value(context), "projection")

    def _normed(self, x: jax.Array, norm: RMSNorm) -> jax.Array:
        """`norm`, over all heads of a token, of `x [..., H, S, d]`; float32."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, (-3, -1), keepdims=True)
        return x * jax.lax.rsqrt(mean_square + NORM_EPS) * norm.scale[...].reshape(self.heads, 1, -1)

    def _place(self, x: jax.Array, angles: jax.Array | None, offset: jax.Array | None) -> jax.Array:
        if offset is not None:
            x = x + jnp.swapaxes(offset.reshape(*offset.shape[:-1], self.heads, -1), -2, -3)
        x = x.astype(self.dtype)
        return x if angles is None else rotate(x, angles)
