"""Serving: the public client's protocol, one message per fault, many robots at once, and a server that never dies."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from public_client import check_public_client
from scipy.spatial.transform import Rotation
from tiny_model import save_run, store_config
from training_setup import subprocess_environment
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from wallwm_jax.benchmarks import serving
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.inference.policy import Policy
from wallwm_jax.serving.client import Client
from wallwm_jax.serving.messages import ARM_LAYOUT, Observed, commands
from wallwm_jax.serving.server import Limits, PolicyServer, running
from wallwm_jax.serving.watchdog import Calibration
from wallwm_jax.serving.wire import packb, unpackb

CALIBRATION = Calibration(step=7, threshold=0.5, false_alarm_rate=0.05, spread=0.5, events=3, store="small")
PROMPT = "reach the red square"


@pytest.fixture(scope="module")
def store(small_store):
    return open_store(small_store)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A run of a tiny model that nobody trained; one bucket, so that one program is compiled."""
    workdir = tmp_path_factory.mktemp("served")
    save_run(workdir, store, store_config(store, buckets=(3,)))
    return workdir


@pytest.fixture(scope="module")
def policy(run):
    policy = Policy.from_checkpoint(run)
    policy.event_mode.warm_up(video=True)
    yield policy


@pytest.fixture(scope="module")
def server(policy):
    limits = Limits(message_bytes=200_000, queue=8)
    with running(PolicyServer(policy, {"event": CALIBRATION}, limits=limits, warm=False)) as server:
        yield server


@pytest.fixture
def robot(server):
    client = Client("127.0.0.1", server.port)
    yield client
    client.close()


@pytest.fixture(scope="module")
def images(store):
    record = store.read(0)
    return {view: record.picture(view, 0) for view in record.frames}


@pytest.fixture
def request_(images):
    turned = Rotation.from_euler("z", 0.4).as_quat()  # x y z w
    state = np.array([[0.4, 0.1, 0.2, turned[3], *turned[:3], 0.2]])
    return {"images": images, "state": state, "prompt": PROMPT, "duration_s": 1.6}


def pose_of(state):
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(state[0, [4, 5, 6, 3]]).as_matrix()
    pose[:3, 3] = state[0, :3]
    return pose[None]


# ---------------------------------------------------------------- the protocol


RECORDED = bytes.fromhex(
    "84a6696d6167657381a566726f6e7484c40b5f5f6e6461727261795f5fc3c40464617461c40c000102030405060708090a0bc40564747970"
    "65a37c7531c405736861706593020203a5737461746584c40b5f5f6e6461727261795f5fc3c40464617461c440000000000000e03f000000"
    "00000000000000000000000000000000000000f03f000000000000000000000000000000000000000000000000000000000000d03fc40564"
    "74797065a33c6638c4057368617065920108a670726f6d7074a57265616368aa6475726174696f6e5f7383c40d5f5f6e7067656e65726963"
    "5f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634"
)


def test_messages_are_those_of_openpi_client_byte_for_byte():
    """`RECORDED` is what openpi-client 0.1.2 sends for this observation."""
    observation = {
        "images": {"front": np.arange(12, dtype=np.uint8).reshape(2, 2, 3)},
        "state": np.array([[0.5, 0, 0, 1, 0, 0, 0, 0.25]]),
        "prompt": "reach",
        "duration_s": np.float32(1.5),
    }
    assert packb(observation) == RECORDED
    found = unpackb(RECORDED)
    np.testing.assert_array_equal(found["images"]["front"], observation["images"]["front"])
    np.testing.assert_array_equal(found["state"], observation["state"])
    assert (found["prompt"], found["duration_s"], type(found["duration_s"])) == ("reach", 1.5, np.float32)


def test_the_metadata_says_what_a_request_needs(robot, store):
    metadata = robot.metadata
    assert metadata["views"] == list(store.meta["views"]) and metadata["image_size"] == [64, 64]
    assert metadata["arm_layout"] == list(ARM_LAYOUT) and metadata["max_arms"] == 1
    assert (metadata["control_hz"], metadata["video_fps"], metadata["feedback_every"]) == (10.0, 5.0, 2)
    assert (metadata["modes"], metadata["buckets"], metadata["max_actions"]) == (["event"], [3], 16)
    assert metadata["step"] == 7 and metadata["max_message_bytes"] == 200_000
    assert metadata["watchdog"] == {"event": {"threshold": 0.5, "events": 3}}


def test_the_answers_are_the_policys_bit_for_bit_and_a_reset_begins_anew(robot, policy, images, request_):
    policy.reset()
    observation = Observed(images, pose_of(request_["state"]), np.array([0.2]))
    direct = [policy.infer(observation, PROMPT, 1.6) for _ in range(2)]
    served = [robot.infer(request_) for _ in range(2)]
    for action, reply in zip(direct, served):
        assert reply["actions"].shape == (16, 8) and reply["actions"].dtype == np.float32
        np.testing.assert_array_equal(reply["actions"], commands(action))
    assert np.abs(served[0]["actions"] - served[1]["actions"]).max() > 1e-4
    np.testing.assert_array_equal(robot.infer(request_ | {"reset": True})["actions"], served[0]["actions"])


def test_actions_are_absolute_poses_with_unit_quaternions_that_never_jump(robot, policy, images, request_):
    policy.reset()
    action = policy.infer(Observed(images, pose_of(request_["state"]), np.array([0.2])), PROMPT, 1.6)
    rows = robot.infer(request_)["actions"]
    np.testing.assert_allclose(rows[:, :3], action.poses[:, 0, :3, 3], atol=1e-6)
    turned = Rotation.from_quat(rows[:, [4, 5, 6, 3]]).as_matrix()
    np.testing.assert_allclose(turned, action.poses[:, 0, :3, :3], atol=1e-5)
    np.testing.assert_allclose(rows[:, 7], action.grippers[:, 0], atol=1e-6)
    assert ((rows[1:, 3:7] * rows[:-1, 3:7]).sum(1) >= 0).all()


def test_a_reply_tells_how_long_the_event_takes_and_what_the_time_went_into(robot, policy, request_):
    reply = robot.infer(request_)
    event = reply["event"]
    assert (event["steps"], event["duration_s"], event["whole"], event["progress"]) == (16, 1.6, True, 0.0)
    assert event["duration_quantiles_s"] == sorted(event["duration_quantiles_s"])
    assert event["predicted_duration_s"] == event["duration_quantiles_s"][1] and event["done_probability"] == 0.0
    assert reply["watchdog"] == {"score": None, "worst": None, "threshold": 0.5, "alarm": False, "latents": 0}
    timing = reply["server_timing"]
    assert set(timing) == {"queue_ms", "encode_ms", "model_ms", "pack_ms", "total_ms"}
    parts = timing["queue_ms"] + timing["encode_ms"] + timing["model_ms"] + timing["pack_ms"]
    assert timing["encode_ms"] > 0 and 0 < parts <= timing["total_ms"] < 2 * parts + 50
    del request_["duration_s"]
    own = robot.infer(request_)["event"]
    assert own["duration_s"] == own["predicted_duration_s"]
    told = robot.infer(request_ | {"frames": 4})["event"]
    assert (told["duration_s"], told["steps"]) == (0.8, 8)
    cut = robot.infer(request_ | {"duration_s": 9.0})["event"]
    assert (cut["steps"], cut["whole"]) == (16, False)


def test_health_is_answered_on_the_same_port(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=5) as response:
        assert response.status == 200 and response.read() == b"OK\n"


def test_while_the_programs_compile_health_says_so_and_robots_wait(policy, monkeypatch):
    compiled = threading.Event()
    monkeypatch.setattr(policy.event_mode, "warm_up", lambda *_, **__: compiled.wait(20))
    with running(PolicyServer(policy)) as server:
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=5)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(Client, "127.0.0.1", server.port)
            assert not waiting.done()
            compiled.set()
            client = waiting.result(10)
        assert client.metadata["watchdog"] is None
        client.close()


def test_a_page_in_a_browser_is_not_let_in(server):
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{server.port}", origin="http://example.org")


# ---------------------------------------------------------------- bad input: one message each, and the server goes on


def changed(request_, **fields):
    return {name: value for name, value in (request_ | fields).items() if value is not ...}


FAULTS = {
    "no map": (lambda r: 3, "a request is a map"),
    "typo": (lambda r: changed(r, promt="x"), "unknown field 'promt'"),
    "no images": (lambda r: changed(r, images=...), "images is a map of view name"),
    "missing view": (lambda r: changed(r, images={"front_pixels": None}), "images lacks 'ur5e/wrist'"),
    "unknown view": (lambda r: changed(r, images=r["images"] | {"top": None}), "unknown views 'top'"),
    "no picture": (lambda r: changed(r, images=dict.fromkeys(r["images"])), "no picture at all"),
    "channels": (
        lambda r: changed(r, images=r["images"] | {"ur5e/wrist": np.zeros((64, 64, 4), np.uint8)}),
        r"'ur5e/wrist' is uint8 \[64, 64, 4\]",
    ),
    "float pictures": (
        lambda r: changed(r, images=r["images"] | {"ur5e/wrist": np.zeros((64, 64, 3), np.float32)}),
        r"'ur5e/wrist' is float32 \[64, 64, 3\]",
    ),
    "empty": (
        lambda r: changed(r, images=r["images"] | {"ur5e/wrist": np.zeros((0, 64, 3), np.uint8)}),
        r"'ur5e/wrist' is empty",
    ),
    "no state": (lambda r: changed(r, state=...), r"state is \[G, 8\] floats .* for 1 to 1 arms; got nothing"),
    "integers": (lambda r: changed(r, state=np.zeros((1, 8), int)), r"got int64 \[1, 8\]"),
    "two arms": (lambda r: changed(r, state=np.repeat(r["state"], 2, 0)), r"got float64 \[2, 8\]"),
    "NaN": (lambda r: changed(r, state=r["state"] * np.nan), "not finite"),
    "rotation": (lambda r: changed(r, state=r["state"] * 1.1), r"the quaternion .* has length \[1.1\], not 1"),
    "gripper": (lambda r: changed(r, state=r["state"] + np.eye(8)[7:]), "0 is open, 1 closed"),
    "no prompt": (lambda r: changed(r, prompt=" "), "prompt says the next event in words"),
    "long prompt": (lambda r: changed(r, prompt="x" * 96), "97 text tokens, the model reads 96"),
    "mode": (lambda r: changed(r, mode="unified"), "unknown mode 'unified'; this server decodes in mode 'event'"),
    "duration": (lambda r: changed(r, duration_s=float("nan")), "duration_s must be positive and finite"),
    "negative": (lambda r: changed(r, duration_s=-1), "duration_s must be positive and finite"),
    "frames": (lambda r: changed(r, duration_s=..., frames=0), "frames is a whole number of at least 1"),
    "both": (lambda r: changed(r, frames=4), "send one of them"),
    "watch": (lambda r: changed(r, watch="yes"), "watch is true or false"),
    "steps": (lambda r: changed(r, steps=2), "steps is for mode 'unified'; this request is in mode 'event'"),
    "executed too early": (lambda r: {"executed": {"images": r["images"], "step": 2}}, "nothing has begun"),
    "executed": (lambda r: {"executed": 3}, "executed is a map"),
    "step": (lambda r: {"executed": {"images": r["images"], "step": 1.5}}, "step is a whole number"),
}


def test_each_fault_has_its_message_and_the_connection_stays(robot, request_):
    for name, (fault, message) in FAULTS.items():
        with pytest.raises(RuntimeError, match=message):
            robot.infer(fault(request_))
            raise AssertionError(f"{name} was accepted")
    assert robot.infer(request_)["actions"].shape == (16, 8)


class Planted:
    """A pickle of it runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /nowhere/unpickled",)


def as_array(data, dtype, shape):
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xc1", "not msgpack"),
        (RECORDED[:40], "not msgpack"),
        (b"", "not msgpack"),
        (b"\x81" * 2000, "not msgpack"),
        (os.urandom(500) + b"\xc1", "."),
        (as_array(pickle.dumps(Planted()), "|O", [1]), "never unpickled"),
        (as_array(b"\0" * 8, "i4,i4", [1]), "never unpickled"),
        (as_array(b"\0" * 8, 7, [1]), "never unpickled"),
        (as_array(b"\0" * 8, "nonsense", [1]), "not msgpack"),
        (as_array(b"\0" * 8, "<f4", [3]), r"shape \[3\] and dtype float32 has 8 bytes"),
        (as_array(b"\0" * 8, "<f4", [-2]), r"the shape \[-2\]"),
        (as_array(b"", "<f4", [2**62, 2**62, 0]), "."),
        ("text", "a binary frame of msgpack; this one is text"),
    ],
)
def test_malformed_messages_and_pickles_are_refused(robot, request_, raw, message):
    robot.socket.send(raw)
    reply = robot.socket.recv()
    assert isinstance(reply, str) and re.search(message, reply)
    assert robot.infer(request_)["event"]["steps"] == 16


def test_objects_are_not_sent_either():
    with pytest.raises(TypeError, match="cannot send object"):
        packb({"actions": np.array([None])})


def test_a_huge_message_closes_its_connection_and_no_other(server, robot, request_):
    huge = Client("127.0.0.1", server.port)
    with pytest.raises(ConnectionClosed, match="1009"):
        huge.infer(request_ | {"images": {"front_pixels": np.zeros((512, 512, 3), np.uint8)}})
    assert robot.infer(request_)["event"]["steps"] == 16


def test_a_robot_that_leaves_in_the_middle_disturbs_nobody(server, robot, request_):
    for _ in range(4):
        leaving = Client("127.0.0.1", server.port)
        leaving.socket.send(packb(request_))
        leaving.socket.socket.close()  # no goodbye
    assert robot.infer(request_)["event"]["steps"] == 16


def test_eight_robots_at_once_get_what_each_would_get_alone(server, request_):
    prompts = [f"reach the square number {number}" for number in range(8)]

    def act(prompt):
        with contextlib.closing(Client("127.0.0.1", server.port)) as client:
            return [client.infer(request_ | {"prompt": prompt})["actions"] for _ in range(2)]

    alone = [act(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(act, prompts))
    np.testing.assert_array_equal(together, alone)
    assert len({actions[0].tobytes() for actions in together}) == 8


def test_too_many_at_once_are_told_that_the_server_is_busy(policy, request_, monkeypatch):
    free, running_now = threading.Event(), threading.Event()
    infer = policy.infer

    def slow(*arguments, **named):
        running_now.set()
        free.wait(20)
        return infer(*arguments, **named)

    monkeypatch.setattr(policy, "infer", slow)
    with running(PolicyServer(policy, limits=Limits(queue=1), warm=False)) as server:
        first, second = (Client("127.0.0.1", server.port) for _ in range(2))
        first.socket.send(packb(request_))
        assert running_now.wait(10)
        with pytest.raises(RuntimeError, match="busy: 1 requests are waiting already"):
            second.infer(request_)
        free.set()
        assert unpackb(first.socket.recv())["event"]["steps"] == 16
        assert second.infer(request_)["event"]["steps"] == 16


def test_a_robot_that_answers_no_ping_is_dropped_and_one_too_many_is_refused(policy):
    limits = Limits(clients=1, silence_s=0.3)
    with running(PolicyServer(policy, limits=limits, warm=False)) as server:
        dead = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        dead.sendall(b"GET / HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + key)
        assert dead.recv(1000).startswith(b"HTTP/1.1 101")
        with pytest.raises(InvalidStatus, match="503"):
            Client("127.0.0.1", server.port)
        while dead.recv(4096):  # until the server hangs up; a timeout would raise
            pass
        Client("127.0.0.1", server.port).close()


def test_an_error_inside_the_policy_is_told_without_its_insides(policy, request_, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("a secret path")

    with running(PolicyServer(policy, warm=False)) as server:
        client = Client("127.0.0.1", server.port)
        monkeypatch.setattr(policy, "infer", broken)
        with pytest.raises(RuntimeError, match=r"internal error \(ZeroDivisionError\)") as error:
            client.infer(request_)
        assert "secret" not in str(error.value) and "a secret path" in caplog.text
        monkeypatch.undo()
        assert client.infer(request_)["event"]["steps"] == 16
        client.close()


def test_a_stop_answers_what_has_begun(policy, request_, monkeypatch):
    free, running_now = threading.Event(), threading.Event()
    infer = policy.infer
    monkeypatch.setattr(policy, "infer", lambda *a, **k: running_now.set() or (free.wait(20) and infer(*a, **k)))
    context = running(PolicyServer(policy, warm=False))
    server = context.__enter__()
    client = Client("127.0.0.1", server.port)
    client.socket.send(packb(request_))
    assert running_now.wait(10)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(context.__exit__, None, None, None)
        free.set()
        assert unpackb(client.socket.recv())["event"]["steps"] == 16
        with pytest.raises(ConnectionClosed, match="1001"):
            client.socket.recv()
        leaving.result(10)


def test_a_port_in_use_is_said_in_one_line(policy, server):
    with (
        pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{server.port}"),
        running(PolicyServer(policy, port=server.port)),
    ):
        pass


# ---------------------------------------------------------------- feedback


def predicted_frames(policy, images, request_):
    """The video that the model predicts for the first request of a session, as the robot would see it."""
    policy.reset()
    observation = Observed(images, pose_of(request_["state"]), np.array([0.2]))
    return policy.infer(observation, PROMPT, 1.6, video=True).video


def follow(robot, frames, until=16):
    for step in range(2, until + 1, 2):
        seen = {view: video[step // 2] for view, video in frames.items()}
        reply = robot.infer({"executed": {"images": seen, "step": step}})
    return reply


def test_the_watchdog_is_silent_where_all_goes_as_predicted_and_barks_at_a_planted_wrong_one(
    robot, policy, images, request_
):
    right = predicted_frames(policy, images, request_)
    wrong = {view: np.repeat(video[:1], len(video), 0) for view, video in right.items()}  # nothing happens
    robot.infer(request_ | {"reset": True, "watch": True})
    reply = follow(robot, right)
    assert reply["watchdog"]["latents"] == 2 and abs(reply["watchdog"]["score"]) < 0.2
    assert not reply["watchdog"]["alarm"] and set(reply) == {"event", "watchdog", "server_timing"}
    unwatched, watched = (robot.infer(request_ | {"reset": True, "watch": watch}) for watch in (False, True))
    np.testing.assert_array_equal(watched["actions"], unwatched["actions"])
    reply = follow(robot, wrong)
    assert reply["watchdog"]["score"] > 0.9 and reply["watchdog"]["alarm"]


def test_progress_runs_with_the_clock_from_nothing_to_done(robot, images, request_):
    robot.infer(request_)
    shares = []
    for step in (4, 8, 12, 16, 40):
        event = robot.infer({"executed": {"images": images, "step": step}})["event"]
        shares.append((event["progress"], event["done_probability"]))
    assert shares == sorted(shares) and shares[0][0] > 0.0 and shares[3][1] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(RuntimeError, match="step 40 was told already; the next is at least 41"):
        robot.infer({"executed": {"images": images, "step": 40}})


# ---------------------------------------------------------------- the command and the benchmark


def test_the_benchmark_times_each_bucket_by_a_real_client(policy, monkeypatch):
    monkeypatch.setattr(Policy, "from_checkpoint", lambda *_: policy)
    found = serving.measure(steps=2, workdir="run")
    (row,) = found["programs"]
    assert (row["mode"], row["latents"], row["actions"]) == ("event", 3, 16)
    counts = {kind: row[kind]["seconds"]["count"] for kind in ("request", "video", "feedback")}
    assert counts == {"request": 2, "video": 2, "feedback": 7}  # 8 video frames, the first of which is the video's
    request = row["request"]
    assert set(request["parts_ms"]) == {"queue", "encode", "model", "pack"} and request["cold_seconds"] > 0
    assert request["per_action"] == {
        "cold_seconds": request["cold_seconds"] / 16,
        "seconds": {"median": request["seconds"]["median"] / 16, "p95": request["seconds"]["p95"] / 16},
    }
    assert sum(request["parts_ms"].values()) < 1e3 * request["seconds"]["max"] * 1.5
    assert json.loads(json.dumps(found)) == found and len(serving.table(found).splitlines()) == 9
    with pytest.raises(UserError, match="serving needs --workdir=RUN"):
        serving.measure()
    with pytest.raises(UserError, match="'run' was not trained on windows with history"):
        serving.measure(workdir="run", mode="unified")


@pytest.mark.extended
def test_the_public_client_talks_to_it_unchanged(server):
    check_public_client(server.port, steps=8, duration_s=0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no workdir given; pass --workdir=DIR"),
        (["--workdir=.", "--calibrate"], "--calibrate and --store=DIR go together"),
        (["--workdir=.", "--mode=event", "--latents=runs/staircase"], "--mode=event serves none"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_listens(arguments, message):
    line = [sys.executable, "-m", "wallwm_jax.serve", *arguments]
    done = subprocess.run(line, env=subprocess_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and "listening" not in done.stdout


@pytest.mark.fault
def test_sigterm_ends_the_command_with_0_after_it_has_served(run, request_):
    line = [sys.executable, "-u", "-m", "wallwm_jax.serve", f"--workdir={run}", "--port=0"]
    process = subprocess.Popen(line, env=subprocess_environment(), stdout=subprocess.PIPE, text=True)
    try:
        port = next(int(text.rsplit(":", 1)[1]) for text in process.stdout if text.startswith("listening"))
        with contextlib.closing(Client("127.0.0.1", port)) as robot:  # waits until it is warm
            assert robot.infer(request_)["event"]["steps"] == 16
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        process.kill()
