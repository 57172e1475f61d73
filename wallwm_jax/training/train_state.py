"""The state of a run, how it starts, and how a stage takes over the parameters of an earlier one.

Trained parameters are float32 and carry an optimizer state and an exponential moving average; frozen parameters are
bfloat16 and carry nothing.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.training.families import family_of
from wallwm_jax.training.stages import Stage

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: int32 scalar, number of updates made; also the index of the next rows to read.
      trainable: parameter groups of the stage, float32.
      opt_state: optimizer state of `trainable`.
      ema: moving average of `trainable`, float32; empty where `train.ema_decay` is 0.
      frozen: the stage's frozen parameter groups, bfloat16.
    """

    step: jax.Array
    trainable: dict[str, Any]
    opt_state: optax.OptState
    ema: dict[str, Any]
    frozen: dict[str, Any]

    @property
    def averaged(self) -> dict[str, Any]:
        """What is evaluated and served: the average, or without one the parameters themselves."""
        return self.ema or self.trainable


def initial_state(
    config: ConfigDict, stage: Stage, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """A fresh state; pure, to be jitted with output shardings."""
    trainable, frozen = stage.split(family_of(stage).init(config, stage, key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if config.train.ema_decay else {},
        frozen=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen),
    )


def ema_decay(step: jax.Array, limit: float) -> jax.Array:
    """Decay of the moving average after update `step` (from 0): `min(limit, (1 + step) / (10 + step))`."""
    step = step.astype(jnp.float32)
    return jnp.minimum(limit, (1.0 + step) / (10.0 + step))


def update_ema(ema: PyTree, params: PyTree, decay: jax.Array) -> PyTree:
    """`decay * ema + (1 - decay) * params`."""
    return jax.tree.map(lambda average, new: average + (1.0 - decay) * (new - average), ema, params)


@dataclass(frozen=True)
class Takeover:
    """Which parameters came from an earlier run: paths such as "video/blocks/attention/q/kernel".

    Attributes:
      kept: same path and shape in both, restored.
      new: only here, or of another shape; freshly initialised.
      dropped: only there, or of another shape; not used.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def table(self) -> str:
        """One line per parameter group: arrays kept, new and dropped."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for column, paths in enumerate((self.kept, self.new, self.dropped)):
            for path in paths:
                counts[path.split("/")[0]][column] += 1
        lines = [f"    {'parameters':<12}{'kept':>8}{'new':>8}{'dropped':>9}"]
        lines += [
            f"    {group:<12}{kept:>8}{new:>8}{dropped:>9}" for group, (kept, new, dropped) in sorted(counts.items())
        ]
        changed = sorted(set(self.new) & set(self.dropped))
        return "\n".join(lines + [f"    shape differs, so new: {path}" for path in changed])


def take_over(state: TrainState, source: Mapping[str, Any], origin: str) -> tuple[TrainState, Takeover]:
    """Replaces the parameters of a fresh state by those of an earlier run, where path and shape agree.

    Trained parameters and their average both start from the source; the optimizer state and the step stay fresh.

    Args:
      state: a fresh state.
      source: parameter tree of the earlier run (`checkpoint.load_params`).
      origin: where it came from, for messages.

    Raises:
      UserError: nothing matches, or a frozen parameter would be left random.
    """
    old = flatten(source)
    ours = flatten({**state.trainable, **state.frozen})
    kept = {path for path, leaf in ours.items() if path in old and old[path].shape == leaf.shape}
    result = Takeover(
        kept=tuple(sorted(kept)), new=tuple(sorted(set(ours) - kept)), dropped=tuple(sorted(set(old) - kept))
    )
    if not kept:
        raise UserError(f"no parameter of train.init_from={origin!r} has a place in this model; check config.model")
    random_frozen = [path for path in result.new if path.split("/")[0] in state.frozen]
    if random_frozen:
        raise UserError(
            f"train.init_from={origin!r} lacks {len(random_frozen)} parameters that this stage freezes, such as "
            f"{random_frozen[0]}; config.model must be that of the earlier run"
        )

    def replaced(tree: dict[str, Any]) -> dict[str, Any]:
        def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            name = path_name(path)
            if name not in kept:
                return leaf
            return jax.device_put(np.asarray(old[name]).astype(leaf.dtype), leaf.sharding)

        return jax.tree_util.tree_map_with_path(place, tree)

    state = dataclasses.replace(
        state, trainable=replaced(state.trainable), ema=replaced(state.ema), frozen=replaced(state.frozen)
    )
    return state, result


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"group/block/name": leaf} of a nested dict."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(dict(tree))[0]}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of a nested dict as "group/block/name"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def count(tree: PyTree) -> int:
    """Number of parameters in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
