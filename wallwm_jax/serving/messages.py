"""What a robot may ask and tell, checked field by field; and what the server says of itself.

Arms travel as eight numbers, in requests and replies alike (`ARM_LAYOUT`): position in metres and orientation as a unit
quaternion, of the end effector in the base frame, then the gripper's closing fraction.

A reply says only what something knows. In mode "event" the model's duration head says how long the event takes. In mode
"unified" the chunk's progress is its clock; of the event under way a reply speaks where the request names it (`now`)
and a planner, or the duration head of a model of stage `chunk`, knows its time (`event_clock`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from wallwm_jax.console import UserError
from wallwm_jax.events.actions import ARM_DIM
from wallwm_jax.inference.policy import Action, Policy

ARM_LAYOUT = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper")
PROTOCOL = 1
PLANNER, DURATION_HEAD = "planner", "duration head"  # what can say how long an event takes in unified mode

_UNIT = 1e-3  # how far a quaternion's length may be from 1
_GRIPPER = 0.1  # how far a measured closing fraction may lie outside 0..1
_OF_MODE = {"duration_s": "event", "frames": "event", "steps": "unified", "done": "unified", "now": "unified"}
_REQUEST = ("images", "state", "prompt", "mode", "watch", "reset", *_OF_MODE)
_EXECUTED = ("images", "step", "actions")


@dataclass(frozen=True)
class Observed:
    """An observation as the policy takes it: `frames` view → `[H, W, 3]` uint8, `pose` `[G, 4, 4]`, `gripper` `[G]`."""

    frames: Mapping[str, np.ndarray]
    pose: np.ndarray
    gripper: np.ndarray


@dataclass(frozen=True)
class Request:
    """A robot asks for the next event or chunk.

    Attributes:
      observation: its present observation.
      prompt: the event, or the instruction, in words.
      mode: decoding mode.
      duration_s: length of the event; None leaves it to the model.
      steps: control steps since the request before, in unified mode; None is its whole chunk.
      done: captions of the events that are over, in time order, for a server with latents or a planner.
      now: caption of the event under way, in unified mode; "" where the robot does not say.
      watch: predict the video, too, so that executed observations can be compared with it.
      reset: an episode begins: sampling noise and history start anew.
    """

    observation: Observed
    prompt: str
    mode: str
    duration_s: float | None
    steps: int | None
    done: tuple[str, ...]
    now: str
    watch: bool
    reset: bool


@dataclass(frozen=True)
class Executed:
    """What a robot sees `step` control steps after the observation of its last request; `frames` as in `Observed`.

    `actions` are the commands since the last telling, poses `[n, G, 4, 4]` and grippers `[n, G]`, where they are not
    those that it was sent.
    """

    frames: Mapping[str, np.ndarray]
    step: int
    actions: tuple[np.ndarray, np.ndarray] | None = None


class Reader:
    """Turns unpacked messages into requests of one policy; every fault is a `UserError` that names the field.

    Args:
      policy: to be asked.
      modes: of decoding, that are served; the first is that of a request that names none.
      latents: whether latents tell unified mode what to do; `done` is for them.
      event_time: what says how long events take in unified mode; `now` is for it, `done` for a planner.
    """

    def __init__(
        self, policy: Policy, modes: Sequence[str], *, latents: bool = False, event_time: Sequence[str] = ()
    ) -> None:
        self._mode, self._modes = policy.event_mode, tuple(modes)
        self._latents, self._event_time = latents, event_time
        self.views = self._mode.views
        self.max_arms = int((self._mode.stats.state.count > 0).sum()) // ARM_DIM
        self.video_fps = float(self._mode.store["video_fps"])

    def read(self, message: Any) -> Request | Executed:
        """The request or the executed observation that `message` is."""
        if not isinstance(message, dict):
            raise UserError(f"a request is a map with the fields {', '.join(_REQUEST)}; got {_kind(message)}")
        if "executed" in message:
            _only(message, ("executed",), "beside executed")
            executed = message["executed"]
            if not isinstance(executed, dict):
                raise UserError(f"executed is a map with the fields {', '.join(_EXECUTED)}; got {_kind(executed)}")
            _only(executed, _EXECUTED, "in executed")
            actions = executed.get("actions")
            return Executed(
                self._images(executed.get("images")),
                _integer(executed, "step", 0),
                None if actions is None else self._actions(actions),
            )
        _only(message, _REQUEST, "in the request")
        if message.get("duration_s") is not None and message.get("frames") is not None:
            raise UserError("duration_s and frames both say how long the event takes; send one of them")
        seconds = _seconds(message.get("duration_s"))
        if message.get("frames") is not None:
            seconds = _integer(message, "frames", 1) / self.video_fps
        mode = message.get("mode", self._modes[0])
        if mode not in self._modes:
            raise UserError(f"unknown mode {mode!r}; this server decodes in mode {', '.join(map(repr, self._modes))}")
        for name, other in _OF_MODE.items():
            if other != mode and message.get(name) is not None:
                raise UserError(f"{name} is for mode {other!r}; this request is in mode {mode!r}")
        steps = None if message.get("steps") is None else _integer(message, "steps", 0)
        return Request(
            Observed(self._images(message.get("images")), *self._state(message.get("state"))),
            self._prompt(message.get("prompt"), mode),
            mode,
            seconds,
            steps,
            self._done(message.get("done")),
            self._now(message.get("now")),
            _flag(message, "watch"),
            _flag(message, "reset"),
        )

    def _images(self, images: Any) -> dict[str, np.ndarray]:
        expected = "images is a map of view name to [H, W, 3] uint8 RGB"
        if not isinstance(images, dict):
            raise UserError(f"{expected}; got {_kind(images)}")
        unknown, missing = set(images) - set(self.views), set(self.views) - set(images)
        if unknown:
            raise UserError(f"images has the unknown views {_names(unknown)}; this policy sees {_names(self.views)}")
        if missing:
            raise UserError(f"images lacks {_names(missing)}; send None for a camera that the robot does not have")
        present = {view: image for view, image in images.items() if image is not None}
        if not present:
            raise UserError("images has no picture at all")
        for view, image in present.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UserError(f"{expected}; {view!r} is {_kind(image)}")
            if 0 in image.shape:
                raise UserError(f"images: {view!r} is empty, {list(image.shape)}")
        return present

    def _state(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        layout = f"[G, {len(ARM_LAYOUT)}] floats ({', '.join(ARM_LAYOUT)}) for 1 to {self.max_arms} arms"
        arms = state[None] if isinstance(state, np.ndarray) and state.ndim == 1 else state
        return self._arms("state", arms, layout)

    def _actions(self, actions: Any) -> tuple[np.ndarray, np.ndarray]:
        layout = f"[n, {len(ARM_LAYOUT)} G] floats, laid out as those of a reply, for 1 to {self.max_arms} arms"
        rows = actions
        if isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.shape[1] and rows.shape[1] % len(ARM_LAYOUT) == 0:
            rows = rows.reshape(len(rows), -1, len(ARM_LAYOUT))
            return self._arms("actions", rows, layout, axes=3)
        raise UserError(f"actions is {layout}; got {_kind(actions)}")

    def _arms(self, name: str, rows: Any, layout: str, axes: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """Poses `[..., G, 4, 4]` and grippers `[..., G]` of rows `[..., G, 8]`."""
        if (
            not isinstance(rows, np.ndarray)
            or rows.dtype.kind != "f"
            or rows.ndim != axes
            or rows.shape[-1] != len(ARM_LAYOUT)
            or not 1 <= rows.shape[-2] <= self.max_arms
        ):
            raise UserError(f"{name} is {layout}; got {_kind(rows)}")
        arms = np.asarray(rows, np.float64)
        if not np.isfinite(arms).all():
            raise UserError(f"{name} has numbers that are not finite")
        lengths, grippers = np.linalg.norm(arms[..., 3:7], axis=-1), arms[..., 7]
        if (wrong := np.abs(lengths - 1.0) > _UNIT).any():
            raise UserError(
                f"{name}: the quaternion (qw, qx, qy, qz) has length {lengths[wrong].round(4).tolist()[:4]}, not 1"
            )
        if (wrong := (grippers < -_GRIPPER) | (grippers > 1.0 + _GRIPPER)).any():
            raise UserError(f"{name}: the gripper is {grippers[wrong].tolist()[:4]}; 0 is open, 1 closed")
        return _pose(arms), grippers

    def _done(self, done: Any) -> tuple[str, ...]:
        if done is None:
            return ()
        if not self._latents and PLANNER not in self._event_time:
            raise UserError("done is for a server with latents or a planner (--latents, --planner); this one has none")
        if not isinstance(done, list) or not all(isinstance(caption, str) for caption in done):
            raise UserError(f"done is a list of captions; got {done!r:.60}")
        return tuple(done)

    def _now(self, now: Any) -> str:
        if now is None:
            return ""
        if not self._event_time:
            raise UserError(
                "now is for a server that knows how long events take: one of a run of stage 'chunk', or with --planner"
            )
        if not isinstance(now, str) or not now.strip():
            raise UserError(f"now says the event under way in words; got {now!r:.60}")
        if DURATION_HEAD in self._event_time:
            self._mode.check_caption(now)
        return now

    def _prompt(self, prompt: Any, mode: str) -> str:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompt says the next event in words, or the instruction; got {prompt!r:.60}")
        if not (self._latents and mode == "unified"):  # or the model's text encoder does not read it
            self._mode.check_caption(prompt)
        return prompt


def arm_rows(poses: np.ndarray, grippers: np.ndarray) -> np.ndarray:
    """Poses `[..., 4, 4]` and grippers `[...]` as `[..., 8]` float32 rows of `ARM_LAYOUT`."""
    wxyz = np.roll(Rotation.from_matrix(poses[..., :3, :3].reshape(-1, 3, 3)).as_quat(), 1, axis=-1)
    quaternions = wxyz.reshape(*poses.shape[:-2], 4)
    return np.concatenate([poses[..., :3, 3], quaternions, grippers[..., None]], -1).astype(np.float32)


def commands(action: Action) -> np.ndarray:
    """`[T, 8 G]` float32: the commands of an event, one arm's `ARM_LAYOUT` after the other.

    Of the two quaternions of an orientation each step has the one nearer to the step before.
    """
    rows = arm_rows(action.poses, action.grippers)
    aligned = (rows[1:, :, 3:7] * rows[:-1, :, 3:7]).sum(-1)
    rows[1:, :, 3:7] *= np.cumprod(np.where(aligned < 0, -1.0, 1.0), axis=0)[..., None]
    return rows.reshape(len(rows), -1)


def describe(policy: Policy, modes: Sequence[str]) -> dict[str, Any]:
    """What the server says on connection: everything that a robot needs to make a request. Plain values only."""
    mode, unified, reader = policy.event_mode, policy.unified_mode, Reader(policy, modes)
    return {
        "server": "wallwm_jax",
        "protocol": PROTOCOL,
        "step": policy.step,
        "parameters": policy.num_parameters,
        "modes": list(modes),
        "views": list(mode.views),
        "image_size": [int(side) for side in mode.store["size"]],
        "arm_layout": list(ARM_LAYOUT),
        "max_arms": reader.max_arms,
        "control_hz": float(mode.store["action_hz"]),
        "video_fps": reader.video_fps,
        "feedback_every": int(mode.store["video_stride"]),
        "buckets": list(mode.buckets),
        "max_actions": mode.max_actions,
        "chunk_actions": unified.chunk if unified and "unified" in modes else None,
        "request": list(_REQUEST),
        "executed": list(_EXECUTED),
    }


def _pose(arms: np.ndarray) -> np.ndarray:
    """`[..., 8]` rows to `[..., 4, 4]`."""
    pose = np.tile(np.eye(4), (*arms.shape[:-1], 1, 1))
    xyzw = np.roll(arms[..., 3:7], -1, axis=-1)
    pose[..., :3, :3] = Rotation.from_quat(xyzw.reshape(-1, 4)).as_matrix().reshape(*arms.shape[:-1], 3, 3)
    pose[..., :3, 3] = arms[..., :3]
    return pose


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise UserError(f"duration_s is a number of seconds; got {_kind(value)}")
    if not 0.0 < float(value) < float("inf"):
        raise UserError(f"duration_s must be positive and finite; got {value}")
    return float(value)


def _integer(message: Mapping[str, Any], name: str, least: int) -> int:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} is a whole number of at least {least}; got {value!r:.60}")
    return int(value)


def _flag(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name, False)
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} is true or false; got {value!r:.60}")
    return bool(value)


def _only(message: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    unknown = [name for name in message if name not in known]
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r:.60} {where}; known are {', '.join(known)}")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else type(value).__name__


def _names(views: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, views)))
