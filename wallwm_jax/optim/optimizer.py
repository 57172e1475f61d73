"""The optimizer of a run: Muon for the matrices inside the blocks, AdamW for everything else, one schedule, one clip.

Order of work on a gradient: global-norm clip over all trained parameters, momentum and update rule of the parameter's
group, decoupled weight decay, the group's learning rate.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.optim.muon import ADAMW, MuonSharding, muon
from wallwm_jax.optim.newton_schulz import COEFFICIENTS
from wallwm_jax.optim.ownership import is_spec

PyTree = Any


def learning_rate(peak: float, optim: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up over `optim.warmup_steps`, then a cosine down to `final_lr_fraction * peak` at the last step.

    Update 0 already moves: its rate is `peak / warmup_steps`.

    Raises:
      UserError: the warm-up is not shorter than the run.
    """
    warmup = optim.warmup_steps
    if not 0 <= warmup < steps:
        raise UserError(
            f"optim.warmup_steps={warmup} must be below train.steps={steps}; "
            f"set --config.optim.warmup_steps={steps // 10}"
        )
    cosine = optax.cosine_decay_schedule(peak, max(1, steps - 1 - warmup), alpha=optim.final_lr_fraction)
    if warmup == 0:
        return cosine
    climb = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([climb, cosine], [warmup])


def build_optimizer(
    optim: ConfigDict, steps: int, matrices: PyTree, decay: PyTree, sharding: MuonSharding | None = None
) -> optax.GradientTransformation:
    """The gradient transformation of a run.

    Args:
      optim: `config.optim`.
      steps: length of the schedule.
      matrices: `param_axes.muon_matrices` of the trained parameters.
      decay: `param_axes.decay_mask` of the trained parameters.
      sharding: where they live, for Muon to spread its work; None for one device.

    Raises:
      UserError: an unknown optimizer or table of coefficients, or a warm-up that does not fit.
    """
    if optim.name not in ("muon", "adamw"):
        raise UserError(f"optim.name={optim.name!r} is not an optimizer; use muon or adamw")
    if optim.coefficients not in COEFFICIENTS:
        raise UserError(f"optim.coefficients={optim.coefficients!r}: one of {', '.join(COEFFICIENTS)}")
    rule = muon(
        learning_rate(optim.muon_lr, optim, steps),
        muon_specs(optim, matrices),
        adamw_learning_rate=learning_rate(optim.lr, optim, steps),
        weight_decay=optim.weight_decay,
        decay_mask=decay,
        cautious=optim.cautious_decay,
        b1=optim.b1,
        b2=optim.b2,
        adamw_eps=optim.eps,
        momentum=optim.muon_momentum,
        coefficients=optim.coefficients,
        dtype=optim.muon_dtype,
        neuron_decay=optim.neuron_decay or None,
        sharding=sharding,
    )
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), rule)


def muon_specs(optim: ConfigDict, matrices: PyTree) -> PyTree:
    """What Muon takes: `matrices`, or with `optim.name = "adamw"` nothing."""
    return jax.tree.map(lambda spec: spec if optim.name == "muon" else ADAMW, matrices, is_leaf=is_spec)
