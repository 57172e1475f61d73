"""A frozen VLM in place of words, as unified mode takes it for each chunk; no word is decoded.

    conditioner = LatentConditioner.from_checkpoint("runs/staircase")      # or "runs/vlm_text"
    latents = conditioner.latents([PlanRequest(observation.frames, "make all buttons the same colour")])
    chunk = mode.plan(history.request(), mode.from_latents(latents[0]))

A run of stage `staircase` gives its latents (WALL-WM section 3.2), one of stage `vlm_text` the features that its
projector reads from the VLM, as many as it takes for text (section 3.1). Both stand in the video tower's text space for
the next event's caption, and the question is the planner's own (`inference/planner.py`).
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
from wallwm_jax.models.vlm import staircase, text_projector, vlm
from wallwm_jax.training.checkpoint import load_params

STAGES = ("staircase", "vlm_text")
"""Whose runs may stand in a text's place; each has a parameter group of its name."""


class LatentConditioner:
    """The VLM of a run of one of `STAGES`, with what that stage trained.

    Attributes:
      stage: of the run.
      levels: of events that the run was trained to ask for.
      views: that it looks at.
      step: training step of the parameters.
      shape: (most latents, width) that it gives.
      text: parameters of the text encoder that it was aligned to; None with stored features.
      text_weights: fingerprint of the encoder of stored features; "" where there is none.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ConfigDict,
        *,
        batch_size: int = 8,
        step: int = 0,
        text_weights: str = "",
    ) -> None:
        """`params` hold "vlm" and the stage's; `config.data.views` names the views. Nothing is compiled yet."""
        self.stage = next(name for name in STAGES if name in params)
        self.step, self.text, self.text_weights = step, params.get("text"), text_weights
        self._questioner, self._batch_size = Questioner(config, batch_size), batch_size
        self.levels, self.views = self._questioner.levels, self._questioner.views
        self._params = jax.tree.map(jnp.asarray, {name: params[name] for name in ("vlm", self.stage)})
        if self.stage == "staircase":
            stairs = language_pathway.staircase_config(config)
            self.shape, decode = (len(stairs.entry_depths), stairs.out_width), _decode
        else:
            self.shape, decode = language_pathway.text_shape(config), _project
        self._decode: Any = jax.jit(functools.partial(decode, config))

    @classmethod
    def from_checkpoint(cls, workdir: str | Path, *, step: int | None = None, batch_size: int = 8) -> LatentConditioner:
        """Loads the newest checkpoint of a run, or that of `step`.

        Raises:
          UserError: no run there, no such checkpoint, or a run of another stage.
        """
        loaded = load_params(workdir, step)
        config, store = ConfigDict(loaded.config), loaded.assets["store"]
        if not any(name in loaded.params for name in STAGES):
            raise UserError(
                f"{str(workdir)!r} was trained in stage {config.train.stage!r} and has nothing to put in a text's "
                f"place; that needs a run of stage {' or '.join(map(repr, STAGES))}"
            )
        config.data.views = tuple(store["views"])
        weights = fingerprint(store)
        return cls(loaded.params, config.lock(), batch_size=batch_size, step=loaded.step, text_weights=weights)

    def warm_up(self) -> None:
        """Compiles the programs of all lengths of prompts."""
        for inputs in self._questioner.blanks():
            self._decode(self._params, inputs)

    def latents(self, requests: Sequence[PlanRequest]) -> list[np.ndarray]:
        """Of each request `[K, Dt]` in the video tower's text space, K as many as the run says.

        Raises:
          UserError: a level that the run did not train, a missing view, or a prompt that does not fit.
        """
        found: list[np.ndarray] = []
        for start in range(0, len(requests), self._batch_size):
            part = requests[start : start + self._batch_size]
            features, lengths = jax.device_get(self._decode(self._params, self._questioner.inputs(part)))
            found += [row[:length] for row, length in zip(features[: len(part)], lengths)]
        return found


def check_alignment(conditioner: LatentConditioner, mode: UnifiedMode, run: str) -> None:
    """Raises `UserError` where `run` was aligned to another text encoder than that of the model, or to other sizes."""
    engine = mode.engine
    (most, width), (room, own) = conditioner.shape, language_pathway.text_shape(mode.config)
    if width != own or most > room:
        raise UserError(
            f"{run!r} gives up to {most} features of width {width} in a text's place, the model reads up to {room} of "
            f"width {own}; train it with the model's own model.text and data.text_length"
        )
    same = same_encoder(conditioner.text, engine.params.get("text"))
    if not same or conditioner.text_weights != fingerprint(engine.store):
        raise UserError(
            f"{run!r} was aligned to the text encoder of another model; train stage {conditioner.stage} with "
            "--config.train.text_from= this model, or the one that it was adapted from"
        )


def same_encoder(one: Any, other: Any) -> bool:
    """Whether the parameters of two text encoders are the same, or both None.

    Encoders that a stage froze are kept in bfloat16, so they are compared as such.
    """
    left, right = (dict(jax.tree.leaves_with_path(tree)) for tree in (one, other))
    return left.keys() == right.keys() and all(
        np.shape(leaf) == np.shape(right[path])
        and np.array_equal(jnp.asarray(leaf, jnp.bfloat16), jnp.asarray(right[path], jnp.bfloat16))
        for path, leaf in left.items()
    )


def fingerprint(store: Mapping[str, Any]) -> str:
    """That of the text encoder whose features a store has; "" where it has none."""
    return str(store.get("text_weights", {}).get("fingerprint", ""))


def _decode(config: ConfigDict, params: Mapping[str, Any], inputs: vlm.Inputs) -> tuple[jax.Array, jax.Array]:
    """Latents `[B, K, Dt]` of the staircase behind prompts, and K for each."""
    sizes, stairs = language_pathway.vlm_config(config), language_pathway.staircase_config(config)
    slots = inputs.ids.shape[1] + len(stairs.entry_depths)
    _, cache = vlm.prefill(params["vlm"], sizes, inputs, slots=slots)
    found = staircase.decode(params["staircase"], stairs, sizes.language, cache)
    latents = staircase.project(params["staircase"], stairs, sizes.language, found)
    return latents, jnp.full(len(latents), latents.shape[1])


def _project(config: ConfigDict, params: Mapping[str, Any], inputs: vlm.Inputs) -> tuple[jax.Array, jax.Array]:
    """Features `[B, L, Dt]` that the projector reads from prompts, and how many of them are text, `[B]`."""
    sizes, heads = language_pathway.vlm_config(config), language_pathway.projector_config(config)
    hidden = vlm.forward(params["vlm"], sizes, inputs)
    is_text = inputs.mask & (inputs.ids != sizes.image_id)
    found = text_projector.text_features(params["vlm_text"], heads, hidden, is_text)
    return found.features, text_projector.text_length(found.present)
