"""Flow matching: the shift, the anchor, and that the true velocity carries noise to data."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models import flow_matching as fm


@pytest.mark.parametrize("step, sigma", [(44, 0.405), (45, 0.357), (46, 0.303), (0, 1.0), (50, 0.0)])
def test_anchor_of_a_fifty_step_schedule_at_shift_five(step, sigma):
    assert fm.anchor_sigma(step, 50, 5.0) == pytest.approx(sigma, abs=1e-3)


def test_jitter_covers_exactly_two_steps_on_either_side():
    low, middle, high = fm.jittered_anchor(jnp.asarray([0.0, 0.5, 1.0]), fm.anchor_sigma(45, 50, 5.0), 2, 50, 5.0)
    assert float(low) == pytest.approx(fm.anchor_sigma(47, 50, 5.0), abs=1e-6)
    assert float(middle) == pytest.approx(fm.anchor_sigma(45, 50, 5.0), abs=1e-6)
    assert float(high) == pytest.approx(fm.anchor_sigma(43, 50, 5.0), abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_keeps_the_ends_and_has_an_inverse(shift):
    u = np.linspace(0, 1, 11)
    sigma = fm.sigma_from_uniform(u, shift)
    assert sigma[0] == 0.0 and sigma[-1] == 1.0
    assert (sigma >= u - 1e-12).all()
    np.testing.assert_allclose(fm.uniform_from_sigma(sigma, shift), u, atol=1e-12)


def test_schedule_goes_from_noise_to_its_end():
    np.testing.assert_allclose(fm.sigmas(4, 1.0), [1, 0.75, 0.5, 0.25, 0])
    levels = fm.sigmas(5, 5.0, end=0.357)
    assert levels[0] == 1.0 and levels[-1] == np.float32(0.357)
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("arguments", [dict(num_steps=0, shift=1.0), dict(num_steps=4, shift=1.0, end=1.0)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="sigmas"):
        fm.sigmas(**arguments)


def test_euler_steps_along_the_true_velocity_reach_the_data():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 7))
    velocity = fm.velocity_target(clean, noise)
    levels = fm.sigmas(10, 5.0)
    x = noise
    for sigma, following in itertools.pairwise(levels):
        np.testing.assert_allclose(x, fm.add_noise(clean, noise, sigma), atol=1e-6)
        np.testing.assert_allclose(fm.clean_estimate(x, velocity, sigma), clean, atol=1e-6)
        x = fm.euler_step(x, velocity, sigma, following)
    np.testing.assert_allclose(x, clean, atol=1e-6)
