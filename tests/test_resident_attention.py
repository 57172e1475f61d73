"""The kernel of attention with all keys at hand equals dense attention, forward and backward, however it is masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from wallwm_jax.models import resident_attention
from wallwm_jax.models.attention import attend
from wallwm_jax.models.resident_attention import Rotary, attend_resident
from wallwm_jax.models.rope import rotate
from wallwm_jax.parallel.aot import statistics, topology_devices
from wallwm_jax.parallel.mesh import make_mesh

ROWS, GROUPS, HEADS, WIDTH = 1, 2, 2, 128


def _heads(x):
    return jnp.swapaxes(x.reshape(-1, x.shape[2], HEADS, WIDTH), 1, 2)


def _dense(query, key, value, angles, bias=None, segments=None):
    """The same in the operations of `attend` and `rotate`."""
    shape = query.shape
    query, key, value = map(_heads, (query, key, value))
    if angles is not None:
        angles = angles.reshape(-1, *angles.shape[2:])
        query, key = rotate(query, angles), rotate(key, angles)
    if bias is None:
        segments = segments.reshape(-1, shape[2])
        mixed = attend(query, key, value, q_segments=segments, kv_segments=segments)
    else:
        bias = jnp.broadcast_to(bias, (ROWS, GROUPS, shape[2], bias.shape[3])).reshape(-1, shape[2], bias.shape[3])
        mixed = attend(query, key, value, key_bias=jnp.max(bias, 1), mask=bias > -jnp.inf)
    return jnp.swapaxes(mixed, 1, 2).reshape(shape)


@pytest.mark.parametrize(
    ("queries", "keys", "kind"), [(126, 126, "views"), (530, 65, "caption"), (1050, 1050, "event")]
)
def test_it_is_dense_attention(queries, keys, kind):
    """Across views: a mask and a learned rotary embedding; to captions and along events: blocks of queries, the last of
    which reaches beyond the end."""
    draws = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draws.normal(size=(ROWS, GROUPS, *shape)), jnp.float32)

    query, key, value, probe = (normal(size, HEADS * WIDTH) for size in (queries, keys, keys, queries))
    angles = None if kind == "caption" else normal(queries, WIDTH // 2)
    masks = {}
    if kind == "event":
        masks["segments"] = jnp.asarray(draws.integers(0, 3, (ROWS, GROUPS, queries)))
        closed = np.asarray(masks["segments"]) == 0
    else:
        bias = np.zeros((ROWS, GROUPS, queries if kind == "views" else 1, keys), np.float32)
        bias[..., : keys // 3] = -np.inf  # absent, or behind the caption's end
        bias[..., -1] = np.log(400.0)
        if kind == "views":
            bias[draws.random(bias.shape) < 0.3] = -np.inf
            bias[:, 1, 5] = -np.inf  # a query without any key
        masks["bias"] = jnp.asarray(bias)
        closed = np.broadcast_to(np.all(bias == -np.inf, -1), (ROWS, GROUPS, queries))

    def ours(query, key, value, angles):
        rotary = None if angles is None else Rotary.of(angles)
        options = dict(heads=HEADS, rotary=rotary, learns_rotary=kind == "views", interpret=True)
        return attend_resident(query, key, value, **masks, **options)

    def values_and_gradients(attention):
        def loss(*arrays):
            mixed = attention(*arrays)
            return jnp.sum(mixed * probe), mixed

        arguments = (0, 1, 2, 3) if kind == "views" else (0, 1, 2)
        gradients, mixed = jax.jit(jax.grad(loss, arguments, has_aux=True))(query, key, value, angles)
        return mixed, *gradients

    found = values_and_gradients(ours)
    wanted = values_and_gradients(lambda *arrays: _dense(*arrays, **masks))
    for one, other in zip(found, wanted, strict=True):
        assert jnp.max(jnp.abs(one - other)) < 2e-5 * jnp.max(jnp.abs(other))
    assert jnp.all(found[0][closed] == 0)
    assert closed.any() == (kind != "caption")


def test_keys_of_members_are_those_of_their_groups():
    """Captions of two events, of which each of three groups has one, and the last has none."""
    draws = np.random.default_rng(1)
    query, probe = (jnp.asarray(draws.normal(size=(1, 3, 70, HEADS * WIDTH)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(draws.normal(size=(1, 2, 65, HEADS * WIDTH)), jnp.float32) for _ in range(2))
    members, bias = jnp.asarray([[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]]), jnp.zeros((1, 3, 1, 65))

    def loss(key, value, **how):
        return jnp.sum(probe * attend_resident(query, key, value, heads=HEADS, bias=bias, interpret=True, **how))

    def spread(key, value):
        return loss(*(jnp.einsum("bge,be...->bg...", members, x) for x in (key, value)))

    found = jax.value_and_grad(lambda *arrays: loss(*arrays, members=members), (0, 1))(key, value)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(jax.value_and_grad(spread, (0, 1))(key, value))):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_which_sequences_it_takes():
    assert resident_attention.worthwhile(126, 128)
    assert not resident_attention.worthwhile(126, 32)  # a head of less than the lanes
    assert not resident_attention.worthwhile(16, 128)
    assert not resident_attention.worthwhile(4096, 128)


@pytest.mark.tpu
@pytest.mark.parametrize("split", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}])
def test_every_chip_has_its_own_part(split):
    """Rows, heads and groups are split without any exchange; a context axis that divides no groups splits queries."""
    mesh = make_mesh(
        {"slice": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1} | split, topology_devices("v5p:2x2x1")
    )
    rows, groups, tokens, width = 2, 3, 1040, HEADS * WIDTH
    whole = NamedSharding(mesh, PartitionSpec("fsdp", None, "context", "tensor"))
    array = jax.ShapeDtypeStruct((rows, groups, tokens, width), jnp.bfloat16, sharding=whole)
    segments = jax.ShapeDtypeStruct(
        (rows, groups, tokens), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )

    def attention(query, key, value, segments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend_resident(query, key, value, segments=segments, heads=HEADS)

    found = statistics(jax.jit(attention, out_shardings=whole).lower(array, array, array, segments).compile())
    assert found.kernel_flops == 4 * rows * groups * tokens**2 * width / 4
    received = found.received
    assert received["all-gather"] == (2 * groups * tokens * width * 2 / 2 if "context" in split else 0)
    assert sum(received.values()) == received["all-gather"]
