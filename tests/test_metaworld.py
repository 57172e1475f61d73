"""MetaWorld as a source: episodes that keep the contract, depend on the seed alone, and have stages where they can."""

import cv2
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.sources.simulator import metaworld_demos, rendering
from wallwm_jax.sources.simulator.metaworld_demos import STAGED, TASKS, demonstrations, stage_consistency


def test_every_staged_task_is_a_task():
    assert len(TASKS) == 50 and set(STAGED) < set(TASKS)


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="unknown MetaWorld task 'fly'; give some of assembly, "):
        demonstrations(["push", "fly"], 1, 0)


@pytest.fixture(scope="module")
def recorded():
    """Two episodes of a task with stages, one of a task without; recorded in this process, and again in two others."""
    pytest.importorskip("metaworld")
    try:
        rendering.check_rendering()
    except UserError as error:
        pytest.skip(str(error))
    here = demonstrations(["assembly"], 2, 3, size=48, workers=0)
    there = demonstrations(["assembly"], 2, 3, size=48, workers=2)
    other = demonstrations(["soccer"], 1, 3, size=48, workers=0)
    return list(here), list(there), next(other), here.counts


@pytest.mark.extended
def test_episodes_depend_on_the_seed_alone(recorded):
    here, there, _, counts = recorded
    assert counts["assembly"].kept == 2 and here[0].frames != here[1].frames
    for one, other in zip(here, there, strict=True):
        assert (one.episode_id, one.frames, one.spans) == (other.episode_id, other.frames, other.spans)
        assert np.array_equal(one.poses, other.poses) and np.array_equal(one.command_poses, other.command_poses)


@pytest.mark.extended
def test_the_hand_points_down_and_follows_its_commands_in_a_frame_with_x_forward(recorded):
    for episode in recorded[0]:
        assert episode.clock_hz == 80 and episode.success and episode.num_steps % episode.video_stride == 0
        assert (episode.poses[:, 0, 2, 2] < -0.99).all()  # the hand's z axis against the table's
        assert (episode.poses[:, 0, 0, 3] > 0.4).all()  # in front of the base
        assert np.allclose(np.linalg.det(episode.poses[:, 0, :3, :3]), 1, atol=1e-6)
        off = np.linalg.norm(episode.command_poses[:, 0, :3, 3] - episode.poses[1:, 0, :3, 3], axis=1)
        assert np.median(off) < 0.05
        assert episode.grippers.min() >= 0 and np.ptp(episode.grippers) > 0.2  # it takes hold of the wrench


@pytest.mark.extended
def test_a_camera_sees_the_hand_where_its_calibration_says(recorded):
    episode = recorded[0][0]
    camera = episode.cameras["corner4"]
    seen = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1).astype(float) for jpeg in episode.frames["corner4"]]
    moved = np.abs(seen[-1] - seen[0]).sum(axis=2) > 60
    for frame in (0, len(seen) - 1):
        hand = episode.poses[frame * episode.video_stride, 0, :3, 3]
        x, y = rendering.project(hand, camera.intrinsics, camera.extrinsics[frame]).round().astype(int)
        assert moved[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5].any()


@pytest.mark.extended
def test_stages_of_the_expert_are_actions_where_they_are_consistent(recorded):
    here, _, other, _ = recorded
    for episode in here:
        assert [span.verb for span in episode.spans["action"]] == ["reach", "grasp", "lift", "carry", "lower"]
        assert min(span.length for span in episode.spans["action"]) >= metaworld_demos.SHORTEST_STAGE
        assert episode.instruction == "put the wrench onto the peg"
    assert set(other.spans) == {"task"} and other.instruction == TASKS["soccer"]
    assert stage_consistency("assembly", seed=3, episodes=4) == 1.0
