r"""Which tie makes the latents of a staircase tell the towers most: trace, match, action, or several of them?

    python -m wallwm_jax.sweep configs/sweeps/latent_ties.py --store=runs/quickstart/store --out=runs/sweeps/ties

takes the VLM from runs/vlm (configs/ocbench_vlm.py) and the towers from runs/quickstart/train; others are named behind
a colon, latent_ties.py:VLM,TOWERS. Every run starts from the same branch, the VLM's own, and sees the same events; then
`wallwm_jax.evaluation.latents` measures it on held-out ones. The headline is the share of the gap between the action
loss under no text, or under another event's caption, and that under the true caption which the latents close. "all,
flat" is the control of the stairs: with the same ties, all latents behind the first enter together at depth 4, which
is as much work, and as many layers one after the other.

Measured on the runs of configs/ocbench_chunk.py, one seed, 267 held-out events; of the gap in action loss between no
text and the true caption (0.025) the latents close, and those of another event in their place:

    trace              6 % [-6, 16]     6 % [-6, 16]
    match             58 % [52, 65]    21 % [7, 33]
    action             9 % [6, 11]      9 % [6, 11]
    trace and match   60 % [52, 67]    22 % [7, 34]
    all               43 % [36, 50]    26 % [15, 37]
    all, flat         57 % [51, 63]    21 % [6, 33]

Match alone is worth its cost. The trace is read as well without the latents, the action loss teaches them one answer to
all questions, and added to the others it costs. Nothing here speaks for the stairs against latents that enter together.
"""

from typing import Any

from wallwm_jax.console import UserError
from wallwm_jax.evaluation.sweeps import Sweep

WEIGHTS = ("trace_weight", "match_weight", "latent_action_weight")
TIES = {
    "trace": (1.0, 0.0, 0.0),
    "match": (0.0, 1.0, 0.0),
    "action": (0.0, 0.0, 1.0),
    "trace and match": (1.0, 1.0, 0.0),
    "all": (1.0, 1.0, 1.0),
}
FLAT = (0, 4, 4, 4)  # entry_depths of the control; the stairs are the config's (0, 2, 4, 6)


def get_sweep(runs: str = "runs/vlm,runs/quickstart/train") -> Sweep:
    """`runs` are those of the VLM and of the towers."""
    vlm, comma, towers = runs.partition(",")
    if not (vlm and comma and towers):
        raise UserError(f"configs/sweeps/latent_ties.py:{runs}: name two runs, VLM,TOWERS")
    arms: dict[str, dict[str, Any]] = {
        tie: {f"objective.{name}": weight for name, weight in zip(WEIGHTS, weights)} for tie, weights in TIES.items()
    }
    return Sweep(
        config="configs/ocbench_staircase.py",
        arms=arms | {"all, flat": arms["all"] | {"vlm.entry_depths": FLAT}},
        seeds=(0, 1, 2),
        overrides={"train.init_from": vlm, "train.text_from": towers},
        measure="wallwm_jax.evaluation.latents",
    )
