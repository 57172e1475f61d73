"""The policy: what a robot asks. An observation and a prompt in, a whole event's commands out.

    policy = Policy.from_checkpoint("runs/quickstart")
    event = policy.infer(observation, "press the red button on the left")
    for pose, gripper in zip(event.poses, event.grippers):  # one command per control step
        robot.move(pose, gripper)

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
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.training.checkpoint import load_params

MODES = ("event",)


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
      duration_quantiles_s: `[Q]` what the model itself thinks, at `config.model.duration_quantiles`.
      seconds: what the time went into: "encode" the pictures, "model".
      plan: the same as the model sees it; `EventMode.finish` predicts its video later.
      video: view name → predicted `[1 + 4N, H, W, 3]` uint8 frames, the observation first; None unless asked for.
    """

    actions: np.ndarray
    poses: np.ndarray
    grippers: np.ndarray
    duration_s: float
    control_hz: float
    duration_quantiles_s: np.ndarray
    seconds: dict[str, float]
    plan: EventPlan
    video: dict[str, np.ndarray] | None = None


class Policy:
    """One model behind the interface that robots, servers and evaluations use. Not safe for several threads.

    Attributes:
      event_mode: the batched engine behind `infer`.
      step: training step of the parameters.
    """

    def __init__(self, event_mode: EventMode, *, step: int = 0, seed: int = 0) -> None:
        self.event_mode = event_mode
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
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.event_mode.params))

    def reset(self) -> None:
        """Starts an episode: the sampling noise begins anew. Event mode keeps no history."""
        self._seed = self._first_seed

    def infer(
        self,
        observation: Observation,
        prompt: str,
        duration: float | None = None,
        mode: str = "event",
        *,
        video: bool = False,
        seed: int | None = None,
    ) -> Action:
        """Commands for the whole event that `prompt` names, from the current observation on.

        Args:
          observation: current frame of each view, measured pose and gripper.
          prompt: the next event in words, as the training captions say it.
          duration: seconds; None takes the model's own median.
          mode: "event".
          video: also return the video that the model predicts.
          seed: of the sampling noise; by default the next one since `reset`.

        Raises:
          UserError: an unknown mode, no known view in the observation, bad pictures, or a bad duration.
        """
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}; this version decodes in mode {', '.join(map(repr, MODES))}")
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

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed


def request(observation: Observation, prompt: str, duration: float | None = None) -> EventRequest:
    """An observation and a prompt as event mode takes them; measured poses become the canonical state."""
    state, valid = state_vector(observation.pose, observation.gripper)
    return EventRequest(observation.frames, state, valid, prompt, duration)
