"""What the tests of the VLM stages share: a tiny VLM on the small store, its steps compiled once per test run."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tiny_model import random_like
from training_setup import training_config

from wallwm_jax.config import to_json
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.vlm_batches import VlmRows
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training import train_step
from wallwm_jax.training.checkpoint import Checkpointer, prepare_workdir
from wallwm_jax.training.train_state import TrainState
from wallwm_jax.training.train_step import TrainStep, build_train_step


def vlm_training_config(store_path: str | Path, stage: str = "vlm_sft") -> ConfigDict:
    """The tests' run of a VLM stage: names subtasks and actions, one delta net and one attention per model; all ties of
    latents weigh 1."""
    config = training_config(store_path, stage).copy_and_resolve_references()
    with config.unlocked():
        config.data.vlm.update(image_size=32, length=256, answer_length=64, trace_length=96)
        config.data.text_length = 48
        for part in ("language", "small"):
            config.vlm[part].update(
                width=32, ffn=48, depth=2, interval=2, heads=2, kv_heads=1, head_dim=16, rotary_dim=8,
                mrope_section=(2, 1, 1), linear_key_heads=1, linear_value_heads=2, linear_key_dim=16,
                linear_value_dim=16,
            )  # fmt: skip
        config.vlm.vision.update(width=16, ffn=24, depth=1)
        config.vlm.update(resampler_depth=1, entry_depths=(0, 1))
        config.optim.update(name="adamw", lr=1e-2)
        if stage == "staircase":
            config.objective.update(latent_action_weight=1.0, latent_video_weight=1.0)
    return config.lock()


@functools.cache
def built_vlm_step(store_path: Path, stage: str) -> TrainStep:
    """The train step of a VLM stage on one device, not compiled; `init` gives `random_vlm_state`."""
    config = vlm_training_config(store_path, stage)
    built = build_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    return dataclasses.replace(built, init=lambda: random_vlm_state(built))


@functools.cache
def compiled_vlm_step(store_path: Path, stage: str) -> Any:
    """The compiled program of `built_vlm_step`."""
    config, built = vlm_training_config(store_path, stage), built_vlm_step(store_path, stage)
    shapes = built.abstract_batch(VlmRows.spec(config, config.data.rows))
    return built.step.lower(built.abstract_state, shapes).compile()


def random_vlm_state(built: TrainStep, seed: int = 0) -> TrainState:
    """A state at step 0 with every parameter random."""
    abstract = built.abstract_state
    trainable, frozen = (random_like(tree, seed, 0.1) for tree in (abstract.trainable, abstract.frozen))
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract.opt_state)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, trainable, frozen)
    return jax.tree.map(
        lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding, may_alias=False), state, abstract
    )


def save_random_staircase(store_path: Path, workdir: Path, text_width: int) -> None:
    """Writes a run of stage `staircase` with random parameters, whose latents are `text_width` wide."""
    config, store = vlm_training_config(store_path, "staircase"), open_store(store_path)
    with config.unlocked():
        config.model.text.width = text_width
    state = random_vlm_state(build_train_step(config, make_mesh(config.mesh, jax.devices()[:1])))
    saver = Checkpointer(prepare_workdir(workdir, resume=False, overwrite=False), keep=1, save_every=1)
    saver.keep_frozen(state.frozen)
    described = {**store.meta, "views": list(config.data.views)}
    saver.save(1, state, {"store": described, "stats": store.stats.to_dict()}, json.loads(to_json(config)))
    saver.close()


def use_prepared_vlm_steps(monkeypatch: Any, store_path: Path) -> None:
    """As `training_setup.use_prepared_steps`, of `vlm_training_config`."""

    def build(config: ConfigDict, *_: Any) -> TrainStep:
        stage = config.train.stage
        built, program = built_vlm_step(store_path, stage), compiled_vlm_step(store_path, stage)
        lowered = SimpleNamespace(compile=lambda: program)
        return dataclasses.replace(built, step=SimpleNamespace(lower=lambda *_: lowered))

    monkeypatch.setattr(train_step, "build_train_step", build)


def vlm_batch(store_path: Path, config: ConfigDict, rows: tuple[int, ...] = (0, 1)) -> dict[str, np.ndarray]:
    """These rows as one host batch."""
    make = VlmRows(open_store(store_path), config)
    made = [make(row) for row in rows]
    return {name: np.stack([row[name] for row in made]) for name in VlmRows.spec(config, len(rows))}
