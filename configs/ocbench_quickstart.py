r"""The quickstart's model: a small world action model on OCBench events, for two CPU cores.

    python -m wallwm_jax.train --config=configs/ocbench_quickstart.py \
        --config.data.store=runs/quickstart/store --workdir=runs/quickstart/train

The largest part of `bash launch/quickstart.sh`. Open-loop action error on 512 held-out windows of its store, with
`python -m wallwm_jax.evaluate --level=action --episodes=0 --windows=512 --max_seconds=900`: 0.158, the better baseline
(mean trajectory of the nearest cluster) 0.200, ratio 0.79; the aim is 0.8. Subtasks achieved: 3 of 11, too few steps to
act; `configs/ocbench_cpu.py` goes further. At 64 pixels a step takes half as long again and the ratio is 0.80.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Joint training of both towers, the text encoder and the duration head, on two of the three views."""
    config = base.get_config()
    config.unlock()
    config.data.views = ("front_pixels", "ur5e/wrist")
    config.data.levels = ConfigDict({"subtask": 0.25, "action": 0.75})
    config.data.rows = 2  # small batches: many steps in seven minutes
    config.data.actions_per_row = 192
    config.data.text_length = 64
    config.data.caption_drop = 0.0  # no guidance
    config.data.workers = 0  # on two cores, loading in threads costs less than a process
    config.model.latent_shape = (6, 6)  # 48 pixels: a third of a step is spent on pixels
    config.model.patch = (3, 3)
    config.model.place_embedding = True
    config.model.sight_cone.on = False  # with 2 x 2 patches per view nearly all cones meet
    config.model.video_prediction = "clean"  # 96 features cannot pass on the noise of a patch of 6912 values
    config.model.width = config.model.action_width = config.model.text.width = 96
    config.model.ffn = config.model.action_ffn = 384
    config.objective.action_draws = 2
    config.objective.action_shift = 3.0  # the high noise levels decide where the arm goes
    config.objective.video_sigma_power = 2.0
    config.objective.action_weight = 5.0
    config.optim.muon_lr = 1e-2
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 20
    config.train.steps = 1200
    config.train.ema_decay = 0.995
    config.train.log_every = 25
    config.train.save_every = 250
    config.sampling.action_draws = 4  # the mean of four half-noisy draws is nearer the expert than one of any kind
    config.sampling.action_temperature = 0.5
    return config.lock()
