"""Samplers: they recover data from exact velocity fields, and each is the composition it says it is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import random_batch, tiny_config
from tiny_model import random_params

from wallwm_jax.inference import samplers
from wallwm_jax.models import flow_matching
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.text.byte_ids import encode_bytes

LATENTS = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
ACTIONS = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)


class ExactFlow:
    """The marginal velocity field of a single data point: (x - x0) / sigma, whose flow ends in x0."""

    def joint(self, latents, actions, sigma):
        return (latents - LATENTS) / sigma, (actions - ACTIONS) / sigma

    def video(self, latents, sigma):
        return (latents - LATENTS) / sigma

    def context(self, latents, sigma):
        return self.video(latents, sigma), latents

    def action(self, context, actions, sigma):
        return (actions - ACTIONS * context.mean()) / sigma


def noise(seed, like):
    return jax.random.normal(jax.random.key(seed), like.shape)


def test_remaining_sigmas_end_the_schedule_that_stops_at_the_anchor():
    whole = flow_matching.sigmas(50, 5.0)
    assert abs(whole[45] - 0.357) < 2e-4
    np.testing.assert_allclose(flow_matching.sigmas(45, 5.0, end=whole[45]), whole[:46], atol=1e-6)
    np.testing.assert_allclose(samplers.remaining_sigmas(5, 5.0, whole[45]), whole[45:], atol=1e-6)


@pytest.mark.parametrize("steps, start", [(0, 0.5), (4, 0.0), (4, 1.5)])
def test_impossible_schedules_are_refused(steps, start):
    with pytest.raises(ValueError, match="remaining_sigmas"):
        samplers.remaining_sigmas(steps, 5.0, start)


@pytest.mark.parametrize("steps", [1, 7])
def test_symmetric_sampler_recovers_data_from_an_exact_field(steps):
    latents, actions = samplers.symmetric(
        ExactFlow(), noise(0, LATENTS), noise(1, ACTIONS), sigmas=flow_matching.sigmas(steps, 5.0)
    )
    np.testing.assert_allclose(latents, LATENTS, atol=2e-5)
    np.testing.assert_allclose(actions, ACTIONS, atol=2e-5)


def test_euler_converges_at_first_order_on_a_curved_field():
    """dx/dsigma = x from 1 to 0 shrinks x by e; halving the step halves the error."""
    errors = []
    for steps in (20, 40, 80):
        x = samplers.euler(lambda x, sigma: x, jnp.ones(()), flow_matching.sigmas(steps, 1.0))
        errors.append(abs(float(x) - np.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_anchored_sampler_leaves_the_video_at_the_anchor_and_acts_on_it():
    start = noise(0, LATENTS)
    sigmas = flow_matching.sigmas(6, 5.0, end=0.357)
    latents, actions = samplers.anchored(
        ExactFlow(), start, noise(1, ACTIONS), video_sigmas=sigmas, action_sigmas=flow_matching.sigmas(4, 1.0)
    )
    at_anchor = (1 - 0.357) * LATENTS + 0.357 * start
    np.testing.assert_allclose(latents, at_anchor, atol=2e-5)
    np.testing.assert_allclose(actions, ACTIONS * np.mean(at_anchor), atol=2e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_rest_of_the_schedule_finishes_the_video(steps):
    at_anchor = (1 - 0.357) * LATENTS + 0.357 * noise(0, LATENTS)
    latents = samplers.euler(ExactFlow().video, at_anchor, samplers.remaining_sigmas(steps, 5.0, 0.357))
    np.testing.assert_allclose(latents, LATENTS, atol=2e-5)


def one_row():
    config = tiny_config()
    with config.unlocked():
        config.data.update(dict(rows=1, latents_per_row=8, actions_per_row=40))
    return config


@pytest.fixture(scope="module")
def model():
    """A tiny model, one packed row, and its captions and the null text encoded."""
    config = one_row()
    batch = {name: jnp.asarray(value) for name, value in random_batch(config, seed=3).items()}
    ids, length = encode_bytes("press", config.data.text_length)
    batch |= {"text_ids": jnp.broadcast_to(ids, batch["text_ids"].shape)}
    batch |= {"text_length": jnp.full_like(batch["text_length"], length)}
    params = random_params(config.model)
    null = {**batch, "text_ids": jnp.zeros_like(batch["text_ids"]).at[..., 0].set(1)}
    null["text_length"] = jnp.ones_like(batch["text_length"])
    encode = jax.jit(lambda params, batch: wam.encode_text(params, config.model, batch))
    yield config.model, batch, params, encode(params, batch), encode(params, null)


@pytest.mark.extended
def test_model_flow_anchored_equals_the_composition_it_claims(model):
    config, batch, params, text, _ = model
    mask = (batch["latent_role"] == 2)[:, None, :, None, None, None]
    draws = noise(1, jnp.stack([batch["actions"]] * 2))
    start = jnp.where(mask, noise(0, batch["latents"]), batch["latents"]), draws
    video_sigmas, action_sigmas = flow_matching.sigmas(2, 5.0, end=0.357), flow_matching.sigmas(2, 1.0)

    @jax.jit
    def sampled(params):
        flow = samplers.ModelFlow(params, config, batch, text)
        return samplers.anchored(flow, *start, video_sigmas=video_sigmas, action_sigmas=action_sigmas)

    @jax.jit
    def velocities(params, latents, video_sigma, actions, action_sigma):
        """One joint forward of the model, as in training."""
        events = batch["text_length"].shape
        out = wam.forward(
            params, config, batch, noisy_latents=latents, video_sigma=jnp.full(events, video_sigma), text=text,
            noisy_actions=actions, action_sigma=jnp.full((2, *events), action_sigma),
        )  # fmt: skip
        return jnp.where(mask, out.video_velocity, 0), out.action_velocity

    x, y = start
    for sigma, following in itertools.pairwise(video_sigmas):
        x = x + (following - sigma) * velocities(params, x, sigma, y, 1.0)[0]
    for sigma, following in itertools.pairwise(action_sigmas):
        y = y + (following - sigma) * velocities(params, x, video_sigmas[-1], y, sigma)[1]
    latents, actions = sampled(params)
    np.testing.assert_allclose(latents, x, atol=2e-4)
    np.testing.assert_allclose(actions, y, atol=2e-4)
    np.testing.assert_array_equal(np.where(mask, 0, latents - start[0]), 0)  # known latents stay exactly as they are
    assert np.abs(np.asarray(latents - start[0])).max() > 1e-2


@pytest.mark.extended
def test_guidance_moves_both_streams_along_the_difference_to_the_null_text(model):
    config, batch, params, text, null = model
    start = noise(0, batch["latents"]), noise(1, batch["actions"][None])

    @jax.jit
    def velocities(params):
        def flow(text, **guided):
            flow = samplers.ModelFlow(params, config, batch, text, **guided)
            video, context = flow.context(start[0], 0.5)
            return video, flow.action(context, start[1], 0.7)

        return flow(text), flow(null), flow(text, null_text=null, guidance=3.0)

    for plain, empty, guided in zip(*velocities(params)):
        np.testing.assert_allclose(guided, empty + 3 * (plain - empty), atol=1e-4)
        assert np.abs(plain - empty).max() > 1e-4
