"""Latents in place of words: a staircase beside a frozen VLM, as unified mode takes it for each chunk.

    conditioner = LatentConditioner.from_checkpoint("runs/staircase")
    latents = conditioner.latents([PlanRequest(observation.frames, "make all buttons the same colour")])
    chunk = mode.plan(history.request(), mode.from_latents(latents[0]))

The question is the planner's own (`inference/planner.py`); no word is decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.inference.planner import PlanRequest, Questioner
from wallwm_jax.inference.unified_mode import UnifiedMode
from wallwm_jax.models import language_pathway
from wallwm_jax.models.vlm import staircase, vlm
from wallwm_jax.training.checkpoint import load_params


class LatentConditioner:
    """The staircase of a run of stage `staircase`.

    Attributes:
      levels: of events that the run was trained to ask for.
      views: that it looks at.
      step: training step of the parameters.
      text: parameters of the text encoder that the latents were tied to; None with stored features.
    """

    def __init__(self, params: Mapping[str, Any], config: ConfigDict, *, batch_size: int = 8, step: int = 0) -> None:
        """`params` hold "vlm" and "staircase"; `config.data.views` names the views. Nothing is compiled yet."""
        self.step, self.text = step, params.get("text")
        self._questioner, self._batch_size = Questioner(config, batch_size), batch_size
        self.levels, self.views = self._questioner.levels, self._questioner.views
        self._params = jax.tree.map(jnp.asarray, {name: params[name] for name in ("vlm", "staircase")})
        self._decode: Any = jax.jit(functools.partial(_decode, config))

    @classmethod
    def from_checkpoint(cls, workdir: str | Path, *, step: int | None = None, batch_size: int = 8) -> LatentConditioner:
        """Loads the newest checkpoint of a run, or that of `step`.

        Raises:
          UserError: no run there, no such checkpoint, or a run of another stage.
        """
        loaded = load_params(workdir, step)
        config = ConfigDict(loaded.config)
        if "staircase" not in loaded.params:
            raise UserError(
                f"{str(workdir)!r} was trained in stage {config.train.stage!r} and has no staircase; latents need a "
                "run of stage 'staircase'"
            )
        config.data.views = tuple(loaded.assets["store"]["views"])
        return cls(loaded.params, config.lock(), batch_size=batch_size, step=loaded.step)

    def warm_up(self) -> None:
        """Compiles the programs of all lengths of prompts."""
        for inputs in self._questioner.blanks():
            self._decode(self._params, inputs)

    def latents(self, requests: Sequence[PlanRequest]) -> list[jax.Array]:
        """Of each request `[K, Dt]` in the video tower's text space.

        Raises:
          UserError: a level that the run did not train, a missing view, or a prompt that does not fit.
        """
        found: list[jax.Array] = []
        for start in range(0, len(requests), self._batch_size):
            part = requests[start : start + self._batch_size]
            found += list(self._decode(self._params, self._questioner.inputs(part)))[: len(part)]
        return found


def check_alignment(conditioner: LatentConditioner, mode: UnifiedMode, run: str) -> None:
    """Raises `UserError` where the latents of `run` were tied to another text encoder than that of the model.

    Encoders that a stage froze are kept in bfloat16, so they are compared as such.
    """
    ours = mode.engine.params.get("text")
    if ours is None or conditioner.text is None:
        return
    left, right = jax.tree.leaves_with_path(ours), dict(jax.tree.leaves_with_path(conditioner.text))
    same = all(
        path in right
        and right[path].shape == leaf.shape
        and np.array_equal(jnp.asarray(leaf, jnp.bfloat16), jnp.asarray(right[path], jnp.bfloat16))
        for path, leaf in left
    )
    if not same:
        raise UserError(
            f"the latents of {run!r} were tied to the text encoder of another model; train stage staircase with "
            "--config.train.text_from= this model, or the one that it was adapted from"
        )


def _decode(config: ConfigDict, params: Mapping[str, Any], inputs: vlm.Inputs) -> jax.Array:
    """Latents `[B, K, Dt]` behind prompts."""
    sizes, stairs = language_pathway.vlm_config(config), language_pathway.staircase_config(config)
    slots = inputs.ids.shape[1] + len(stairs.entry_depths)
    _, cache = vlm.prefill(params["vlm"], sizes, inputs, slots=slots)
    found = staircase.decode(params["staircase"], stairs, sizes.language, cache)
    return staircase.project(params["staircase"], stairs, sizes.language, found)
