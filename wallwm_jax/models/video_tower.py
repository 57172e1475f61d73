"""Video tower: Wan's video transformer over packed events, several views and latent frames of different noise levels.

Structure and parameters are Wan 2.2 TI2V's, so that only weights need importing: patch embedding, time and text MLPs,
blocks of within-view self-attention, text cross-attention and feed-forward, and the modulated head. The cross-view
branch is `view_attention.py`. The stream is `[B, F, N, D]`: rows, latent frames, N = V*h*w cells of all views.
WALL-WM section 2.1.
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
from wallwm_jax.models.layers import FeedForward, LayerNorm, Linear, TimeEmbedding, gated, modulate, settled
from wallwm_jax.models.norms import norm_modulated
from wallwm_jax.models.rope import axis_dims, grid_angles, position_angles
from wallwm_jax.models.sight_cone import sight_mask
from wallwm_jax.models.view_attention import UNKNOWN_CAMERA, CameraTable, ViewAttention
from wallwm_jax.parallel.sharding import constrain, context_size

Batch = dict[str, Any]

TIMESTEPS = 1000.0  # Wan feeds 1000 * sigma
DENOISE = 2  # latent_role of the frames that carry noise


class VideoCondition(NamedTuple):
    """What every block reads beside the stream; computed once per forward.

    Attributes:
      sigma: `[B, F]` noise level of the frame.
      time: `[B, F, D]` embedded timestep. modulation: `[B, F, 6, D]` its projection.
      angles: `[B, F, h*w, d/2]` of the within-view attention. camera_angles: `[B, F, N, d/2]` across views, or None.
      view_mask: `[B, F, N, N]` cells that may attend to each other across views, or None for all.
      segments: `[B, F, V]` event of a view's cells, 0 for padding and absent views.
      text: `[B, E, L, D]` caption tokens. frame_event: `[B, F, E]` one-hot, all zeros for padding.
      text_bias: `[B, F, L]` logit bias per caption token of the frame's event.
    """

    sigma: jax.Array
    time: jax.Array
    modulation: jax.Array
    angles: jax.Array
    camera_angles: jax.Array | None
    view_mask: jax.Array | None
    segments: jax.Array
    text: jax.Array
    frame_event: jax.Array
    text_bias: jax.Array


class VideoBlock(nnx.Module):
    """One block: within-view attention, cross-view attention, text cross-attention, feed-forward."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        width, heads, dtype = config.width, config.heads, jnp.dtype(config.compute_dtype)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, width), jnp.float32) / width**0.5)
        self.self_attention = Attention(width, heads, rngs=rngs, dtype=dtype)
        self.view_attention = ViewAttention(width, heads, rngs=rngs, dtype=dtype) if config.view_attention else None
        if self.view_attention is not None:
            self.view_attention.start_from(self.self_attention, self.modulation[...][:3])
        self.text_norm = LayerNorm(width)
        self.text_attention = Attention(width, heads, rngs=rngs, dtype=dtype)
        self.ffn = FeedForward(width, config.ffn, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, condition: VideoCondition) -> jax.Array:
        modulation = jnp.split(self.modulation[...] + condition.modulation, 6, 2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        x = _on_mesh(x, condition)
        dtype = self.self_attention.dtype
        normed, x = norm_modulated(x, shift, scale, dtype)
        x = _on_mesh(gated(x, self._within_views(normed, condition), gate), condition)
        if self.view_attention is not None and condition.camera_angles is not None:
            cell_bias = _closed_where(condition.segments == 0, x.shape[2] // condition.segments.shape[2])
            time = condition.modulation[:, :, :3]
            x = self.view_attention(x, time, condition.camera_angles, cell_bias, condition.view_mask)
        normed, x = norm_modulated(x, self.text_norm.bias[...], self.text_norm.scale[...] - 1.0, dtype)
        x = x + self._text(normed, condition)
        normed, x = norm_modulated(x, ffn_shift, ffn_scale, dtype)
        return _on_mesh(gated(x, self.ffn(normed), ffn_gate), condition)

    def _within_views(self, x: jax.Array, condition: VideoCondition) -> jax.Array:
        """Self-attention over the cells of one view and all latent frames of one event."""
        b, f, n, width = x.shape
        views = condition.segments.shape[2]
        cells = n // views
        parts = context_size() if _cells_are_split(f, views) and cells % context_size() == 0 else 1

        def by_view(part: jax.Array) -> jax.Array:
            """`[B, F, V, cells, ...]` to `[B, V, F * cells, ...]`; what is split over devices is the outer one."""
            part = part.reshape(b, f, views, parts, cells // parts, *part.shape[4:])
            return jnp.moveaxis(part, 1, 3).reshape(b, views, f * cells, *part.shape[5:])

        angles = jnp.broadcast_to(condition.angles[:, :, None], (b, f, views, *condition.angles.shape[2:]))
        segments = jnp.broadcast_to(condition.segments[..., None], (b, f, views, cells))
        mixed = self.self_attention.in_views(
            by_view(x.reshape(b, f, views, cells, width)),
            angles=by_view(angles),
            segments=by_view(segments),
            events=condition.frame_event.shape[-1],
        )
        mixed = jnp.moveaxis(mixed.reshape(b, views, parts, f, cells // parts, width), 3, 1)
        return settled(mixed.reshape(b, f, n, width), self.self_attention.dtype)

    def read_text(self, probes: jax.Array, tokens: jax.Array, bias: jax.Array) -> jax.Array:
        """What the cross-attention gives stream states `probes [P, D]` of `tokens [B, L, D]`, `[B, P, D]`."""
        attention = self.text_attention
        query = attention.queries(self.text_norm(probes))
        query = jnp.broadcast_to(query, (len(tokens), *query.shape))
        return attention.merge(attend(query, attention.keys(tokens), attention.values(tokens), key_bias=bias))

    def _text(self, x: jax.Array, condition: VideoCondition) -> jax.Array:
        """Cross-attention of a frame's cells to its event's caption: keys once per event, then gathered per frame."""
        return self.text_attention.in_frames(
            x, condition.text, key_bias=condition.text_bias, frame_event=condition.frame_event
        )


class VideoTower(nnx.Module):
    """Embedding, blocks and head; `world_action_model.py` runs the blocks."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.compute_dtype)
        rows, columns = config.patch
        patch = rows * columns * config.latent_channels
        self.config, self.dtype = config, dtype
        self.patch_embedding = Linear(patch, width, rngs=rngs, dtype=dtype)
        places = (config.latent_shape[0] // rows) * (config.latent_shape[1] // columns)
        self.place_embedding = (
            nnx.Param(jnp.zeros((config.max_views, places, width), jnp.float32)) if config.place_embedding else None
        )
        self.time_embedding = TimeEmbedding(config.freq_dim, width, 6, rngs=rngs, std=0.02)
        self.text_up = Linear(config.text.width, width, rngs=rngs, dtype=dtype)
        self.text_down = Linear(width, width, rngs=rngs, dtype=dtype)
        self.cameras = CameraTable(config.max_views, width // config.heads) if config.view_attention else None
        self.blocks = build(lambda rngs: VideoBlock(config, rngs=rngs), config.depth, rngs)
        self.head_modulation = nnx.Param(jax.random.normal(rngs.params(), (2, width), jnp.float32) / width**0.5)
        self.head = Linear(width, patch, rngs=rngs, dtype=dtype, std=0.0)

    def embed(self, batch: Batch, latents: jax.Array) -> jax.Array:
        """Latents `[B, V, F, h, w, C]` to the stream `[B, F, N, D]`.

        With `model.place_embedding` a learned vector per camera and patch is added. Rotary angles do not reach the
        values of an attention, so a small tower that starts from nothing has no word for where in the picture a patch
        is; Wan's towers have learned one and take none.
        """
        patches = self.patch_embedding(patchify(latents, self.config.patch))
        if self.place_embedding is not None:
            slot = jnp.maximum(batch["latent_event"] - 1, 0)
            camera = jnp.take_along_axis(batch["view_id"], slot[..., None], 1)
            camera = jnp.where(camera < self.config.max_views, camera, UNKNOWN_CAMERA)
            patches = patches + self.place_embedding[...][camera].astype(patches.dtype)
        return patches.reshape(*patches.shape[:2], -1, self.config.width)

    def condition(self, batch: Batch, sigma: jax.Array, features: jax.Array, length: jax.Array) -> VideoCondition:
        """What the blocks read; noise level `sigma [B, E]`, captions `features [B, E, L, Dt]` and `length [B, E]`."""
        rows, columns = (size // patch for size, patch in zip(self.config.latent_shape, self.config.patch))
        head_dim = self.config.width // self.config.heads
        events = batch["view_id"].shape[1]
        event, slot = batch["latent_event"], jnp.maximum(batch["latent_event"] - 1, 0)
        frame_sigma = jnp.where(batch["latent_role"] == DENOISE, jnp.take_along_axis(sigma, slot, 1), 0.0)
        time, modulation = self.time_embedding(TIMESTEPS * frame_sigma)
        view_id = jnp.take_along_axis(batch["view_id"], slot[..., None], 1)
        frame_angles = position_angles(batch["latent_pos"], axis_dims(head_dim)[0])
        text, bias = self.caption_tokens(features, length)
        return VideoCondition(
            sigma=frame_sigma,
            time=time,
            modulation=modulation,
            angles=grid_angles(frame_angles, rows, columns, head_dim),
            camera_angles=None if self.cameras is None else self.cameras(view_id, rows, columns),
            view_mask=self._view_mask(batch, rows, columns),
            segments=jnp.where(view_id > 0, event[..., None], 0),
            text=text,
            frame_event=jax.nn.one_hot(event - 1, events, dtype=self.dtype),
            text_bias=jnp.where(event[..., None] > 0, jnp.take_along_axis(bias, slot[..., None], 1), -jnp.inf),
        )

    def velocity(self, x: jax.Array, noisy_latents: jax.Array, condition: VideoCondition) -> jax.Array:
        """The head: stream `[B, F, N, D]` to velocity `[B, V, F, h, w, C]`, float32.

        With `video_prediction = "clean"` the head gives the clean latents, and the velocity is what they imply for
        `noisy_latents`: a head narrower than a patch cannot pass the noise on, which a velocity holds.
        """
        modulation = self.head_modulation[...] + condition.time[:, :, None]
        patches = self.head(modulate(x, modulation[:, :, :1], modulation[:, :, 1:])).astype(jnp.float32)
        output = unpatchify(patches, noisy_latents.shape[1], self.config.latent_shape, self.config.patch)
        if self.config.video_prediction == "velocity":
            return output
        return implied_velocity(noisy_latents, output, condition.sigma[:, None, :, None, None, None])

    def _view_mask(self, batch: Batch, rows: int, columns: int) -> jax.Array | None:
        """Sight-cone mask `[B, F, N, N]` from the cameras of each latent frame; None where all views see each other."""
        cone = self.config.sight_cone
        if not (cone.on and self.config.view_attention) or batch["view_geometry"].shape[1] == 1:
            return None
        cameras = jnp.swapaxes(batch["view_geometry"], 1, 2)
        return sight_mask(cameras, rows, columns, near=cone.near, far=cone.far, widen=cone.widen)

    def caption_tokens(self, features: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Caption tokens through Wan's text MLP `[B, E, L, D]`, and their logit bias `[B, E, L]`.

        With `text.pad_to` = P, one token is appended: Wan pads captions with zero features to P tokens and attends to
        them all; the P - n pads are equal, so one of them with logit bias log(P - n) is the same function.
        """
        pad_to, tokens = self.config.text.pad_to, features.shape[2]
        length = length[..., None]
        is_token = jnp.arange(tokens) < length
        features = jnp.where(is_token[..., None], features, 0)
        bias = jnp.where(is_token, 0.0, -jnp.inf)
        if pad_to:
            features = jnp.pad(features, ((0, 0), (0, 0), (0, 1), (0, 0)))
            bias = jnp.concatenate([bias, jnp.log(jnp.maximum(pad_to - length, 0).astype(jnp.float32))], -1)
        return self.text_down(jax.nn.gelu(self.text_up(features), approximate=True)), bias


def patchify(latents: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Latents `[B, V, F, h, w, C]` to patches `[B, F, V, h*w / (p*q), p*q*C]`, cells inside a patch row by row."""
    b, v, f, h, w, c = latents.shape
    p, q = patch
    cells = latents.reshape(b, v, f, h // p, p, w // q, q, c)
    return jnp.transpose(cells, (0, 2, 1, 3, 5, 4, 6, 7)).reshape(b, f, v, (h // p) * (w // q), p * q * c)


def unpatchify(patches: jax.Array, views: int, shape: tuple[int, int], patch: tuple[int, int]) -> jax.Array:
    """Inverse of `patchify` for patches `[B, F, V*cells, p*q*C]`: latents `[B, V, F, h, w, C]`."""
    b, f, _, width = patches.shape
    (h, w), (p, q) = shape, patch
    cells = patches.reshape(b, f, views, h // p, w // q, p, q, width // (p * q))
    return jnp.transpose(cells, (0, 2, 1, 3, 5, 4, 6, 7)).reshape(b, views, f, h, w, width // (p * q))


def _cells_are_split(frames: int, views: int) -> bool:
    """Whether the context axis splits the cells of a view: where it does not divide the frames, and there is one view.

    Split frames keep text and cross-view attention on one device; cells of several views cannot be split evenly.
    """
    return views == 1 and frames % context_size() != 0


def _on_mesh(x: jax.Array, condition: VideoCondition) -> jax.Array:
    """The stream `[B, F, N, D]`, each device's part of it."""
    cells = "cells" if _cells_are_split(x.shape[1], condition.segments.shape[2]) else None
    return constrain(x, "batch", None if cells else "frames", cells, None)


def _closed_where(closed: jax.Array, repeats: int) -> jax.Array:
    """Key bias `[..., V * repeats]`: -inf where `closed [..., V]`, else 0."""
    return jnp.repeat(jnp.where(closed, -jnp.inf, 0.0), repeats, axis=-1)
