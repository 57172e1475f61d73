"""Serving in unified mode: each connection has its past, and what a robot does not tell of it is filled in."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from history_windows import HISTORY, STEPS, configured
from public_client import check_public_client
from scipy.spatial.transform import Rotation
from tiny_model import random_like, random_params
from vlm_setup import vlm_training_config

from wallwm_jax.benchmarks import serving
from wallwm_jax.console import UserError
from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.inference.latent_conditioner import LatentConditioner
from wallwm_jax.inference.policy import Policy
from wallwm_jax.inference.policy import request as event_request
from wallwm_jax.models import language_pathway
from wallwm_jax.serving import opening
from wallwm_jax.serving.client import Client
from wallwm_jax.serving.messages import Executed, Observed, arm_rows, commands
from wallwm_jax.serving.past import Past
from wallwm_jax.serving.server import PolicyServer, running
from wallwm_jax.serving.watchdog import Calibration

CALIBRATION = Calibration(step=0, threshold=0.5, false_alarm_rate=0.05, spread=0.5, events=3, store="history")
TASK = "put the red block on the left"


@pytest.fixture(scope="module")
def policy(history_store):
    config = configured(history_store)
    with config.unlocked():
        config.sampling.update(steps=2, video_steps=2, action_draws=2, buckets=(3,))
    params = random_params(config.model, seed=3)
    yield Policy(EventMode(params, config, history_store.meta, history_store.stats))


@pytest.fixture(scope="module")
def server(policy):
    calibrations = dict.fromkeys(("event", "unified"), CALIBRATION)
    with running(PolicyServer(policy, calibrations, modes=("unified",), warm=False)) as server:
        yield server


@pytest.fixture
def robot(server):
    client = Client("127.0.0.1", server.port)
    yield client
    client.close()


@pytest.fixture(scope="module")
def scene(history_store):
    """Observations of an episode at every control step: the pictures of its first frames, a pose that moves."""
    record = history_store.read(0)

    def at(step):
        frames = {view: record.picture(view, min(step // 2, len(record.frames[view]) - 1)) for view in record.frames}
        pose = np.eye(4)[None].copy()
        pose[0, :3, :3] = Rotation.from_euler("z", 0.01 * step).as_matrix()
        pose[0, :3, 3] = [0.4, 0.1, 0.2 + 0.001 * step]
        return Observed(frames, pose, np.array([0.2]))

    return at


def request(observation, **fields):
    state = arm_rows(observation.pose, observation.gripper)
    return {"images": dict(observation.frames), "state": state, "prompt": TASK, **fields}


def told(step, observation, **fields):
    return {"executed": {"images": dict(observation.frames), "step": step, **fields}}


def test_chunks_are_the_policys_bit_for_bit_and_see_what_was_told(robot, policy, scene):
    policy.reset()
    first = policy.infer(scene(0), TASK, mode="unified")
    for step, command in enumerate(zip(first.poses, first.grippers), 1):
        policy.observe(present := scene(step), command)
    second = policy.infer(present, TASK, mode="unified")
    reply = robot.infer(request(scene(0)))
    assert reply["actions"].shape == (STEPS, 8) and reply["chunk"]["number"] == 1
    np.testing.assert_allclose(reply["actions"], commands(first), atol=1e-6)  # a state travels in float32
    for step in range(2, STEPS + 1, 2):
        place = robot.infer(told(step, scene(step)))["chunk"]
        assert place["progress"] == pytest.approx(step / STEPS) and place["steps"] == STEPS
    again = robot.infer(request(scene(STEPS)))
    np.testing.assert_allclose(again["actions"], commands(second), atol=1e-4)
    assert again["chunk"]["number"] == 2 and again["chunk"]["progress"] == 0.0
    unseen = robot.infer(request(scene(0), reset=True))
    np.testing.assert_array_equal(unseen["actions"], reply["actions"])
    held = robot.infer(request(scene(STEPS)))  # as an action chunk broker does: requests alone
    assert np.abs(held["actions"] - again["actions"]).max() > 1e-4


def test_the_metadata_says_what_is_served_and_the_default_is_all_that_the_model_can(robot, policy):
    assert robot.metadata["modes"] == ["unified"] and robot.metadata["chunk_actions"] == STEPS
    assert robot.metadata["watchdog"] == {"unified": {"threshold": 0.5, "events": 3}}
    assert robot.metadata["event_time"] == []
    assert PolicyServer(policy)._modes == ("event", "unified")


FAULTS = {
    "mode": ({"mode": "event"}, "unknown mode 'event'; this server decodes in mode 'unified'"),
    "duration": ({"duration_s": 1.0}, "duration_s is for mode 'event'"),
    "frames": ({"frames": 3}, "frames is for mode 'event'"),
    "half steps": ({"steps": 1.5}, "steps is a whole number of at least 0"),
    "odd steps": ({"steps": 3}, "steps is 3; the next chunk begins after a multiple of 2 control steps"),
    "many steps": ({"steps": 10**15}, f"1000000000000000 control steps were executed. The last chunk has {STEPS}"),
    "done": ({"done": ["reach"]}, r"done is for a server with latents or a planner"),
    "now": ({"now": "reach"}, "now is for a server that knows how long events take: one of a run of stage 'chunk'"),
}


def test_each_fault_has_its_message_and_the_past_stays(robot, scene):
    robot.infer(request(scene(0)))
    for name, (fields, message) in FAULTS.items():
        with pytest.raises(RuntimeError, match=message):
            robot.infer(request(scene(2), **fields))
            raise AssertionError(f"{name} was accepted")
    robot.infer(told(4, scene(4)))
    rows = arm_rows(scene(6).pose, scene(6).gripper).reshape(1, 8).repeat(2, 0)
    for message, wrong in {
        "step 4 was told already; the next is at least 5": told(4, scene(4)),
        f"26 control steps were executed. The last chunk has {STEPS}": told(26, scene(26)),
        r"actions is \[n, 8 G\] floats": told(6, scene(6), actions=rows[:, :7]),
        "actions has 1 steps of 1 arms; since step 4 there were 2 of 1": told(6, scene(6), actions=rows[:1]),
        "actions has numbers that are not finite": told(6, scene(6), actions=rows * np.nan),
        "steps is 2, but step 4 of the chunk was told already": request(scene(2), steps=2),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            robot.infer(wrong)
    robot.infer(told(6, scene(6), actions=rows))
    assert robot.infer(request(scene(6), steps=6))["actions"].shape == (STEPS, 8)


@pytest.mark.extended
def test_eight_robots_at_once_have_a_past_each(server, scene):
    def act(number):
        with contextlib.closing(Client("127.0.0.1", server.port)) as client:
            found = [client.infer(request(scene(2 * number), prompt=f"{TASK}, {number}"))["actions"]]
            client.infer(told(2, scene(4)))
            return [*found, client.infer(request(scene(6), steps=4, prompt=f"{TASK}, {number}"))["actions"]]

    alone = [act(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(act, range(8)))
    np.testing.assert_array_equal(together, alone)
    assert len({actions[1].tobytes() for actions in together}) == 8


@pytest.mark.extended
def test_the_watchdog_compares_chunks_too(robot, policy, scene):
    policy.reset()
    video = policy.infer(scene(0), TASK, mode="unified", video=True).video
    future = {view: film[4 * HISTORY :] for view, film in video.items()}

    def score(frame):
        robot.infer(request(scene(0), reset=True, watch=True))
        for step in range(2, STEPS + 1, 2):
            seen = {view: film[frame(step)] for view, film in future.items()}
            found = robot.infer({"executed": {"images": seen, "step": step}})["watchdog"]
        return found

    right, wrong = score(lambda step: step // 2), score(lambda step: 0)
    assert right["latents"] == 3 and abs(right["score"]) < 0.3
    assert wrong["score"] > right["score"] + 0.5
    assert right["threshold"] == 0.5 and not right["alarm"] and wrong["alarm"]


@pytest.fixture
def adapted(policy):
    """The same model as a run of stage `chunk`, whose duration head has seen events."""
    config = policy.event_mode.config
    stage = config.train.stage
    with config.unlocked():
        config.train.stage = "chunk"
    yield policy
    with config.unlocked():
        config.train.stage = stage


def test_a_reply_speaks_of_the_event_where_the_robot_names_it_and_a_head_knows_events(adapted, scene):
    served = PolicyServer(adapted, modes=("unified",), warm=False)
    assert "duration head" in dict(served._programs())
    asked = event_request(scene(0), "reach the red block")
    quantiles = adapted.event_mode.durations([asked])[0]
    with running(served) as server, contextlib.closing(Client("127.0.0.1", server.port)) as robot:
        assert robot.metadata["event_time"] == ["duration head"]
        assert "event" not in robot.infer(request(scene(0)))
        first = robot.infer(request(scene(0), reset=True, now="reach the red block"))
        later = robot.infer(told(8, scene(8)))
        again = robot.infer(request(scene(STEPS), now="reach the red block"))
        other = robot.infer(request(scene(0), steps=STEPS, now="grasp it"))["event"]
        with pytest.raises(RuntimeError, match="now says the event under way in words"):
            robot.infer(request(scene(0), now=3))
    event = first["event"]
    np.testing.assert_allclose(event["duration_quantiles_s"], quantiles, rtol=1e-4)
    assert event["elapsed_s"] == event["progress"] == event["done_probability"] == 0.0
    assert event["predicted_duration_s"] == event["left_s"] == event["duration_quantiles_s"][1]
    assert later["event"]["elapsed_s"] == 0.8 and later["chunk"]["progress"] == pytest.approx(8 / STEPS)
    assert again["event"]["elapsed_s"] == STEPS / 10 and again["event"]["progress"] > later["event"]["progress"] > 0.0
    assert again["event"]["duration_quantiles_s"] == event["duration_quantiles_s"]  # of the event's beginning
    assert other["elapsed_s"] == 0.0 and other["duration_quantiles_s"] != event["duration_quantiles_s"]


def test_a_planner_tells_the_time_left_and_no_probabilities(policy, scene):
    asked = []

    def time_left(requests):
        asked.extend(requests)
        return [None if requests[0].now == "wave" else 3.6]

    planner = SimpleNamespace(levels=("subtask",), time_left=time_left, warm_up=lambda: None)
    with (
        running(PolicyServer(policy, modes=("unified",), planner=planner, warm=False)) as server,
        contextlib.closing(Client("127.0.0.1", server.port)) as robot,
    ):
        assert robot.metadata["event_time"] == ["planner"]
        first, second = (robot.infer(request(scene(n), now="press it", done=["reach it"])) for n in (0, STEPS))
        silent = robot.infer(request(scene(0), now="wave"))
    assert first["event"] == {"elapsed_s": 0.0, "progress": 0.0, "predicted_duration_s": 3.6, "left_s": 3.6}
    assert second["event"]["progress"] == pytest.approx(2.4 / 6.0) and second["event"]["left_s"] == pytest.approx(3.6)
    assert silent["event"] == {"elapsed_s": 0.0} and silent["server_timing"]["event_time_ms"] >= 0.0
    assert [(one.now, one.done, one.instruction) for one in asked[:2]] == [("press it", ("reach it",), TASK)] * 2
    view = next(iter(scene(0).frames))
    np.testing.assert_array_equal(asked[1].previous_frames[view], scene(0).frames[view])  # it began there
    np.testing.assert_array_equal(asked[1].frames[view], scene(STEPS).frames[view])


def test_latents_take_the_prompts_place(policy, scene):
    """A stand-in gives other latents once an event is done; the words then say nothing."""
    asked = []

    def latents(requests):
        asked.extend(requests)
        return [jnp.full((3, policy.event_mode.config.model.text.width), 1.0 + len(one.done)) for one in requests]

    source = SimpleNamespace(levels=("subtask",), latents=latents, warm_up=lambda: None)
    served = PolicyServer(policy, modes=("unified",), latents=source, warm=False)
    assert dict(served._programs())["latents"] is source.warm_up
    with (
        running(served) as server,
        contextlib.closing(Client("127.0.0.1", server.port)) as robot,
    ):
        said = [
            robot.infer(request(scene(0), reset=True, **fields))["actions"]
            for fields in ({}, {"prompt": "nonsense"}, {"done": ["reach the red block"]})
        ]
        with pytest.raises(RuntimeError, match="done is a list of captions"):
            robot.infer(request(scene(0), done=[3]))
    assert [one.done for one in asked] == [(), (), ("reach the red block",)]
    assert asked[0].instruction == TASK and set(asked[0].frames) == set(scene(0).frames)
    np.testing.assert_array_equal(said[0], said[1])
    assert np.abs(said[2] - said[0]).max() > 1e-3


@pytest.mark.extended
def test_a_staircase_tells_what_to_do_and_every_length_of_prompt_is_warm(policy, history_store, scene):
    config = vlm_training_config(history_store.path, "staircase")
    params = random_like(jax.eval_shape(lambda: language_pathway.init(config, jax.random.key(0))), scale=0.1)
    conditioner = LatentConditioner(params, config, batch_size=1)
    conditioner.warm_up()
    assert conditioner._decode._cache_size() == 2  # 128 tokens, and the room for 192
    served = PolicyServer(policy, modes=("unified",), latents=conditioner, warm=False)
    with running(served) as server, contextlib.closing(Client("127.0.0.1", server.port)) as robot:
        said = [
            robot.infer(request(scene(0), reset=True, prompt=prompt, done=done))["actions"]
            for prompt, done in ((TASK, []), ("sort " * 12, []), (TASK, ["reach the red block"]))
        ]
        with pytest.raises(RuntimeError, match=r"the prompt of task .* more than the 192"):
            robot.infer(request(scene(0), prompt="sort " * 50))
    assert len({actions.tobytes() for actions in said}) == 3
    assert conditioner._decode._cache_size() == 2


@pytest.mark.extended
def test_the_public_client_plays_chunks_unchanged(server):
    check_public_client(server.port, steps=STEPS)


@pytest.mark.extended
def test_an_event_in_between_ends_the_past(policy, scene):
    with (
        running(PolicyServer(policy)) as server,
        contextlib.closing(Client("127.0.0.1", server.port)) as robot,
    ):
        warm = policy.event_mode.compilations, policy.unified_mode.compilations
        for _ in range(2):
            assert robot.infer(request(scene(0), mode="unified"))["chunk"]["number"] in (1, 2)
        assert robot.infer(request(scene(0), duration_s=1.6))["event"]["steps"] == 16
        with pytest.raises(RuntimeError, match="actions are fed back in mode 'unified'"):
            robot.infer(told(2, scene(2), actions=np.zeros((2, 8)) + np.eye(8)[3]))
        assert robot.infer(request(scene(0), mode="unified", steps=7))["chunk"]["number"] == 1
        assert (policy.event_mode.compilations, policy.unified_mode.compilations) == warm


# ---------------------------------------------------------------- the past alone, without a model


def past_and_action():
    engine = SimpleNamespace(store={"size": (4, 4)})
    past = Past(SimpleNamespace(stride=2, past_frames=4, chunk=8, engine=engine))
    poses = np.tile(np.eye(4), (8, 1, 1, 1))
    poses[:, 0, 0, 3] = np.arange(8)  # command n leads to step n + 1
    return past, SimpleNamespace(poses=poses, grippers=np.zeros((8, 1)))


def seen(grey):
    return Observed({"front": np.full((4, 4, 3), grey, np.uint8)}, np.eye(4)[None], np.zeros(1))


def greys(past):
    return past.history.request().frames["front"][:, 0, 0, 0].tolist()


def test_pictures_that_were_not_told_are_those_before_and_commands_those_sent():
    past, action = past_and_action()
    assert past.begin(seen(1), None).frames["front"][0, 0, 0] == 1
    past.follow(action)
    past.tell(Executed(seen(50).frames, 4))
    past.begin(seen(80), None)
    assert greys(past) == [1, 1, 50, 50, 80]  # at steps 0, 2, 4, 6, 8
    np.testing.assert_array_equal(past.history.request().command_poses[:, 0, 0, 3], np.arange(8))


def test_commands_that_were_told_replace_those_sent_and_part_of_a_chunk_may_do():
    past, action = past_and_action()
    past.begin(seen(1), None)
    past.follow(action)
    past.tell(Executed(seen(20).frames, 2))
    past.tell(Executed(seen(40).frames, 4, (np.tile(10 * np.eye(4), (2, 1, 1, 1)), np.ones((2, 1)))))
    past.begin(seen(60), 6)
    found = past.history.request()
    assert greys(past) == [1, 1, 20, 40, 60] and len(found.command_poses) == 6
    np.testing.assert_array_equal(found.command_grippers[:, 0], [0, 0, 1, 1, 0, 0])
    assert action.grippers.sum() == 0  # the reply stays as it was
    assert past.begin(seen(99), None).frames["front"][0, 0, 0] == 60  # nothing was sent since: the same observation


def test_another_number_of_arms_is_refused():
    past, action = past_and_action()
    past.begin(seen(1), None)
    past.follow(action)
    two = Observed(seen(2).frames, np.tile(np.eye(4), (2, 1, 1)), np.zeros(2))
    with pytest.raises(UserError, match="state has 2 arms, the episode began with 1"):
        past.begin(two, None)
    past.begin(seen(2), None)


@pytest.mark.extended
def test_the_benchmark_times_chunks_beside_events(policy, monkeypatch):
    monkeypatch.setattr(Policy, "from_checkpoint", lambda *_: policy)
    found = serving.measure(steps=2, workdir="run")
    event, chunk = found["programs"]
    assert (event["mode"], event["latents"], event["actions"]) == ("event", 3, 16)
    assert (chunk["mode"], chunk["latents"], chunk["actions"]) == ("unified", 1 + HISTORY + STEPS // 8, STEPS)
    assert {kind: chunk[kind]["seconds"]["count"] for kind in ("request", "video", "feedback")} == {
        "request": 2,
        "video": 2,
        "feedback": STEPS // 2 - 1,
    }
    assert chunk["request"]["per_action"]["seconds"]["p95"] == chunk["request"]["seconds"]["p95"] / STEPS
    assert json.loads(json.dumps(found)) == found and len(serving.table(found).splitlines()) == 12


@pytest.mark.extended
def test_the_benchmark_times_chunks_alone_and_under_latents(policy, monkeypatch):
    latents = jnp.ones((3, policy.event_mode.config.model.text.width))
    source = SimpleNamespace(levels=("subtask",), latents=lambda _: [latents], warm_up=lambda: None)
    monkeypatch.setattr(Policy, "from_checkpoint", lambda *_: policy)
    monkeypatch.setattr(opening, "open_latents", lambda *_: source)
    (chunk,) = serving.measure(steps=2, workdir="run", mode="unified", latents="staircase")["programs"]
    assert (chunk["mode"], chunk["told_by"], chunk["actions"]) == ("unified", "latents", STEPS)
    assert set(chunk["request"]["parts_ms"]) == {"queue", "encode", "latents", "model", "pack"}
