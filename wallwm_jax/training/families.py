"""The two models that stages train, and what the train step needs of each: parameters, rows, loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from wallwm_jax.data.pipeline import PackedRows, Rows
from wallwm_jax.data.vlm_batches import VlmRows
from wallwm_jax.models import language_flops, language_pathway, model_flops, world_action_model
from wallwm_jax.training import language_objectives, objectives
from wallwm_jax.training.stages import Stage


@dataclass(frozen=True)
class Family:
    """What all stages of a model share.

    Attributes:
      init: (config, stage, key) -> random parameters, float32, of at least the groups that the stage attaches.
      rows: makes the rows of its batches.
      compute_loss: as `objectives.compute_loss`.
      flops: module that counts them, with `RowShape.of`, `training_flops` and `batch_flops` as in `models.model_flops`.
    """

    init: Callable[[ConfigDict, Stage, jax.Array], dict[str, Any]]
    rows: type[Rows]
    compute_loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    flops: Any


_FAMILIES = {
    "world_action": Family(
        init=lambda config, stage, key: world_action_model.init(config.model, key),
        rows=PackedRows,
        compute_loss=objectives.compute_loss,
        flops=model_flops,
    ),
    "language": Family(
        init=lambda config, stage, key: language_pathway.init(config, key, (*stage.trains, *stage.freezes)),
        rows=VlmRows,
        compute_loss=language_objectives.compute_loss,
        flops=language_flops,
    ),
}


def family_of(stage: Stage) -> Family:
    """The family of a stage."""
    return _FAMILIES[stage.model]
