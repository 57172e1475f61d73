"""Canonical actions: commanded end-effector poses relative to one observation, as 32 numbers; and the way back.

Layout (WALL-WM section 2.5 fixes the content, padding to 32 is ours): arm `g` owns dimensions `10 g .. 10 g + 9`:

    0:3   position of the command minus position of the observation, metres, in the axes of the base frame
    3:9   first two columns of `R_command @ R_observation^T` (base axes), column 0 then column 1
    9     commanded gripper, absolute: 0 open, 1 closed

States use the same layout with the absolute pose. Unused dimensions are zero and invalid. All arrays are numpy.
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.console import UserError

ACTION_DIM = 32
ARM_DIM = 10
GRIPPER_OFFSET = 9  # within one arm's dimensions
MAX_ARMS = ACTION_DIM // ARM_DIM

_DEGENERATE = 1e-6


def valid_dimensions(num_arms: int) -> np.ndarray:
    """`[32]` bool: the dimensions that `num_arms` arms use. Raises `UserError` for 0 or more than 3 arms."""
    if not 1 <= num_arms <= MAX_ARMS:
        raise UserError(f"{num_arms} arms do not fit into {ACTION_DIM} action dimensions; give 1 to {MAX_ARMS} arms")
    return np.arange(ACTION_DIM) < ARM_DIM * num_arms


def relative_actions(
    command_poses: np.ndarray, command_grippers: np.ndarray, observation_pose: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Commands as canonical actions, relative to the measured pose at the window's observation.

    Args:
      command_poses: `[T, G, 4, 4]` commanded base-frame poses, metres.
      command_grippers: `[T, G]` commanded closing fraction.
      observation_pose: `[G, 4, 4]` measured base-frame poses at the observation.

    Returns:
      actions `[T, 32]` float32 and the validity of each dimension `[32]` bool.

    Raises:
      UserError: the number of arms does not fit or differs between the arguments.
    """
    commands = np.asarray(command_poses, np.float64)
    observed = np.asarray(observation_pose, np.float64)
    grippers = np.asarray(command_grippers, np.float64)
    steps, arms = _check(commands, grippers, observed)
    position = commands[..., :3, 3] - observed[:, :3, 3]
    rotation = commands[..., :3, :3] @ np.swapaxes(observed[:, :3, :3], -1, -2)
    return _pack(position, rotation, grippers, steps, arms), valid_dimensions(arms)


def absolute_commands(actions: np.ndarray, observation_pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact inverse of `relative_actions`; rotations are re-orthonormalised (Gram-Schmidt on the two columns).

    Two columns that span no plane (an untrained model may say so) mean: hold the observed orientation.

    Args:
      actions: `[T, 32]` canonical actions, un-normalised.
      observation_pose: `[G, 4, 4]` measured base-frame poses at the observation.

    Returns:
      poses `[T, G, 4, 4]` float64 in the base frame, metres, and grippers `[T, G]` clipped to 0..1.
    """
    observed = np.asarray(observation_pose, np.float64)
    arms = len(observed)
    valid_dimensions(arms)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM:
        raise UserError(f"actions have shape {actions.shape}, expected [T, {ACTION_DIM}]")
    per_arm = np.asarray(actions, np.float64)[:, : ARM_DIM * arms].reshape(len(actions), arms, ARM_DIM)
    poses = np.zeros((len(actions), arms, 4, 4))
    poses[..., :3, :3] = rotation_from_columns(per_arm[..., 3:9]) @ observed[:, :3, :3]
    poses[..., :3, 3] = per_arm[..., :3] + observed[:, :3, 3]
    poses[..., 3, 3] = 1.0
    return poses, np.clip(per_arm[..., GRIPPER_OFFSET], 0.0, 1.0)


def state_vector(pose: np.ndarray, gripper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measured poses `[G, 4, 4]` and grippers `[G]` as a state `[32]` float32 and its validity `[32]` bool."""
    pose = np.asarray(pose, np.float64)[None]
    gripper = np.asarray(gripper, np.float64)[None]
    steps, arms = _check(pose, gripper, pose[0])
    return _pack(pose[..., :3, 3], pose[..., :3, :3], gripper, steps, arms)[0], valid_dimensions(arms)


def rotation_from_columns(columns: np.ndarray) -> np.ndarray:
    """`[..., 6]` (column 0, column 1 of a rotation, any scale) to `[..., 3, 3]` rotations; identity if degenerate."""
    first, second = columns[..., :3], columns[..., 3:6]
    x_norm = np.linalg.norm(first, axis=-1, keepdims=True)
    x = first / np.maximum(x_norm, _DEGENERATE)
    y = second - (x * second).sum(-1, keepdims=True) * x
    y_norm = np.linalg.norm(y, axis=-1, keepdims=True)
    y = y / np.maximum(y_norm, _DEGENERATE)
    rotation = np.stack([x, y, np.cross(x, y)], axis=-1)
    usable = (x_norm > _DEGENERATE) & (y_norm > _DEGENERATE)
    return np.where(usable[..., None], rotation, np.eye(3))


def _pack(position: np.ndarray, rotation: np.ndarray, gripper: np.ndarray, steps: int, arms: int) -> np.ndarray:
    """position `[T, G, 3]`, rotation `[T, G, 3, 3]`, gripper `[T, G]` to `[T, 32]` float32."""
    columns = np.swapaxes(rotation[..., :2], -1, -2).reshape(steps, arms, 6)
    per_arm = np.concatenate([position, columns, gripper[..., None]], axis=-1)
    packed = np.zeros((steps, ACTION_DIM), np.float32)
    packed[:, : ARM_DIM * arms] = per_arm.reshape(steps, -1)
    return packed


def _check(commands: np.ndarray, grippers: np.ndarray, observed: np.ndarray) -> tuple[int, int]:
    steps, arms = grippers.shape
    valid_dimensions(arms)
    if commands.shape != (steps, arms, 4, 4) or observed.shape != (arms, 4, 4):
        raise UserError(
            f"poses {commands.shape} and observation {observed.shape} do not fit {steps} steps of {arms} arms; "
            f"expected [{steps}, {arms}, 4, 4] and [{arms}, 4, 4]"
        )
    return steps, arms
