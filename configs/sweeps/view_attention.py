r"""What the paper changed at once, apart: event or chunk, with view attention or without, at matched tokens.

    python -m wallwm_jax.sweep configs/sweeps/view_attention.py --store=runs/arms/store --out=runs/sweeps/views
    S=runs/sweeps/views; python -m wallwm_jax.evaluation.arms --store=runs/arms/store --out=$S/acting --episodes=50 \
        --sampling=action_draws=1 --sampling=action_temperature=0.0 \
        --arm="event, views:run=runs/arms/event" --arm="event:run=$S/event/seed-0/train" \
        --arm="event, views, own duration:run=runs/arms/event,own_duration" \
        --arm="event, own duration:run=$S/event/seed-0/train,own_duration" \
        --arm="chunk, views:run=$S/chunk-views/seed-0/train,mode=unified" \
        --arm="chunk:run=$S/chunk/seed-0/train,mode=unified"

Four models from scratch, which see as many latents; the store has windows of both kinds
(`--windows=event,history`). The sweep trains three, the fourth is `configs/ocbench_chunk.py:event` (runs/arms/event).
The second command acts, on the same trials: events by the scripted planner's words, its durations (the oracle) or the
model's own, chunks by the task's instruction.

Measured of the two models of events, told actions (`level=action` in each arm), on 50 trials: with view attention
20 % [12, 32] of the subtasks, without 14 % [7, 25], the difference 7 points [-3, 16]; by their own durations 21 and
16 %. Those of chunks have not been run.
"""

from configs import ocbench_chunk
from wallwm_jax.evaluation.sweeps import Sweep

CHUNKS = {  # as configs/ocbench_chunk.py, told the instruction alone
    "data.window_kind": "history",
    "data.latents_per_row": ocbench_chunk.CHUNKS,
    "train.steps": ocbench_chunk.MATCHED,
    "data.actions_per_row": 240,
    "data.events_per_row": 8,
    "data.duration_clause_prob": 0.0,
}


def get_sweep() -> Sweep:
    """The model of `configs/ocbench_chunk.py:event`, and what differs from it."""
    alone = {"model.view_attention": False}
    return Sweep(
        config="configs/ocbench_chunk.py:event",
        arms={"event": alone, "chunk, views": CHUNKS, "chunk": CHUNKS | alone},
        overrides={"train.save_every": 600},
    )
