"""Losses of the world action model and the random draws they need (WALL-WM eq. 7, 12, 13; section 2.7 of the report).

Noise is drawn per event: one video sigma for each event slot [B, E], and K independent draws of the actions [K, B, E]
that reuse one video forward. Every stream's loss is a sum over the valid elements of the whole global batch divided by
their number, so it depends neither on how rows are spread over devices nor on how events are packed into rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from wallwm_jax.models import flow_matching, world_action_model
from wallwm_jax.models.action_tower import is_given
from wallwm_jax.models.video_tower import DENOISE
from wallwm_jax.training.stages import Stage
from wallwm_jax.training.tube_mask import Tubes, draw_tubes

Batch = dict[str, jax.Array]
Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """Everything random in one step.

    Attributes:
      video_noise: [B, V, F, h, w, C] standard normal.
      video_sigma: [B, E] noise level of each event's future latents, in [0, 1].
      action_noise: [K, B, A, Da] standard normal.
      action_sigma: [K, B, E] noise level of each event's actions, in [0, 1].
      tubes: hidden windows; None where the objective has none.
    """

    video_noise: jax.Array
    video_sigma: jax.Array
    action_noise: jax.Array
    action_sigma: jax.Array
    tubes: Tubes | None = None


def draw(key: jax.Array, batch: Batch, config: ConfigDict, stage: Stage) -> Draws:
    """Noise, sigmas and tubes of one step, a pure function of `key` and the batch; reads `objective` and `model`."""
    objective = config.objective
    video_key, sigma_key, action_key, action_sigma_key = jax.random.split(key, 4)
    rows, slots = batch["window_index"].shape
    draws = objective.action_draws
    u = jax.random.uniform(sigma_key, (rows, slots))
    is_anchored: Any = {"anchor": True, "uniform": False, "mixed": u < 0.5}[stage.video_sigma]
    u = 2 * u % 1.0 if stage.video_sigma == "mixed" else u
    anchor = flow_matching.jittered_anchor(
        u, objective.anchor_sigma, objective.anchor_jitter_steps, objective.schedule_steps, objective.video_shift
    )
    video_sigma = jnp.where(is_anchored, anchor, flow_matching.sigma_from_uniform(u, objective.video_shift))
    if objective.action_sigma == "symmetric":
        action_sigma = jnp.broadcast_to(video_sigma, (draws, rows, slots))
    else:
        offset = jnp.arange(draws)[:, None, None] / draws  # an event's draws lie evenly over the noise levels
        u = (jax.random.uniform(action_sigma_key, (rows, slots)) + offset) % 1.0
        action_sigma = flow_matching.sigma_from_uniform(u, objective.action_shift)
    tubes = None
    if objective.tube.prob:
        tubes = draw_tubes(jax.random.fold_in(key, 1), batch, config.model, objective.tube)
    return Draws(
        video_noise=jax.random.normal(video_key, batch["latents"].shape),
        video_sigma=video_sigma,
        action_noise=jax.random.normal(action_key, (draws, *batch["actions"].shape)),
        action_sigma=action_sigma,
        tubes=tubes,
    )


def compute_loss(
    trainable: Params,
    frozen: Params,
    config: ConfigDict,
    stage: Stage,
    batch: Batch,
    key: jax.Array,
    channel_weight: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the stage's losses on one packed batch.

    Args:
      trainable: parameter groups that the loss is differentiated by.
      frozen: the other attached groups, in any float dtype; they are read in float32.
      config: `model` and `objective` sections are read.
      stage: which streams count.
      batch: packed batch of the design (section 3).
      key: random key of this step.
      channel_weight: [C] weight of each latent channel, mean 1 (standard deviation of the band over its mean).

    Returns:
      (loss, metrics); metrics are scalars: "loss", "loss_<stream>" for each of the stage's streams, "events" (real
      events in the batch).
    """
    params = {
        **detached(config.model),
        **trainable,
        **jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dict(frozen)),
    }
    objective = config.objective
    draws = draw(key, batch, config, stage)
    text = world_action_model.encode_text(params, config.model, batch)
    outputs = world_action_model.forward(
        params,
        config.model,
        hide_clean(batch, draws),
        noisy_latents=noise_latents(batch, draws),
        video_sigma=draws.video_sigma,
        noisy_actions=noise_actions(batch, draws),
        action_sigma=draws.action_sigma,
        text=text,
        train_video=stage.trains_video,
        run_actions=stage.runs_actions,
    )
    losses: dict[str, jax.Array] = {}
    if "video" in stage.losses:
        losses["video"] = video_loss(
            outputs.video_velocity, batch, draws, channel_weight, objective.tube.weight, objective.video_sigma_power
        )
    if "action" in stage.losses:
        assert outputs.action_velocity is not None  # the stage runs actions
        losses["action"] = action_loss(outputs.action_velocity, batch, draws, objective.action_sigma_power)
        if objective.dct_weight:
            losses["dct"] = dct_loss(outputs.action_velocity, batch, draws)
    if "duration" in stage.losses:
        quantiles = world_action_model.predict_duration(params, config.model, batch, text)
        losses["duration"] = duration_loss(quantiles, batch, config.model.duration_quantiles)
    weights = {
        "video": objective.video_weight,
        "action": objective.action_weight,
        "duration": objective.duration_weight,
        "dct": objective.dct_weight,
    }
    total = sum((weights[stream] * loss for stream, loss in losses.items()), jnp.float32(0.0))
    metrics = {f"loss_{stream}": loss for stream, loss in losses.items()}
    return total, {"loss": total, **metrics, "events": jnp.sum(batch["window_index"] >= 0)}


def noise_latents(batch: Batch, draws: Draws) -> jax.Array:
    """[B, V, F, h, w, C]: future latents noised to their event's sigma, to 1 in a tube; clean ones and padding stay."""
    denoise = batch["latent_role"] == DENOISE
    sigma = (_per_token(draws.video_sigma, batch["latent_event"]) * denoise)[:, None, :, None, None]
    if draws.tubes is not None:
        sigma = jnp.where(draws.tubes.hidden & denoise[:, None, :, None, None], 1.0, sigma)
    return flow_matching.add_noise(batch["latents"], draws.video_noise, sigma[..., None])


def hide_clean(batch: Batch, draws: Draws) -> Batch:
    """The batch as the model sees it: the clean latents' cells are noise where a tube covers them, too."""
    if draws.tubes is None:
        return batch
    covered = _per_token(draws.tubes.hides_clean, batch["latent_event"]) & (batch["latent_role"] != DENOISE)
    hidden = draws.tubes.hidden & covered[:, None, :, None, None]
    return {**batch, "latents": jnp.where(hidden[..., None], draws.video_noise, batch["latents"])}


def noise_actions(batch: Batch, draws: Draws) -> jax.Array:
    """[K, B, A, Da]: actions noised to their event's sigma of each draw; invalid dimensions and padding stay 0."""
    sigma = jax.vmap(_per_token, in_axes=(0, None))(draws.action_sigma, batch["action_event"])
    return flow_matching.add_noise(batch["actions"], draws.action_noise, sigma[..., None]) * _valid_actions(batch)


def video_loss(
    velocity: jax.Array,
    batch: Batch,
    draws: Draws,
    channel_weight: jax.Array,
    tube_weight: float = 1.0,
    sigma_power: float = 0.0,
) -> jax.Array:
    """Mean of `channel_weight * (velocity - (noise - latents))^2` over valid latent cells (WALL-WM eq. 7), those in a
    tube times `tube_weight` (eq. 8), each event times `sigma ** sigma_power` as in `action_loss`.

    Valid: a future latent of a real event, in a view that the event has, cell wholly inside the view's picture.
    """
    target = flow_matching.velocity_target(batch["latents"], draws.video_noise)
    error = jnp.square(velocity.astype(jnp.float32) - target) @ channel_weight / channel_weight.shape[0]
    error *= (_per_token(draws.video_sigma, batch["latent_event"]) ** sigma_power)[:, None, :, None, None]
    if draws.tubes is not None:
        error = jnp.where(draws.tubes.hidden, tube_weight * error, error)
    return masked_mean(error, valid_cells(batch))


def action_loss(velocity: jax.Array, batch: Batch, draws: Draws, sigma_power: float = 0.0) -> jax.Array:
    """Mean of `w (velocity - (noise - actions))^2` over the K draws and the valid action elements (WALL-WM eq. 12-13).

    The weight is `w = sigma ** sigma_power`: 0 weighs all noise levels alike, 2 makes it the error of the clean actions
    that the velocity implies, which x-prediction needs to stay bounded at low noise.
    """
    target = flow_matching.velocity_target(batch["actions"], draws.action_noise)
    valid = jnp.broadcast_to(_valid_actions(batch), velocity.shape)
    sigma = jax.vmap(_per_token, in_axes=(0, None))(draws.action_sigma, batch["action_event"])[..., None]
    return masked_mean(sigma**sigma_power * jnp.square(velocity.astype(jnp.float32) - target), valid)


def dct_loss(velocity: jax.Array, batch: Batch, draws: Draws) -> jax.Array:
    """Auxiliary loss on the orthonormal DCT-II of each event's clean actions (WALL-WM eq. 14).

    For an event of T actions at noise level sigma: `(1 - sigma)^2 sum_j exp(-4 j / T) dct(estimate - actions)_j^2`,
    mean over draws, events and valid action dimensions.
    """
    event, events = batch["action_event"], batch["window_index"].shape[1]
    denoised = jnp.where(is_given(batch), 0, event)
    member = jax.nn.one_hot(denoised - 1, events, dtype=jnp.float32)  # [B, A, E]
    length = jnp.sum(member, 1)  # [B, E]
    own = jnp.maximum(jnp.einsum("bae,be->ba", member, length), 1.0)
    order = jnp.arange(event.shape[1], dtype=jnp.float32)
    wave = jnp.cos(jnp.pi * order * (batch["action_pos"] + 0.5)[..., None] / own[..., None])  # [B, A, J]
    scale = jnp.sqrt(jnp.where(order == 0, 1.0, 2.0) / own[..., None])
    sigma = jax.vmap(_per_token, in_axes=(0, None))(draws.action_sigma, event)[..., None]
    estimate = flow_matching.clean_estimate(noise_actions(batch, draws), velocity.astype(jnp.float32), sigma)
    error = (estimate - batch["actions"]) * _valid_actions(batch)
    spectrum = jnp.einsum("bae,baj,kbad->kbejd", member, wave * scale, error)
    fade = jnp.where(order < length[..., None], jnp.exp(-4.0 * order / jnp.maximum(length, 1.0)[..., None]), 0.0)
    of_event = jnp.einsum("kbejd,bej->kbed", jnp.square(spectrum), fade)
    of_event *= jnp.square(1.0 - draws.action_sigma)[..., None]
    valid = jnp.einsum("bae,bad->bed", member, _valid_actions(batch).astype(jnp.float32)) > 0
    return masked_mean(of_event, jnp.broadcast_to(valid, of_event.shape))


def duration_loss(quantiles: jax.Array, batch: Batch, levels: tuple[float, ...]) -> jax.Array:
    """Pinball loss of log-seconds quantiles [B, E, Q], mean over events and quantile levels.

    Left out: absent events, and captions that state the duration or were dropped (the null text, one token long).
    """
    told = batch["duration_in_caption"] | (batch["text_length"] <= 1)
    valid = (batch["window_index"] >= 0) & (batch["duration_s"] > 0) & ~told
    target = jnp.log(jnp.where(valid, batch["duration_s"], 1.0))
    level = jnp.asarray(levels, jnp.float32)
    above = target[..., None] - quantiles.astype(jnp.float32)
    return masked_mean(jnp.mean(jnp.maximum(level * above, (level - 1.0) * above), -1), valid)


def valid_cells(batch: Batch) -> jax.Array:
    """[B, V, F, h, w] bool: the latent cells that the video loss is taken over."""
    height, width = batch["latents"].shape[3:5]
    event = batch["latent_event"]
    present = _per_token(batch["view_id"] > 0, event)  # [B, F, V]
    x0, y0, x1, y1 = jnp.moveaxis(_per_token(batch["valid_rect"], event), -1, 0)[..., None]  # [B, F, V, 1] each
    slack = 1e-4
    column, row = jnp.arange(width) / width, jnp.arange(height) / height
    inside_x = (column >= x0 - slack) & (column + 1.0 / width <= x1 + slack)  # [B, F, V, w]
    inside_y = (row >= y0 - slack) & (row + 1.0 / height <= y1 + slack)
    cells = inside_y[..., :, None] & inside_x[..., None, :] & present[..., None, None]
    cells &= (batch["latent_role"] == DENOISE)[:, :, None, None, None]
    return jnp.swapaxes(cells, 1, 2)


def detached(model: ConfigDict) -> dict[str, Any]:
    """Zeros for the groups that a stage does not attach: the model's graph names them, no computation reads them."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), world_action_model.abstract_params(model))


def _per_token(values: jax.Array, event: jax.Array) -> jax.Array:
    """Values of each token's event: [B, E, ...] at 1-based slots [B, S] -> [B, S, ...]; zero where the slot is 0."""
    taken = jax.vmap(lambda row, slots: row[jnp.maximum(slots - 1, 0)])(values, event)
    real = (event > 0).reshape(event.shape + (1,) * (values.ndim - 2))
    return jnp.where(real, taken, jnp.zeros((), values.dtype))


def _valid_actions(batch: Batch) -> jax.Array:
    """`[B, A, Da]`: what is denoised; given actions (scheme B) are not."""
    return batch["action_valid"] & ((batch["action_event"] > 0) & ~is_given(batch))[..., None]


def masked_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Global sum over global count; 0 where nothing is valid."""
    total = jnp.sum(jnp.where(valid, values, 0.0))
    return total / jnp.maximum(jnp.sum(valid), 1)
