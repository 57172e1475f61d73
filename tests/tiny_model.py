"""Tiny models and runs for tests: parameters without compiling an initialiser, checkpoints without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from random_batch import tiny_config

from wallwm_jax.config import to_json
from wallwm_jax.data.event_store import EventStore
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.codecs import get_codec
from wallwm_jax.training.checkpoint import Checkpointer
from wallwm_jax.training.train_state import TrainState


def random_params(model: ConfigDict, seed: int = 0, scale: float = 0.2) -> dict[str, Any]:
    """Every parameter of `config.model` drawn from a normal, so that no zero-initialised output hides a mistake."""
    return random_like(wam.abstract_params(model), seed, scale)


def random_like(shapes: dict[str, Any], seed: int = 0, scale: float = 0.2) -> dict[str, Any]:
    """Normal draws of the shapes and types of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def save_run(
    workdir: Path, store: EventStore, config: ConfigDict, *, step: int = 7, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Makes `workdir` a run with one checkpoint; returns its average, which differs from its trained parameters.

    Parameter groups in `without` are left out.
    """
    params, average = random_params(config.model, seed=1), random_params(config.model, seed=2)
    params, average = ({k: v for k, v in tree.items() if k not in without} for tree in (params, average))
    save_params(workdir, store, config, params, average, step=step)
    return average


def save_params(
    workdir: Path, store: EventStore, config: ConfigDict, params: dict[str, Any], average: dict[str, Any], step: int = 7
) -> None:
    """Makes `workdir` a run with one checkpoint of these parameters."""
    state = TrainState(np.int32(step), params, {"momentum": params}, average, {})
    checkpointer = Checkpointer(workdir, keep=1, save_every=1)
    assets = {"store": store.meta, "stats": store.stats.to_dict()}
    checkpointer.save(step, state, assets, json.loads(to_json(config)))
    checkpointer.close()


def store_config(store: EventStore, **sampling: Any) -> ConfigDict:
    """A tiny model that fits `store`, with `sampling` in place of the base config's."""
    config = tiny_config()
    with config.unlocked():
        config.data.store = str(store.path)
        config.data.text_length = 96
        config.model.latent_shape = tuple(side // 8 for side in store.meta["size"])
        config.model.latent_channels = get_codec(store.meta["codec"]).channels
        config.model.max_latents = 16
        config.sampling.update({"steps": 2, "video_steps": 2, "buckets": (2, 3), "action_temperature": 1.0, **sampling})
    return config
