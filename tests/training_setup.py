"""What the tests of training share: one tiny run on the small store, its step compiled once per stage and test run."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from random_batch import random_batch
from tiny_model import random_params, store_config

from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.packing import batch_spec
from wallwm_jax.data.pipeline import resolve_views
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training import train_step
from wallwm_jax.training.train_state import TrainState
from wallwm_jax.training.train_step import TrainStep, build_train_step

STEPS = 6


def training_config(store_path: str | Path, stage: str = "joint") -> ConfigDict:
    """A run of `STEPS` steps, a checkpoint every second, two rows of eight latents, on the store at `store_path`."""
    store = open_store(store_path)
    config = store_config(store)
    with config.unlocked():
        config.data.update(rows=2, latents_per_row=8, actions_per_row=64, events_per_row=4, draw_block_rows=8)
        config.data.update(workers=0, text_length=24, views=resolve_views(store, config), fill_target=0.9)
        config.model.update(patch=(4, 4), max_latents=4)
        config.objective.action_draws = 2
        config.optim.warmup_steps = 2
        config.train.update(stage=stage, steps=STEPS, save_every=2, log_every=2)
    return config.lock()


def subprocess_environment() -> dict[str, str]:
    """For processes that import the tests' modules; they compile as conftest.py says."""
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}


@functools.cache
def built_step(store_path: Path, stage: str) -> TrainStep:
    """The train step of a stage on one device, not compiled."""
    config = training_config(store_path, stage)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return build_train_step(config, mesh, open_store(store_path).channel_weights())


@functools.cache
def compiled_step(store_path: Path, stage: str) -> Any:
    """The compiled program of `built_step`."""
    config, built = training_config(store_path, stage), built_step(store_path, stage)
    shapes = built.abstract_batch(batch_spec(config, config.data.rows))
    return built.step.lower(built.abstract_state, shapes).compile()


def use_prepared_steps(monkeypatch: Any, store_path: Path) -> None:
    """Lets `wallwm_jax.train.run` on `training_config(store_path, stage)` find its step already compiled.

    For tests of what surrounds the step; that `run` compiles it once is seen where the command itself is started.
    """

    def build(config: ConfigDict, *_: Any) -> TrainStep:
        built, program = built_step(store_path, config.train.stage), compiled_step(store_path, config.train.stage)
        lowered = SimpleNamespace(compile=lambda: program)
        return dataclasses.replace(built, step=SimpleNamespace(lower=lambda *_: lowered))

    monkeypatch.setattr(train_step, "build_train_step", build)


def traced_steps(directory: Path) -> list[int]:
    """Numbers of the train steps in the profile under `directory`."""
    (file,) = directory.rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    return sorted(dict(event.stats)["step_num"] for event in events)


def device_batch(config: ConfigDict, built: TrainStep, seed: int = 0) -> dict[str, jax.Array]:
    """A random packed batch where the step wants it."""
    return jax.device_put(random_batch(config, seed), built.rows)


def random_state(config: ConfigDict, built: TrainStep, seed: int = 0) -> TrainState:
    """A state at step 0 with every parameter random, so that no zero-initialised output stops a gradient."""
    trainable, frozen = built.stage.split(random_params(config.model, seed))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=jax.jit(built.optimizer.init)(trainable),
        ema=trainable,
        frozen=frozen,
    )
    return jax.tree.map(
        lambda leaf, like: jax.device_put(np.asarray(leaf, like.dtype), like.sharding, may_alias=False),
        state,
        built.abstract_state,
    )
