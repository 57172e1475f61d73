"""The losses on events that training never sees, by the averaged parameters: the same rows and noise each time.

Rows are drawn from the store's heldout split as training draws them, read once, and stay in host memory; what changes
between two evaluations are the parameters alone. Nothing of a training step depends on it.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.device_feed import feed
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.pipeline import make_loader
from wallwm_jax.training.train_state import TrainState
from wallwm_jax.training.train_step import TrainStep

SPLIT = "heldout"


def open_heldout(config: ConfigDict) -> EventStore | None:
    """The heldout split of the run's store; None where `train.heldout_every` is 0.

    Raises:
      UserError: it has no windows.
    """
    if not config.train.heldout_every:
        return None
    store = open_store(config.data.store, SPLIT)
    if not len(store.index):
        raise UserError(
            f"train.heldout_every={config.train.heldout_every}, but event store {config.data.store!r} has no "
            "heldout windows; build it with --heldout_fraction, or set --config.train.heldout_every=0"
        )
    return store


class Heldout:
    """`train.heldout_batches` batches of the heldout split, and the compiled program that evaluates one."""

    def __init__(self, store: EventStore, config: ConfigDict, built: TrainStep, *, host_index: int, host_count: int):
        """Reads this host's rows and compiles.

        Args:
          store: from `open_heldout`.
          config: with `data.views` named.
          built: the run's step.
          host_index, host_count: as in `pipeline.make_loader`.

        Raises:
          UserError: its windows cannot be drawn from, or too many are damaged.
        """
        rows = built.family.rows
        with make_loader(store, config, rows, host_index=host_index, host_count=host_count) as loader:
            self._batches = list(itertools.islice(loader, int(config.train.heldout_batches)))
        self._sharding = built.rows
        shapes = built.abstract_batch(rows.spec(config, config.data.rows))
        number = jax.ShapeDtypeStruct((), np.int32)
        self._program = built.evaluate.lower(built.abstract_state, shapes, number).compile()

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Means over the batches: "loss" and "loss_<stream>"."""
        found: list[dict[str, Any]] = []
        with feed(iter(self._batches), self._sharding) as batches:
            for number, (batch, _, _) in enumerate(batches):
                found.append(self._program(state, batch, np.int32(number)))
        measured: list[dict[str, float]] = jax.device_get(found)
        return {name: float(np.mean([one[name] for one in measured])) for name in found[0] if name != "events"}
