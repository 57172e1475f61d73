"""Staircase Decoding: K latents of a language model in one pass over its depth (WALL-WM section 3.2).

A branch with parameters of its own, cloned from a frozen backbone, runs K positions behind the backbone's text.
Position k enters at depth `entry_depths[k]`, from the state of the one before it relayed sideways at that depth, so
that all of them are through when the layers are: L steps one after the other, where K tokens decoded in turn take K L.

    depth 0 ... e_1 ... e_2 ... L         in every layer a position reads the backbone's keys, values and recurrent
    1 ────────┬──────────────────▶ z_1    states of that layer, and those positions of the branch that came before it
              └ 2 ───┬───────────▶ z_2
                     └ 3 ────────▶ z_3    one projector for all
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wallwm_jax.console import UserError
from wallwm_jax.models.layers import Linear
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.language_blocks import OffsetNorm
from wallwm_jax.models.vlm.language_model import Cache, run_layers

Params = dict[str, Any]

_EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class StaircaseConfig:
    """Which position enters where.

    Attributes:
      entry_depths: layers below each position's entry, the first 0, never falling; equal ones enter together, from the
        last position before them. All zeros are K prompt tokens.
      out_width: of the projected latents, that of the video tower's text features.
      prefix_width: of the soft prefix, the width of the language model that reads it.
    """

    entry_depths: tuple[int, ...]
    out_width: int
    prefix_width: int

    @classmethod
    def stairs(cls, latents: int, out_width: int, prefix_width: int, spacing: int = 4) -> StaircaseConfig:
        """Position k enters at depth k times `spacing`."""
        return cls(tuple(spacing * k for k in range(latents)), out_width, prefix_width)

    @classmethod
    def flat(cls, latents: int, out_width: int, prefix_width: int, relay_depth: int) -> StaircaseConfig:
        """The control: the first position alone runs the lower layers, all others enter at `relay_depth` from it."""
        return cls((0, *(relay_depth for _ in range(latents - 1))), out_width, prefix_width)

    def check(self, depth: int) -> None:
        """Raises `UserError` where the positions cannot enter a backbone of `depth` layers so."""
        if not self.entry_depths or self.entry_depths[0] != 0 or list(self.entry_depths) != sorted(self.entry_depths):
            raise UserError(f"entry_depths {self.entry_depths}: the first is 0, and none is less than the one before")
        if self.entry_depths[-1] >= depth:
            raise UserError(
                f"entry_depths {self.entry_depths}: the last latent must enter below the top of the {depth} layers; "
                "take fewer latents or closer entries"
            )


class Border(nnx.Module):
    """Where positions enter the branch and leave it."""

    def __init__(self, config: StaircaseConfig, language: LanguageConfig, *, rngs: nnx.Rngs):
        width, dtype = language.width, jnp.dtype(language.compute_dtype)

        def table(*shape: int) -> nnx.Param:
            return nnx.Param(_EMBEDDING_STD * jax.random.normal(rngs.params(), shape, jnp.float32))

        self.start = table(width)
        self.steps = table(len(config.entry_depths), width)
        self.relay_norm = OffsetNorm(width)
        self.relay = Linear(width, width, rngs=rngs, dtype=dtype, std=0.0)
        self.norm = OffsetNorm(width)
        self.projector = Linear(width, config.out_width, rngs=rngs, dtype=dtype)
        self.prefix = Linear(width, config.prefix_width, rngs=rngs, dtype=dtype)

    def enter(self, source: jax.Array, step: jax.Array) -> jax.Array:
        """New positions `[B, n, D]` from the state `source [B, 1, D]` of the one before; at first, its copies."""
        relayed = source + self.relay(self.relay_norm(source)).astype(source.dtype)
        return relayed + step.astype(source.dtype)


def init(config: StaircaseConfig, language: LanguageConfig, backbone: Params, key: jax.Array) -> Params:
    """A branch that starts as the backbone: `blocks` and the final norm are its copies, `border` is new.

    Args:
      config: of the stairs.
      language: sizes of the backbone.
      backbone: its parameters, `language_model.init` or converted.
      key: of what is new.

    Raises:
      UserError: stairs that do not fit the backbone.
    """
    config.check(language.depth)
    border = nnx.to_pure_dict(nnx.state(Border(config, language, rngs=nnx.Rngs(params=key)), nnx.Param))
    copied = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), clone(backbone))
    return {**copied, "border": {**border, **copied["border"]}}


def clone(backbone: Params) -> Params:
    """What a branch takes over from its backbone's parameters: the blocks and the final norm."""
    return {"blocks": backbone["blocks"], "border": {"norm": backbone["norm"]}}


def decode(params: Params, config: StaircaseConfig, language: LanguageConfig, cache: Cache) -> jax.Array:
    """The latents `[B, K, D]` behind the text in `cache`, normed; differentiable in `params` and in the cache.

    Args:
      params: from `init`.
      config, language: of the branch.
      cache: of the backbone, from `language_model.prefill` with K free slots; it is read only.
    """
    border, batch = _bind(params, config, language), len(cache.position)
    steps, depths = border.steps[...], config.entry_depths
    hidden = jnp.zeros((batch, 0, language.width), language.compute_dtype)
    for first, last in itertools.pairwise([*sorted(set(depths)), language.depth]):
        step = steps[depths.index(first) : depths.index(first) + depths.count(first)]
        if first:
            entering = border.enter(hidden[:, -1:], step)
        else:
            entering = jnp.broadcast_to(border.start[...] + step, (batch, *step.shape)).astype(hidden.dtype)
        hidden = jnp.concatenate([hidden, entering], 1)
        place = cache.position[:, None] + jnp.arange(hidden.shape[1])
        positions = jnp.broadcast_to(place, (3, *place.shape))
        hidden, _ = run_layers(params["blocks"], language, hidden, positions, cache, first=first, last=last)
    return border.norm(hidden)


def project(params: Params, config: StaircaseConfig, language: LanguageConfig, latents: jax.Array) -> jax.Array:
    """Latents `[B, K, D]` to the video tower's text space, `[B, K, out_width]`, float32."""
    return _bind(params, config, language).projector(latents).astype(jnp.float32)


def soft_prefix(params: Params, config: StaircaseConfig, language: LanguageConfig, latents: jax.Array) -> jax.Array:
    """Latents `[B, K, D]` as embeddings of a smaller language model, `[B, K, prefix_width]`, float32 (P_pref)."""
    return _bind(params, config, language).prefix(latents).astype(jnp.float32)


def _bind(params: Params, config: StaircaseConfig, language: LanguageConfig) -> Border:
    return nnx.merge(_graph(config, language), params["border"])


@functools.lru_cache(maxsize=8)
def _graph(config: StaircaseConfig, language: LanguageConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Border(config, language, rngs=nnx.Rngs(0))))[0]
