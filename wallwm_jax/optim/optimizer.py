"""The optimizer: Muon for the matrices inside the blocks, AdamW for everything else, one schedule, one clip.

Order of work on a gradient: global-norm clip over all trained parameters, momentum and update rule of the parameter's
group, decoupled weight decay, the group's learning rate. Muon (section 4.2 of the report) orthogonalises the Nesterov
momentum of each matrix and scales it by 0.2 * sqrt(max(m, n)), so that the update has a root mean square of about 0.2,
as AdamW's has, whatever the shape. Scanned stacks `[L, m, n]` are L separate matrices: the dimension numbers from
`models/param_axes.py` say so, since optax alone takes only two-dimensional leaves and silently leaves the rest to Adam.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from wallwm_jax.console import UserError
from wallwm_jax.models.param_axes import MatrixAxes

PyTree = Any

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's coefficients, five times: optax scans over a table, but unrolls a triple for every parameter."""

UPDATE_RMS = 0.2
"""Root mean square of a Muon update before the learning rate."""


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


def build_optimizer(optim: ConfigDict, steps: int, matrices: PyTree, decay: PyTree) -> optax.GradientTransformation:
    """The gradient transformation of a run.

    Args:
      optim: `config.optim`.
      steps: length of the schedule.
      matrices: `param_axes.muon_matrices` of the trained parameters.
      decay: `param_axes.decay_mask` of the trained parameters.

    Raises:
      UserError: `optim.name` is neither "muon" nor "adamw", or the warm-up does not fit.
    """
    if optim.name not in ("muon", "adamw"):
        raise UserError(f"optim.name={optim.name!r} is not an optimizer; use muon or adamw")
    muon_lr, adamw_lr = (learning_rate(peak, optim, steps) for peak in (optim.muon_lr, optim.lr))
    labels = group_labels(optim, matrices)
    dims = jax.tree.map(functools.partial(_dimension_numbers, optim), matrices, is_leaf=_is_leaf)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.partition(
            {
                "muon": optax.chain(
                    scale_by_muon(
                        NEWTON_SCHULZ, beta=optim.muon_momentum, eps=optim.eps, weight_dimension_numbers=dims
                    ),
                    _scale_by_shape(dims),
                ),
                "adamw": optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
            },
            labels,
        ),
        optax.add_decayed_weights(optim.weight_decay, mask=decay),
        optax.partition(
            {"muon": optax.scale_by_learning_rate(muon_lr), "adamw": optax.scale_by_learning_rate(adamw_lr)}, labels
        ),
    )


def group_labels(optim: ConfigDict, matrices: PyTree) -> PyTree:
    """Tree of "muon" or "adamw", the rule that updates each parameter."""
    return jax.tree.map(lambda spec: "muon" if _is_muon(optim, spec) else "adamw", matrices, is_leaf=_is_leaf)


def _scale_by_shape(dims: PyTree) -> optax.GradientTransformation:
    """Scales orthogonal matrices by `UPDATE_RMS * sqrt(max(m, n))`."""

    def scaled(update: jax.Array, spec: MuonDimensionNumbers) -> jax.Array:
        sides = (_size(update, spec.reduction_axis), _size(update, spec.output_axis))
        return UPDATE_RMS * math.sqrt(max(sides)) * update

    return optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, dims))


def _size(array: jax.Array, axes: int | Sequence[int]) -> int:
    return math.prod(array.shape[axis] for axis in ([axes] if isinstance(axes, int) else axes))


def _dimension_numbers(optim: ConfigDict, spec: MatrixAxes | None) -> MuonDimensionNumbers | optax.MaskedNode:
    if spec is None or not _is_muon(optim, spec):
        return optax.MaskedNode()
    return MuonDimensionNumbers(spec.reduction, spec.output)


def _is_muon(optim: ConfigDict, spec: MatrixAxes | None) -> bool:
    return optim.name == "muon" and spec is not None


def _is_leaf(node: object) -> bool:
    return node is None or isinstance(node, MatrixAxes)
