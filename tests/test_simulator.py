"""OCBench as source and as world: rendering, true events, exact replay, sides as seen, a planner that recovers."""

import os

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.sources.simulator import rendering

pytest.importorskip("ocbench")
try:
    rendering.check_rendering()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

import cv2

from wallwm_jax.events.schema import LEVELS
from wallwm_jax.sources.simulator import ocbench_demos
from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv, replay
from wallwm_jax.sources.simulator.planner import EXPERT_SECONDS, ScriptedPlanner, expert_durations
from wallwm_jax.sources.simulator.scene import Scene

CHAMBER = "chamber-cpu-lite-easy-task1-v0"
BLOCK = "block-cpu-lite-single-task1-v0"
SWITCH = "switch-cpu-lite-3x3-task1-v0"
HANOI = "hanoi-cpu-lite-single-task1-v0"
SIZE = 32
VIEW = "front_pixels"


def environment(env_id):
    """The environment that the recorder of this process keeps, so that each model is compiled once."""
    return ocbench_demos._environment(env_id, SIZE, (VIEW,))


def record(env_id, number=0):
    family = env_id.split("-")[0]
    return ocbench_demos.record_attempt((family, env_id, number), seed=1, size=SIZE, views=(VIEW,)).episode


@pytest.mark.parametrize(
    ("env_id", "verbs"),
    [
        (CHAMBER, {"press", "open"}),
        (BLOCK, {"place"}),
        (SWITCH, {"press"}),
        (HANOI, {"place"}),
    ],
)
def test_an_expert_episode_has_nested_events_and_replays_to_success(env_id, verbs):
    episode = record(env_id)
    assert episode.success and {span.verb for span in episode.spans["subtask"]} == verbs
    assert all(span.success for span in episode.spans["subtask"])
    assert episode.spans["action"][0].verb == "reach"
    for level in LEVELS:  # gap-free and nested: checked by Episode itself
        assert len(episode.spans[level]) >= len(episode.spans[LEVELS[max(LEVELS.index(level) - 1, 0)]])
        assert min(span.length for span in episode.spans[level]) >= 2
    assert episode.num_steps % episode.video_stride == 0  # the final state is a stored frame
    assert cv2.imdecode(np.frombuffer(episode.frames[VIEW][-1], np.uint8), 1).shape == (SIZE, SIZE, 3)
    assert replay(environment(env_id), episode, level="subtask")
    assert replay(environment(env_id), episode, level="action")


def test_episodes_depend_on_the_seed_alone_not_on_workers_or_what_the_environment_did_before():
    record(SWITCH, 3)  # from here on this process's environment is a used one; the workers' are fresh
    arguments = dict(families=[SWITCH], episodes=2, seed=1, size=SIZE, views=(VIEW,))
    here = ocbench_demos.demonstrations(workers=0, **arguments)
    there = ocbench_demos.demonstrations(workers=2, **arguments)
    for one, other in zip(here, there, strict=True):
        assert (one.episode_id, one.frames, one.spans) == (other.episode_id, other.frames, other.spans)
        assert np.array_equal(one.poses, other.poses) and np.array_equal(one.command_poses, other.command_poses)
    assert here.counts == there.counts and there.counts[SWITCH].kept == 2


def test_thinned_out_meshes_leave_physics_bit_identical():
    states = []
    for cell in (0.0, rendering.CELL):
        env = OCBenchEnv(BLOCK, (VIEW,), SIZE)
        env.reset(5, render=False)
        before = int(env.env.unwrapped._model.mesh_facenum.sum())
        rendering.SceneRenderer(env.env.unwrapped._model, SIZE, cell=cell).close()
        after = int(env.env.unwrapped._model.mesh_facenum.sum())
        assert after == before if cell == 0 else after < before / 10
        rng = np.random.default_rng(0)
        for _ in range(30):
            env.step_joints(rng.uniform(-1, 1, 7), render=False)
        states.append(env.info["qpos"])
        env.close()
    assert np.array_equal(states[0], states[1])


def test_vertex_clustering_keeps_a_closed_surface_inside_its_cells():
    rng = np.random.default_rng(0)
    vertices = rng.uniform(0, 0.1, (500, 3))
    faces = rng.integers(0, 500, (2000, 3))
    merged, kept = rendering._cluster_faces(vertices, faces, 0.05)
    assert len(np.unique(merged)) == 8  # one vertex in each of 2 x 2 x 2 cells
    assert np.array_equal(np.floor(vertices[merged] / 0.05), np.floor(vertices[faces[kept]] / 0.05))
    assert len({tuple(sorted(face)) for face in merged.tolist()}) == len(merged) == 56  # all triples of 8, once


def test_without_a_working_backend_the_message_holds_the_install_command(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "mujoco")
    monkeypatch.setattr(rendering, "_draws", lambda backend: False)
    monkeypatch.delenv(rendering._CHOSEN)
    with pytest.raises(UserError, match=r"apt-get install -y libegl1 libgl1-mesa-dri\n.*libosmesa6"):
        rendering.check_rendering.__wrapped__()
    tried = []
    monkeypatch.setattr(rendering, "_draws", lambda backend: tried.append(backend) or backend == "osmesa")
    monkeypatch.setenv("MUJOCO_GL", "")
    assert rendering.check_rendering.__wrapped__() == "osmesa" and tried == ["egl", "osmesa"]
    monkeypatch.setenv("MUJOCO_GL", os.environ["MUJOCO_GL"])


def test_an_unknown_environment_and_family_are_named():
    with pytest.raises(UserError, match="no OCBench environment 'chamber-cpu-x-v0'"):
        OCBenchEnv("chamber-cpu-x-v0")
    with pytest.raises(UserError, match="unknown OCBench family 'kitchen'; give one of chamber, block"):
        ocbench_demos.demonstrations(["kitchen"], 1, 0)


def test_sides_are_those_of_the_picture_and_flip_with_the_mirrored_layout():
    env = environment(CHAMBER)
    sides = {}
    for seed in range(20):
        observation = env.reset(seed)
        scene = Scene(env.env)
        simulator = env.env.unwrapped
        facts = scene.facts(dict(task="button", button=0, target_state=1, name="unlock_drawer"), env.info)
        sides[simulator._mirrored] = facts.thing.where
        pixel = scene.pixel(env.info["privileged/block_0_pos"]) * SIZE
        column, row = pixel.astype(int)
        red, _, blue = observation.frames[VIEW][row, column].astype(int)
        if len(sides) == 2 and blue > red + 40:  # the block is drawn where it is projected
            break
    else:
        pytest.fail("no seed shows both layouts and the block")
    assert sides == {False: "on the left", True: "on the right"}
    opening = scene.facts(dict(task="drawer", target_pos=-0.16, name="open_drawer"), env.info)
    assert opening.direction == ("to the left" if simulator._mirrored else "to the right")


def test_the_planner_speaks_as_the_demonstrations_do():
    episode = record(BLOCK)
    env = environment(BLOCK)
    env.reset(episode.seed, render=False)
    planner = ScriptedPlanner(env, durations=expert_durations([episode]))
    planner.reset()
    subtask, action = planner.next_event("subtask"), planner.next_event("action")
    assert subtask.caption == action.parent_caption == episode.spans["subtask"][0].caption
    assert action.caption == episode.spans["action"][0].caption
    assert action.duration_s * 10 == np.median([s.length for s in episode.spans["action"] if s.verb == "reach"])
    assert not subtask.is_done() and not action.is_done()
    assert {verb for _, verb in expert_durations([episode])} <= {verb for _, verb in EXPERT_SECONDS["block"]}


def test_the_planner_follows_the_robot_also_when_it_drops_the_block():
    episode = record(BLOCK)
    env = environment(BLOCK)
    env.reset(episode.seed, render=False)
    planner = ScriptedPlanner(env)
    planner.reset()
    carry = next(span for span in episode.spans["action"] if span.verb == "carry")
    seen, events = [], {}
    for step in range(carry.start + 2):
        event = planner.next_event("action")
        if event.verb not in seen[-1:]:
            seen.append(event.verb)
        events[event.verb] = event
        env.step(episode.command_poses[step], episode.command_grippers[step], render=False)
    assert seen[:3] == ["reach", "descend", "grasp"] and seen[-2:] == ["lift", "carry"]
    assert events["grasp"].is_done() and not events["carry"].is_done()
    for _ in range(10):  # open the gripper in the air
        env.step(episode.command_poses[carry.start], np.zeros(1), render=False)
    dropped = planner.next_event("action")
    assert dropped.verb in ("reach", "descend") and "blue block" in dropped.caption
    assert not events["grasp"].is_done() and not planner.next_event("subtask").is_done()


def test_the_planners_subtasks_solve_the_task():
    env = environment(SWITCH)
    env.reset(2, render=False)
    planner = ScriptedPlanner(env, seed=1)
    before = np.random.get_state()  # noqa: NPY002  (the planner must leave numpy's global generator alone)
    planner.reset()
    captions = []
    planner.next_event("subtask")
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    while (event := planner.next_event("subtask")) is not None and len(captions) < 9:
        captions.append(event.caption)
        controller, subgoal, done = planner._controller, planner._subgoal, False
        controller._agent.reset(None, env.info, controller._target_info(subgoal, env.info))
        while not (controller._agent.done or done):
            _, done, _ = env.step_joints(controller._agent.select_action(None, env.info), render=False)
        assert event.is_done()
    assert env.success and len(set(captions)) == len(captions) and all("button in the" in c for c in captions)
    assert planner.next_event("action") is None
    with pytest.raises(UserError, match="not 'task'"):
        planner.next_event("task")
