"""The canonical action representation: layout, exact round trip, behaviour on bad input."""

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.events import actions as canonical


def random_poses(rng, *shape):
    """Uniform rotations (QR of a Gaussian, determinant +1) with positions within a metre."""
    q, r = np.linalg.qr(rng.normal(size=(*shape, 3, 3)))
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    q[..., 0] *= np.linalg.det(q)[..., None]
    poses = np.zeros((*shape, 4, 4))
    poses[..., :3, :3], poses[..., :3, 3], poses[..., 3, 3] = q, rng.uniform(-1, 1, (*shape, 3)), 1
    return poses


@pytest.mark.parametrize("arms", [1, 2, 3])
def test_relative_then_absolute_is_the_identity_in_float32(arms):
    rng = np.random.default_rng(arms)
    commands, observed = random_poses(rng, 50, arms), random_poses(rng, arms)
    grippers = rng.uniform(0, 1, (50, arms))
    actions, valid = canonical.relative_actions(commands, grippers, observed)
    assert actions.dtype == np.float32 and actions.shape == (50, 32)
    assert valid.sum() == 10 * arms and not actions[:, ~valid].any()
    poses, back = canonical.absolute_commands(actions, observed)
    assert np.abs(poses - commands).max() < 5e-7
    assert np.abs(back - grippers).max() < 1e-7
    again, _ = canonical.relative_actions(poses, back, observed)
    assert np.abs(again - actions).max() < 2e-7


def test_layout_of_a_quarter_turn_about_the_base_z_axis():
    observed = np.eye(4)[None]
    observed[0, :3, 3] = [0.4, 0.0, 0.2]
    command = np.eye(4)[None, None].copy()
    command[0, 0, :3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    command[0, 0, :3, 3] = [0.5, -0.1, 0.2]
    actions, _ = canonical.relative_actions(command, np.array([[1.0]]), observed)
    expected = [0.1, -0.1, 0.0, 0, 1, 0, -1, 0, 0, 1]  # position, column 0, column 1, gripper
    np.testing.assert_allclose(actions[0, :10], expected, atol=1e-7)


def test_rotation_is_in_base_axes_so_a_turned_observation_does_not_turn_the_action():
    rng = np.random.default_rng(0)
    command, observed = random_poses(rng, 1, 1), random_poses(rng, 1)
    turn = random_poses(rng)[:3, :3]
    turned_command, turned_observed = command.copy(), observed.copy()
    turned_command[..., :3, :3] = command[..., :3, :3] @ turn
    turned_observed[..., :3, :3] = observed[..., :3, :3] @ turn
    actions, _ = canonical.relative_actions(command, np.zeros((1, 1)), observed)
    turned, _ = canonical.relative_actions(turned_command, np.zeros((1, 1)), turned_observed)
    np.testing.assert_allclose(actions, turned, atol=1e-6)


def test_noisy_predictions_become_rotations_and_grippers_in_range():
    rng = np.random.default_rng(1)
    observed = random_poses(rng, 1)
    poses, grippers = canonical.absolute_commands(rng.normal(size=(20, 32)) * 3, observed)
    rotations = poses[:, 0, :3, :3]
    np.testing.assert_allclose(
        rotations @ np.swapaxes(rotations, -1, -2), np.broadcast_to(np.eye(3), (20, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    assert grippers.min() == 0 and grippers.max() == 1


def test_no_rotation_at_all_holds_the_observed_orientation():
    observed = random_poses(np.random.default_rng(2), 1)
    poses, _ = canonical.absolute_commands(np.zeros((3, 32), np.float32), observed)
    np.testing.assert_allclose(poses, np.broadcast_to(observed, (3, 1, 4, 4)))


def test_state_is_the_absolute_pose():
    pose = random_poses(np.random.default_rng(3), 2)
    state, valid = canonical.state_vector(pose, np.array([0.25, 0.75]))
    np.testing.assert_allclose(state[10:13], pose[1, :3, 3], rtol=1e-6)
    np.testing.assert_allclose(state[13:16], pose[1, :3, 0], rtol=1e-6)
    np.testing.assert_allclose(state[16:19], pose[1, :3, 1], rtol=1e-6)
    assert state[9] == 0.25 and state[19] == 0.75 and valid.tolist() == [True] * 20 + [False] * 12


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="4 arms do not fit"):
        canonical.relative_actions(np.zeros((2, 4, 4, 4)), np.zeros((2, 4)), np.zeros((4, 4, 4)))
    with pytest.raises(UserError, match=r"expected \[2, 1, 4, 4\]"):
        canonical.relative_actions(np.zeros((2, 4, 4)), np.zeros((2, 1)), np.zeros((1, 4, 4)))
    with pytest.raises(UserError, match=r"expected \[T, 32\]"):
        canonical.absolute_commands(np.zeros((2, 10)), np.eye(4)[None])
