"""WALL-WM's size: Wan 2.2 TI2V-5B's video tower (5.0 B, 6.1 B with view attention) and an action tower of width 1024.

Stages by argument, each on what the one before it left (`joint` for a small data set):

    python -m wallwm_jax.train --config=configs/wan5b.py:video  --workdir=runs/video --config.data.store=STORE
    python -m wallwm_jax.train --config=configs/wan5b.py:action --workdir=runs/action --config.data.store=STORE \
        --config.train.init_from=runs/video

STORE holds latents of Wan 2.2's codec (stride 4x16x16, 48 channels) of 192x224 frames: 12x14 cells, 42 tokens per view
and latent frame; and caption features of UMT5-XXL. Sized for v5p:4x4x8 (128 chips), four rows of 34 latent frames each.
The learning rates are those of fine-tuning pretrained weights; the paper states none.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(stage: str = "video") -> ConfigDict:
    """The 5B pair at one stage of pretraining."""
    config = base.get_config()
    config.train.stage = stage
    config.model.update(
        dict(
            latent_shape=(12, 14),
            latent_channels=48,
            width=3072,
            depth=30,
            heads=24,
            ffn=14336,
            action_width=1024,
            action_heads=16,
            action_ffn=4096,
            compute_dtype="bfloat16",
            remat="products",
        )
    )
    config.model.text.update(dict(kind="features", width=4096, pad_to=512))
    config.data.update(dict(rows=512, events_per_row=8, workers=8))
    config.objective.update(dict(action_draws=6))
    config.optim.update(dict(lr=5e-5, muon_lr=5e-5, muon_dtype="bfloat16", warmup_steps=1000))
    config.train.update(dict(steps=200_000, log_every=20, save_every=1000, heldout_every=1000))
    return config
