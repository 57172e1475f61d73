"""Losses: which elements count, what they are worth, and what is random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from random_batch import random_batch, tiny_config

from wallwm_jax.models.flow_matching import anchor_sigma
from wallwm_jax.training import objectives
from wallwm_jax.training.objectives import Draws, action_loss, draw, duration_loss, video_loss
from wallwm_jax.training.stages import STAGES

CONFIG = tiny_config()
JOINT, ACTION = STAGES["joint"], STAGES["action"]


@pytest.fixture(autouse=True)
def _quick():
    yield


@pytest.fixture
def batch():
    return {name: jnp.asarray(value) for name, value in random_batch(CONFIG, seed=3).items()}


@pytest.fixture
def draws(batch):
    return draw(jax.random.key(0), batch, CONFIG, JOINT)


def video_targets(batch, draws):
    return np.asarray(draws.video_noise - batch["latents"])


# Video


def test_video_loss_is_the_weighted_mean_square_over_valid_cells(batch, draws):
    """Against plain loops: future latents, present views, cells inside the picture; half of each picture is border."""
    batch["valid_rect"] = batch["valid_rect"] * jnp.asarray([1.0, 1.0, 1.0, 0.5])  # the lower half is black
    weight = np.linspace(0.5, 1.5, CONFIG.model.latent_channels).astype(np.float32)
    predicted = np.random.default_rng(0).normal(size=batch["latents"].shape).astype(np.float32)
    error = (predicted - video_targets(batch, draws)) ** 2 @ weight / len(weight)
    total, count = 0.0, 0
    for row, frame in np.ndindex(*batch["latent_event"].shape):
        slot = int(batch["latent_event"][row, frame]) - 1
        if int(batch["latent_role"][row, frame]) != 2:
            continue
        for view in np.flatnonzero(np.asarray(batch["view_id"][row, slot])):
            cells = error[row, view, frame, :2]  # two of four rows of cells are above the border
            total, count = total + cells.sum(), count + cells.size
    assert count > 100
    np.testing.assert_allclose(
        video_loss(jnp.asarray(predicted), batch, draws, jnp.asarray(weight)), total / count, 1e-5
    )


def test_a_cell_that_the_border_cuts_does_not_count(batch):
    """Four cells of width 0.25: a picture from 0.3 to 1.0 leaves the last two columns."""
    batch["valid_rect"] = jnp.where(batch["valid_rect"].any(-1, keepdims=True), jnp.asarray([0.3, 0.0, 1.0, 1.0]), 0.0)
    cells = np.asarray(objectives.valid_cells(batch))
    assert cells.any((0, 1, 2, 3)).tolist() == [False, False, True, True]


@pytest.mark.parametrize("what", ["perfect", "wrong on padding, clean latents and absent views only"])
def test_video_loss_is_zero_where_it_matters_not(batch, draws, what):
    predicted = jnp.asarray(video_targets(batch, draws))
    if what != "perfect":
        predicted = jnp.where(objectives.valid_cells(batch)[..., None], predicted, 1e6)
    assert video_loss(predicted, batch, draws, jnp.ones(CONFIG.model.latent_channels)) == 0.0


def test_clean_latents_and_padding_stay_as_they_are(batch, draws):
    noisy = np.asarray(objectives.noise_latents(batch, draws))
    future = np.asarray(batch["latent_role"] == 2)[:, None, :, None, None, None]
    np.testing.assert_array_equal(np.where(future, 0, noisy), np.where(future, 0, batch["latents"]))
    row, frame = np.argwhere(future[:, 0, :, 0, 0, 0])[-1]
    sigma = float(draws.video_sigma[row, batch["latent_event"][row, frame] - 1])
    expected = (1 - sigma) * batch["latents"][row, :, frame] + sigma * draws.video_noise[row, :, frame]
    np.testing.assert_allclose(noisy[row, :, frame], expected, rtol=1e-5, atol=1e-6)


# Actions


def test_action_loss_averages_draws_and_valid_elements(batch, draws):
    predicted = np.random.default_rng(1).normal(size=draws.action_noise.shape).astype(np.float32)
    valid = np.asarray(batch["action_valid"]) & (np.asarray(batch["action_event"]) > 0)[..., None]
    target = np.asarray(draws.action_noise) - np.asarray(batch["actions"])
    expected = np.mean([((predicted[k] - target[k]) ** 2)[valid].mean() for k in range(len(predicted))])
    np.testing.assert_allclose(action_loss(jnp.asarray(predicted), batch, draws), expected, rtol=1e-5)
    spoilt = np.where(valid, predicted, np.nan)
    np.testing.assert_allclose(action_loss(jnp.asarray(spoilt), batch, draws), expected, rtol=1e-5)


def test_given_actions_are_in_no_loss(batch, draws):
    """Scheme B: what lies before the observation conditions only."""
    observed = {**batch, "action_pos": batch["action_pos"] - 4 * (batch["action_event"] > 0)}
    given = np.asarray(observed["action_pos"] < 0)[..., None]
    predicted = jnp.asarray(np.random.default_rng(1).normal(size=draws.action_noise.shape), jnp.float32)
    for loss in (action_loss, objectives.dct_loss):
        gradient = np.asarray(jax.grad(loss)(predicted, observed, draws))
        assert (np.where(given, gradient, 0) == 0).all() and np.abs(gradient).max() > 0
    assert (np.where(given, objectives.noise_actions(observed, draws), 0) == 0).all()


def test_weighed_by_sigma_squared_the_action_loss_is_the_error_of_the_clean_actions(batch, draws):
    predicted = np.random.default_rng(1).normal(size=draws.action_noise.shape).astype(np.float32)
    noisy, event = objectives.noise_actions(batch, draws), np.asarray(batch["action_event"])
    sigma = np.take_along_axis(
        np.asarray(draws.action_sigma), np.broadcast_to(np.maximum(event - 1, 0), predicted.shape[:3]), 2
    )
    error = np.asarray(noisy - sigma[..., None] * predicted) - np.asarray(batch["actions"])
    valid = np.broadcast_to(np.asarray(batch["action_valid"]) & (event > 0)[..., None], error.shape)
    loss = action_loss(jnp.asarray(predicted), batch, draws, sigma_power=2.0)
    np.testing.assert_allclose(loss, (error**2)[valid].mean(), rtol=1e-4)


def test_the_dct_loss_is_scipys_transform_of_each_event(batch, draws):
    predicted = np.random.default_rng(1).normal(size=draws.action_noise.shape).astype(np.float32)
    noisy, event = np.asarray(objectives.noise_actions(batch, draws)), np.asarray(batch["action_event"])
    terms = []
    places = {(row, int(slot)) for row, slots in enumerate(event) for slot in set(slots) - {0}}
    for row, slot in sorted(places):
        here = np.flatnonzero(event[row] == slot)
        valid = np.asarray(batch["action_valid"])[row, here[0]]
        for k, sigma in enumerate(np.asarray(draws.action_sigma)[:, row, slot - 1]):
            error = (noisy[k, row] - sigma * predicted[k, row] - np.asarray(batch["actions"])[row])[here][:, valid]
            fade = np.exp(-np.arange(len(here)) / (len(here) / 4))
            terms.append((1 - sigma) ** 2 * (fade[:, None] * scipy.fft.dct(error, axis=0, norm="ortho") ** 2).sum(0))
    loss = objectives.dct_loss(jnp.asarray(predicted), batch, draws)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-4)


def test_invalid_action_dimensions_carry_no_noise(batch, draws):
    noisy = np.asarray(objectives.noise_actions(batch, draws))
    used = np.asarray(batch["action_valid"]).any((0, 1))
    assert np.all(noisy[..., ~used] == 0) and used.sum() == 10
    row, token = np.argwhere(np.asarray(batch["action_event"]) > 0)[-1]
    sigma = np.asarray(draws.action_sigma)[:, row, int(batch["action_event"][row, token]) - 1, None]
    expected = (1 - sigma) * np.asarray(batch["actions"])[row, token] + sigma * draws.action_noise[:, row, token]
    np.testing.assert_allclose(noisy[:, row, token, used], expected[:, used], rtol=1e-5, atol=1e-6)


def test_losses_are_sums_over_counts_of_the_whole_batch(batch, draws):
    """A batch of two rows weighs its rows by their valid elements, not one half each."""
    predicted = jnp.asarray(np.random.default_rng(2).normal(size=draws.action_noise.shape), jnp.float32)
    whole = float(action_loss(predicted, batch, draws))
    parts, counts = [], []
    for row in range(CONFIG.data.rows):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        own = Draws(*(getattr(draws, name)[row : row + 1] for name in ("video_noise", "video_sigma")),
                    *(getattr(draws, name)[:, row : row + 1] for name in ("action_noise", "action_sigma")))  # fmt: skip
        parts.append(float(action_loss(predicted[:, row : row + 1], alone, own)))
        counts.append(int((alone["action_valid"] & (alone["action_event"] > 0)[..., None]).sum()))
    assert counts[0] != counts[1]
    np.testing.assert_allclose(whole, np.average(parts, weights=counts), rtol=1e-5)


# Duration


def test_duration_loss_is_the_pinball_loss_in_log_seconds(batch):
    """One event of e seconds against quantiles 0, 1 and 3 at levels 0.1, 0.5, 0.9: 0.1 * 1, 0, 0.1 * 2 over three."""
    only = np.argwhere(np.asarray(batch["window_index"]) >= 0)[0]
    duration = np.zeros(batch["duration_s"].shape, np.float32)
    duration[tuple(only)] = np.e
    batch |= {"duration_s": jnp.asarray(duration), "duration_in_caption": jnp.zeros(duration.shape, bool)}
    batch["text_length"] = jnp.full(duration.shape, 5)
    quantiles = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 3.0]), (*duration.shape, 3))
    np.testing.assert_allclose(duration_loss(quantiles, batch, (0.1, 0.5, 0.9)), (0.1 + 0.0 + 0.2) / 3, rtol=1e-5)


@pytest.mark.parametrize("told", [{"duration_in_caption": True}, {"text_length": 1}, {"window_index": -1}])
def test_events_whose_duration_is_told_or_whose_caption_was_dropped_do_not_count(batch, told):
    batch |= {name: jnp.full_like(batch[name], value) for name, value in told.items()}
    quantiles = jnp.full((*batch["duration_s"].shape, 3), 100.0)
    assert duration_loss(quantiles, batch, (0.1, 0.5, 0.9)) == 0.0


# Randomness


def test_sigma_of_the_joint_stage_is_uniform_before_the_shift(batch):
    batch = batch | {"window_index": jnp.zeros((2000, 5), jnp.int32)}
    draws = draw_sigmas(batch, JOINT)
    times = np.sort(np.asarray(draws.video_sigma / (5.0 - 4.0 * draws.video_sigma)).ravel())
    assert np.abs(times - np.linspace(0, 1, len(times))).max() < 0.02  # Kolmogorov-Smirnov distance of 10,000 draws
    actions = np.sort(np.asarray(draws.action_sigma).ravel())  # action_shift is 1: uniform itself
    assert np.abs(actions - np.linspace(0, 1, len(actions))).max() < 0.02
    assert (
        abs(np.corrcoef(np.asarray(draws.action_sigma[0]).ravel(), np.asarray(draws.video_sigma).ravel())[0, 1]) < 0.05
    )


def test_sigma_of_the_action_stage_stays_within_two_steps_of_the_anchor(batch):
    """Steps 43 to 47 of 50 at shift 5, counted from noise; the anchor itself is step 45."""
    draws = draw_sigmas(batch | {"window_index": jnp.zeros((2000, 5), jnp.int32)}, ACTION)
    low, high = anchor_sigma(47, 50, 5.0), anchor_sigma(43, 50, 5.0)
    assert low == pytest.approx(0.2419, abs=1e-4) and high == pytest.approx(0.4487, abs=1e-4)
    sigma = np.asarray(draws.video_sigma)
    assert sigma.min() == pytest.approx(low, abs=1e-3) and sigma.max() == pytest.approx(high, abs=1e-3)
    assert np.median(sigma) == pytest.approx(CONFIG.objective.anchor_sigma, abs=3e-3)


def test_symmetric_coupling_gives_every_draw_the_video_sigma(batch):
    config = CONFIG.copy_and_resolve_references()
    config.objective.action_sigma = "symmetric"
    draws = draw(jax.random.key(0), batch, config, JOINT)
    assert draws.action_sigma.shape[0] == 4
    np.testing.assert_array_equal(draws.action_sigma, np.broadcast_to(draws.video_sigma, draws.action_sigma.shape))
    assert float(jnp.abs(draws.action_noise[0] - draws.action_noise[1]).max()) > 1.0  # the noise itself differs


def test_draws_follow_the_key_alone(batch):
    one, same, other = (draw(jax.random.key(seed), batch, CONFIG, JOINT) for seed in (5, 5, 6))
    for name in ("video_noise", "video_sigma", "action_noise", "action_sigma"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))


def draw_sigmas(batch, stage):
    """Draws for a batch whose rows only `window_index` counts; noise is kept small by cutting the other arrays."""
    small = batch | {"latents": jnp.zeros((1, 1, 1, 1, 1, 1)), "actions": jnp.zeros((1, 1, 1))}
    return draw(jax.random.key(1), small, CONFIG, stage)
