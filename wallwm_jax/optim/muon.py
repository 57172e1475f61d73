"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024; section 4.2 of the WALL-WM report).

    specs = {"embedding": ADAMW, "blocks": {"up": MatrixSpec(1, 2), ...}}          # [L, in, out] are L matrices
    optimizer = muon(3e-4, specs, sharding=MuonSharding(mesh, partition_specs))    # no sharding: one device

`scale_by_muon` is the rule alone, as an optax transformation. On a mesh each matrix is orthogonalised whole by one
chip (`ownership`, `exchange`); parameters and momentum keep their sharding, and the state holds nothing of the mesh.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from wallwm_jax.optim import newton_schulz
from wallwm_jax.optim.exchange import run_plan
from wallwm_jax.optim.ownership import ADAMW, MatrixSpec, MuonSharding, Plan, flatten, make_plan, matrix_paths

PyTree = Any

UPDATE_SCALES = ("rms", "jordan", "spectral", "none")
_RMS = 0.2


class MuonState(NamedTuple):
    """Number of updates, momentum like the parameters, and NorMuon's mean squares (None without)."""

    step: jax.Array
    momentum: PyTree
    mean_square: PyTree


def scale_by_muon(
    specs: PyTree,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: str | newton_schulz.Coefficients = "polar_express",
    dtype: DTypeLike = jnp.bfloat16,
    eps: float = 1e-7,
    update_scale: str = "rms",
    neuron_decay: float | None = None,
    optax_compat: bool = False,
    sharding: MuonSharding | None = None,
) -> optax.GradientTransformation:
    """Orthogonalised momentum.

    Args:
      specs: per parameter a `MatrixSpec`, `ADAMW`, or None for vectors and scalars. Only matrices may reach the
        transformation: mask the others out, as `muon` does.
      momentum: decay of the momentum, `buffer <- momentum * buffer + gradient`.
      nesterov: orthogonalise `gradient + momentum * buffer` rather than the buffer.
      coefficients: a name in `newton_schulz.COEFFICIENTS`, or a table.
      dtype: of the operands of the iteration, and of what travels between chips.
      eps: added to the norm of a matrix.
      update_scale: "rms", `0.2 sqrt(max(m, n))`, for updates whose root mean square is 0.2 as AdamW's
        (arXiv 2502.16982); "jordan", `sqrt(max(1, out / in))`; "spectral", `sqrt(out / in)`; "none".
      neuron_decay: decay of the mean square of each output's row, by which NorMuon (arXiv 2510.05491) evens the rows
        out at constant norm; None leaves it out.
      optax_compat: bias-corrected averages as `optax.contrib.scale_by_muon` keeps them, for comparisons.
      sharding: the mesh; None for one device.

    Raises:
      ValueError: an unknown name; when it meets the parameters, see `ownership`.
    """
    if update_scale not in UPDATE_SCALES:
        raise ValueError(f"update_scale={update_scale!r}: one of {', '.join(UPDATE_SCALES)}")
    if isinstance(coefficients, str) and coefficients not in newton_schulz.COEFFICIENTS:
        raise ValueError(f"coefficients={coefficients!r}: one of {', '.join(newton_schulz.COEFFICIENTS)}, or a table")
    table = newton_schulz.COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
    iterate = functools.partial(newton_schulz.orthogonalize, coefficients=table, dtype=dtype, eps=eps)

    def init(params: PyTree) -> MuonState:
        matrices = matrix_paths(specs, params)
        mean_square = None
        if neuron_decay is not None:
            mean_square = _by_path(lambda path, leaf: jnp.zeros(_per_output(leaf.shape, matrices[path])), params)
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params), mean_square)

    def update(updates: PyTree, state: MuonState, params: PyTree = None) -> tuple[PyTree, MuonState]:
        matrices = matrix_paths(specs, updates)
        step = optax.safe_increment(state.step)
        if optax_compat:
            buffer, direction = _averaged(updates, state.momentum, momentum, nesterov, step)
        else:
            buffer = jax.tree.map(lambda m, g: (momentum * m + g).astype(m.dtype), state.momentum, updates)
            direction = jax.tree.map(lambda m, g: g + momentum * m, buffer, updates) if nesterov else buffer
        factors = _orthogonal(direction, matrices, iterate, dtype, sharding)
        factors = _by_path(lambda path, x: x.astype(jnp.float32), factors)
        mean_square = state.mean_square
        if neuron_decay is not None:
            mean_square = _by_path(
                lambda path, v, x: neuron_decay * v + (1.0 - neuron_decay) * _row_square(x, matrices[path]),
                mean_square,
                factors,
            )
            factors = _by_path(
                lambda path, x, v: _even_rows(x, v / (1.0 - neuron_decay**step), matrices[path]), factors, mean_square
            )
        factors = _by_path(
            lambda path, x, g: (_scale(g.shape, matrices[path], update_scale) * x).astype(g.dtype), factors, updates
        )
        return factors, MuonState(step, buffer, mean_square)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    specs: PyTree,
    *,
    adamw_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    decay_mask: PyTree | None = None,
    cautious: bool = False,
    b1: float = 0.9,
    b2: float = 0.95,
    adamw_eps: float = 1e-8,
    **options: Any,
) -> optax.GradientTransformation:
    """Muon for the matrices, AdamW for everything else, decoupled weight decay for both.

    Args:
      learning_rate: of the matrices.
      specs: see `scale_by_muon`; a parameter of two axes or more needs an explicit claim, by a spec or by `ADAMW`.
      adamw_learning_rate: of the others; None: the same, which `update_scale="rms"` is made for.
      weight_decay: shrinks parameters by learning rate times this.
      decay_mask: tree of bool, which parameters decay; None: those that Muon takes.
      cautious: decay only elements that the update makes smaller, too (arXiv 2510.12402).
      b1, b2, adamw_eps: of AdamW.
      **options: of `scale_by_muon`.
    """
    rates = {"muon": learning_rate, "adamw": learning_rate if adamw_learning_rate is None else adamw_learning_rate}
    rules = {"muon": scale_by_muon(specs, **options), "adamw": optax.scale_by_adam(b1=b1, b2=b2, eps=adamw_eps)}

    def labels(params: PyTree) -> PyTree:
        matrices = matrix_paths(specs, params)
        return _by_path(lambda path, leaf: "muon" if path in matrices else "adamw", params)

    def mask(params: PyTree) -> PyTree:
        matrices = matrix_paths(specs, params)
        return _by_path(lambda path, leaf: path in matrices, params) if decay_mask is None else decay_mask

    decay = _cautious_decay(weight_decay) if cautious else optax.add_decayed_weights(weight_decay)
    return optax.chain(
        optax.partition(rules, labels),
        optax.masked(decay, mask),
        optax.partition({name: optax.scale_by_learning_rate(rate) for name, rate in rates.items()}, labels),
    )


def plan_of(specs: PyTree, params: PyTree, sharding: MuonSharding | None) -> Plan:
    """The plan that `scale_by_muon` follows for these parameters (arrays or shapes)."""
    matrices = matrix_paths(specs, params)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params) if path in matrices}
    return make_plan(shapes, matrices, *_placement(sharding))


def _placement(sharding: MuonSharding | None) -> tuple[Any, ...]:
    """Layouts by path, mesh sizes and owner axes."""
    if sharding is None:
        return ()
    layouts = dict(flatten(sharding.specs, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec)))
    return layouts, dict(sharding.mesh.shape), sharding.owner_axes


def _orthogonal(
    directions: PyTree, matrices: dict[str, MatrixSpec], iterate: Any, dtype: DTypeLike, sharding: MuonSharding | None
) -> PyTree:
    """The factors of a tree, in `dtype`."""
    by_path = {path: leaf.astype(dtype) for path, leaf in flatten(directions)}
    missing = sorted(set(by_path) - set(matrices))
    if missing:
        raise ValueError(f"scale_by_muon met {missing[0]!r}, which has no MatrixSpec; mask it out, or use muon()")
    placement = _placement(sharding)
    plan = make_plan({path: leaf.shape for path, leaf in by_path.items()}, matrices, *placement)
    mesh, layouts = (sharding.mesh, placement[0]) if sharding is not None else (None, None)
    factors = run_plan(plan, by_path, iterate, mesh, layouts)
    return _by_path(lambda path, leaf: factors[path], directions)


def _averaged(
    updates: PyTree, momentum: PyTree, decay: float, nesterov: bool, count: jax.Array
) -> tuple[PyTree, PyTree]:
    """optax's buffer, an average, and its bias-corrected direction."""
    buffer = optax.tree_utils.tree_update_moment(updates, momentum, decay, 1)
    correct = optax.tree_utils.tree_bias_correction
    if not nesterov:
        return buffer, correct(buffer, decay, count)
    ahead = correct(buffer, decay, optax.safe_increment(count))
    own = correct(updates, decay, count)
    return buffer, jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, own)


def _scale(shape: tuple[int, ...], spec: MatrixSpec, kind: str) -> Any:
    """Factor of a parameter's updates, broadcast along its output where parts differ."""
    fan_in, fan_out = shape[spec.reduction], shape[spec.output]

    def of_part(outputs: int) -> float:
        return {
            "rms": _RMS * math.sqrt(max(fan_in, outputs)),
            "jordan": math.sqrt(max(1.0, outputs / fan_in)),
            "spectral": math.sqrt(outputs / fan_in),
            "none": 1.0,
        }[kind]

    if len(set(spec.split)) <= 1:
        return of_part(spec.split[0] if spec.split else fan_out)
    factors = jnp.concatenate([jnp.full(size, of_part(size)) for size in spec.split])
    return factors.reshape([-1 if axis == spec.output else 1 for axis in range(len(shape))])


def _per_output(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[int, ...]:
    return tuple(1 if axis == spec.reduction else size for axis, size in enumerate(shape))


def _row_square(x: jax.Array, spec: MatrixSpec) -> jax.Array:
    return jnp.mean(jnp.square(x), spec.reduction, keepdims=True)


def _even_rows(x: jax.Array, mean_square: jax.Array, spec: MatrixSpec) -> jax.Array:
    """Divides each output's row by its running root mean square, at the Frobenius norm the matrix had."""
    axes = (spec.reduction, spec.output)
    even = x * jax.lax.rsqrt(mean_square + 1e-12)
    norm, new = (jnp.sqrt(jnp.sum(jnp.square(part), axes, keepdims=True)) for part in (x, even))
    return even * (norm / (new + 1e-12))


def _cautious_decay(weight_decay: float) -> optax.GradientTransformation:
    def update(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(lambda u, p: u + weight_decay * jnp.where(u * p > 0, p, 0.0), updates, params)

    return optax.stateless(update)


def _by_path(function: Any, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `function(path, leaf, ...)`."""

    def at(keys: Any, *leaves: Any) -> Any:
        return function(jax.tree_util.keystr(keys, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(at, tree, *rest)


__all__ = ["ADAMW", "UPDATE_SCALES", "MatrixSpec", "MuonSharding", "MuonState", "muon", "plan_of", "scale_by_muon"]
