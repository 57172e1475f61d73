"""OCBench as an environment that takes absolute end-effector commands and returns pictures, poses and calibration.

The robot is a UR5e with a 2F-85 gripper at 10 Hz ("lite" environments). The pose is that of the point between the
finger tips (site `robotiq/pinch`) in the base frame, which is the world frame; its z axis points down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events import actions as canonical
from wallwm_jax.events.schema import Episode
from wallwm_jax.sources.simulator import rendering

VIEWS = ("front_pixels", "side", "ur5e/wrist")
EMBODIMENT = "ur5e_2f85"
CLOCK_HZ = 10.0


@dataclass(frozen=True)
class Observation:
    """What the robot sees and measures at one control step; `frames` and `cameras` are empty where not rendered.

    Attributes:
      step: control steps since the reset.
      frames: view name → `[H, W, 3]` uint8 RGB.
      pose: `[1, 4, 4]` measured end-effector pose in the base frame, metres.
      gripper: `[1]` measured closing fraction, 0 open to 1 closed.
      cameras: view name → (intrinsics `[3, 3]` in pixels, world-from-camera `[4, 4]`, OpenCV axes).
      instruction: the task, in words.
      clock_hz: control steps per second.
    """

    step: int
    pose: np.ndarray
    gripper: np.ndarray
    instruction: str
    frames: Mapping[str, np.ndarray] = field(default_factory=dict)
    cameras: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    clock_hz: float = CLOCK_HZ


class OCBenchEnv:
    """One OCBench environment, for example "chamber-cpu-lite-easy-task1-v0", deterministic from the reset's seed.

    `env` is the OCBench environment itself and `info` its privileged state at the present step, for experts and
    planners; a policy uses neither.
    """

    clock_hz = CLOCK_HZ

    def __init__(self, env_id: str, views: Sequence[str] = VIEWS, size: int = 64):
        """`views`: MuJoCo camera names; `size`: pixels of the square pictures.

        Raises:
          UserError: the simulator is not installed, cannot draw, or knows no such environment.
        """
        rendering.check_rendering()
        try:
            import gymnasium
            import ocbench  # noqa: F401  (registers its environments)
        except ImportError as error:
            raise UserError(f"OCBench is not installed ({error}); run: pip install 'wallwm_jax[sim]'") from error
        try:
            # The settings of OCBench's own visual tasks: no goal markers, no recolouring at success.
            self.env: Any = gymnasium.make(
                env_id, disable_env_checker=True, width=size, height=size, visualize_info=False
            )
        except gymnasium.error.Error as error:
            raise UserError(f"no OCBench environment {env_id!r}: {error}") from error
        self.env_id = env_id
        self.views = tuple(views)
        self.size = size
        self.max_steps = int(gymnasium.spec(env_id).max_episode_steps or 0)
        self.info: dict[str, Any] = {}
        self.success = False
        self._simulator: Any = self.env.unwrapped
        self._renderer: rendering.SceneRenderer | None = None
        self._step = 0

    def reset(self, seed: int, *, render: bool = True) -> Observation:
        """Starts the episode of this seed."""
        from wallwm_jax.sources.simulator.scene import Scene

        _, self.info = self.env.reset(seed=int(seed))
        self._step, self.success = 0, False
        self.instruction = Scene(self.env).instruction()[0]
        return self.observe(render=render)

    def step(
        self, command_pose: np.ndarray, command_gripper: np.ndarray, *, render: bool = True
    ) -> tuple[Observation, bool, bool]:
        """Moves towards the absolute command `[1, 4, 4]`, `[1]` for one control step (0.1 s).

        Returns:
          the observation after it, whether the episode is over (success, failure or time), whether it succeeded.
        """
        return self.step_joints(self.joint_action(command_pose, command_gripper), render=render)

    def joint_action(self, command_pose: np.ndarray, command_gripper: np.ndarray) -> np.ndarray:
        """The simulator's joint command `[7]` that moves towards the absolute command."""
        from ocbench import lie

        pose = np.asarray(command_pose, np.float64).reshape(4, 4)
        rotation = lie.SO3.from_matrix(pose[:3, :3]) @ self._simulator._effector_down_rotation.inverse()
        gripper = float(np.asarray(command_gripper).reshape(()))
        return self._simulator.joint_position_action(pose[:3, 3], None, gripper, effector_rotation=rotation)

    def step_joints(self, action: np.ndarray, *, render: bool = True) -> tuple[Observation, bool, bool]:
        """As `step`, with the simulator's own action `[7]`; for experts."""
        _, _, terminated, truncated, self.info = self.env.step(action)
        self._step += 1
        self.success = self.success or bool(self.info["success"])
        return self.observe(render=render), bool(terminated or truncated), self.success

    def observe(self, *, render: bool = True) -> Observation:
        """The present observation; `render=False` leaves out pictures and cameras, which cost most of the time."""
        pose = np.eye(4)
        pose[:3, :3] = self._simulator._data.site_xmat[self._simulator._pinch_site_id].reshape(3, 3)
        pose[:3, 3] = self._simulator._data.site_xpos[self._simulator._pinch_site_id]
        return Observation(
            step=self._step,
            pose=pose[None],
            gripper=np.array(self.info["proprio/gripper_opening"], np.float64),  # OCBench counts 1 as closed
            instruction=self.instruction,
            frames={view: self._picture(view) for view in self.views} if render else {},
            cameras={view: self._camera(view) for view in self.views} if render else {},
        )

    def close(self) -> None:
        """Frees the renderer and the simulator."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self.env.close()

    def _picture(self, view: str) -> np.ndarray:
        if self._renderer is None:
            self._renderer = rendering.SceneRenderer(self._simulator._model, self.size)
        return self._renderer.render(self._simulator._data, view)

    def _camera(self, view: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            rendering.camera_intrinsics(self._simulator._model, view, self.size),
            rendering.camera_pose(self._simulator._data, view),
        )


def replay(env: OCBenchEnv, episode: Episode, *, level: str = "action") -> bool:
    """Acts a recorded episode again through the canonical actions; returns whether the task succeeds.

    Each event of `level` becomes float32 actions relative to its recorded observation, which are turned back into
    commands at the pose that is measured *now*: what a policy that predicts the expert exactly would do.
    """
    if episode.seed is None:
        raise UserError(f"episode {episode.episode_id!r} has no simulator seed; it cannot be replayed")
    env.reset(episode.seed, render=False)
    return act_again(env, episode, level=level)


def act_again(env: OCBenchEnv, episode: Episode, *, level: str = "action") -> bool:
    """As `replay`, from where the environment stands."""
    observation = env.observe(render=False)
    for span in episode.spans[level]:
        steps = slice(span.start, span.end)
        actions, _ = canonical.relative_actions(
            episode.command_poses[steps], episode.command_grippers[steps], episode.poses[span.start]
        )
        for pose, gripper in zip(*canonical.absolute_commands(actions, observation.pose)):
            observation, done, success = env.step(pose, gripper, render=False)
            if done:
                return success
    return env.success
