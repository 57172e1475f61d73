"""One window per row: the batch that the model sees of it, and its denoising by the configured sampler.

Both decoding modes are this. Event mode knows the current frame alone and gives an event's future; unified mode knows
a history too and gives a chunk of fixed length. All is traced inside their jitted programs.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.inference import samplers
from wallwm_jax.inference.samplers import DENOISE_ROLE, ModelFlow
from wallwm_jax.models import flow_matching

Batch = dict[str, jax.Array]

SAMPLERS = ("anchored", "symmetric")
_CLEAN_ROLE = 1


def sampling_config(config: ConfigDict) -> ConfigDict:
    """A copy of `config` as inference runs it: the sight-cone mask is for training, at inference all views see each
    other.

    Raises:
      UserError: an unknown sampler, or no draws.
    """
    if config.sampling.sampler not in SAMPLERS:
        raise UserError(f"config.sampling.sampler={config.sampling.sampler!r}: one of {', '.join(SAMPLERS)}")
    if config.sampling.action_draws < 1:
        raise UserError(f"config.sampling.action_draws={config.sampling.action_draws} must be at least 1")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.sight_cone.on = False
    return config


def window_batch(model: ConfigDict, inputs: Mapping[str, jax.Array], latents: int) -> Batch:
    """A packed batch with one window per row, zeros where it is to be denoised; texts are the caller's to add.

    Args:
      model: `config.model`.
      inputs: `given [B, V, 1 + M, h, w, C]` normalised latents up to the observation's, `view_id [B, V]`, `state [B,
        32]`, `state_valid`, `futures [B]` latents and `steps [B]` actions to come; with a history also `past [B, P,
        32]` normalised actions that led to the observation, the last `past_steps [B]` of which count, and `number [B]`
        of the window along the episode, from 1.
      latents: `1 + N` from the observation on, those of the longest window that fits.
    """
    given, valid = inputs["given"], inputs["state_valid"]
    (rows, views, known), cell = given.shape[:3], given.shape[3:]
    past = inputs.get("past", jnp.zeros((rows, 0, ACTION_DIM)))
    position = jnp.arange(1 - known, latents)[None]
    action = jnp.arange(-past.shape[1], model.actions_per_latent * (latents - 1))[None]
    in_window = position <= inputs["futures"][:, None]
    acts = (action < inputs["steps"][:, None]) & (action >= -inputs.get("past_steps", jnp.zeros(rows, int))[:, None])
    batch = {
        "latents": jnp.zeros((rows, views, known - 1 + latents, *cell)).at[:, :, :known].set(given),
        "latent_event": in_window.astype(jnp.int32),
        "latent_role": jnp.where(in_window, jnp.where(position <= 0, _CLEAN_ROLE, DENOISE_ROLE), 0),
        "latent_pos": jnp.where(in_window, position, 0),
        "actions": jnp.zeros((rows, action.shape[1], ACTION_DIM)).at[:, : past.shape[1]].set(past),
        "action_event": acts.astype(jnp.int32),
        "action_pos": jnp.where(acts, action, 0),
        "action_valid": acts[..., None] & valid[:, None],
        "state": inputs["state"][:, None],
        "state_valid": valid[:, None],
        "view_id": inputs["view_id"][:, None],
        "valid_rect": jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (rows, 1, views, 4)),
        "window_index": jnp.zeros((rows, 1), jnp.int32),
        "duration_s": jnp.zeros((rows, 1)),
        "duration_in_caption": jnp.zeros((rows, 1), bool),
        "event_level": jnp.zeros((rows, 1), jnp.int32),
    }
    if "number" in inputs:
        batch["window_number"] = inputs["number"][:, None]
    return batch


def denoise(config: ConfigDict, flow: ModelFlow, seeds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normalised latents `[B, V, F, h, w, C]`, left at the anchor by the anchored sampler, and actions `[B, A, 32]`:
    the mean of `sampling.action_draws` draws. Row i is a function of `seeds[i]` and of what `flow` knows of it."""
    batch, sampling, objective = flow.batch, config.sampling, config.objective
    latents, actions = _noise(seeds, batch, sampling.action_draws)
    actions = sampling.action_temperature * actions
    is_noisy = batch["latent_role"][:, None, :, None, None, None] == DENOISE_ROLE
    latents = jnp.where(is_noisy, latents, batch["latents"])
    if sampling.sampler == "symmetric":
        sigmas = flow_matching.sigmas(sampling.steps, objective.video_shift)
        latents, actions = samplers.symmetric(flow, latents, actions, sigmas=sigmas)
    else:
        latents, actions = samplers.anchored(
            flow,
            latents,
            actions,
            video_sigmas=flow_matching.sigmas(sampling.video_steps, objective.video_shift, end=objective.anchor_sigma),
            action_sigmas=flow_matching.sigmas(sampling.steps, objective.action_shift),
        )
    return latents, jnp.mean(actions, 0)


def finish(config: ConfigDict, flow: ModelFlow, latents: jax.Array) -> jax.Array:
    """Denoises the video from the anchor to the end; `latents` as `denoise` returned them."""
    objective = config.objective
    sigmas = samplers.remaining_sigmas(config.sampling.video_steps, objective.video_shift, objective.anchor_sigma)
    return samplers.euler(flow.video, latents, sigmas)


def _noise(seeds: jax.Array, batch: Mapping[str, jax.Array], draws: int) -> tuple[jax.Array, jax.Array]:
    """Unit noise like the latents and `[draws, ...]` like the actions; a function of seed and position, the same in
    every bucket."""
    _, views, bucket, *cell = batch["latents"].shape
    _, length, width = batch["actions"].shape

    def one_row(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        video, action = jax.random.split(jax.random.key(seed))
        at = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        latents = jax.vmap(lambda key: jax.random.normal(key, (views, *cell)))(at(video, jnp.arange(bucket)))
        actions = jax.vmap(lambda key: jax.random.normal(key, (draws, width)))(at(action, jnp.arange(length)))
        return jnp.moveaxis(latents, 0, 1), jnp.moveaxis(actions, 0, 1)

    return jax.vmap(one_row, out_axes=(0, 1))(seeds)
