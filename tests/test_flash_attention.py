"""The kernel of attention along packed events equals dense attention, forward and backward, however it is split."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_setup import subprocess_environment

from wallwm_jax.models import flash_attention
from wallwm_jax.models.attention import attend
from wallwm_jax.models.flash_attention import attend_flash
from wallwm_jax.models.resident_attention import Rotary
from wallwm_jax.models.rope import rotate
from wallwm_jax.parallel.aot import statistics, topology_devices
from wallwm_jax.parallel.mesh import AXES, make_mesh

ROWS, GROUPS, HEADS, WIDTH = 1, 2, 2, 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash_attention, "_block_size", lambda tokens, sizes=None: 256 if sizes is None else 128)


@pytest.mark.parametrize(("tokens", "at_once"), [(530, 1024), (530, 256), (512, 1024)])
def test_it_is_dense_attention(monkeypatch, tokens, at_once):
    """Events with padding before them; blocks that reach beyond the end; gradients of some queries at a time."""
    monkeypatch.setattr(flash_attention, "_MOST_QUERIES", at_once)
    draws = np.random.default_rng(tokens)

    def normal(width):
        return jnp.asarray(draws.normal(size=(ROWS, GROUPS, tokens, width)), jnp.float32)

    query, key, value, probe = (normal(HEADS * WIDTH) for _ in range(4))
    angles, segments = normal(WIDTH // 2), jnp.asarray(np.sort(draws.integers(0, 4, (ROWS, GROUPS, tokens)), -1))

    def ours(query, key, value):
        return attend_flash(query, key, value, heads=HEADS, segments=segments, rotary=Rotary.of(angles), interpret=True)

    def dense(query, key, value):
        heads = (jnp.swapaxes(x.reshape(GROUPS, tokens, HEADS, WIDTH), 1, 2) for x in (query, key, value))
        query, key, value = heads
        query, key = rotate(query, angles[0]), rotate(key, angles[0])
        mixed = attend(query, key, value, q_segments=segments[0], kv_segments=segments[0])
        return jnp.swapaxes(mixed, 1, 2).reshape(probe.shape)

    def values_and_gradients(attention):
        def loss(*arrays):
            mixed = attention(*arrays)
            return jnp.sum(mixed * probe), mixed

        gradients, mixed = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
        return mixed, *gradients

    found = values_and_gradients(ours)
    for one, other in zip(found, values_and_gradients(dense), strict=True):
        assert jnp.max(jnp.abs(one - other)) < 5e-6 * jnp.max(jnp.abs(other))
    closed = segments == 0
    assert closed.any() and jnp.all(found[0][closed] == 0)


def test_blocks_pad_little(monkeypatch):
    monkeypatch.undo()
    forward, backward = (
        [flash_attention._block_size(tokens, sizes) for tokens in (2100, 5712, 32_760, 75_600)]
        for sizes in (flash_attention._BLOCKS, flash_attention._BACKWARD_KEYS)
    )
    assert forward == [1152, 1152, 1024, 1024] and backward == [384, 384, 512, 512]
    assert flash_attention.worthwhile(2100, 128)
    assert not flash_attention.worthwhile(2100, 64)  # a head of less than the lanes
    assert not flash_attention.worthwhile(126, 128)


_ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from wallwm_jax.models import flash_attention
from wallwm_jax.models.resident_attention import Rotary
from wallwm_jax.parallel.mesh import make_mesh
flash_attention._block_size = lambda tokens, sizes=None: 128
draws = np.random.default_rng(0)
def normal(width): return jnp.asarray(draws.normal(size=(2, 1, 256, width)), jnp.float32)
angles, segments = normal(64), jnp.asarray(np.sort(draws.integers(0, 4, (2, 1, 256)), -1))
mesh = make_mesh(dict(slice=1, data=1, fsdp=2, context=2, tensor=2))
for heads in (4, 2):
    *qkv, probe = (normal(heads * 128) for _ in range(4))
    def run(*arrays):
        def loss(query, key, value):
            mixed = flash_attention.attend_flash(
                query, key, value, heads=heads, segments=segments, rotary=Rotary.of(angles), interpret=True)
            return jnp.sum(mixed * probe), mixed
        return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    def on_mesh(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*arrays)
    where = jax.NamedSharding(mesh, jax.P("fsdp", None, "context", "tensor"))
    found = jax.jit(on_mesh, in_shardings=where)(*qkv)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(run)(*qkv))):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.max(jnp.abs(other))))
"""


@pytest.mark.extended
def test_on_a_mesh_it_equals_one_device():
    """Rows, tokens and heads split, forward and backward: two heads a device are exchanged, one stays."""
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_MESH], env=subprocess_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("split", "exchanged"),
    [
        ({"fsdp": 2, "tensor": 2}, {}),
        ({"context": 4}, {"all-to-all": 4 * 3 / 4}),
        ({"context": 2, "tensor": 2}, {"all-gather": 2 * 1 / 2}),
    ],
    ids=["rows and heads", "heads by exchange", "queries"],
)
def test_what_chips_exchange(monkeypatch, split, exchanged):
    """Where a context axis divides the heads, queries, keys, values and what is mixed change places; else keys and
    values come whole."""
    monkeypatch.undo()
    heads = 4 if split == {"context": 4} else 2
    mesh = make_mesh(dict.fromkeys(AXES, 1) | split, topology_devices("v5p:2x2x1"))
    rows, tokens, width = 2, 2304, heads * WIDTH
    where = NamedSharding(mesh, PartitionSpec("fsdp", None, "context", "tensor"))
    array = jax.ShapeDtypeStruct((rows, 1, tokens, width), jnp.bfloat16, sharding=where)
    of_tokens = NamedSharding(mesh, PartitionSpec("fsdp", None, "context"))
    segments = jax.ShapeDtypeStruct((rows, 1, tokens), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    angles = jax.ShapeDtypeStruct((rows, 1, tokens, WIDTH // 2), jnp.float32, sharding=of_tokens)

    def attention(query, key, value, segments, angles):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend_flash(query, key, value, heads=heads, segments=segments, rotary=Rotary.of(angles))

    compiled = jax.jit(attention, out_shardings=where).lower(array, array, array, segments, angles).compile()
    found = statistics(compiled)
    assert found.kernel_flops == 4 * rows * tokens**2 * width / 4
    whole = rows * tokens * width * 2 / (4 / split.get("context", 1))  # what a chip would hold of all tokens
    for kind, share in exchanged.items():
        assert found.received[kind] == pytest.approx(share * whole / (split["context"] if kind == "all-to-all" else 1))
    assert set(found.received) == set(exchanged)
