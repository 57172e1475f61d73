"""The large imported tower: Wan 2.1 T2V-14B's (14.3 B, 18.5 B with view attention) and an action tower of width 1024.

Stages by argument, as in configs/wan5b.py:

    python -m wallwm_jax.train --config=configs/wan14b.py:video --workdir=runs/video --config.data.store=STORE

STORE holds latents of Wan 2.1's codec (stride 4x8x8, 16 channels) of 192x224 frames: 24x28 cells, 168 tokens per view
and latent frame; and caption features of UMT5-XXL. Sized for v5p:8x8x8 (512 chips), one row of 34 latent frames each.
"""

from ml_collections import ConfigDict

from configs import wan5b


def get_config(stage: str = "video") -> ConfigDict:
    """The 14B pair at one stage of pretraining."""
    config = wan5b.get_config(stage)
    config.model.update(dict(latent_shape=(24, 28), latent_channels=16, width=5120, depth=40, heads=40, ffn=13824))
    config.model.remat = "selective"
    config.data.update(dict(rows=512))
    return config
