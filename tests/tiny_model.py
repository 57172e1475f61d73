"""Random parameters without compiling an initialiser, and a switch that halves the time to compile tiny programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from random_batch import tiny_config

from wallwm_jax.data.event_store import EventStore
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.codecs import get_codec


def random_params(model: ConfigDict, seed: int = 0, scale: float = 0.2) -> dict[str, Any]:
    """Every parameter of `config.model` drawn from a normal, so that no zero-initialised output hides a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), wam.abstract_params(model)
    )


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles without most optimisations inside the block."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def store_config(store: EventStore, **sampling: Any) -> ConfigDict:
    """A tiny model that fits `store`, with `sampling` in place of the base config's."""
    config = tiny_config()
    with config.unlocked():
        config.data.store = str(store.path)
        config.data.text_length = 96
        config.model.latent_shape = tuple(side // 8 for side in store.meta["size"])
        config.model.latent_channels = get_codec(store.meta["codec"]).channels
        config.model.max_latents = 16
        config.sampling.update({"steps": 2, "video_steps": 2, "buckets": (2, 3, 5), **sampling})
    return config
