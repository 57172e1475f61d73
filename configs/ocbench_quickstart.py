"""The quickstart's model: a small world action model on OCBench events, trained in about six minutes on two CPU cores.

python -m wallwm_jax.train --config=configs/ocbench_quickstart.py --config.data.store=runs/quickstart/store \
    --workdir=runs/quickstart/train
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Joint training of both towers, the text encoder and the duration head, two of the three views."""
    config = base.get_config()
    config.unlock()
    config.data.views = ("front_pixels", "ur5e/wrist")
    config.data.rows = 2
    config.data.workers = 0
    config.model.width = config.model.action_width = 96
    config.model.ffn = config.model.action_ffn = 384
    config.model.text.width = 96
    config.train.steps = 300
    config.train.ema_decay = 0.99
    config.train.log_every = 25
    config.train.save_every = 100
    return config.lock()
