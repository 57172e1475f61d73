"""Losses of the VLM stages: the answer in words, the reasoning trace, L_text and L_CoT (WALL-WM sections 3.1, 3.2).

The latents of a staircase have three ties, each by its weight: "trace" is L_CoT; "match" compares what the frozen video
tower reads from them and from the next event's caption; "latent_action" and "latent_video" are the frozen towers' own
flow-matching losses on that event with the latents in the caption's place, so that the gradient comes all the way.

As in `objectives`, every loss is a sum over the valid elements of the whole global batch divided by their number, so it
does not depend on how rows are spread over devices. Rows of padding count nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from wallwm_jax.data.vlm_batches import holds_windows
from wallwm_jax.models import language_pathway, world_action_model
from wallwm_jax.models.vlm import language_model, staircase, text_projector, vlm
from wallwm_jax.models.vlm.text_projector import TextFeatures
from wallwm_jax.models.world_action_model import TextContext
from wallwm_jax.training import objectives
from wallwm_jax.training.objectives import detached, masked_mean
from wallwm_jax.training.stages import Stage

Batch = dict[str, jax.Array]
Params = Mapping[str, Any]

_VARIANCE_FLOOR = 1e-4  # of a channel of the text encoder, or of a reading, in shares of the mean


def compute_loss(
    trainable: Params,
    frozen: Params,
    config: ConfigDict,
    stage: Stage,
    batch: Batch,
    key: jax.Array,
    channel_weight: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the stage's losses on one `VlmBatch`; a tie of the latents that weighs nothing is left out.

    Args:
      trainable: parameter groups that the loss is differentiated by.
      frozen: the other attached groups, in any float dtype; they are read in float32.
      config: `data.vlm`, `vlm`, `model` and `objective` are read.
      stage: which losses count.
      batch: of `data.vlm_batches`.
      key: of the noise of "latent_action" and "latent_video"; nothing else is random.
      channel_weight: as for `objectives.compute_loss`.

    Returns:
      (loss, metrics); metrics are scalars: "loss", "loss_<stream>" for each of the stage's losses that is computed,
      "events" (rows that are no padding).
    """
    params = {**trainable, **jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dict(frozen))}
    losses: dict[str, jax.Array] = {}
    if "staircase" in params:
        losses |= _latent_losses(params, config, stage, batch, key, channel_weight)
    else:
        hidden = vlm.forward(params["vlm"], language_pathway.vlm_config(config), vlm_inputs(batch))
    if "answer" in stage.losses:
        features = answer_features(hidden, batch, config.data.vlm.answer_length)
        logits = vlm.logits(params["vlm"], language_pathway.vlm_config(config), features)
        losses["answer"] = answer_loss(logits, batch)
    if "small" in stage.losses:
        losses["small"] = trace_loss(params["small"], config, batch)
    if "vlm_text" in params:
        losses |= _text_losses(params, config, batch, hidden)
    total = sum((config.objective[f"{name}_weight"] * loss for name, loss in losses.items()), jnp.float32(0.0))
    metrics = {f"loss_{name}": loss for name, loss in losses.items()}
    return total, {"loss": total, **metrics, "events": jnp.sum(batch["window_index"] >= 0)}


def vlm_inputs(batch: Batch) -> vlm.Inputs:
    """A `VlmBatch` as the VLM takes it."""
    mask = jnp.arange(batch["ids"].shape[1]) < batch["length"][:, None]
    return vlm.Inputs(batch["ids"], mask, jnp.swapaxes(batch["positions"], 0, 1), batch["images"])


def answer_features(hidden: jax.Array, batch: Batch, length: int) -> jax.Array:
    """`[B, length, D]` of `hidden [B, S, D]`: at i the position before the answer's token i, which predicts it."""
    places = batch["answer_start"][:, None] - 1 + jnp.arange(length)
    return jnp.take_along_axis(hidden, jnp.minimum(places, hidden.shape[1] - 1)[..., None], 1)


def answer_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy of the answer's tokens, the end id included, by `logits [B, A, V]` of `answer_features`."""
    order = jnp.arange(logits.shape[1])
    places = jnp.minimum(batch["answer_start"][:, None] + order, batch["ids"].shape[1] - 1)
    targets = jnp.take_along_axis(batch["ids"], places, 1)
    return _cross_entropy(logits, targets, order < batch["answer_length"][:, None])


def trace_loss(params: Params, config: ConfigDict, batch: Batch, prefix: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of the reasoning trace by the small language model, which reads it from its start id on, behind a
    soft prefix `[B, K, D]` where there is one (WALL-WM eq. 19)."""
    sizes, ids = language_pathway.small_config(config), batch["trace_ids"]
    order = jnp.arange(ids.shape[1])
    mask = ((order < batch["trace_length"][:, None]) | (order == 0))[:, :-1]
    embedded, before = language_model.embed(dict(params), sizes, ids[:, :-1]), 0
    if prefix is not None:
        before = prefix.shape[1]
        embedded = jnp.concatenate([prefix.astype(embedded.dtype), embedded], 1)
        mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], 1)
    hidden = language_model.forward(dict(params), sizes, embedded, mask=mask)[:, before:]
    return _cross_entropy(
        language_model.logits(dict(params), sizes, hidden), ids[:, 1:], order[1:] < batch["trace_length"][:, None]
    )


def match_loss(found: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean square of `found - target` `[layers, B, P, D]` over the rows `valid [B]`, in units of the target's variance
    over them, layer by layer: 1 is what the mean reading would reach."""
    target = jax.lax.stop_gradient(target)
    weight = valid[None, :, None, None] / jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(weight * target, 1, keepdims=True)
    parts = (target - mean, target, found - target)
    spread, size, error = (jnp.sum(weight * jnp.square(part), (1, 2, 3)) for part in parts)
    return jnp.mean(error / (spread + _VARIANCE_FLOOR * size + jnp.finfo(jnp.float32).tiny))


def latents_of(params: Params, config: ConfigDict, batch: Batch) -> tuple[TextContext, jax.Array]:
    """The staircase's latents behind the prompts: in the place of a caption's features, `[B, 1, K, Dt]`, and as the
    small model's soft prefix `[B, K, D]`."""
    sizes, stairs = language_pathway.vlm_config(config), language_pathway.staircase_config(config)
    inputs, length = vlm_inputs(batch), batch["ids"].shape[1]
    prompt = inputs._replace(mask=jnp.arange(length) < batch["answer_start"][:, None])
    _, cache = vlm.prefill(params["vlm"], sizes, prompt, slots=length + len(stairs.entry_depths))
    latents = staircase.decode(params["staircase"], stairs, sizes.language, cache)
    features = staircase.project(params["staircase"], stairs, sizes.language, latents)[:, None]
    prefix = staircase.soft_prefix(params["staircase"], stairs, sizes.language, latents)
    return TextContext(features, jnp.full(features.shape[:2], features.shape[2], jnp.int32)), prefix


def projected(params: Params, config: ConfigDict, batch: Batch, hidden: jax.Array) -> TextFeatures:
    """What the projector reads from the prompts, of the VLM's features `hidden [B, S, D]`, in a caption's place."""
    sizes, image_id = language_pathway.projector_config(config), language_pathway.vlm_config(config).image_id
    is_prompt = jnp.arange(hidden.shape[1]) < batch["answer_start"][:, None]
    return text_projector.text_features(params["vlm_text"], sizes, hidden, is_prompt & (batch["ids"] != image_id))


def world_params(params: Params, config: ConfigDict) -> dict[str, Any]:
    """Those of the world action model, zeros for groups that are not attached."""
    return {name: params.get(name, zeros) for name, zeros in detached(config.model).items()}


def readings(world: dict[str, Any], config: ConfigDict, text: TextContext) -> jax.Array:
    """What the video tower reads of a text, `[layers, B, P, D]`, by the same P random states of its stream."""
    probes = jax.random.normal(jax.random.key(0), (language_pathway.PROBES, config.model.width))
    return world_action_model.read_text(world, config.model, text, probes)


def tower_losses(
    world: dict[str, Any],
    config: ConfigDict,
    batch: Batch,
    draws: objectives.Draws,
    text: TextContext,
    channel_weight: jax.Array,
) -> dict[str, jax.Array]:
    """The towers' flow-matching losses on the windows in `batch` under `text`, differentiable in it."""
    outputs = world_action_model.forward(
        world,
        config.model,
        batch,
        noisy_latents=objectives.noise_latents(batch, draws),
        video_sigma=draws.video_sigma,
        noisy_actions=objectives.noise_actions(batch, draws),
        action_sigma=draws.action_sigma,
        text=text,
    )
    assert outputs.action_velocity is not None
    powers = config.objective.video_sigma_power, config.objective.action_sigma_power
    video = objectives.video_loss(outputs.video_velocity, batch, draws, channel_weight, 1.0, powers[0])
    return {
        "latent_action": objectives.action_loss(outputs.action_velocity, batch, draws, powers[1]),
        "latent_video": video,
    }


def _latent_losses(
    params: Params, config: ConfigDict, stage: Stage, batch: Batch, key: jax.Array, channel_weight: jax.Array
) -> dict[str, jax.Array]:
    instead, prefix = latents_of(params, config, batch)
    world, losses = world_params(params, config), {}
    if config.objective.trace_weight:
        losses["trace"] = trace_loss(params["small"], config, batch, prefix)
    if config.objective.match_weight:
        caption = world_action_model.encode_text(world, config.model, batch)
        found, target = (readings(world, config, text) for text in (instead, caption))
        losses["match"] = match_loss(found, target, batch["is_next"])
    if holds_windows(config):
        draws = objectives.draw(key, batch, config, stage)
        losses |= tower_losses(world, config, batch, draws, instead, channel_weight)
    return losses


def _text_losses(params: Params, config: ConfigDict, batch: Batch, hidden: jax.Array) -> dict[str, jax.Array]:
    sizes, found = language_pathway.projector_config(config), projected(params, config, batch, hidden)
    target = world_action_model.encode_text(world_params(params, config), config.model, batch)
    features = answer_features(hidden, batch, config.data.vlm.answer_length)
    log_s = text_projector.remaining_time(params["vlm_text"], sizes, features[:, 0])
    return {
        "align": align_loss(found.features, target.features[:, 0], target.length[:, 0] * batch["is_next"]),
        "present": present_loss(found.present, target.length[:, 0], batch["is_next"]),
        "next": answer_loss(text_projector.next_logits(params["vlm_text"], sizes, features), batch),
        "time": time_loss(log_s, batch["remaining_s"]),
    }


def align_loss(features: jax.Array, target: jax.Array, length: jax.Array) -> jax.Array:
    """Mean square of `features - target` `[B, L, Dt]` over the first `length [B]` of each row, a channel in units of
    the target's standard deviation over the batch: 1 is what the mean feature would reach."""
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    valid = (jnp.arange(target.shape[1]) < length[:, None])[..., None]
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(jnp.where(valid, target, 0.0), (0, 1)) / count
    variance = jnp.sum(jnp.where(valid, jnp.square(target - mean), 0.0), (0, 1)) / count
    variance = variance + _VARIANCE_FLOOR * jnp.mean(variance) + jnp.finfo(jnp.float32).tiny
    error = jnp.square(features.astype(jnp.float32) - target) / variance
    return masked_mean(error, jnp.broadcast_to(valid, error.shape))


def present_loss(logits: jax.Array, length: jax.Array, valid: jax.Array) -> jax.Array:
    """Binary cross-entropy of `logits [B, L]`: are the first `length [B]` features text; over the rows `valid [B]`."""
    is_text = jnp.arange(logits.shape[1]) < length[:, None]
    error = optax.sigmoid_binary_cross_entropy(logits, is_text.astype(jnp.float32))
    return masked_mean(error, jnp.broadcast_to(valid[:, None], error.shape))


def time_loss(log_seconds: jax.Array, remaining_s: jax.Array) -> jax.Array:
    """Huber loss of `log_seconds [B]` where an event follows or is under way, that is, `remaining_s [B]` is above 0."""
    valid = remaining_s > 0
    return masked_mean(optax.huber_loss(log_seconds, jnp.log(jnp.where(valid, remaining_s, 1.0))), valid)


def _cross_entropy(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), valid)
