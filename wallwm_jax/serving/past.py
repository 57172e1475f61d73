"""The past of one robot, as its messages tell it: what unified mode plans from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.inference.captions import fit_picture
from wallwm_jax.inference.policy import Action
from wallwm_jax.inference.unified_mode import History, UnifiedMode
from wallwm_jax.serving.messages import Executed, Observed


class Past:
    """A `History` that fills in what a robot leaves out: the commands are those it was sent, the last picture holds.

    Nothing reaches the history before the next request does, so that one that is refused leaves no trace.

    Attributes:
      history: up to the observation of the last request.
      step: control steps of the episode up to there.
    """

    def __init__(self, mode: UnifiedMode) -> None:
        self.history, self.step = History(mode), 0
        self._stride, self._size = mode.stride, tuple(mode.engine.store["size"])
        self._present: Observed | None = None
        self._told = 0  # step of the chunk that was told last
        self._sent(np.zeros((0, 1, 4, 4)), np.zeros((0, 1)))

    def begin(self, observation: Observed, steps: int | None) -> Observed:
        """The observation that a chunk starts from, after `steps` of the last one's commands, all of them by default.

        After no step at all it is the one before.

        Raises:
          UserError: a number of steps that the chunk does not have, that is not at a frame of the video, or before what
            was told already; or another number of arms.
        """
        observation = dataclasses.replace(observation, frames=self.fitted(observation.frames))
        before = self._present
        if before is None:
            self._present = observation
            self.history.observe(observation)
            return observation
        steps = len(self._poses) if steps is None else steps
        self._check(steps)
        if steps < self._told:
            raise UserError(f"steps is {steps}, but step {self._told} of the chunk was told already")
        if steps % self._stride:
            raise UserError(f"steps is {steps}; the next chunk begins after a multiple of {self._stride} control steps")
        if len(observation.pose) != len(before.pose):
            raise UserError(
                f"state has {len(observation.pose)} arms, the episode began with {len(before.pose)}; an episode of "
                "another robot begins with reset"
            )
        frames = before.frames
        for step, command in enumerate(zip(self._poses[:steps], self._grippers[:steps]), 1):
            frames = self._seen.get(step, frames)
            seen = observation if step == steps else Observed(frames, observation.pose, observation.gripper)
            self.history.observe(seen, command)
            self._present = seen
        self._sent(self._poses[:0], self._grippers[:0])
        self.step += steps
        assert self._present is not None
        return self._present

    def follow(self, action: Action) -> None:
        """The chunk that the robot was sent."""
        self._sent(action.poses.copy(), action.grippers.copy())

    def check(self, executed: Executed) -> None:
        """Raises `UserError`: a step that the chunk does not have, or not one command for each step and arm."""
        self._check(executed.step)
        if executed.actions is not None:
            given, expected = executed.actions[1].shape, (executed.step - self._told, self._grippers.shape[1])
            if given != expected:
                raise UserError(
                    f"actions has {given[0]} steps of {given[1]} arms; since step {self._told} there were "
                    f"{expected[0]} of {expected[1]}"
                )

    def tell(self, executed: Executed) -> None:
        """What the robot saw, and the commands since the last telling where they are not those that it was sent."""
        if executed.actions is not None:
            told = slice(self._told, executed.step)
            self._poses[told], self._grippers[told] = executed.actions
        self._told = executed.step
        if executed.step % self._stride == 0:
            self._seen[executed.step] = self.fitted(executed.frames)

    def fitted(self, frames: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """At the model's size, so that what is kept of a robot is small."""
        return {view: fit_picture(frame, self._size, view) for view, frame in frames.items()}

    def _check(self, step: int) -> None:
        if step > len(self._poses):
            raise UserError(f"{step} control steps were executed? The last chunk has {len(self._poses)}")

    def _sent(self, poses: np.ndarray, grippers: np.ndarray) -> None:
        self._poses, self._grippers, self._told = poses, grippers, 0
        self._seen: dict[int, Mapping[str, np.ndarray]] = {}
