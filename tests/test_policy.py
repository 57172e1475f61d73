"""The policy: loads average and assets only, answers in absolute commands, and says what it cannot do."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny_model import save_run, store_config

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.events.actions import relative_actions
from wallwm_jax.inference.policy import Policy


@dataclasses.dataclass
class Observed:
    frames: dict
    pose: np.ndarray
    gripper: np.ndarray


@pytest.fixture(scope="module")
def store(small_store):
    return open_store(small_store)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A workdir with one checkpoint at step 7, and its average."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, save_run(workdir, store, store_config(store, buckets=(5,)))


@pytest.fixture(scope="module")
def policy(run):
    yield Policy.from_checkpoint(run[0])


@pytest.fixture(scope="module")
def observation(store):
    record = store.read(0)
    angle = 0.4
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    pose[:3, 3] = record.state[:3]
    return Observed({view: record.picture(view, 0) for view in record.frames}, pose[None], np.array([0.2]))


def test_it_loads_the_average_and_never_touches_the_optimizer(run, policy, tmp_path):
    workdir, average = run
    for loaded, saved in zip(jax.tree.leaves(policy.event_mode.params), jax.tree.leaves(average)):
        np.testing.assert_array_equal(loaded, saved)
    assert policy.step == 7 and policy.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(average))
    copy = tmp_path / "without_state"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "7" / "state")
    assert Policy.from_checkpoint(copy).step == 7


def test_commands_are_the_canonical_actions_made_absolute(policy, observation):
    event = policy.infer(observation, "reach the red square", duration=0.8)
    assert event.actions.shape == (8, 32) and event.poses.shape == (8, 1, 4, 4) and event.grippers.shape == (8, 1)
    assert event.duration_s == 0.8 and event.control_hz == 10.0 and event.video is None
    np.testing.assert_allclose(event.poses[:, 0, :3, 3], event.actions[:, :3] + observation.pose[0, :3, 3], atol=1e-6)
    rotations = event.poses[:, 0, :3, :3]
    np.testing.assert_allclose(rotations @ rotations.swapaxes(1, 2), np.tile(np.eye(3), (8, 1, 1)), atol=1e-6)
    again, _ = relative_actions(event.poses, event.grippers, observation.pose)
    np.testing.assert_allclose(again[:, :3], event.actions[:, :3], atol=1e-6)
    assert (event.grippers >= 0).all() and (event.grippers <= 1).all()


def test_reset_starts_the_same_noise_again_and_without_it_answers_vary(policy, observation):
    policy.reset()
    first = policy.infer(observation, "grasp", duration=0.4).actions
    second = policy.infer(observation, "grasp", duration=0.4).actions
    policy.reset()
    again = policy.infer(observation, "grasp", duration=0.4).actions
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


def test_duration_is_the_models_own_where_none_is_given_and_video_comes_on_request(policy, observation):
    event = policy.infer(observation, "grasp", video=True)
    assert event.duration_s > 0 and len(event.actions) == policy.event_mode.num_actions(event.duration_s)
    for view, frames in event.video.items():
        assert np.abs(frames[0].astype(int) - observation.frames[view]).max() <= 1


def test_errors_name_the_remedy(policy, run, observation, tmp_path):
    with pytest.raises(UserError, match="unknown mode 'chunks'; this version decodes in mode 'event', 'unified'"):
        policy.infer(observation, "grasp", mode="chunks")
    with pytest.raises(UserError, match="not the workdir of a training run"):
        Policy.from_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at step 3; it has 7"):
        Policy.from_checkpoint(run[0], step=3)
    with pytest.raises(UserError, match="unknown sampling entry 'step'"):
        Policy.from_checkpoint(run[0], sampling={"step": 3})
    with pytest.raises(UserError, match="sampling entry steps='many' is not of the kind of 2"):
        Policy.from_checkpoint(run[0], sampling={"steps": "many"})


def test_a_run_that_has_not_learned_to_act_is_refused(store, tmp_path):
    save_run(tmp_path, store, store_config(store), without=("action", "duration"))
    with pytest.raises(UserError, match=r"no parameters of action and duration; acting needs .* 'joint' or 'action'"):
        Policy.from_checkpoint(tmp_path)


def test_sampling_can_be_changed_at_load(run):
    policy = Policy.from_checkpoint(run[0], sampling={"steps": 3, "buckets": (9,)})
    assert policy.event_mode.config.sampling.steps == 3 and policy.event_mode.buckets == (9,)
