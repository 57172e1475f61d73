"""The small imported tower: Wan 2.1 T2V-1.3B's (1.4 B, 1.7 B with view attention) and an action tower of width 768.

Stages by argument, as in configs/wan5b.py:

    python -m wallwm_jax.train --config=configs/wan1b3.py:video --workdir=runs/video --config.data.store=STORE

STORE holds latents of Wan 2.1's codec (stride 4x8x8, 16 channels) of 96x112 frames: 12x14 cells, 42 tokens per view and
latent frame; and caption features of UMT5-XXL. Sized for one 80 GB GPU or v5p:2x2x1 (4 chips), eight rows in all.
"""

from ml_collections import ConfigDict

from configs import wan5b


def get_config(stage: str = "video") -> ConfigDict:
    """The 1.3B pair at one stage of pretraining."""
    config = wan5b.get_config(stage)
    config.model.update(
        dict(latent_channels=16, width=1536, heads=12, ffn=8960, action_width=768, action_heads=12, action_ffn=3072)
    )
    config.data.update(dict(rows=8))
    return config
