"""Planners: what has been seen and done, and the instruction, in; the next event in words, with its duration, out.

planner = VlmPlanner.from_checkpoint("runs/vlm")
plan = planner.plan([PlanRequest(observation.frames, "make all buttons the same colour", done=["press ..."])])[0]
action = policy.infer(observation, plan.caption, plan.duration_s)
(seconds,) = planner.time_left([PlanRequest(later.frames, "make ...", done=["press ..."], now=plan.caption)])
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.vlm_batches import Prompts, resized
from wallwm_jax.events import planning_text
from wallwm_jax.events.planning_text import Plan
from wallwm_jax.models import language_pathway
from wallwm_jax.models.vlm import text_projector, vlm
from wallwm_jax.models.vlm.text_projector import ProjectorConfig
from wallwm_jax.models.vlm.tokenizer import pad
from wallwm_jax.training.checkpoint import load_params

_BUCKET = 128  # prompts are padded to a multiple of this: few compilations, little waste


@dataclass(frozen=True)
class PlanRequest:
    """What a planner is told.

    Attributes:
      frames: view name → `[H, W, 3]` uint8 RGB, now.
      instruction: the task.
      done: captions of the events so far, in time order.
      level: of the event to name, "subtask" or "action".
      previous_frames: those seen where the last event began; None before the first.
      now: caption of the event that is under way, where it is asked how long that one still takes.
    """

    frames: Mapping[str, np.ndarray]
    instruction: str
    done: Sequence[str] = ()
    level: str = "subtask"
    previous_frames: Mapping[str, np.ndarray] | None = None
    now: str = ""


class Planner(Protocol):
    """Names the next event of each of several episodes."""

    def plan(self, requests: Sequence[PlanRequest]) -> list[Plan]:
        """One answer per request: the caption of the next event, how many seconds it takes, or that all is done."""


class Questioner:
    """Requests as the VLM of a run is asked in training, in batches of one size.

    Attributes:
      levels: of events that the run was trained to name.
      views: that it looks at.
      tokenizer: of its VLM.
    """

    def __init__(self, config: ConfigDict, batch_size: int) -> None:
        """`config` is the run's; `config.data.views` names the views."""
        self.levels = tuple(level for level, share in config.data.levels.items() if share)
        self.views = tuple(config.data.views)
        self._data, self._batch_size = config.data.vlm, batch_size
        self._prompts, self._sizes = Prompts(config), language_pathway.vlm_config(config)
        self.tokenizer = self._prompts.tokenizer

    def inputs(self, requests: Sequence[PlanRequest]) -> vlm.Inputs:
        """At most a batch of requests, filled up by the first; prompts are padded to some few lengths.

        Raises:
          UserError: a level that the run did not train, a missing view, or a prompt that does not fit.
        """
        rows = [self._prompt(request) for request in requests]
        longest = max(len(ids) for ids, _ in rows)
        return self._padded(rows, min(-(-longest // _BUCKET) * _BUCKET, self._prompts.room))

    def blanks(self) -> Iterator[vlm.Inputs]:
        """A batch without content of every length that `inputs` may have."""
        black = np.zeros((self._data.image_size, self._data.image_size, 3), np.uint8)
        row = self._prompt(PlanRequest(dict.fromkeys(self.views, black), "", (), self.levels[0]))
        for length in {min(full, self._prompts.room) for full in range(_BUCKET, self._prompts.room + _BUCKET, _BUCKET)}:
            if length >= len(row[0]):
                yield self._padded([row], length)

    def _padded(self, rows: Sequence[tuple[list[int], np.ndarray]], length: int) -> vlm.Inputs:
        rows = [*rows, *[rows[0]] * (self._batch_size - len(rows))]
        ids, mask = pad(self.tokenizer, [ids for ids, _ in rows], length)
        return vlm.prepare(self._sizes, ids, mask, np.stack([pictures for _, pictures in rows]))

    def _prompt(self, request: PlanRequest) -> tuple[list[int], np.ndarray]:
        if request.level not in self.levels:
            raise UserError(f"this planner names events of {', '.join(self.levels)}, not of {request.level!r}")
        shown = [request.frames]
        if self._data.previous_images:
            shown.insert(0, request.previous_frames or request.frames)
        pictures = np.stack([self._picture(frames, view) for frames in shown for view in self.views])
        ids = self._prompts.ids(request.instruction, request.level, request.done, len(pictures), request.now)
        return ids, pictures

    def _picture(self, frames: Mapping[str, np.ndarray], view: str) -> np.ndarray:
        if view not in frames:
            raise UserError(f"the planner looks at view {view!r}; the observation has {', '.join(frames)}")
        return resized(frames[view], self._data.image_size)


class VlmPlanner:
    """The vision-language model of a run of stage `vlm_sft` or `vlm_text` as a `Planner`.

    Attributes:
      config: of the run.
      levels: those that it was trained to name.
      step: training step of the parameters.
    """

    def __init__(self, params: Mapping[str, Any], config: ConfigDict, *, batch_size: int = 8, step: int = 0) -> None:
        """`params` hold the group "vlm"; `config.data.views` names its views. Nothing is compiled yet."""
        self.config, self.step, self._batch_size = config, step, batch_size
        self._questioner = Questioner(config, batch_size)
        self.levels = self._questioner.levels
        self._params = jax.tree.map(jnp.asarray, params["vlm"])
        tokenizer = self._questioner.tokenizer
        self._seconds_left: Any = None
        if "vlm_text" in params:
            self._head = jax.tree.map(jnp.asarray, params["vlm_text"])
            sizes, heads = language_pathway.vlm_config(config), language_pathway.projector_config(config)
            self._seconds_left = jax.jit(functools.partial(_seconds_left, config=sizes, heads=heads))
        self._generate = jax.jit(
            functools.partial(
                vlm.generate,
                config=language_pathway.vlm_config(config),
                steps=config.data.vlm.answer_length,
                end_id=tokenizer.end_id,
                pad_id=tokenizer.pad_id,
            )
        )

    @classmethod
    def from_checkpoint(cls, workdir: str | Path, *, step: int | None = None, batch_size: int = 8) -> VlmPlanner:
        """Loads the newest checkpoint of a run, or that of `step`.

        Raises:
          UserError: no run there, no such checkpoint, or a run without a vision-language model.
        """
        loaded = load_params(workdir, step)
        config = ConfigDict(loaded.config)
        if "vlm" not in loaded.params:
            raise UserError(
                f"{str(workdir)!r} was trained in stage {config.train.stage!r} and has no vision-language model; a "
                "planner needs a run of stage 'vlm_sft' or 'vlm_text'"
            )
        config.data.views = tuple(loaded.assets["store"]["views"])
        return cls(loaded.params, config.lock(), batch_size=batch_size, step=loaded.step)

    def plan(self, requests: Sequence[PlanRequest]) -> list[Plan]:
        """See `Planner`; runs in batches of one size, a program per length of prompts, rounded up. `now` is not read.

        Raises:
          UserError: a level that the run did not train, a missing view, or a prompt that does not fit.
        """
        size, requests = self._batch_size, [replace(request, now="") for request in requests]
        texts = [
            text for start in range(0, len(requests), size) for text in self.answers(requests[start : start + size])
        ]
        return [planning_text.parse(text) for text in texts]

    def time_left(self, requests: Sequence[PlanRequest]) -> list[float | None]:
        """Seconds that each request's event `now` still takes, asked at any moment of it; None where none were said.

        A run of stage `vlm_text` answers by its time head, one of `vlm_sft` in words, to half a second.

        Raises:
          UserError: as `plan`; a request without `now`; or the run was never asked so.
        """
        if not self.config.data.vlm.inside_prob:
            raise UserError("this planner was trained with data.vlm.inside_prob=0: it was never asked inside an event")
        if any(not request.now for request in requests):
            raise UserError("how long an event still takes can be asked with its caption in `now` only")
        size, found = self._batch_size, []
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            if self._seconds_left is None:
                found += [planning_text.parse_time_left(text) for text in self.answers(part)]
            else:
                seconds = self._seconds_left(self._params, self._head, self._questioner.inputs(part))
                found += np.asarray(seconds)[: len(part)].tolist()
        return found

    def warm_up(self) -> None:
        """Compiles what `time_left` asks, of all lengths of prompts."""
        for inputs in self._questioner.blanks():
            if self._seconds_left is None:
                self._generate(self._params, inputs=inputs)
            else:
                self._seconds_left(self._params, self._head, inputs)

    def answers(self, requests: Sequence[PlanRequest]) -> list[str]:
        """What the model says, unread; at most a batch of requests."""
        said = np.asarray(self._generate(self._params, inputs=self._questioner.inputs(requests)))
        return [self._questioner.tokenizer.decode(tokens.tolist()) for tokens in said[: len(requests)]]


def _seconds_left(
    params: Any, head: Any, inputs: vlm.Inputs, *, config: vlm.VLMConfig, heads: ProjectorConfig
) -> jax.Array:
    """`[B]` by the time head, on the last token of each prompt."""
    hidden = vlm.forward(params, config, inputs)
    last = jnp.sum(inputs.mask, 1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
    return jnp.exp(text_projector.remaining_time(head, heads, hidden))
