"""The world action model as pure functions of plain parameters: video and action tower, text encoder, duration head.

Parameters are a nested dict of float32 arrays with top-level keys "video", "action", "duration" and, with the `bytes`
text encoder, "text"; parameters of blocks carry a leading layer axis. The modules behind them are Flax NNX, merged at
trace time. `batch` is the packed batch (`data/packing.py`): B rows, V views, F latent frames, A actions, E events.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.models import layer_stack
from wallwm_jax.models.action_tower import ActionBlock, ActionTower, VideoKeys
from wallwm_jax.models.duration_head import DurationHead
from wallwm_jax.models.param_axes import name_axes
from wallwm_jax.models.text.bytes import ByteEncoder
from wallwm_jax.models.video_tower import DENOISE, VideoBlock, VideoTower

Batch = dict[str, Any]
Params = dict[str, Any]


class TextContext(NamedTuple):
    """Encoded captions: `features [B, E, L, Dt]`, and how many of the L are text, `length [B, E]`."""

    features: jax.Array
    length: jax.Array


class VideoContext(NamedTuple):
    """What the action tower needs of one video forward, for any number of action forwards.

    Attributes:
      keys: per layer, stacked: key and value `[L, B, H, F*V*cells, d]`.
      segments: `[B, F, V]` event of a view's cells, 0 closed.
      sigma: `[B, E]` noise level of that forward.
    """

    keys: VideoKeys
    segments: jax.Array
    sigma: jax.Array


class Outputs(NamedTuple):
    """Velocities, float32: video `[B, V, F, h, w, C]`; action `[K, B, A, Da]`, None where the actions did not run."""

    video_velocity: jax.Array
    action_velocity: jax.Array | None


class WorldActionModel(nnx.Module):
    """The modules; the functions below are the interface."""

    def __init__(self, config: FrozenConfigDict, *, rngs: nnx.Rngs):
        self.config = config
        self.video = VideoTower(config, rngs=rngs)
        self.action = ActionTower(config, rngs=rngs)
        self.duration = DurationHead(config, rngs=rngs)
        if config.text.kind == "bytes":
            self.text = ByteEncoder(config, rngs=rngs)


def init(config: ConfigDict, key: jax.Array) -> Params:
    """Random parameters of the model that `config` (`config.model`) describes.

    Raises:
      UserError: sizes that do not fit together.
    """
    model = WorldActionModel(_checked(config), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_params(config: ConfigDict) -> Params:
    """Shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def encode_text(params: Params, config: ConfigDict, batch: Batch) -> TextContext:
    """Captions of the batch as features: encodes `text_ids`, or passes `text_features` of a frozen encoder.

    The `bytes` encoder gives one feature per `config.text.stride` bytes.
    """
    if config.text.kind == "features":
        return TextContext(batch["text_features"], batch["text_length"])
    return TextContext(*_bind(params, config).text(batch["text_ids"], batch["text_length"]))


def forward(
    params: Params,
    config: ConfigDict,
    batch: Batch,
    *,
    noisy_latents: jax.Array,
    video_sigma: jax.Array,
    text: TextContext,
    noisy_actions: jax.Array | None = None,
    action_sigma: jax.Array | None = None,
    run_actions: bool = True,
    train_video: bool = True,
) -> Outputs:
    """Predicts the velocities of both streams in one pass over the layers.

    Args:
      params, config: of this model.
      batch: the packed batch. Clean latent frames are taken from `batch["latents"]`, whatever `noisy_latents` holds.
      noisy_latents: `[B, V, F, h, w, C]`.
      video_sigma: `[B, E]` noise level of each event's video, in [0, 1].
      text: from `encode_text`.
      noisy_actions: `[K, B, A, Da]`, K draws that share the video. action_sigma: `[K, B, E]`.
      run_actions: False leaves the action tower out (stage video).
      train_video: False stops gradients at the video tower's parameters and at the text, so that no video backward
        exists (stage action).

    Raises:
      ValueError: `run_actions` without actions.
    """
    if not run_actions:
        return Outputs(_run_video(_bind(params, config), batch, noisy_latents, video_sigma, text)[0], None)
    if noisy_actions is None or action_sigma is None:
        raise ValueError("forward: run_actions needs noisy_actions and action_sigma")
    if not train_video:
        params = {**params, "video": jax.lax.stop_gradient(params["video"])}
        text = jax.lax.stop_gradient(text)
    model = _bind(params, config)
    video, action = model.video, model.action
    condition = video.condition(batch, video_sigma, *text)
    action_condition = action.condition(batch, action_sigma, video_sigma, condition.segments)
    frames = action.frame_embeddings(batch)

    def step(carry: Any, blocks: tuple[VideoBlock, ActionBlock], _: None) -> tuple[Any, None]:
        stream, actions = carry
        video_block, action_block = blocks
        stream = layer_stack.remat(video_block.__call__, config.remat)(stream, condition)

        def act(actions: jax.Array, stream: jax.Array) -> jax.Array:
            return action_block(actions, action_block.video_keys(stream, frames), action_condition)

        return (stream, layer_stack.remat(act, config.remat)(actions, stream)), None

    start = (video.embed(batch, _with_clean(batch, noisy_latents)), action.embed(batch, noisy_actions))
    (stream, actions), _ = layer_stack.run(step, start, (video.blocks, action.blocks))
    video_velocity = video.velocity(stream, noisy_latents, condition)
    return Outputs(video_velocity, action.velocity(batch, actions, noisy_actions, action_sigma, action_condition))


def video_context(
    params: Params,
    config: ConfigDict,
    batch: Batch,
    noisy_latents: jax.Array,
    video_sigma: jax.Array,
    text: TextContext,
) -> tuple[jax.Array, VideoContext]:
    """One video forward: its velocity `[B, V, F, h, w, C]`, and the context that `action_velocity` reuses."""
    velocity, context = _run_video(_bind(params, config), batch, noisy_latents, video_sigma, text, keep=True)
    assert context is not None
    return velocity, context


def action_velocity(
    params: Params,
    config: ConfigDict,
    batch: Batch,
    context: VideoContext,
    noisy_actions: jax.Array,
    action_sigma: jax.Array,
) -> jax.Array:
    """Velocity `[K, B, A, Da]` of `noisy_actions` at `action_sigma [K, B, E]`, on the features of one video forward."""
    action = _bind(params, config).action
    condition = action.condition(batch, action_sigma, context.sigma, context.segments)

    def step(actions: jax.Array, blocks: tuple[ActionBlock], keys: VideoKeys) -> tuple[jax.Array, None]:
        return layer_stack.remat(blocks[0].__call__, config.remat)(actions, keys, condition), None

    actions, _ = layer_stack.run(step, action.embed(batch, noisy_actions), (action.blocks,), context.keys)
    return action.velocity(batch, actions, noisy_actions, action_sigma, condition)


def read_text(params: Params, config: ConfigDict, text: TextContext, probes: jax.Array) -> jax.Array:
    """What the video tower reads of a text: per block the output of its cross-attention, `[layers, B, P, D]` float32.

    Args:
      params, config: of this model.
      text: captions of one event per row, E = 1; or what stands for them.
      probes: `[P, D]` states of the stream, before the block's norm.
    """
    video = _bind(params, config).video
    tokens, bias = video.caption_tokens(text.features, text.length)

    def step(_: None, blocks: tuple[VideoBlock], __: None) -> tuple[None, jax.Array]:
        return None, blocks[0].read_text(probes, tokens[:, 0], bias[:, 0])

    return layer_stack.run(step, None, (video.blocks,))[1].astype(jnp.float32)


def predict_duration(params: Params, config: ConfigDict, batch: Batch, text: TextContext) -> jax.Array:
    """Quantiles of each event's duration, `[B, E, Q]` log-seconds, rising with `config.duration_quantiles`.

    Reads the clean first latent, the caption and the state of an event: nothing that depends on its length.
    """
    model = _bind(params, config)
    return model.duration(batch, *text, patch_embedding=model.video.patch_embedding)


def _run_video(
    model: WorldActionModel,
    batch: Batch,
    noisy_latents: jax.Array,
    sigma: jax.Array,
    text: TextContext,
    *,
    keep: bool = False,
) -> tuple[jax.Array, VideoContext | None]:
    video, action = model.video, model.action
    condition = video.condition(batch, sigma, *text)

    def step(stream: jax.Array, blocks: tuple[Any, ...], _: None) -> tuple[jax.Array, VideoKeys | None]:
        stream = layer_stack.remat(blocks[0].__call__, model.config.remat)(stream, condition)
        return stream, blocks[1].video_keys(stream, frames) if keep else None

    frames = action.frame_embeddings(batch) if keep else None
    blocks = (video.blocks, action.blocks) if keep else (video.blocks,)
    stream, keys = layer_stack.run(step, video.embed(batch, _with_clean(batch, noisy_latents)), blocks)
    velocity = video.velocity(stream, noisy_latents, condition)
    return velocity, VideoContext(keys, condition.segments, sigma) if keep else None


def _with_clean(batch: Batch, noisy_latents: jax.Array) -> jax.Array:
    noisy = (batch["latent_role"] == DENOISE)[:, None, :, None, None, None]
    return jnp.where(noisy, noisy_latents, batch["latents"])


def _bind(params: Params, config: ConfigDict) -> WorldActionModel:
    return nnx.merge(_graph(_checked(config)), params)


@functools.lru_cache(maxsize=32)
def _graph(config: FrozenConfigDict) -> Any:
    model = nnx.eval_shape(lambda: WorldActionModel(config, rngs=nnx.Rngs(0)))
    name_axes(model)
    return nnx.split(model)[0]


def _checked(config: ConfigDict) -> FrozenConfigDict:
    """The config, frozen; raises `UserError` where sizes do not fit together."""
    for name, width, heads in (
        ("model.width", config.width, config.heads),
        ("model.action_width", config.action_width, config.action_heads),
        ("model.text.width", config.text.width, config.text.heads),
    ):
        if width % heads or (width // heads) % 2:
            raise UserError(f"{name} = {width} over {heads} heads: each head needs an even whole number of dimensions")
    for size, patch in zip(config.latent_shape, config.patch):
        if size % patch:
            raise UserError(
                f"model.latent_shape = {tuple(config.latent_shape)} is not a multiple of model.patch = "
                f"{tuple(config.patch)}"
            )
    if config.text.kind not in ("bytes", "features"):
        raise UserError(f"model.text.kind = {config.text.kind!r}: bytes or features")
    if config.compute_dtype not in ("float32", "bfloat16"):
        raise UserError(f"model.compute_dtype = {config.compute_dtype!r}: float32 or bfloat16")
    for name in ("video_prediction", "action_prediction"):
        if config[name] not in ("velocity", "clean"):
            raise UserError(f"model.{name} = {config[name]!r}: velocity or clean")
    if config.remat not in layer_stack.REMAT:
        raise UserError(f"model.remat = {config.remat!r}: one of {', '.join(layer_stack.REMAT)}")
    return FrozenConfigDict(config)
