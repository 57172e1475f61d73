"""The train step: built here once from (config, mesh) and used unchanged by training, tests, preflight and benchmarks.

`step(state, batch) -> (state, metrics)` is pure: its randomness is `fold_in(seed, step)`, so the
same state and rows give the same result in any process. It is jitted with explicit shardings on both sides and donates
the state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from wallwm_jax.models import param_axes
from wallwm_jax.optim.muon import MuonSharding
from wallwm_jax.optim.muon_cost import MuonCost, muon_cost_report
from wallwm_jax.optim.optimizer import build_optimizer, learning_rate
from wallwm_jax.parallel import sharding
from wallwm_jax.training.families import Family, family_of
from wallwm_jax.training.stages import Stage, get_stage
from wallwm_jax.training.train_state import TrainState, ema_decay, initial_state, update_ema

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

_INIT_STREAM = 2**31 - 1  # folded into the seed for the initial parameters; steps fold in their number
_HELDOUT_STREAM = 2**31 - 2  # and for the noise of held-out batches


@dataclass(frozen=True)
class TrainStep:
    """A built step and everything needed to call it.

    Attributes:
      step: jitted (state, batch) -> (state, metrics); the state is donated. Metrics are float32 or int32 scalars:
        "loss", "loss_<stream>", "grad_norm" (before the clip), "lr", "muon_lr", "events".
      evaluate: jitted (state, batch, number) -> metrics of the averaged parameters; its noise follows from the batch's
        number alone.
      init: jitted () -> fresh TrainState, made where it lives; a pure function of `config.seed`.
      abstract_state: shapes, dtypes and shardings of the state, no memory.
      rows: sharding of every array of a batch.
      stage: what trains.
      family: what it is a stage of: its rows and its loss.
      optimizer: the gradient transformation inside `step`.
      muon_cost: what Muon's part of a step costs a chip; None where nothing is Muon's.
    """

    step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    init: jax.stages.Wrapped
    abstract_state: TrainState
    rows: NamedSharding
    stage: Stage
    family: Family
    optimizer: optax.GradientTransformation
    muon_cost: MuonCost | None

    def abstract_batch(self, spec: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch as shapes with shardings, from `family.rows.spec`."""
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows) for name, (shape, dtype) in spec.items()}


def build_train_step(config: ConfigDict, mesh: Mesh, channel_weight: np.ndarray | None = None) -> TrainStep:
    """Builds the step of `config.train.stage`; nothing is compiled or allocated yet.

    Args:
      config: all sections except `data` are read.
      mesh: from `parallel.mesh.make_mesh`.
      channel_weight: [C] weight of each latent channel in the video loss, mean 1 (`Stats.channel_weights`); None weighs
        all alike.

    Raises:
      UserError: unknown stage or optimizer, or a schedule that does not fit.
    """
    stage = get_stage(config.train.stage)
    family = family_of(stage)
    shapes, _ = stage.split(jax.eval_shape(lambda: family.init(config, stage, jax.random.key(0))))
    matrices, placement = param_axes.muon_matrices(shapes), muon_sharding(shapes, mesh)
    optimizer = build_optimizer(config.optim, config.train.steps, matrices, param_axes.decay_mask(shapes), placement)
    channels = config.model.latent_channels
    weight = np.ones(channels, np.float32) if channel_weight is None else np.asarray(channel_weight, np.float32)
    if "video" in stage.losses and weight.shape != (channels,):
        raise ValueError(f"channel_weight has shape {weight.shape}; the model has {channels} latent channels")

    def fresh() -> TrainState:
        return initial_state(config, stage, optimizer, jax.random.fold_in(jax.random.key(config.seed), _INIT_STREAM))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _step(state, batch)

    def loss_of(state: TrainState, batch: Batch, key: jax.Array) -> Callable[[PyTree], tuple[jax.Array, Metrics]]:
        return functools.partial(
            family.compute_loss,
            frozen=state.frozen,
            config=config,
            stage=stage,
            batch=batch,
            key=key,
            channel_weight=jnp.asarray(weight),
        )

    def evaluate(state: TrainState, batch: Batch, number: jax.Array) -> Metrics:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            stream = jax.random.fold_in(jax.random.key(config.seed), _HELDOUT_STREAM)
            return loss_of(state, batch, jax.random.fold_in(stream, number))(state.averaged)[1]

    def _step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss = loss_of(state, batch, jax.random.fold_in(jax.random.key(config.seed), state.step))
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            **metrics,
            "grad_norm": optax.global_norm(grads),
            "lr": learning_rate(config.optim.lr, config.optim, config.train.steps)(state.step),
            "muon_lr": learning_rate(config.optim.muon_lr, config.optim, config.train.steps)(state.step),
        }
        decay = ema_decay(state.step, config.train.ema_decay)
        ema = update_ema(state.ema, trainable, decay) if state.ema else {}
        return (
            TrainState(step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema, frozen=state.frozen),
            metrics,
        )

    abstract = jax.eval_shape(fresh)
    shardings = state_shardings(abstract, optimizer, mesh)
    rows, whole = sharding.rows_sharding(mesh), sharding.replicated(mesh)
    return TrainStep(
        step=jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, whole), donate_argnums=0),
        evaluate=jax.jit(evaluate, in_shardings=(shardings, rows, whole), out_shardings=whole),
        init=jax.jit(fresh, out_shardings=shardings, compiler_options=_quick_compilation(mesh)),
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
        ),
        rows=rows,
        stage=stage,
        family=family,
        optimizer=optimizer,
        muon_cost=(
            muon_cost_report(matrices, shapes, placement, dtype=config.optim.muon_dtype)
            if config.optim.name == "muon"
            else None
        ),
    )


def muon_sharding(params: PyTree, mesh: Mesh) -> MuonSharding | None:
    """Where parameters live on `mesh`, for Muon; None on one device."""
    if mesh.size == 1:
        return None
    specs = param_axes.map_params(lambda path, rule, leaf: sharding.spec_for(rule.axes, leaf.shape, mesh), params)
    return MuonSharding(mesh.abstract_mesh, specs)


def _quick_compilation(mesh: Mesh) -> dict[str, Any]:
    """Compiler options for a program that runs once; on CPU they halve the time that initialising takes."""
    return {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}


def state_shardings(abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """NamedSharding of every array of a state: parameters, their moments and average by `param_axes`."""
    trainable, frozen = (
        param_axes.map_params(lambda path, rule, leaf: sharding.named(rule.axes, leaf.shape, mesh), params)
        for params in (abstract.trainable, abstract.frozen)
    )
    whole = sharding.replicated(mesh)
    rules = param_axes.map_params(lambda path, rule, leaf: rule, abstract.trainable)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, rule: (
            moment if isinstance(moment, optax.MaskedNode) else sharding.named(rule.axes, moment.shape, mesh)
        ),
        abstract.opt_state,
        rules,
        transform_non_params=lambda _: whole,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    ema = trainable if abstract.ema else {}
    where: dict[str, Any] = dict(step=whole, trainable=trainable, opt_state=opt_state, ema=ema, frozen=frozen)
    return TrainState(**where)
