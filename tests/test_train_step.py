"""The train step: pure, compiled once, the same on any number of devices; mesh and shardings under it; takeover."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random_params
from training_setup import (
    built_step,
    compiled_step,
    device_batch,
    random_state,
    subprocess_environment,
    training_config,
)

from wallwm_jax.console import UserError
from wallwm_jax.parallel import distributed, sharding
from wallwm_jax.parallel.mesh import AXES, make_mesh, mesh_shape
from wallwm_jax.training.train_state import TrainState, ema_decay, flatten, take_over

ONE = {"slice": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.fixture(scope="module")
def joint(clustered_store):
    built = built_step(clustered_store, "joint")
    return training_config(clustered_store), built, compiled_step(clustered_store, "joint")


# The step


def test_the_same_state_and_rows_give_the_same_bits_and_another_step_other_noise(joint):
    config, built, step = joint
    batch = device_batch(config, built)
    (one, first), (two, again) = (step(random_state(config, built), batch) for _ in range(2))
    assert {name: float(value) for name, value in first.items()} == {
        name: float(value) for name, value in again.items()
    }
    for path, leaf in flatten(one.trainable).items():
        np.testing.assert_array_equal(leaf, flatten(two.trainable)[path])
    moved = random_state(config, built)
    moved = TrainState(**{**vars(moved), "step": moved.step + 1})
    assert float(step(moved, batch)[1]["loss"]) != float(first["loss"])


def test_metrics_count_events_and_follow_the_schedule(joint):
    config, built, step = joint
    batch = device_batch(config, built)
    state, rates = random_state(config, built), []
    for _ in range(4):
        state, metrics = step(state, batch)
        rates.append(float(metrics["lr"]) / config.optim.lr)
    assert int(metrics["events"]) == int((np.asarray(batch["window_index"]) >= 0).sum())
    third = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 3))  # warm-up of 2, then a cosine to 5 % at step 5
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.0, third], rtol=1e-5)
    assert int(state.step) == 4 and math.isfinite(float(metrics["grad_norm"]))


def test_the_average_follows_with_its_warm_up(joint):
    """After the first update the average is 0.1 old + 0.9 new: decay is (1 + t) / (10 + t) up to the limit."""
    config, built, step = joint
    before = jax.device_get(random_state(config, built).trainable)
    state, _ = step(random_state(config, built), device_batch(config, built))
    for path, old in flatten(before).items():
        expected = 0.1 * old + 0.9 * np.asarray(flatten(state.trainable)[path])
        np.testing.assert_allclose(flatten(state.ema)[path], expected, rtol=1e-5, atol=1e-7)
    assert [float(ema_decay(jnp.int32(t), 0.9999)) for t in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.9999])


def test_the_loss_comes_down_on_rows_seen_again_and_again(joint):
    config, built, step = joint
    state = built.init()
    batch = device_batch(config, built)
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss_duration"]))  # the stream without noise
    assert losses[-1] < losses[0] - 0.01


_TWO_DEVICES = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from training_setup import device_batch, random_state, training_config
from wallwm_jax.data.event_store import open_store
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training.train_step import build_train_step
config = training_config(sys.argv[1], "video")
mesh = make_mesh(config.mesh)
built = build_train_step(config, mesh, open_store(sys.argv[1]).channel_weights())
state, lines = random_state(config, built), []
for seed in range(2):
    state, metrics = built.step(state, device_batch(config, built, seed))
    lines.append({name: float(value) for name, value in metrics.items()})
kernel = state.trainable["video"]["blocks"]["ffn"]["up"]["kernel"]
momenta = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
print(json.dumps({"shape": dict(mesh.shape), "metrics": lines, "compilations": built.step._cache_size(),
    "kernel": kernel.addressable_shards[0].data.shape, "momentum": momenta[0].addressable_shards[0].data.shape}))
"""


@pytest.mark.extended
def test_two_devices_give_the_same_numbers_as_one(clustered_store):
    """Rows and weights split over fsdp = 2: every metric of two steps agrees to 1e-5; one compilation serves both."""
    config, built = training_config(clustered_store, "video"), built_step(clustered_store, "video")
    step = compiled_step(clustered_store, "video")
    command = [sys.executable, "-c", _TWO_DEVICES, str(clustered_store)]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout.splitlines()[-1])
    assert two["shape"]["fsdp"] == 2 and two["compilations"] == 1
    assert two["kernel"] == [2, 16, 64] and two["momentum"] == [2, 16, 64]  # half of the 32 inputs on each device
    state = random_state(config, built)
    for seed in range(2):
        state, metrics = step(state, device_batch(config, built, seed))
        assert two["metrics"][seed] == pytest.approx({name: float(value) for name, value in metrics.items()}, rel=1e-5)


# Taking over an earlier stage's parameters


def test_takeover_keeps_matching_arrays_and_says_what_is_new_and_dropped(clustered_store):
    """Stage action from a joint run whose action tower was narrower."""
    config = training_config(clustered_store, "action")
    built = built_step(clustered_store, "action")
    narrow = config.copy_and_resolve_references()
    with narrow.unlocked():
        narrow.model.action_ffn = 24
    source = random_params(narrow.model, seed=7)
    source["planner"] = {"bias": jnp.zeros(3)}
    state, takeover = take_over(random_state(config, built, seed=1), source, "runs/joint")
    video = flatten(state.frozen)["video/blocks/ffn/up/kernel"]
    np.testing.assert_array_equal(video, source["video"]["blocks"]["ffn"]["up"]["kernel"].astype(jnp.bfloat16))
    kept = flatten(state.trainable)["action/encoder_up/kernel"]
    np.testing.assert_array_equal(kept, source["action"]["encoder_up"]["kernel"])
    np.testing.assert_array_equal(flatten(state.ema)["action/encoder_up/kernel"], kept)
    changed = {path for path in takeover.new}
    assert changed == {
        f"action/blocks/ffn/{name}" for name in ("up/kernel", "up/bias", "gate/kernel", "gate/bias", "down/kernel")
    }
    assert set(takeover.dropped) == changed | {"planner/bias"}
    lines = takeover.table().splitlines()
    count = {group: sum(path.startswith(f"{group}/") for path in takeover.kept) for group in ("action", "video")}
    assert re.fullmatch(rf"\s+action\s+{count['action']}\s+5\s+5", lines[1])
    assert re.fullmatch(r"\s+planner\s+0\s+0\s+1", lines[3])
    assert re.fullmatch(rf"\s+video\s+{count['video']}\s+0\s+0", lines[5])
    assert "    shape differs, so new: action/blocks/ffn/down/kernel" in lines


def test_a_frozen_part_is_never_left_random(clustered_store):
    config = training_config(clustered_store, "action")
    built = built_step(clustered_store, "action")
    source = random_params(config.model)
    del source["text"]["norm"]
    with pytest.raises(UserError, match=r"'runs/x' lacks 2 parameters that this stage freezes, such as text/norm/bias"):
        take_over(random_state(config, built), source, "runs/x")


# The mesh


def test_one_axis_takes_the_devices_that_are_left():
    assert mesh_shape({**ONE, "fsdp": -1}, 8) == (1, 1, 8, 1, 1)
    assert mesh_shape({**ONE, "data": 2, "fsdp": -1, "tensor": 2}, 8) == (1, 2, 2, 1, 2)
    mesh = make_mesh(ONE, jax.devices()[:1])
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({**ONE, "fsdp": 3}, "slice 1 x data 1 x fsdp 3 x context 1 x tensor 1 does not fit 8 devices"),
        ({**ONE, "fsdp": -1, "data": 3}, "does not fit 8 devices"),
        ({**ONE, "fsdp": -1, "data": -1}, "-1 on data and fsdp; only one"),
        ({**ONE, "tensor": 0}, "config.mesh.tensor is 0"),
        ({"data": 1}, r"names the axes \['data'\]"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(sizes, 8)


def test_rules_turn_axis_names_into_partitions():
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 1, 2), AXES)
    spec = sharding.spec_for(("layers", "embed", "heads"), (3, 64, 64), mesh)
    assert spec == jax.P(None, "fsdp", "tensor")
    assert sharding.spec_for(("embed", "modulation"), (30, 6), mesh) == jax.P(None, None)  # 4 does not divide 30
    assert sharding.spec_for(("embed", "embed"), (64, 64), mesh) == jax.P("fsdp", None)  # an axis splits once
    assert sharding.spec_for(("batch", None), (16, 7), mesh) == jax.P(("data", "fsdp"), None)  # one slice
    with pytest.raises(ValueError, match="'embedd' has no sharding rule"):
        sharding.spec_for(("embedd",), (4,), mesh)


def test_constrain_does_nothing_without_a_mesh_and_pins_the_layout_with_one():
    x = jnp.ones((4, 8))
    assert sharding.constrain(x, "batch", "embed") is x
    mesh = make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: sharding.constrain(x, "batch", "embed"))(x).sharding.mesh.axis_names == AXES


def test_a_single_process_holds_all_rows_and_passes_every_barrier():
    assert distributed.this_host() == distributed.Host(0, 1)
    assert sharding.host_rows(make_mesh(ONE, jax.devices()[:1]), 4) == (0, 1)
    distributed.barrier("nobody else")


_PROCESS = """
import sys
import jax
from wallwm_jax.console import UserError
from wallwm_jax.parallel import distributed, sharding
from wallwm_jax.parallel.mesh import make_mesh
host = distributed.initialize(start_timeout_s=60)
mesh = make_mesh({"slice": 1, "data": 2, "fsdp": -1, "context": 1, "tensor": 1})
distributed.barrier("together", timeout_s=60)
print(host.index, host.count, *sharding.host_rows(mesh, 8), flush=True)
if host.is_first:
    try:
        distributed.barrier("alone", timeout_s=1)
    except UserError as error:
        print(error, flush=True)
distributed.barrier("end", timeout_s=60)
"""


def test_processes_find_each_other_and_a_barrier_gives_up(tmp_path):
    """Two processes of one device each: rows are halved; the first waits one second for a peer that never comes."""
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS],
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (output[0].splitlines() for output in outputs)
    assert first[0] == "0 2 0 2" and second[0] == "1 2 1 2"
    assert first[1].startswith("process 0 of 2 waited 1 s at barrier 'alone' for the others")


def test_half_an_address_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS is set but JAX_NUM_PROCESSES is not"):
        distributed.initialize()


def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]
