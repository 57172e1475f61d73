r"""A tiny vision-language model that names the next event on OCBench, for two CPU cores; stages by argument.

    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:vlm_sft --config.data.store=runs/quickstart/store \
        --workdir=runs/vlm
    python -m wallwm_jax.evaluation.planner_accuracy --workdir=runs/vlm --store=runs/quickstart/store

It reads words and two views, names subtasks, and says how long one still takes. Then its features take the place of the
text encoder of a world action model, with the model's own sizes from configs/ocbench_quickstart.py:

    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:vlm_text --config.data.store=runs/quickstart/store \
        --workdir=runs/vlm_text --config.train.init_from=runs/vlm --config.train.text_from=runs/quickstart/train
    python -m wallwm_jax.evaluation.latents --workdir=runs/vlm_text --store=runs/quickstart/store

In words a row has 176 + 144 tokens, where bytes need 416 + 320 for the same history, and what an answer says is a third
of its tokens, not a tenth.

Measured with the first two commands on twice the quickstart's demonstrations, the store of configs/ocbench_chunk.py:
of 331 held-out questions 32 % [27, 37] exact, 66 % [61, 71] with the right object; of 129 after orders that training
had not seen 33 % [26, 42] and 66 % [57, 74]. What followed most often on the last event, by its text alone: 38 %
[33, 43] and 52 % [46, 57], of unseen orders 38 % [30, 47] and 48 % [40, 57]. So it reads from the picture what is next,
and words it worse. On half the demonstrations, 13 minutes of training on two busy cores, 28 % [21, 35] and 61 %
[53, 68] of 151. Time of the next event: median error 0.90 s; time left inside events 0.60 s, where half of the
caption's usual duration has 0.63.

And with the last two, on the runs of configs/ocbench_chunk.py: of the gap in action loss between no text and the true
caption (0.025, 267 held-out events) the features close 65 % [52, 76], those of another event 9 % [-8, 23]; of that
between another caption and the true one 70 % [57, 81] against 21 % [5, 35]. Their length is right for 74 % [69, 79].
"""

from ml_collections import ConfigDict

from configs import ocbench_quickstart


def get_config(stage: str = "vlm_sft") -> ConfigDict:
    """Stage `vlm_sft` or `vlm_text`; configs/ocbench_staircase.py starts from it, too."""
    config = ocbench_quickstart.get_config()
    config.unlock()
    config.data.levels = ConfigDict({"subtask": 1.0})
    config.data.rows = 8
    config.data.vlm.length = 176  # about six subtasks of history
    config.data.vlm.answer_length = 32
    config.data.vlm.trace_length = 144
    config.data.vlm.inside_prob = 0.2
    config.data.vlm.done_prob = 0.25
    config.data.vl_power = config.data.action_power = 0.0  # events as often as they occur, so as they are asked for
    config.vlm.tokenizer = "words"
    config.vlm.language.vocabulary = config.vlm.small.vocabulary = 512
    config.vlm.vision.update(width=64, heads=4, ffn=128, depth=3)
    config.optim.muon_lr = 1e-2
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.train.stage = stage
    config.train.steps = 1200
    config.train.ema_decay = 0.99
    config.train.save_every = 200
    return config.lock()
