"""What one robot does with the policy: asks for events or chunks, tells what it saw. One session per connection.

All state that outlives a request is here: the sampling noise, what is being executed, and in unified mode the past.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.inference.latent_conditioner import LatentConditioner
from wallwm_jax.inference.planner import PlanRequest, VlmPlanner
from wallwm_jax.inference.policy import Action, Policy
from wallwm_jax.inference.unified_mode import Chunk, Conditioning
from wallwm_jax.serving.event_clock import EventClock, EventTime
from wallwm_jax.serving.messages import Executed, Request, commands
from wallwm_jax.serving.past import Past
from wallwm_jax.serving.watchdog import Calibration, EventWatch, Judgement

Frames = Mapping[str, np.ndarray]


class Session:
    """One robot's episode. Not safe for several threads; the server's engine runs all sessions in one.

    Args:
      policy: shared by all sessions.
      calibrations: decoding mode → that of the watchdog; a mode without has no alarm, and chunks under latents have
        none, since words have set it.
      seed: of the sampling noise; a session's answers are those of a fresh `Policy` of this seed.
      latents: tell unified mode what to do; None leaves it to the prompt's words.
      planner: tells the time of the event under way in unified mode; see `EventClock`.
    """

    def __init__(
        self,
        policy: Policy,
        calibrations: Mapping[str, Calibration] | None = None,
        seed: int = 0,
        latents: LatentConditioner | None = None,
        planner: VlmPlanner | None = None,
    ) -> None:
        self._policy, self._calibrations, self._first_seed, self._latents = policy, calibrations or {}, seed, latents
        self._clock = EventClock(policy.event_mode, planner)
        self._reset()

    def answer(self, message: Request | Executed) -> tuple[dict[str, Any], dict[str, float]]:
        """The reply, and the seconds that its parts took. Raises UserError: what the policy or the watchdog refuses."""
        return self._plan(message) if isinstance(message, Request) else self._follow(message)

    def _reset(self) -> None:
        self._seed = self._first_seed
        self._watch: EventWatch | None = None
        self._unseen: tuple[Action, Frames] | None = None
        self._past: Past | None = None  # of the chunks so far; an event ends it
        self._under_way: EventTime | None = None  # while these chunks are played

    def imagine(self) -> None:
        """Predicts the video of what is to be watched: after the commands are out, so that nobody waits."""
        if not self._unseen:
            return
        (action, frames), self._unseen = self._unseen, None
        if isinstance(action.plan, Chunk):
            unified = self._policy.unified_mode
            assert unified is not None  # it made the chunk
            films = unified.finish(action.plan)
            latents = {view: film[unified.history :] for view, film in films.items()}
        else:
            latents = dict(self._policy.event_mode.finish(action.plan))
        self._watch = self._watch_over(action, frames, latents)

    def _watch_over(self, action: Action, frames: Frames, latents: Frames | None) -> EventWatch:
        calibration = self._calibration
        return EventWatch(
            self._policy.event_mode,
            frames,
            latents,
            steps=len(action.actions),
            seconds=action.duration_s,
            quantiles_s=None if isinstance(action.plan, Chunk) else action.duration_quantiles_s,
            spread=calibration.spread if calibration else math.inf,
        )

    def _plan(self, request: Request) -> tuple[dict[str, Any], dict[str, float]]:
        """Commands for the next event or chunk."""
        if request.reset:
            self._reset()
        action, frames, about = (self._chunk if request.mode == "unified" else self._event)(request)
        self._seed += 1
        self._watch, self._unseen = self._watch_over(action, frames, None), (action, frames) if request.watch else None
        reply = {"actions": commands(action), "control_hz": action.control_hz}
        return reply | self._judged(self._watch.judgement(), about, 0), action.seconds

    def _event(self, request: Request) -> tuple[Action, Frames, dict[str, Any]]:
        """The next event, the frames it begins with, and what the reply says of it."""
        mode = self._policy.event_mode
        action = self._policy.infer(request.observation, request.prompt, request.duration_s, seed=self._seed + 1)
        self._past, self._under_way = None, None
        quantiles = [float(second) for second in action.duration_quantiles_s]
        about = {
            "steps": len(action.actions),
            "duration_s": action.duration_s,
            "whole": action.duration_s * action.control_hz <= mode.max_actions,
            "predicted_duration_s": quantiles[mode.median],
            "duration_quantiles_s": quantiles,
        }
        return action, {view: frame[None] for view, frame in request.observation.frames.items()}, about

    def _chunk(self, request: Request) -> tuple[Action, Frames, dict[str, Any]]:
        """The next chunk, likewise; its frames are those of the past."""
        unified = self._policy.unified_mode
        assert unified is not None  # or the reader would have refused
        if self._past is None:
            self._past = Past(unified)
        prompt: str | Conditioning = request.prompt
        # Before the past moves: what is refused here leaves no trace in it.
        begun, frames = time.perf_counter(), self._past.fitted(request.observation.frames)
        if self._latents:
            asked = PlanRequest(frames, request.prompt, request.done, self._latents.levels[0])
            prompt = jax.block_until_ready(unified.from_latents(self._latents.latents([asked])[0]))
        told = time.perf_counter()
        event = self._clock.ask(request, frames, self._under_way)
        timed = time.perf_counter()
        observation = self._past.begin(request.observation, request.steps)
        self._under_way = event and event.at(self._past.step)
        action = self._policy.infer(
            observation, prompt, mode="unified", seed=self._seed + 1, history=self._past.history
        )
        action.seconds.update({"latents": told - begun} if self._latents else {})
        action.seconds.update({"event_time": timed - told} if event else {})
        self._past.follow(action)
        assert isinstance(action.plan, Chunk) and action.plan.draft is not None
        chunk = action.plan.draft.request
        return action, chunk.frames, {"number": chunk.number, "steps": len(action.actions)}

    def _follow(self, executed: Executed) -> tuple[dict[str, Any], dict[str, float]]:
        """How goes what the last request began."""
        self.imagine()
        if self._watch is None:
            raise UserError("nothing has begun on this connection; send a request before what was executed of it")
        if self._past:
            self._past.check(executed)
        elif executed.actions is not None:
            raise UserError("actions are fed back in mode 'unified'; an event needs none")
        judged = self._watch.observe(executed.step, executed.frames)
        if self._past:
            self._past.tell(executed)
        return self._judged(judged, {"steps": self._watch.steps}, executed.step), {}

    @property
    def _calibration(self) -> Calibration | None:
        """That of what is being executed."""
        if self._past is None:
            return self._calibrations.get("event")
        return None if self._latents else self._calibrations.get("unified")

    def _judged(self, judged: Judgement, about: dict[str, Any], step: int) -> dict[str, Any]:
        """What is said of the event, or of the chunk and the event under way, `step` control steps after it began."""
        threshold = self._calibration.threshold if self._calibration else None
        alarm = threshold is not None and judged.worst is not None and judged.worst > threshold
        place = {"progress": judged.progress, "done_probability": judged.done_probability}
        reply = {"chunk" if self._past else "event": place | about}
        if self._past and self._under_way:
            reply["event"] = self._clock.place(self._under_way, self._past.step + step)
        return reply | {
            "watchdog": {
                "score": judged.score,
                "worst": judged.worst,
                "threshold": threshold,
                "alarm": alarm,
                "latents": judged.latents,
            },
        }
