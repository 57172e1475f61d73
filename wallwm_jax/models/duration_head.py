"""Duration head: how long an event will take, as quantiles of log-seconds, from what is known before it starts.

It reads the clean first latent, the caption and the state, and never a tower's features: those attended to future
latents, whose number is the answer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import FrozenConfigDict

from wallwm_jax.models.layers import Linear, layer_norm
from wallwm_jax.models.video_tower import patchify

CLEAN = 1  # latent_role of an event's first latent


class DurationHead(nnx.Module):
    """A two-layer network on the pooled first latent, the pooled caption and the state; computes in float32."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        self.config = config
        inputs = config.width + config.text.width + config.action_dim
        self.up = Linear(inputs, config.action_width, rngs=rngs, dtype=jnp.float32)
        self.down = Linear(config.action_width, len(config.duration_quantiles), rngs=rngs, dtype=jnp.float32, std=0.0)

    def __call__(
        self, batch: dict[str, Any], features: jax.Array, length: jax.Array, *, patch_embedding: Linear
    ) -> jax.Array:
        """Log-seconds `[B, E, Q]`, rising; caption `features [B, E, L, Dt]` with `length [B, E]`.

        The video tower's `patch_embedding` is read, not trained, from here.
        """
        is_token = (jnp.arange(features.shape[2]) < length[..., None])[..., None]
        caption = jnp.sum(jnp.where(is_token, features.astype(jnp.float32), 0.0), 2) / jnp.maximum(length, 1)[..., None]
        first = jax.lax.stop_gradient(patch_embedding(self._first_latent(batch)))
        state = jnp.where(batch["state_valid"], batch["state"], 0.0)
        hidden = jax.nn.silu(self.up(jnp.concatenate([layer_norm(first), layer_norm(caption), state], -1)))
        start, steps = jnp.split(self.down(hidden), [1], -1)
        return jnp.concatenate([start, start + jnp.cumsum(jax.nn.softplus(steps), -1)], -1)

    def _first_latent(self, batch: dict[str, Any]) -> jax.Array:
        """Mean patch of each event's clean latent over cells and present views, `[B, E, p*q*C]`.

        The embedding is linear: the embedded mean is the mean of the embeddings.
        """
        events = batch["view_id"].shape[1]
        clean = (batch["latent_role"] == CLEAN) & (batch["latent_event"] > 0) & (batch["latent_pos"] == 0)
        slot = jnp.where(clean, batch["latent_event"] - 1, -1)
        event_frame = jax.nn.one_hot(slot, events, dtype=jnp.float32, axis=1)
        present = (batch["view_id"] > 0).astype(jnp.float32)
        patches = jnp.mean(patchify(batch["latents"], self.config.patch), 3)
        pooled = jnp.einsum("bef,bfvp,bev->bep", event_frame, patches, present)
        return pooled / jnp.maximum(jnp.sum(present, -1), 1.0)[..., None]
