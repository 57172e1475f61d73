"""Flow matching: the straight path from data (sigma 0) to noise (sigma 1), its velocity, schedules and the anchor.

The convention is Wan's: `x_sigma = (1 - sigma) x_0 + sigma noise`, velocity target `noise - x_0` (WALL-WM eq. 7 for
video, eq. 12 for actions).
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Numbers = TypeVar("Numbers", float, np.ndarray, jax.Array)


def sigma_from_uniform(u: Numbers, shift: float) -> Numbers:
    """Noise level of a uniform draw `u` in [0, 1]: `shift * u / (1 + (shift - 1) * u)`; shift > 1 favours noise."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def uniform_from_sigma(sigma: Numbers, shift: float) -> Numbers:
    """Inverse of `sigma_from_uniform`."""
    return sigma / (shift - (shift - 1.0) * sigma)


def add_noise(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """`(1 - sigma) * clean + sigma * noise`; `sigma` broadcasts against both."""
    return (1.0 - sigma) * clean + sigma * noise


def velocity_target(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """What the towers predict: `noise - clean`."""
    return noise - clean


def clean_estimate(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The data that a predicted velocity implies: `noisy - sigma * velocity`."""
    return noisy - sigma * velocity


def implied_velocity(noisy: jax.Array, clean: jax.Array, sigma: jax.Array) -> jax.Array:
    """The velocity that a prediction of the data implies: `(noisy - clean) / sigma`; below sigma 0.05, as at 0.05."""
    return (noisy - clean) / jnp.maximum(sigma, 0.05)


def euler_step(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array, next_sigma: jax.Array) -> jax.Array:
    """One Euler step along the path, from `sigma` to `next_sigma` (smaller: towards the data)."""
    return noisy + (next_sigma - sigma) * velocity


def sigmas(num_steps: int, shift: float, *, end: float = 0.0) -> np.ndarray:
    """Levels `[num_steps + 1]` from 1 down to `end`, evenly spaced before the shift; float32.

    Raises:
      ValueError: `num_steps` is less than 1, or `end` is not in [0, 1).
    """
    if num_steps < 1 or not 0.0 <= end < 1.0:
        raise ValueError(f"sigmas: num_steps {num_steps} must be at least 1 and end {end} in [0, 1)")
    levels = sigma_from_uniform(np.linspace(1.0, uniform_from_sigma(end, shift), num_steps + 1), shift)
    levels[-1] = end
    return levels.astype(np.float32)


def anchor_sigma(step: int, num_steps: int, shift: float) -> float:
    """Noise level after `step` of `num_steps` steps counted from noise: step 45 of 50 at shift 5 is 0.357."""
    return sigma_from_uniform(1.0 - step / num_steps, shift)


def jittered_anchor(u: jax.Array, anchor: float, jitter_steps: float, num_steps: int, shift: float) -> jax.Array:
    """Anchor level moved by a uniform draw `u` in [0, 1] within ± `jitter_steps` of a `num_steps` schedule.

    WALL-WM section 2.7, asymmetric mapping: the video is seen at one noise level, with a small window in training.
    """
    moved = uniform_from_sigma(anchor, shift) + (2.0 * u - 1.0) * jitter_steps / num_steps
    return sigma_from_uniform(jnp.clip(moved, 0.0, 1.0), shift)
