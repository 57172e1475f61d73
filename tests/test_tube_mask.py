"""Tube masks: where they lie, what they hide, and that the loss still asks for what is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import random_batch, tiny_config

from wallwm_jax.training import objectives
from wallwm_jax.training.stages import STAGES

ROWS = 8


@pytest.fixture(autouse=True)
def _quick():
    yield


def example(prob=1.0, clean_prob=0.5, sides=(1, 2), patch=(1, 1)):
    config = tiny_config(rows=ROWS)
    with config.unlocked():
        config.model.patch = patch
        config.objective.tube.update(dict(prob=prob, clean_prob=clean_prob, sides=sides))
    batch = {name: jnp.asarray(value) for name, value in random_batch(config, seed=5).items()}
    batch["view_geometry"] = jnp.zeros_like(batch["view_geometry"])  # no calibration: every present view sees all
    key = jax.random.key(0)
    draws = jax.jit(lambda key: objectives.draw(key, batch, config, STAGES["joint"]))(key)
    return batch, draws


def events_of(batch):
    """(row, slot, frames) of every event."""
    event = np.asarray(batch["latent_event"])
    return [(row, slot - 1, event[row] == slot) for row in range(len(event)) for slot in set(event[row]) - {0}]


@pytest.mark.parametrize("patch", [(1, 1), (2, 2)])
def test_a_tube_is_one_window_of_one_view_through_a_whole_event(patch):
    batch, draws = example(patch=patch)
    hidden, views, sizes = np.asarray(draws.tubes.hidden), set(), set()
    for row, slot, frames in events_of(batch):
        window = hidden[row][:, frames]
        present = np.asarray(batch["view_id"])[row, slot] > 0
        if present.sum() < 2:
            assert not window.any()  # nobody else could see it
            continue
        assert (window == window[:, :1]).all()
        (view,) = np.flatnonzero(window.any((1, 2, 3)))
        rows, columns = np.nonzero(window[view, 0])
        side = np.ptp(rows) + 1
        assert present[view] and side == np.ptp(columns) + 1 and len(rows) == side**2
        assert rows.min() % patch[0] == 0 and side % patch[0] == 0
        views.add(int(view))
        sizes.add(int(side) // patch[0])
    assert views == {0, 1} and sizes == {1, 2}
    assert not hidden[np.broadcast_to(np.asarray(batch["latent_event"])[:, None] == 0, hidden.shape[:3])].any()


def test_hidden_cells_are_pure_noise_and_the_target_stays():
    batch, draws = example()
    hidden, noise = np.asarray(draws.tubes.hidden), np.asarray(draws.video_noise)
    denoise = np.asarray(batch["latent_role"] == 2)[:, None, :, None, None]
    noisy = np.asarray(objectives.noise_latents(batch, draws))
    np.testing.assert_allclose(noisy[hidden & denoise], noise[hidden & denoise], rtol=1e-6)
    without = objectives.noise_latents(batch, objectives.Draws(*(getattr(draws, name) for name in (
        "video_noise", "video_sigma", "action_noise", "action_sigma"))))  # fmt: skip
    np.testing.assert_array_equal(noisy[~hidden], np.asarray(without)[~hidden])
    seen = np.asarray(objectives.hide_clean(batch, draws)["latents"])
    changed = (seen != np.asarray(batch["latents"])).any(-1)
    assert changed.any() and not (changed & (denoise | ~hidden)).any()
    flags = np.asarray(draws.tubes.hides_clean)
    for row, slot, frames in events_of(batch):
        assert changed[row][:, frames].any() == (flags[row, slot] and hidden[row][:, frames].any())


def test_the_loss_inside_a_tube_has_its_weight():
    batch, draws = example()
    predicted = jax.random.normal(jax.random.key(1), batch["latents"].shape)
    weight = jnp.ones(batch["latents"].shape[-1])
    once, twice = (float(objectives.video_loss(predicted, batch, draws, weight, factor)) for factor in (1.0, 2.0))
    error = np.square(np.asarray(predicted) - (np.asarray(draws.video_noise) - np.asarray(batch["latents"]))).mean(-1)
    valid = np.asarray(objectives.valid_cells(batch))
    inside = (error * np.asarray(draws.tubes.hidden))[valid].sum() / valid.sum()
    assert twice - once == pytest.approx(inside, rel=1e-4) and inside > 0


def test_without_probability_there_are_no_tubes():
    batch, draws = example(prob=0.0)
    assert draws.tubes is None and objectives.hide_clean(batch, draws) is batch
    _, seldom = example(prob=0.3)
    chosen = [bool(np.asarray(seldom.tubes.hidden)[row][:, frames].any()) for row, _, frames in events_of(batch)]
    assert 0 < np.mean(chosen) < 0.6
