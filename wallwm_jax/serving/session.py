"""What one robot does with the policy: asks for events, tells what it saw. One session per connection.

All state that outlives a request is here: the sampling noise and the event being executed. A mode with a history keeps
its frames here, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.inference.policy import Action, Policy
from wallwm_jax.serving.messages import Executed, Request, commands
from wallwm_jax.serving.watchdog import Calibration, EventWatch, Judgement


class Session:
    """One robot's episode. Not safe for several threads; the server's engine runs all sessions in one.

    Args:
      policy: shared by all sessions.
      calibration: of the watchdog; None leaves it without an alarm.
      seed: of the sampling noise; a session's answers are those of a fresh `Policy` of this seed.
    """

    def __init__(self, policy: Policy, calibration: Calibration | None = None, seed: int = 0) -> None:
        self._policy, self._calibration, self._first_seed = policy, calibration, seed
        self._reset()

    def answer(self, message: Request | Executed) -> tuple[dict[str, Any], dict[str, float]]:
        """The reply, and the seconds that its parts took. Raises UserError: what the policy or the watchdog refuses."""
        return self._plan(message) if isinstance(message, Request) else self._follow(message)

    def _reset(self) -> None:
        self._seed = self._first_seed
        self._event: EventWatch | None = None
        self._unseen: tuple[Request, Action] | None = None

    def imagine(self) -> None:
        """Predicts the video of an event that is to be watched: after its commands are out, so that nobody waits."""
        if self._unseen:
            request, action = self._unseen
            assert action.plan is not None  # the server serves events
            self._event = self._watch(request, action, self._policy.event_mode.finish(action.plan))
            self._unseen = None

    def _watch(self, request: Request, action: Action, latents: Mapping[str, np.ndarray] | None) -> EventWatch:
        return EventWatch(
            self._policy.event_mode,
            request.observation.frames,
            latents,
            steps=len(action.actions),
            seconds=action.duration_s,
            quantiles_s=action.duration_quantiles_s,
            spread=self._calibration.spread if self._calibration else math.inf,
        )

    def _plan(self, request: Request) -> tuple[dict[str, Any], dict[str, float]]:
        """Commands for the next event."""
        if request.reset:
            self._reset()
        mode = self._policy.event_mode
        action = self._policy.infer(
            request.observation,
            request.prompt,
            request.duration_s,
            request.mode,
            seed=self._seed + 1,
        )
        self._seed += 1
        self._event, self._unseen = self._watch(request, action, None), (request, action) if request.watch else None
        quantiles = [float(second) for second in action.duration_quantiles_s]
        event = {
            "steps": len(action.actions),
            "duration_s": action.duration_s,
            "whole": action.duration_s * action.control_hz <= mode.max_actions,
            "predicted_duration_s": quantiles[mode.median],
            "duration_quantiles_s": quantiles,
        }
        reply = {"actions": commands(action), "control_hz": action.control_hz}
        return reply | self._judged(self._event.judgement(), event), action.seconds

    def _follow(self, executed: Executed) -> tuple[dict[str, Any], dict[str, float]]:
        """How the event goes that the last request began."""
        self.imagine()
        if self._event is None:
            raise UserError("no event has begun on this connection; send a request before what was executed of it")
        judged = self._event.observe(executed.step, executed.frames)
        return self._judged(judged, {"steps": self._event.steps}), {}

    def _judged(self, judged: Judgement, event: dict[str, Any]) -> dict[str, Any]:
        threshold = self._calibration.threshold if self._calibration else None
        alarm = threshold is not None and judged.worst is not None and judged.worst > threshold
        return {
            "event": {"progress": judged.progress, "done_probability": judged.done_probability, **event},
            "watchdog": {
                "score": judged.score,
                "worst": judged.worst,
                "threshold": threshold,
                "alarm": alarm,
                "latents": judged.latents,
            },
        }
