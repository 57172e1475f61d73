r"""Latents of a staircase on OCBench, tied to what frozen towers read and to a reasoning trace, for two CPU cores.

    python -m wallwm_jax.train --config=configs/ocbench_staircase.py --config.data.store=runs/quickstart/store \
        --workdir=runs/staircase --config.train.init_from=runs/vlm --config.train.text_from=runs/quickstart/train
    python -m wallwm_jax.evaluation.latents --workdir=runs/staircase --store=runs/quickstart/store

`init_from` is a run of configs/ocbench_vlm.py, stage `vlm_sft`; `text_from` one of a world action model, both towers,
of the sizes of configs/ocbench_quickstart.py. The ties are trace and match; the third, the towers' own action loss, is
--config.objective.latent_action_weight=1. configs/sweeps/latent_ties.py compares them, and says why it is left out.

Measured on the runs of configs/ocbench_chunk.py and 267 held-out events: of the gap in action loss between no text and
the true caption (0.025) the latents close 60 % [52, 67], those of another event 22 % [7, 34]; of that between another
caption and the true one 65 % [56, 73] against 31 % [17, 43]. What the tower's cross-attention reads is 0.84 away from
what it reads of the true caption, with another caption 2.01.
"""

from ml_collections import ConfigDict

from configs import ocbench_vlm


def get_config() -> ConfigDict:
    """Stage `staircase`, tied by trace and match."""
    config = ocbench_vlm.get_config("staircase")
    config.unlock()
    config.data.vlm.inside_prob = 0.0
    config.data.vlm.done_prob = 0.1  # where no event follows, two of three ties have nothing to say
    config.data.latents_per_row = 17  # of one event, the longest
    config.data.actions_per_row = 128
    config.train.steps = 300
    config.train.save_every = 100
    config.train.ema_decay = 0.98
    return config.lock()
