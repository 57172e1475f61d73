r"""Cluster-balanced against uniform sampling on a long-tailed mix: does it help rare events, at equal steps?

    V="--size=48 --views=front_pixels,ur5e/wrist --windows=event"
    python -m wallwm_jax.build_events --source=ocbench:chamber=80,switch=15,block=4,hanoi=1 --episodes=200 \
        --heldout_fraction=0 $V --out=runs/tail/train
    python -m wallwm_jax.build_events --source=ocbench:chamber,switch,block,hanoi --episodes=20 --seed=1000 \
        --heldout_fraction=0.95 $V --out=runs/tail/heldout
    python -m wallwm_jax.sweep configs/sweeps/long_tail.py:runs/tail/heldout --store=runs/tail/train \
        --out=runs/sweeps/tail

A window is drawn with weight n_vl^-a * n_act^-b. The second store has as many episodes of each family, none of them in
the first; `wallwm_jax.evaluation.event_errors` measures on as many of its events per family. `all:STORE` in the place
of `STORE` adds the arms that balance one clustering alone.

Measured, three seeds, two CPU cores: a = b = 1 lowers the action error of hanoi, one episode in a hundred, from 0.230
to 0.209, event by event by 0.021 [0.011, 0.031]; of block, four in a hundred, from 0.216 to 0.202, by 0.014 [0.008,
0.020]. Chamber and switch, the frequent ones, stay where they were (-0.002 [-0.009, 0.005], -0.000 [-0.005, 0.005]);
all together 0.008 [0.004, 0.013]. a = b = 0.5 does that for block (0.012 [0.006, 0.017]) and not for hanoi. Of whole
subtasks nothing can be told. docs/events.md has the table.
"""

from wallwm_jax.console import UserError
from wallwm_jax.evaluation.sweeps import Sweep

UNIFORM = "uniform"
POWERS = {UNIFORM: (0.0, 0.0), "a = b = 0.5": (0.5, 0.5), "a = b = 1": (1.0, 1.0)}
ALONE = {"a = 1, b = 0": (1.0, 0.0), "a = 0, b = 1": (0.0, 1.0)}


def get_sweep(heldout: str) -> Sweep:
    """`heldout` is the store to measure on, with `all:` before it for all arms; the quickstart's model."""
    store = heldout.removeprefix("all:")
    if not store:
        raise UserError(f"configs/sweeps/long_tail.py:{heldout}: name the store to measure on")
    powers = POWERS | ALONE if store != heldout else POWERS
    return Sweep(
        config="configs/ocbench_quickstart.py",
        arms={name: {"data.vl_power": a, "data.action_power": b} for name, (a, b) in powers.items()},
        seeds=(0, 1, 2),
        overrides={"train.steps": 400, "train.save_every": 400},
        measure="wallwm_jax.evaluation.event_errors",
        measure_store=store,
        paired_with=UNIFORM,
    )
