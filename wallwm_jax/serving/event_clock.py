"""How far the event under way is in unified mode, whose chunks know only their own clock.

Two things can say how long an event takes: a planner that was asked inside events in its training, anew at each chunk,
and the duration head of a model of stage `chunk`, at the event's first observation. That head is frozen as the run
before had left it, which has to have learnt from events; the embedding of pictures that it reads has trained on since.
The head of a model trained on chunks from the beginning has learnt how long these are, and is not asked. What neither
of them says is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.inference.planner import PlanRequest, VlmPlanner
from wallwm_jax.inference.policy import request as event_request
from wallwm_jax.serving.messages import DURATION_HEAD, PLANNER, Request
from wallwm_jax.serving.watchdog import possible_durations

Frames = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EventTime:
    """What is known of one event under way.

    Attributes:
      caption: as the robot names it.
      frames: view → `[H, W, 3]` uint8, those that it began with.
      quantiles_s: `[Q]` seconds that the duration head gave it then; None where it is not asked.
      left_s: seconds that the planner gave it last; None where it said none.
      began, asked: control steps of the episode at which it began, and at which the planner was asked.
    """

    caption: str
    frames: Frames
    quantiles_s: np.ndarray | None
    left_s: float | None
    began: int | None = None
    asked: int = 0

    def at(self, step: int) -> EventTime:
        """The same, asked at this control step of the episode; a new event begins there."""
        return replace(self, began=step if self.began is None else self.began, asked=step)


class EventClock:
    """Tells the time of events.

    Args:
      mode: of the policy; its duration head is asked where it has learnt events.
      planner: asked at each chunk; None leaves it to the head.
    """

    def __init__(self, mode: EventMode, planner: VlmPlanner | None) -> None:
        self._mode, self._planner, self._sources = mode, planner, time_sources(mode, planner)
        self._hz = float(mode.store["action_hz"])

    def ask(self, request: Request, frames: Frames, before: EventTime | None) -> EventTime | None:
        """The event that a request says is under way, the one `before` or a new one; None where it names none.

        Raises:
          UserError: what the planner refuses.
        """
        if not request.now:
            return None
        event = before
        if event is None or event.caption != request.now:
            quantiles = None
            if DURATION_HEAD in self._sources:
                quantiles = self._mode.durations([event_request(request.observation, request.now)])[0]
            event = EventTime(request.now, frames, quantiles, None)
        if self._planner:
            level = self._planner.levels[0]
            asked = PlanRequest(frames, request.prompt, request.done, level, event.frames, request.now)
            event = replace(event, left_s=self._planner.time_left([asked])[0])
        return event

    def place(self, event: EventTime, step: int) -> dict[str, Any]:
        """What a reply says of the event at this control step of the episode.

        A planner's time stands in place of the head's median, with the head's spread around it.
        """
        assert event.began is not None  # `at` has said when
        elapsed = (step - event.began) / self._hz
        found: dict[str, Any] = {"elapsed_s": elapsed}
        seconds: float | None = None
        if event.left_s is not None:
            seconds = max((event.asked - event.began) / self._hz + event.left_s, 1.0 / self._hz)
            found["progress"] = min(1.0, elapsed / seconds)
        if event.quantiles_s is not None:
            seconds = seconds or float(event.quantiles_s[self._mode.median])
            durations = possible_durations(event.quantiles_s, self._mode.config.model.duration_quantiles, seconds)
            shares = np.minimum(1.0, elapsed / durations)
            found |= {
                "progress": float(shares.mean()),
                "done_probability": float((shares >= 1.0).mean()),
                "duration_quantiles_s": event.quantiles_s.tolist(),
            }
        if seconds is not None:
            found |= {"predicted_duration_s": seconds, "left_s": max(0.0, seconds - elapsed)}
        return found


def time_sources(mode: EventMode, planner: VlmPlanner | None) -> list[str]:
    """What can say how long the events of unified mode take."""
    head = mode.config.train.stage == "chunk"
    return [name for name, known in ((PLANNER, planner), (DURATION_HEAD, head)) if known]
