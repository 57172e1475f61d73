r"""What the paper changed at once, apart: event or chunk, with view attention or without, at matched tokens.

    python -m wallwm_jax.sweep configs/sweeps/view_attention.py --store=runs/arms/store --out=runs/sweeps/views
    S=runs/sweeps/views; python -m wallwm_jax.evaluation.arms --store=runs/arms/store --out=$S/acting --episodes=50 \
        --sampling=action_draws=1 --sampling=action_temperature=0.0 \
        --arm="event, views:run=runs/arms/event,level=action" --arm="event:run=$S/event/seed-0/train,level=action" \
        --arm="event, views, own duration:run=runs/arms/event,level=action,own_duration" \
        --arm="event, own duration:run=$S/event/seed-0/train,level=action,own_duration" \
        --arm="chunk, views:run=$S/chunk-views/seed-0/train,mode=unified" \
        --arm="chunk:run=$S/chunk/seed-0/train,mode=unified"
    python -m wallwm_jax.evaluate --workdir=RUN --store=runs/arms/store --episodes=0 --windows=256 --out=OUT \
        --sampling=action_draws=1 --sampling=action_temperature=0.0    # of each; --level=action or --mode=unified

Four models from scratch, which see as many latents; the store has windows of both kinds
(`--windows=event,history`). The sweep trains three, the fourth is `configs/ocbench_chunk.py:event` (runs/arms/event).
The second command acts, on the same trials: events by the scripted planner's words, its durations (the oracle) or the
model's own, chunks by the task's instruction.

Measured, one seed, on 50 trials, events told actions, chunks the instruction:

                                    event, views    event           chunk, views   chunk
    subtasks achieved               20 % [12, 32]   14 % [7, 25]    0 % [0, 7]     0 % [0, 7]
    by the model's own durations    21 % [12, 32]   16 % [9, 28]
    action error, 256 windows       0.158           0.156           0.285          0.293
    times the better baseline       0.84            0.83            0.73           0.75

Trial by trial events are 20 points [12, 28] above chunks with view attention, 14 [6, 21] without. View attention is
worth 7 points of acting [-3, 16] and nothing of the action error: with these two cameras it cannot be told from chance.
Errors of events and of chunks are over different windows, so only neighbours compare.
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
