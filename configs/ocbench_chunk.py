r"""Unified mode on OCBench beside event mode: the runs of one comparison, on two CPU cores, from store to table.

One store with both kinds of windows, one event-grounded model (configs/ocbench_cpu.py), its adaptation to chunks of 32
steps after a history (stage `chunk`, here), a model of chunks from scratch at as many steps of as many tokens (here,
`:scratch`), a VLM that names events and a staircase of latents beside it (configs/ocbench_vlm.py):

    python -m wallwm_jax.build_events --source=ocbench:chamber,switch,block --episodes=288 --seed=1 \
        --windows=event,history --out=runs/arms/store
    python -m wallwm_jax.train --config=configs/ocbench_cpu.py --config.data.store=runs/arms/store \
        --workdir=runs/arms/event
    python -m wallwm_jax.train --config=configs/ocbench_chunk.py --config.data.store=runs/arms/store \
        --config.train.init_from=runs/arms/event --workdir=runs/arms/chunk
    python -m wallwm_jax.train --config=configs/ocbench_chunk.py:scratch --config.data.store=runs/arms/store \
        --workdir=runs/arms/scratch
    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:vlm_sft --config.data.store=runs/arms/store \
        --workdir=runs/arms/vlm
    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:staircase --config.data.store=runs/arms/store \
        --config.train.init_from=runs/arms/vlm --config.train.text_from=runs/arms/event --workdir=runs/arms/staircase
    python -m wallwm_jax.evaluation.arms --store=runs/arms/store --out=runs/arms/table --episodes=50 \
        --sampling=action_draws=1 --sampling=action_temperature=0.0 \
        --arm="event, oracle:run=runs/arms/event" \
        --arm="event, VLM:run=runs/arms/event,planner=runs/arms/vlm" \
        --arm="unified, instruction:run=runs/arms/chunk,mode=unified" \
        --arm="unified, staircase:run=runs/arms/chunk,mode=unified,text=runs/arms/staircase" \
        --arm="chunks from scratch:run=runs/arms/scratch,mode=unified"

Each command goes on after a stop when it is run again, training with --resume. Half of the chunks are told the subtask
or action that goes on where they begin, the rest the instruction: latents stand for the words of an event.
"""

from ml_collections import ConfigDict

from configs import ocbench_cpu
from wallwm_jax.console import UserError

ADAPTATION = 900  # steps, a fifth of those of the events


def get_config(part: str = "adapt") -> ConfigDict:
    """`adapt` goes on from a run on events; `scratch` takes as many steps as both together."""
    if part not in ("adapt", "scratch"):
        raise UserError(f"configs/ocbench_chunk.py:{part}: the part is adapt or scratch")
    config = ocbench_cpu.get_config()
    config.unlock()
    config.data.window_kind = "history"
    config.data.actions_per_row = 240  # 40 in a window, where an event has 8 per latent
    config.data.events_per_row = 8
    config.data.chunk_event_prob = 0.5
    config.data.duration_clause_prob = 0.0  # a chunk's length is no news
    if part == "scratch":
        config.train.steps += ADAPTATION
        return config.lock()
    config.train.stage = "chunk"
    config.train.steps = ADAPTATION
    config.optim.warmup_steps = 50
    config.optim.muon_lr *= 0.3
    config.optim.lr *= 0.3
    return config.lock()
