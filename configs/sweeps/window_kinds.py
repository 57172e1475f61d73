r"""Where windows are cut × what they are told: events, tiles or random stretches; the instruction or the events inside.

    python -m wallwm_jax.build_events --source=ocbench:chamber,switch,block --episodes=72 --size=48 \
        --views=front_pixels,ur5e/wrist --windows=event,fixed,random --out=runs/kinds/store
    python -m wallwm_jax.sweep configs/sweeps/window_kinds.py --store=runs/kinds/store --out=runs/sweeps/kinds

Six models from scratch, which see as many latents. Random windows are as long as events, in the numbers in which there
are subtasks and actions (one to four or five); of events a quarter of those drawn are subtasks. A tile or random window
is told the subtasks or actions inside it, by the same shares. All are measured by `wallwm_jax.evaluation.event_errors`
on the same held-out events, told what they learned to read and the true duration. Captions are neither reworded nor
prefixed nor timed, so that only their kind differs.

Measured on two CPU cores in an hour: action error 0.216 of events told the event, 0.243 of random windows and 0.251 of
tiles told the events inside; told the instruction 0.239, 0.258 and 0.270.
"""

from typing import Any

from wallwm_jax.evaluation.sweeps import Sweep

STEPS = 240
WINDOWS: dict[str, dict[str, Any]] = {
    "event": {"data.window_kind": "event"},
    "fixed": {
        "data.window_kind": "fixed",
        "data.latents_per_row": 35,  # seven tiles of five latents
        "train.steps": round(STEPS * 33.3 / 34.3),  # rows of tiles are full but for those at an episode's end
        "data.actions_per_row": 240,
    },
    "random": {"data.window_kind": "random"},
}
CAPTIONS = {"event": {"data.caption": "events"}, "instruction": {"data.caption": "instruction"}}


def get_sweep() -> Sweep:
    """The quickstart's model with a fifth of its steps."""
    return Sweep(
        config="configs/ocbench_quickstart.py",
        arms={
            f"{kind}, told the {'events' if kind != 'event' and caption == 'event' else caption}": window | told
            for caption, told in CAPTIONS.items()
            for kind, window in WINDOWS.items()
        },
        seeds=(0, 1, 2),
        overrides={
            "train.steps": STEPS,
            "train.save_every": STEPS,
            "data.text_length": 160,
            "data.paraphrase_prob": 0.0,
            "data.parent_caption_prob": 0.0,
            "data.duration_clause_prob": 0.0,
        },
        measure="wallwm_jax.evaluation.event_errors",
        paired_with="event, told the event",
    )
