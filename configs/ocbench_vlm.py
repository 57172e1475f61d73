r"""A tiny vision-language model that names the next event on OCBench, for two CPU cores; stages by argument.

    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:vlm_sft --config.data.store=runs/quickstart/store \
        --workdir=runs/vlm
    python -m wallwm_jax.evaluation.planner_accuracy --workdir=runs/vlm --store=runs/quickstart/store

It reads bytes and two views, and names subtasks. Then its features take the place of the text encoder of a world action
model, with the model's own sizes from configs/ocbench_quickstart.py:

    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:vlm_text --config.data.store=runs/quickstart/store \
        --workdir=runs/vlm_text --config.train.init_from=runs/vlm --config.train.text_from=runs/quickstart/train

Or a staircase of four latents beside it is tied to how a world action model's video tower reads captions, here to that
of configs/ocbench_cpu.py (of the quickstart: add --config.model.patch="(4, 4)" --config.model.place_embedding):

    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:staircase --config.data.store=runs/cpu/store \
        --workdir=runs/staircase --config.train.init_from=runs/vlm --config.train.text_from=runs/cpu/train
"""

from ml_collections import ConfigDict

from configs import ocbench_cpu, ocbench_quickstart


def get_config(stage: str = "vlm_sft") -> ConfigDict:
    """Stage `vlm_sft`, `vlm_text` or `staircase`."""
    config = (ocbench_cpu if stage == "staircase" else ocbench_quickstart).get_config()
    config.unlock()
    config.data.levels = ConfigDict({"subtask": 1.0})
    config.data.rows = 4
    config.data.vlm.length = 416  # about six subtasks of history
    config.data.vlm.answer_length = 96
    config.data.vlm.trace_length = 320
    config.optim.muon_lr = 5e-3
    config.optim.lr = 2e-3
    config.optim.warmup_steps = 50
    config.train.stage = stage
    config.train.steps = 1000
    config.train.ema_decay = 0.99
    config.train.save_every = 250
    config.train.log_every = 25
    return config.lock()
