r"""Unified mode on OCBench beside event mode: the runs of one comparison, on two CPU cores, from store to page.

One store with both kinds of windows, one event-grounded model of the quickstart's size with half again its steps
(`:event`), its adaptation to chunks of 32 steps after a history (`:adapt`, stage `chunk`), a model of chunks from
scratch that sees as many latents as both (`:scratch`), a VLM that names events, and beside it a staircase of latents
and a projector into the text encoder's place:

    python -m wallwm_jax.build_events --source=ocbench:chamber,switch,block --episodes=144 --seed=1 --size=48 \
        --views=front_pixels,ur5e/wrist --windows=event,history --out=runs/arms/store
    S=--config.data.store=runs/arms/store
    python -m wallwm_jax.train --config=configs/ocbench_chunk.py:event $S --workdir=runs/arms/event
    python -m wallwm_jax.train --config=configs/ocbench_chunk.py:adapt $S --config.train.init_from=runs/arms/event \
        --workdir=runs/arms/chunk
    python -m wallwm_jax.train --config=configs/ocbench_chunk.py:scratch $S --workdir=runs/arms/scratch
    python -m wallwm_jax.train --config=configs/ocbench_vlm.py $S --workdir=runs/arms/vlm
    python -m wallwm_jax.train --config=configs/ocbench_staircase.py $S --config.train.init_from=runs/arms/vlm \
        --config.train.text_from=runs/arms/event --workdir=runs/arms/staircase
    python -m wallwm_jax.train --config=configs/ocbench_vlm.py:vlm_text $S --config.train.init_from=runs/arms/vlm \
        --config.train.text_from=runs/arms/event --workdir=runs/arms/vlm_text
    python -m wallwm_jax.evaluation.arms --store=runs/arms/store --out=runs/arms/table --episodes=50 \
        --sampling=action_draws=1 --sampling=action_temperature=0.0 \
        --arm="event, oracle:run=runs/arms/event" \
        --arm="event, VLM:run=runs/arms/event,planner=runs/arms/vlm" \
        --arm="unified, instruction:run=runs/arms/chunk,mode=unified" \
        --arm="unified, staircase:run=runs/arms/chunk,mode=unified,text=runs/arms/staircase" \
        --arm="unified, features:run=runs/arms/chunk,mode=unified,text=runs/arms/vlm_text" \
        --arm="chunks from scratch:run=runs/arms/scratch,mode=unified"
    python -m wallwm_jax.evaluation.arms --store=runs/arms/store --out=runs/arms/actions --episodes=50 \
        --sampling=action_draws=1 --sampling=action_temperature=0.0 \
        --arm="event, oracle:run=runs/arms/event,level=action" \
        --arm="event, own duration:run=runs/arms/event,level=action,own_duration" \
        --arm="unified, words of the event:run=runs/arms/chunk,mode=unified,text=event,level=action" \
        --arm="chunks from scratch, words of the event:run=runs/arms/scratch,mode=unified,text=event,level=action"
    python -m wallwm_jax.evaluation.planner_accuracy --workdir=runs/arms/vlm --store=runs/arms/store \
        --out=runs/arms/planner.json
    python -m wallwm_jax.evaluation.report --arms=runs/arms/table --arms=runs/arms/actions \
        --planner=runs/arms/planner.json --out=runs/arms/page

Each command goes on after a stop when it is run again, training with --resume. Half of the chunks are told the subtask
or action that goes on where they begin, the rest the instruction: latents and features stand for the words of an event.

Measured with these commands on two busy cores, seed 0 (the staircase had all three ties); subtasks achieved, 95 %
interval:

                                          told subtasks       told actions
    event, oracle                         0 % [0, 7]          20 % [12, 32]
    event, own duration                  11 % [5, 21]         21 % [12, 32]
    event, VLM                            2 % [0, 10]
    unified, instruction                  0 % [0, 7]
    unified, staircase                    0 % [0, 7]
    unified, features                     2 % [0, 10]
    unified, words of the event                                4 % [1, 13]
    chunks from scratch (told actions: words of the event)
                                          0 % [0, 7]           2 % [0, 10]

Told actions, events are 16 points [4, 27] above chunks of the adapted model and 18 [10, 26] above those from scratch,
trial by trial. Told whole subtasks, models of this size do not act, whatever names them, unless by their own durations,
which are those of actions: they look again after 14 steps in the mean, with the oracle's after 43 (its `trials/`). No
episode of several subtasks was finished. So acting says nothing yet of planners and latents; what they tell is in
`configs/ocbench_vlm.py` and `configs/ocbench_staircase.py`.
"""

from ml_collections import ConfigDict

from configs import ocbench_quickstart
from wallwm_jax.console import UserError

EVENTS, ADAPTATION = 1800, 600  # steps
CHUNKS = 36  # latents of a row: six chunks fill it whole; rows of events hold 33.3 of their 34
MATCHED = round(EVENTS * 33.3 / CHUNKS)  # steps that see as many latents as those of the events


def get_config(part: str = "adapt") -> ConfigDict:
    """`event` learns events; `adapt` goes on from it with chunks; `scratch` sees as many latents as both."""
    if part not in ("event", "adapt", "scratch"):
        raise UserError(f"configs/ocbench_chunk.py:{part}: the part is event, adapt or scratch")
    config = ocbench_quickstart.get_config()
    config.unlock()
    config.train.steps = {"event": EVENTS, "adapt": ADAPTATION, "scratch": MATCHED + ADAPTATION}[part]
    config.optim.warmup_steps = 50
    if part == "event":
        return config.lock()
    config.data.window_kind = "history"
    config.data.latents_per_row = CHUNKS
    config.data.actions_per_row = 240  # 40 in a window, where an event has 8 per latent
    config.data.events_per_row = 8
    config.data.chunk_event_prob = 0.5
    config.data.duration_clause_prob = 0.0  # a chunk's length is no news
    if part == "adapt":
        config.train.stage = "chunk"
        config.optim.muon_lr *= 0.3
        config.optim.lr *= 0.3
    return config.lock()
