"""The policy: what a robot asks. An observation and a prompt in, a whole event's commands out.

    policy = Policy.from_checkpoint("runs/quickstart")
    event = policy.infer(observation, "press the red button on the left")
    for pose, gripper in zip(event.poses, event.grippers):  # one command per control step
        robot.move(pose, gripper)

A model that was trained on windows with history decodes chunks of fixed length too (`inference/unified_mode.py`):

    while not done:
        chunk = policy.infer(observation, "sort the blocks by colour", mode="unified")
        for command in zip(chunk.poses, chunk.grippers):
            observation = robot.move(*command)
            policy.observe(observation, command)

Loads the averaged parameters and the assets of a run (statistics, cameras, clock), never an optimizer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.normalization import Stats
from wallwm_jax.events.actions import absolute_commands, state_vector
from wallwm_jax.inference.event_mode import EventMode, EventPlan, EventRequest
from wallwm_jax.inference.unified_mode import Chunk, Conditioning, History, UnifiedMode
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.training.checkpoint import load_params

MODES = ("event", "unified")


class Observation(Protocol):
    """What a robot reports: `frames` view name → `[H, W, 3]` uint8 RGB, `pose` `[G, 4, 4]` metres, `gripper` `[G]`."""

    @property
    def frames(self) -> Mapping[str, np.ndarray]: ...

    @property
    def pose(self) -> np.ndarray: ...

    @property
    def gripper(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Action:
    """One event's worth of commands.

    Attributes:
      actions: `[T, 32]` canonical actions, relative to the observation (`events.actions`).
      poses: `[T, G, 4, 4]` absolute end-effector commands in the base frame, metres.
      grippers: `[T, G]` commanded closing fraction, 0 open to 1 closed.
      duration_s: how long the event takes, as given or as the model thinks; longer than `T` steps where it was cut.
      control_hz: commands per second.
      duration_quantiles_s: `[Q]` what the model itself thinks, at `config.model.duration_quantiles`; none of a chunk.
      seconds: what the time went into: "encode" the pictures, "model".
      plan: the same as the model sees it; `EventMode.finish` or `UnifiedMode.finish` predicts its video later.
      video: view name → predicted `[1 + 4N, H, W, 3]` uint8 frames, the observation first; None unless asked for.
    """

    actions: np.ndarray
    poses: np.ndarray
    grippers: np.ndarray
    duration_s: float
    control_hz: float
    duration_quantiles_s: np.ndarray
    seconds: dict[str, float]
    plan: EventPlan | Chunk
    video: dict[str, np.ndarray] | None = None


class Policy:
    """One model behind the interface that robots, servers and evaluations use. Not safe for several threads.

    Attributes:
      event_mode: the batched engine behind `infer`.
      unified_mode: decodes chunks after a history; None where the model was not trained to.
      step: training step of the parameters.
    """

    def __init__(self, event_mode: EventMode, *, step: int = 0, seed: int = 0) -> None:
        self.event_mode = event_mode
        self.unified_mode = UnifiedMode(event_mode) if event_mode.config.data.window_kind == "history" else None
        self._history = History(self.unified_mode) if self.unified_mode else None
        self.step = step
        self._first_seed = seed
        self.reset()

    @classmethod
    def from_checkpoint(
        cls,
        workdir: str | Path,
        *,
        step: int | None = None,
        batch_size: int = 1,
        sampling: Mapping[str, Any] | None = None,
        seed: int = 0,
        codec_weights: str = "",
        text_weights: str = "",
    ) -> Policy:
        """Loads the newest checkpoint of a run, or that of `step`.

        Args:
          workdir: of `wallwm_jax.train`.
          step: which checkpoint; None for the newest.
          batch_size: requests that `event_mode` runs at once.
          sampling: entries of `config.sampling` to change, for example `{"steps": 20}`.
          seed: of the sampling noise; `reset` starts it again.
          codec_weights, text_weights: folders of the frozen parts, where they are not where the store's build had them.

        Raises:
          UserError: no run there, no such checkpoint, a run that has not learned to act, or an unknown sampling entry.
        """
        loaded = load_params(workdir, step)
        config = ConfigDict(loaded.config).lock()
        for name, value in (sampling or {}).items():
            if name not in config.sampling:
                raise UserError(f"unknown sampling entry {name!r}; it has {', '.join(sorted(config.sampling))}")
            try:
                config.sampling[name] = value
            except TypeError:
                raise UserError(
                    f"sampling entry {name}={value!r} is not of the kind of {config.sampling[name]!r}"
                ) from None
        missing = set(wam.abstract_params(config.model)) - set(loaded.params)
        if missing:
            raise UserError(
                f"{str(workdir)!r} was trained in stage {config.train.stage!r} and has no parameters of "
                f"{' and '.join(sorted(missing))}; acting needs a run of stage 'joint' or 'action'"
            )
        params = jax.tree.map(jnp.asarray, loaded.params)
        stats = Stats.from_dict(loaded.assets["stats"])
        event_mode = EventMode(
            params,
            config,
            loaded.assets["store"],
            stats,
            batch_size=batch_size,
            codec_weights=codec_weights,
            text_weights=text_weights,
        )
        return cls(event_mode, step=loaded.step, seed=seed)

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of `MODES` that the model was trained for."""
        return MODES if self.unified_mode else MODES[:1]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.event_mode.params))

    def reset(self) -> None:
        """Starts an episode: the sampling noise begins anew, and nothing was seen."""
        self._seed = self._first_seed
        if self._history is not None:
            self._history.reset()

    def observe(self, observation: Observation, command: tuple[np.ndarray, np.ndarray]) -> None:
        """For unified mode: what the robot reports after one control step, and the command (pose, gripper) it followed.

        Raises:
          UserError: the episode's first chunk was not inferred yet, or the model has no unified mode.
        """
        self._unified()[1].observe(observation, command)

    def infer(
        self,
        observation: Observation,
        prompt: str | Conditioning,
        duration: float | None = None,
        mode: str = "event",
        *,
        video: bool = False,
        seed: int | None = None,
        history: History | None = None,
    ) -> Action:
        """Commands for the whole event that `prompt` names, or for the next chunk, from the current observation on.

        Args:
          observation: current frame of each view, measured pose and gripper; in mode "unified" the one that was last
            given to `observe`, but for an episode's first.
          prompt: the next event in words, as the training captions say it; in mode "unified" the instruction, which is
            encoded once as long as it stays, or what `UnifiedMode` made of it.
          duration: seconds, of an event; None takes the model's own median.
          mode: "event" or "unified".
          video: also return the video that the model predicts.
          seed: of the sampling noise; by default the next one since `reset`.
          history: for unified mode, of one robot where several share the policy; by default what `observe` was told.

        Raises:
          UserError: an unknown mode or one the model was not trained for, no known view in the observation, bad
            pictures, a bad duration, or an observation that `observe` was not told of.
        """
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}; this version decodes in mode {', '.join(map(repr, MODES))}")
        if mode == "unified":
            return self._infer_chunk(observation, prompt, video=video, seed=seed, history=history)
        if not isinstance(prompt, str):
            raise UserError("event mode takes the next event in words; latents are for mode='unified'")
        engine, begun = self.event_mode, time.perf_counter()
        encoded = engine.encode(request(observation, prompt, duration))
        ready = time.perf_counter()
        quantiles = engine.durations([encoded])[0]
        if duration is None:
            encoded = dataclasses.replace(encoded, duration_s=float(quantiles[engine.median]))
        seeds = [self._next_seed() if seed is None else seed]
        plan = engine.plan([encoded], seeds=seeds, video=video)[0]
        done = time.perf_counter()
        poses, grippers = absolute_commands(plan.actions, observation.pose)
        return Action(
            actions=plan.actions,
            poses=poses,
            grippers=grippers,
            duration_s=plan.duration_s,
            control_hz=float(engine.store["action_hz"]),
            duration_quantiles_s=quantiles,
            seconds={"encode": ready - begun, "model": done - ready},
            plan=plan,
            video=engine.decode(plan) if video else None,
        )

    def _infer_chunk(
        self,
        observation: Observation,
        prompt: str | Conditioning,
        *,
        video: bool,
        seed: int | None,
        history: History | None,
    ) -> Action:
        (engine, own), begun = self._unified(), time.perf_counter()
        history = history or own
        history.begin(observation)
        request = history.request()
        if isinstance(prompt, str):
            self.event_mode.check_caption(prompt)
            prompt = engine.encode_text(prompt)
        ready = time.perf_counter()
        chunk = engine.plan(request, prompt, seed=self._next_seed() if seed is None else seed, video=video)
        hertz = float(self.event_mode.store["action_hz"])
        return Action(
            actions=chunk.actions,
            poses=chunk.poses,
            grippers=chunk.grippers,
            duration_s=len(chunk.actions) / hertz,
            control_hz=hertz,
            duration_quantiles_s=np.zeros(0),
            seconds={"encode": ready - begun, "model": time.perf_counter() - ready},
            plan=chunk,
            video=engine.decode(chunk) if video else None,
        )

    def _unified(self) -> tuple[UnifiedMode, History]:
        if self.unified_mode is None or self._history is None:
            raise UserError(
                "this model was not trained on windows with history, so it has no unified mode; it decodes events"
            )
        return self.unified_mode, self._history

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed


def request(observation: Observation, prompt: str, duration: float | None = None) -> EventRequest:
    """An observation and a prompt as event mode takes them; measured poses become the canonical state."""
    state, valid = state_vector(observation.pose, observation.gripper)
    return EventRequest(observation.frames, state, valid, prompt, duration)
