"""The store of windows with history that tests share (`conftest.history_store`), and the tiny config that fits it."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict
from random_batch import tiny_config
from synthetic import synthetic_episode

from wallwm_jax.data.clusters import cluster_store
from wallwm_jax.data.event_store import EventStore
from wallwm_jax.data.store_writer import StoreOptions, atomic_directory, write_store

HISTORY, STEPS = 2, 24
PAST = 8 * HISTORY  # commands of the history


def build(target: Path) -> None:
    """Writes the store."""
    options = StoreOptions(kinds=("event", "history"), fixed_steps=STEPS, history=HISTORY, latent_sample=16)
    with atomic_directory(target, overwrite=False) as directory:
        write_store(directory, (synthetic_episode(seed, steps=64 + 7 * seed) for seed in range(4)), options)
    cluster_store(target)


def configured(store: EventStore) -> ConfigDict:
    """One row of windows with history."""
    config = tiny_config()
    with config.unlocked():
        config.data.update(
            window_kind="history",
            views=tuple(store.meta["views"]),
            rows=1,
            latents_per_row=18,
            actions_per_row=128,
            events_per_row=4,
            text_length=48,
            workers=0,
        )
        config.data.update(fill_target=0.9, draw_block_rows=4)
        config.model.update(latent_shape=(8, 8), latent_channels=768, patch=(4, 4), max_latents=17)
        config.objective.action_draws = 1
    return config
