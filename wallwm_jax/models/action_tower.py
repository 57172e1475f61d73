"""Action tower: a flow-matching transformer over each event's end-effector trajectory, coupled one-way to the video.

It is as deep as the video tower. Block i attends to what leaves video block i; nothing flows back. A token is the
state of an event or one of its actions; the stream is `[K, B, S, D]`: K noise draws that share the video, rows,
S = E states and A actions, event by event. WALL-WM sections 2.5, 2.6.

Two window schemes (2.6). A, event-centric: an event is its observation and its future. B, observation-centred: history
and anchor come before, with negative `latent_pos` and `action_pos`; what lies at a negative `action_pos` is given, not
denoised, and `window_number [B, E]` (1, 2, ... along an episode; absent or 0 in scheme A) adds E_abs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import FrozenConfigDict

from wallwm_jax.models.attention import Attention, attend
from wallwm_jax.models.flow_matching import implied_velocity
from wallwm_jax.models.layer_stack import build
from wallwm_jax.models.layers import GatedFeedForward, Linear, TimeEmbedding, gated, layer_norm, modulate
from wallwm_jax.models.rope import position_angles
from wallwm_jax.models.video_tower import TIMESTEPS

Batch = dict[str, Any]

TOKEN_MODULATIONS = 9  # shift, scale, gate of self-attention, video attention, feed-forward: per token
STATE_MODULATIONS = 3  # shift, scale, gate of the state branch: per event


class VideoKeys(NamedTuple):
    """What one block reads of the video: keys and values `[B, H, F*N, d]` of all cells."""

    key: jax.Array
    value: jax.Array


class ActionCondition(NamedTuple):
    """What every block reads beside the stream; computed once per forward.

    Attributes:
      time: `[K, B, E, D]` embedded noise level. modulation: `[K, B, E, 12, D]` its projection.
      angles: `[B, S, d/2]` of the self-attention.
      segments: `[B, S]` event of a token. token_event: `[K, B, S, E]` the same, one-hot; state_event: of state tokens.
      frame: `[K, B, S, R]` row of a token in the table of E_tau, one-hot.
      frame_embedding: `[R, D]` E_tau.
      window_offset: `[B, S, D]` E_abs of a token's event, zero in scheme A.
      video_segments: `[B, F*N]` event of a cell.
    """

    time: jax.Array
    modulation: jax.Array
    angles: jax.Array
    segments: jax.Array
    token_event: jax.Array
    state_event: jax.Array
    frame: jax.Array
    frame_embedding: jax.Array
    window_offset: jax.Array
    video_segments: jax.Array

    def per_token(self, values: jax.Array) -> jax.Array:
        """`[K, B, E, ...]` to `[K, B, S, ...]`: what a token's event has."""
        return jnp.einsum("kbse,kbe...->kbs...", self.token_event, values)


class ActionBlock(nnx.Module):
    """One block: self-attention, state, video cross-attention, gated feed-forward.

    Each branch is modulated and gated by the noise levels of the actions and of the video. All gates start at zero.
    """

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        width, dtype = config.action_width, jnp.dtype(config.compute_dtype)
        self.modulation = nnx.Param(jnp.zeros((TOKEN_MODULATIONS + STATE_MODULATIONS, width), jnp.float32))
        self.self_attention = Attention(width, config.action_heads, rngs=rngs, dtype=dtype)
        self.state_value = Linear(width, width, rngs=rngs, dtype=dtype)
        self.state_output = Linear(width, width, rngs=rngs, dtype=dtype)
        self.video_attention = Attention(width, config.action_heads, rngs=rngs, dtype=dtype, key_width=config.width)
        self.ffn = GatedFeedForward(width, config.action_ffn, rngs=rngs, dtype=dtype)

    def video_keys(self, video: jax.Array, frame_embedding: jax.Array) -> VideoKeys:
        """Keys and values of the stream leaving the video block, `[B, F, N, Dv]`, layer-normed and projected.

        `frame_embedding [B, F, D]`, E_tau and E_abs of the latent frames, is added to both.
        """
        b, f, n, _ = video.shape
        normed = layer_norm(video).astype(self.video_attention.dtype).reshape(b, f * n, -1)
        offset = jnp.repeat(frame_embedding, n, axis=1)
        return VideoKeys(
            self.video_attention.keys(normed, offset=offset), self.video_attention.values(normed, offset=offset)
        )

    def __call__(self, x: jax.Array, video: VideoKeys, condition: ActionCondition) -> jax.Array:
        modulation = self.modulation[...] + condition.modulation
        of_token, of_state = jnp.split(modulation, [TOKEN_MODULATIONS], 3)
        own = jnp.split(condition.per_token(of_token.reshape(*of_token.shape[:3], -1)), TOKEN_MODULATIONS, -1)
        x = gated(x, self._self_attention(modulate(x, *own[0:2]), condition), own[2])
        x = self._state(x, of_state, condition)
        x = gated(x, self._video(modulate(x, *own[3:5]), video, condition), own[5])
        return gated(x, self.ffn(modulate(x, *own[6:8])), own[8])

    def _self_attention(self, x: jax.Array, condition: ActionCondition) -> jax.Array:
        """Attention over the state and action tokens of one event."""
        k, b = x.shape[:2]
        attention = self.self_attention
        parts = (
            attention.queries(x, angles=condition.angles),
            attention.keys(x, angles=condition.angles),
            attention.values(x),
        )
        # Rows before draws: the merged axis is split over devices as rows are.
        query, key, value = (jnp.swapaxes(part, 0, 1).reshape(b * k, *part.shape[2:]) for part in parts)
        segments = jnp.repeat(condition.segments, k, axis=0)
        events = condition.token_event.shape[-1]
        mixed = attend(query, key, value, q_segments=segments, kv_segments=segments, num_segments=events)
        return attention.merge(jnp.swapaxes(mixed.reshape(b, k, *mixed.shape[1:]), 0, 1))

    def _state(self, x: jax.Array, modulation: jax.Array, condition: ActionCondition) -> jax.Array:
        """Cross-attention to the event's one state token: softmax over one key is 1, so its value is the result."""
        shift, scale, gate = (part[:, :, :, 0] for part in jnp.split(modulation, STATE_MODULATIONS, 3))
        state = jnp.einsum("kbse,kbsd->kbed", condition.state_event, x)
        update = self.state_output(self.state_value(modulate(state, shift, scale)))
        return x + condition.per_token((gate * update.astype(jnp.float32)).astype(x.dtype))

    def _video(self, x: jax.Array, video: VideoKeys, condition: ActionCondition) -> jax.Array:
        """Cross-attention to all cells, frames and views of the event; the draws share keys and values."""
        k, b, s, _ = x.shape
        attention = self.video_attention
        place = condition.frame @ condition.frame_embedding + condition.window_offset
        query = attention.queries(x, offset=place)
        heads = query.shape[2]
        query = jnp.moveaxis(query, 0, 3).reshape(b, heads, s * k, -1)
        mixed = attend(
            query,
            video.key,
            video.value,
            q_segments=jnp.repeat(condition.segments, k, axis=1),
            kv_segments=condition.video_segments,
            num_segments=condition.token_event.shape[-1],
        )
        return attention.merge(jnp.moveaxis(mixed.reshape(b, heads, s, k, -1), 3, 0))


class ActionTower(nnx.Module):
    """Encoder, blocks and head; `world_action_model.py` runs the blocks."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        width, dtype = config.action_width, jnp.dtype(config.compute_dtype)
        self.config, self.dtype = config, dtype
        self.encoder_up = Linear(config.action_dim, width, rngs=rngs, dtype=dtype)
        self.encoder_down = Linear(width, width, rngs=rngs, dtype=dtype)
        modulations = TOKEN_MODULATIONS + STATE_MODULATIONS
        self.time_embedding = TimeEmbedding(config.freq_dim, width, modulations, rngs=rngs, std=0.0)
        self.video_time_embedding = TimeEmbedding(config.freq_dim, width, modulations, rngs=rngs, std=0.0)
        rows = 2 * config.max_latents + 1
        self.frame_embedding = nnx.Param(0.5 * _sinusoids(rows, width))
        self.window_embedding = nnx.Param(jnp.zeros((config.max_windows, width), jnp.float32))
        self.blocks = build(lambda rngs: ActionBlock(config, rngs=rngs), config.depth, rngs)
        self.head_modulation = nnx.Param(jnp.zeros((2, width), jnp.float32))
        self.head_up = Linear(width, width, rngs=rngs, dtype=dtype)
        self.head_down = Linear(width, config.action_dim, rngs=rngs, dtype=dtype, std=0.0)

    def embed(self, batch: Batch, noisy_actions: jax.Array) -> jax.Array:
        """States of the batch and `noisy_actions [K, B, A, Da]` to the stream `[K, B, S, D]`; one encoder for both.

        Given actions are read from the batch.
        """
        state = jnp.where(batch["state_valid"], batch["state"], 0.0)
        state = jnp.broadcast_to(state, (noisy_actions.shape[0], *state.shape))
        actions = jnp.where(is_given(batch)[..., None], batch["actions"], noisy_actions)
        actions = jnp.where(batch["action_valid"], actions, 0.0)
        tokens = jnp.concatenate([state, actions], 2)
        tokens = jnp.take_along_axis(tokens, token_order(batch)[None, :, :, None], 2)
        return self.encoder_down(jax.nn.silu(self.encoder_up(tokens)))

    def condition(
        self, batch: Batch, sigma: jax.Array, video_sigma: jax.Array, video_segments: jax.Array
    ) -> ActionCondition:
        """What the blocks read.

        Args:
          batch: the packed batch.
          sigma: `[K, B, E]` noise level of the actions, in [0, 1].
          video_sigma: `[B, E]` noise level of the video the features were computed at.
          video_segments: `[B, F, V]` event of a view's cells, 0 closed.
        """
        config = self.config
        b, events = batch["view_id"].shape[:2]
        cells = (config.latent_shape[0] // config.patch[0]) * (config.latent_shape[1] // config.patch[1])
        order, states = token_order(batch), jnp.broadcast_to(jnp.arange(1, events + 1), (b, events))

        def per_token(of_states: jax.Array, of_actions: jax.Array) -> jax.Array:
            return jnp.take_along_axis(jnp.concatenate([of_states, of_actions], 1), order, 1)

        nothing, ones = jnp.zeros_like(states), jnp.ones_like(states)
        segments = per_token(states, batch["action_event"])
        is_state = per_token(ones, jnp.zeros_like(batch["action_event"]))
        position = per_token(nothing, batch["action_pos"] + ~is_given(batch))  # the state stands at the observation
        frame = per_token(nothing, batch["action_pos"] // config.actions_per_latent + 1)
        draws = sigma.shape[0]
        token_event = jax.nn.one_hot(jnp.tile(segments[None] - 1, (draws, 1, 1)), events, dtype=self.dtype)
        time, modulation = (
            own + video
            for own, video in zip(
                self.time_embedding(TIMESTEPS * sigma), self.video_time_embedding(TIMESTEPS * video_sigma)
            )
        )
        return ActionCondition(
            time=time,
            modulation=modulation,
            angles=position_angles(position, config.action_width // config.action_heads),
            segments=segments,
            token_event=token_event,
            state_event=token_event * is_state[..., None].astype(self.dtype),
            frame=self._frame_rows(jnp.tile(frame[None], (draws, 1, 1))),
            frame_embedding=self.frame_embedding[...],
            window_offset=self._window_offsets(batch, segments),
            video_segments=jnp.repeat(video_segments.reshape(b, -1), cells, axis=1),
        )

    def velocity(
        self, batch: Batch, x: jax.Array, noisy_actions: jax.Array, sigma: jax.Array, condition: ActionCondition
    ) -> jax.Array:
        """The head: stream `[K, B, S, D]` to velocities in the order of the batch, `[K, B, A, Da]`, float32.

        With `action_prediction = "clean"` the head gives the clean actions, and the velocity is what they imply for
        `noisy_actions [K, B, A, Da]` at `sigma [K, B, E]` (x-prediction, WALL-WM section 2.7).
        """
        modulation = self.head_modulation[...] + condition.time[:, :, :, None]
        shift, scale = jnp.split(condition.per_token(modulation.reshape(*modulation.shape[:3], -1)), 2, -1)
        tokens = self.head_down(jax.nn.silu(self.head_up(modulate(x, shift, scale)))).astype(jnp.float32)
        place = jnp.argsort(token_order(batch), axis=1)[:, batch["view_id"].shape[1] :]
        output = jnp.take_along_axis(tokens, place[None, :, :, None], 2)
        if self.config.action_prediction == "velocity":
            return output
        slot = jnp.broadcast_to(jnp.maximum(batch["action_event"] - 1, 0), noisy_actions.shape[:3])
        return implied_velocity(noisy_actions, output, jnp.take_along_axis(sigma, slot, 2)[..., None])

    def frame_embeddings(self, batch: Batch) -> jax.Array:
        """E_tau plus E_abs of the latent frames, `[B, F, D]`; beyond a table, its last row."""
        own = self._frame_rows(batch["latent_pos"]) @ self.frame_embedding[...]
        return own + self._window_offsets(batch, batch["latent_event"])

    def _window_offsets(self, batch: Batch, event: jax.Array) -> jax.Array:
        """E_abs `[B, n, D]` of the tokens of `event [B, n]`; zero for windows numbered 0."""
        if "window_number" not in batch:
            return jnp.zeros((1, 1, self.config.action_width))
        number = jnp.take_along_axis(batch["window_number"], jnp.maximum(event - 1, 0), 1)
        row = jnp.where(event > 0, jnp.minimum(number, self.config.max_windows) - 1, -1)
        return jax.nn.one_hot(row, self.config.max_windows, dtype=jnp.float32) @ self.window_embedding[...]

    def _frame_rows(self, frame: jax.Array) -> jax.Array:
        reach = self.config.max_latents
        return jax.nn.one_hot(jnp.clip(frame, -reach, reach) + reach, 2 * reach + 1, dtype=jnp.float32)


def is_given(batch: Batch) -> jax.Array:
    """`[B, A]`: action tokens of the history and the anchor, which condition and are never denoised (scheme B)."""
    return batch["action_pos"] < 0


def token_order(batch: Batch) -> jax.Array:
    """Order `[B, S]` of the stream's tokens among E states then A actions: event by event, state first, padding last.

    Events that lie together let attention skip the rest of the row.
    """
    b, events = batch["view_id"].shape[:2]
    states = jnp.broadcast_to(jnp.arange(1, events + 1), (b, events))
    actions = jnp.where(batch["action_event"] > 0, batch["action_event"], events + 1)
    return jnp.argsort(jnp.concatenate([states, actions], 1), axis=1, stable=True)


def _sinusoids(rows: int, width: int) -> jax.Array:
    """Initial E_tau `[rows, width]`: neighbouring frames are alike, so queries first look at their own latent frame."""
    position = jnp.arange(rows, dtype=jnp.float32)[:, None]
    angle = position * (100.0 ** -(jnp.arange((width + 1) // 2) / ((width + 1) // 2)))
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1).reshape(rows, -1)[:, :width]
