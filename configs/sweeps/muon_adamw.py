r"""Muon against AdamW on the quickstart's model: does it learn faster?

    python -m wallwm_jax.sweep configs/sweeps/muon_adamw.py:rates --store=runs/quickstart/store --out=runs/sweeps/rates
    python -m wallwm_jax.sweep configs/sweeps/muon_adamw.py:seeds --store=runs/quickstart/store --out=runs/sweeps/seeds

`rates` trains each optimizer at four learning rates with one seed, `seeds` the best of each with three. The rate is
that of the matrices; embeddings, norms and heads are AdamW's in both, at the same rate as in the quickstart with Muon,
at the swept one without. Runs of 200 steps, about two and a half minutes each on two CPU cores.

Measured on the quickstart's store. Final loss by rate, Muon 2.35, 2.10, 2.10, 2.23; AdamW 2.82, 2.34, 2.23, 2.36. At
the best rates, seed by seed, Muon ends 0.130 [0.058, 0.201] below AdamW (2.13 against 2.26) and passes AdamW's final
loss after 151, 138 and 176 of the 200 steps: a fifth fewer in the mean, which three seeds do not prove.
"""

from wallwm_jax.console import UserError
from wallwm_jax.evaluation.sweeps import Sweep

MUON = (4e-3, 1e-2, 2.5e-2, 6e-2)
ADAMW = (1e-3, 2.5e-3, 6e-3, 1.5e-2)
BEST_MUON, BEST_ADAMW = 2.5e-2, 6e-3


def get_sweep(part: str) -> Sweep:
    """`part` is "rates" or "seeds"."""
    if part not in ("rates", "seeds"):
        raise UserError(f"configs/sweeps/muon_adamw.py:{part}: the part is rates or seeds")
    muon, adamw = (MUON, ADAMW) if part == "rates" else ((BEST_MUON,), (BEST_ADAMW,))
    arms = {f"Muon {rate:g}": {"optim.name": "muon", "optim.muon_lr": rate} for rate in muon}
    arms |= {f"AdamW {rate:g}": {"optim.name": "adamw", "optim.lr": rate} for rate in adamw}
    return Sweep(
        config="configs/ocbench_quickstart.py",
        arms=arms,
        seeds=(0,) if part == "rates" else (0, 1, 2),
        overrides={"train.steps": 200, "train.save_every": 200},
        reference=f"AdamW {BEST_ADAMW:g}",
    )
