"""The tiny config that tests build models from, and the random batches of the benchmarks."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import base
from wallwm_jax.benchmarks.random_batch import random_batch as random_batch


def tiny_config(**data: object) -> ConfigDict:
    """The base config with every size cut down; `data` overrides entries of `config.data`."""
    config = base.get_config().copy_and_resolve_references()
    with config.unlocked():
        sizes = dict(rows=2, latents_per_row=12, actions_per_row=80, events_per_row=5, text_length=12)
        config.data.update(sizes | data)
        config.model.update(
            dict(
                latent_shape=(4, 4),
                latent_channels=6,
                width=32,
                depth=2,
                heads=2,
                ffn=64,
                freq_dim=32,
                max_views=4,
                action_width=24,
                action_heads=2,
                action_ffn=48,
                max_latents=6,
            )
        )
        config.model.text.update(dict(width=16, depth=1, heads=2))
    return config.lock()
