"""Samplers: from noise to one event's video and actions, by Euler steps of the two flows.

A velocity field `v(x, sigma)` is learned on `x = (1 - sigma) x0 + sigma noise` with target `noise - x0` (WALL-WM eq. 7,
12 and 13), so `dx / dsigma = v` and sampling walks sigma from 1 down to 0.

Two samplers (section 2.7 of the report, arXiv 2606.01955):

- `symmetric`: both streams together, one sigma for both, as in joint training on small data.
- `anchored`: the video only from noise to `anchor_sigma`; one forward there gives the context (keys and values of every
  layer) on which all action steps run. The video stays there, unless somebody wants to see it.

The integrators know no model: they take functions. `ModelFlow` is the model as such functions, with guidance by the
null text; the draws of its actions, `K`, share every forward of the video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.models import flow_matching
from wallwm_jax.models import world_action_model as wam

Array = jax.Array

DENOISE_ROLE = 2  # latent_role of the latents that a sampler fills in


class Flow(Protocol):
    """The velocity fields that the samplers integrate; `sigma` is a scalar in [0, 1]."""

    def joint(self, latents: Array, actions: Array, sigma: Array) -> tuple[Array, Array]:
        """Velocities of both streams at the same sigma."""

    def video(self, latents: Array, sigma: Array) -> Array:
        """Velocity of the video stream alone."""

    def context(self, latents: Array, sigma: Array) -> tuple[Array, Any]:
        """Velocity of the video stream and what the action stream reads of this forward."""

    def action(self, context: Any, actions: Array, sigma: Array) -> Array:
        """Velocity of the action stream on a context."""


def remaining_sigmas(steps: int, shift: float, start: float) -> np.ndarray:
    """Sigmas `[steps + 1]` from `start` down to 0, equally spaced before the shift: the end of a schedule.

    `flow_matching.sigmas(45, 5.0, end=s)` and `remaining_sigmas(5, 5.0, s)` make up `flow_matching.sigmas(50, 5.0)`
    where `s` is its sigma after 45 steps.

    Raises:
      ValueError: `steps` is less than 1, or `start` is not in (0, 1].
    """
    if steps < 1 or not 0.0 < start <= 1.0:
        raise ValueError(f"remaining_sigmas: steps {steps} must be at least 1 and start {start} in (0, 1]")
    sigma: Any = np.float64(start)
    u: Any = np.linspace(flow_matching.uniform_from_sigma(sigma, shift), 0.0, steps + 1)
    levels = np.asarray(flow_matching.sigma_from_uniform(u, shift), np.float32)
    levels[0] = start
    return levels


def euler(velocity: Callable[[Any, Array], Any], x: Any, sigmas: np.ndarray) -> Any:
    """Walks `x` (an array or a tree of arrays) through `sigmas [S + 1]`: `S` evaluations of `velocity(x, sigma)`."""

    def step(x: Any, pair: Array) -> tuple[Any, None]:
        sigma, following = pair
        slope = velocity(x, sigma)
        return jax.tree.map(lambda value, v: flow_matching.euler_step(value, v, sigma, following), x, slope), None

    return jax.lax.scan(step, x, jnp.stack([sigmas[:-1], sigmas[1:]], axis=1))[0]


def symmetric(flow: Flow, latents: Array, actions: Array, *, sigmas: np.ndarray) -> tuple[Array, Array]:
    """Both streams from noise to data on the same `sigmas [S + 1]`; returns (latents, actions)."""
    return euler(lambda x, sigma: flow.joint(x[0], x[1], sigma), (latents, actions), sigmas)


def anchored(
    flow: Flow, latents: Array, actions: Array, *, video_sigmas: np.ndarray, action_sigmas: np.ndarray
) -> tuple[Array, Array]:
    """Video to the anchor, one forward there, the whole action flow on that forward's context.

    Args:
      flow: the velocity fields.
      latents, actions: noise; known latents at their places.
      video_sigmas: `[S + 1]` from 1 to the anchor sigma.
      action_sigmas: `[S' + 1]` from 1 to 0.

    Returns:
      (latents at the anchor, actions). `euler(flow.video, latents, remaining_sigmas(...))` denoises the rest of the
      video, where somebody wants to see it.
    """
    latents = euler(flow.video, latents, video_sigmas)
    _, context = flow.context(latents, jnp.asarray(video_sigmas[-1]))
    return latents, euler(lambda x, sigma: flow.action(context, x, sigma), actions, action_sigmas)


@dataclass(frozen=True)
class ModelFlow:
    """The world action model as a `Flow` over one packed batch.

    Velocities are zero where the batch has nothing to denoise (clean latents, padding): known latents stay as they are.
    With `guidance` g other than 1 every forward is run for the null text too: `v = v_null + g (v_text - v_null)`.

    Attributes:
      params: parameter tree of `models.world_action_model`.
      model: `config.model`.
      batch: packed batch; the actions that are sampled are `[K, B, A, Da]`.
      text: encoded captions; `null_text` the encoded null caption, needed only when guidance is not 1.
    """

    params: dict[str, Any]
    model: ConfigDict
    batch: dict[str, Any]
    text: Any
    null_text: Any = None
    guidance: float = 1.0

    def joint(self, latents: Array, actions: Array, sigma: Array) -> tuple[Array, Array]:
        def forward(text: Any) -> tuple[Array, Array]:
            out = wam.forward(
                self.params,
                self.model,
                self.batch,
                noisy_latents=latents,
                video_sigma=self._per_event(sigma),
                noisy_actions=actions,
                action_sigma=self._per_draw(actions, sigma),
                text=text,
            )
            assert out.action_velocity is not None
            return self._masked(out.video_velocity), out.action_velocity

        return self._guided(*(forward(text) for text in self._texts()))

    def video(self, latents: Array, sigma: Array) -> Array:
        def forward(text: Any) -> Array:
            out = wam.forward(
                self.params,
                self.model,
                self.batch,
                noisy_latents=latents,
                video_sigma=self._per_event(sigma),
                noisy_actions=None,
                action_sigma=None,
                text=text,
                run_actions=False,
            )
            return self._masked(out.video_velocity)

        return self._guided(*(forward(text) for text in self._texts()))

    def context(self, latents: Array, sigma: Array) -> tuple[Array, tuple[Any, ...]]:
        outputs = [
            wam.video_context(self.params, self.model, self.batch, latents, self._per_event(sigma), text)
            for text in self._texts()
        ]
        velocity = self._guided(*(self._masked(velocity) for velocity, _ in outputs))
        return velocity, tuple(context for _, context in outputs)

    def action(self, context: tuple[Any, ...], actions: Array, sigma: Array) -> Array:
        def forward(one: Any) -> Array:
            sigmas = self._per_draw(actions, sigma)
            return wam.action_velocity(self.params, self.model, self.batch, one, actions, sigmas)

        return self._guided(*(forward(one) for one in context))

    def _texts(self) -> tuple[Any, ...]:
        return (self.text,) if self.guidance == 1.0 else (self.text, self.null_text)

    def _guided(self, with_text: Any, without: Any = None) -> Any:
        if without is None:
            return with_text
        return jax.tree.map(lambda v, null: null + self.guidance * (v - null), with_text, without)

    def _per_event(self, sigma: Array) -> Array:
        return jnp.full(self.batch["view_id"].shape[:2], sigma, jnp.float32)

    def _per_draw(self, actions: Array, sigma: Array) -> Array:
        return jnp.full((len(actions), *self.batch["view_id"].shape[:2]), sigma, jnp.float32)

    def _masked(self, velocity: Array) -> Array:
        denoise = self.batch["latent_role"][:, None, :, None, None, None] == DENOISE_ROLE
        return jnp.where(denoise, velocity, 0.0)
