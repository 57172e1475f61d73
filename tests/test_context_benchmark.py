"""The two ways to split a long attention: the same function on devices at hand, each its own exchange on a TPU."""

import json
import subprocess
import sys

import pytest
from random_batch import tiny_config
from training_setup import subprocess_environment

from wallwm_jax.benchmarks import context
from wallwm_jax.console import UserError

_ON_DEVICES = """
import dataclasses, json
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from wallwm_jax.benchmarks import context
from wallwm_jax.models.attention import attend
from wallwm_jax.parallel.mesh import AXES, make_mesh
blocks = context._blocks
context._blocks = lambda length: dataclasses.replace(blocks(length), interpret=True)
arrays = jax.random.normal(jax.random.key(0), (4, 1, 4, 1000, 128))
def with_gradients(attention):
    def both(query, key, value, towards):
        mixed, back = jax.vjp(attention, query, key, value)
        return mixed, *back(towards)
    return jax.jit(both)(*arrays)
expected = with_gradients(attend)
with jax.set_mesh(make_mesh({**dict.fromkeys(AXES, 1), "context": 4}, jax.devices())):
    found = {name: with_gradients(context.ROWS[name]) for name in ("all_to_all", "ring")}
print(json.dumps({name: [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(arrays, expected)]
                  for name, arrays in found.items()}))
"""


def config(**model):
    config = tiny_config(latents_per_row=16, rows=1, views=("front",)).copy_and_resolve_references()
    with config.unlocked():
        config.model.update(dict(latent_shape=(16, 16), heads=4, width=512) | model)
    return config


@pytest.mark.tpu
def test_both_ways_are_the_attention_and_its_gradient():
    """Of 250 tokens a device, which are padded to whole blocks."""
    pytest.importorskip("tokamax", reason="pip install tokamax")
    command = [sys.executable, "-c", _ON_DEVICES]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, errors in json.loads(done.stdout.splitlines()[-1]).items():
        assert max(errors) < 1e-5, (name, errors)


@pytest.mark.tpu
def test_on_tpu_one_way_exchanges_heads_and_the_other_sends_keys_round():
    """1024 tokens over four chips; a chip's part of an array is 256 tokens of 512 bfloat16 features."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    pytest.importorskip("tokamax", reason="pip install tokamax")
    result = context.measure(config(), "v5p:2x2x1")
    part = 256 * 512 * 2
    for name in ("towers", "all_to_all"):
        assert result[name]["collectives"] == {"all-to-all": 8}
        assert result[name]["received"] == pytest.approx(8 * 3 / 4 * part, rel=0.01)
    ring = result["ring"]
    assert set(ring["collectives"]) == {"collective-permute"} and ring["received"] > 16 * part
    assert result["all_to_all"]["flops"] == pytest.approx(14 * 1024 * 1024 * 512 / 4, rel=0.01)
    assert all(name in context.table(result) for name in context.ROWS)


@pytest.mark.tpu
def test_what_cannot_be_split_is_refused():
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    with pytest.raises(UserError, match="--rows=rings: one of towers, all_to_all, ring"):
        context.measure(config(), "v5p:2x2x1", ["rings"])
    with pytest.raises(UserError, match="128 chips do not divide the 16 tokens of a view"):
        context.measure(config(latent_shape=(2, 2)), "v5p:4x4x8")
