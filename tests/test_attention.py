"""Attention: segments, biases, masks, rows without keys, Wan's text padding as one biased key, and skipped tiles."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models import attention, event_attention, splash_attention, triton_attention
from wallwm_jax.models.attention import attend

B, S, T, H, D = 2, 7, 9, 3, 8


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, H, n, D)) for key, n in zip(keys, (S, T, T))]


def dense(query, key, value, allowed, bias=0.0):
    """Attention written out, float64; `allowed [B, S, T]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bhsd,bhtd->bhst", query, key) / np.sqrt(D) + bias
    weights = np.exp(logits - logits.max()) * allowed[:, None]
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bhtd->bhsd", np.where(total > 0, weights / np.where(total > 0, total, 1), 0), value)


def by_token(out):
    """`[B, S, H, D]` of `[B, H, S, D]`."""
    return np.swapaxes(np.asarray(out), 1, 2)


def test_plain_attention(qkv):
    np.testing.assert_allclose(attend(*qkv), dense(*qkv, np.ones((B, S, T))), atol=1e-6)


def test_segments_close_other_events_and_padding(qkv):
    q_segments = np.array([[1, 1, 2, 2, 3, 0, 0], [2, 2, 1, 1, 1, 0, 4]])
    kv_segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 2, 2, 3, 3, 3, 0, 0]])
    allowed = (q_segments[:, :, None] == kv_segments[:, None]) & (kv_segments != 0)[:, None]
    out = attend(*qkv, q_segments=jnp.asarray(q_segments), kv_segments=jnp.asarray(kv_segments))
    np.testing.assert_allclose(out, dense(*qkv, allowed), atol=1e-6)
    assert (by_token(out)[~allowed.any(-1)] == 0).all()
    assert (~allowed.any(-1)).sum() == 5


def test_a_row_without_keys_has_zero_output_and_finite_gradients(qkv):
    closed = jnp.full((B, T), -jnp.inf)
    value, gradients = jax.value_and_grad(lambda q, k, v: attend(q, k, v, key_bias=closed).sum(), (0, 1, 2))(*qkv)
    assert value == 0
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_segments_bias_and_mask_combine(qkv):
    rng = np.random.default_rng(0)
    q_segments, kv_segments = rng.integers(1, 3, (B, S)), rng.integers(1, 3, (B, T))
    bias = np.where(rng.random((B, T)) < 0.3, -np.inf, rng.normal(size=(B, T))).astype(np.float32)
    mask = rng.random((B, S, T)) < 0.7
    allowed = (q_segments[:, :, None] == kv_segments[:, None]) & np.isfinite(bias)[:, None] & mask
    out = attend(
        *qkv,
        q_segments=jnp.asarray(q_segments),
        kv_segments=jnp.asarray(kv_segments),
        key_bias=jnp.asarray(bias),
        mask=jnp.asarray(mask),
    )
    finite = np.where(np.isfinite(bias), bias, 0)[:, None, None]
    np.testing.assert_allclose(out, dense(*qkv, allowed, finite), atol=1e-6)


def test_equal_padding_keys_are_one_key_with_log_bias(qkv):
    """Wan attends to all 512 - n zero pads of a caption; one key with bias log(512 - n) is the same function."""
    query, key, value = qkv
    n, pads = T - 1, 503
    repeats = np.array([1] * n + [pads])
    padded = query, jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    expected = dense(*padded, np.ones((B, S, repeats.sum())))
    bias = jnp.asarray(np.log(repeats), jnp.float32)[None].repeat(B, 0)
    np.testing.assert_allclose(attend(query, key, value, key_bias=bias), expected, atol=5e-6)


def test_half_precision_stays_close_to_float32(qkv):
    out = attend(*(x.astype(jnp.bfloat16) for x in qkv))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), attend(*qkv), atol=0.04)


# --- event_attention: the CPU's tiles --------------------------------------------------------------------------------

ROW, KEYS, EVENTS = 400, 900, 6
LENGTHS = ([30, 70, 1, 150, 99], [120, 64, 65, 63, 80])


def packed_rows(scale, shuffle=False):
    """Segments `[2, n]` of events one after the other, the rest padding; shuffled on demand."""
    events = [np.repeat(np.arange(1, len(row) + 1), np.asarray(row) * scale) for row in LENGTHS]
    rows = np.stack([np.pad(row, (0, {1: ROW, 2: KEYS}[scale] - len(row))) for row in events])
    return np.random.default_rng(0).permuted(rows, axis=1) if shuffle else rows


@pytest.fixture(scope="module")
def tiles():
    keys = jax.random.split(jax.random.key(1), 4)
    return [jax.random.normal(key, (2, 2, n, D)) for key, n in zip(keys, (ROW, KEYS, KEYS, ROW))]


@pytest.mark.parametrize("shuffle", [False, True])
def test_visiting_open_tiles_equals_dense_attention_and_its_gradients(tiles, shuffle):
    query, key, value, cotangent = tiles
    segments = [jnp.asarray(packed_rows(scale, shuffle)) for scale in (1, 2)]
    assert event_attention.worthwhile(ROW, KEYS, EVENTS)

    def run(function):
        return jax.jit(lambda *qkv: (*jax.vjp(function, *qkv)[1](cotangent), function(*qkv)))(query, key, value)

    ours = run(lambda *qkv: event_attention.attend_events(*qkv, *segments, EVENTS))
    theirs = run(lambda *qkv: attend(*qkv, q_segments=segments[0], kv_segments=segments[1]))
    for mine, dense_one in zip(ours, theirs):
        np.testing.assert_allclose(mine, dense_one, atol=5e-6)
    assert (by_token(ours[-1])[np.asarray(segments[0]) == 0] == 0).all()


def test_poisoning_one_event_leaves_the_tiles_of_others_bit_unchanged(tiles):
    query, key, value, cotangent = tiles
    segments = [jnp.asarray(packed_rows(scale)) for scale in (1, 2)]

    @jax.jit
    def run(query, key, value, cotangent):
        out, pullback = jax.vjp(lambda *qkv: event_attention.attend_events(*qkv, *segments, EVENTS), query, key, value)
        return out, pullback(cotangent)

    inside = [(segment == 2)[:, None, :, None] for segment in segments]
    poisoned = [
        jnp.where(where, 1e3 * jnp.sin(37 * x), x)
        for x, where in ((query, inside[0]), (key, inside[1]), (value, inside[1]), (cotangent, inside[0]))
    ]
    (clean, gradients), (out, others) = run(*tiles), run(*poisoned)
    for ours, theirs, where in zip((clean, *gradients), (out, *others), (inside[0], *inside[:1], *inside[1:] * 2)):
        np.testing.assert_array_equal(jnp.where(where, 0, ours), jnp.where(where, 0, theirs))
        assert float(jnp.abs(jnp.where(where, ours - theirs, 0)).max()) > 1


def test_many_events_on_one_cpu_take_the_tiles(tiles, monkeypatch):
    query, key, value, _ = tiles
    segments = dict(zip(("q_segments", "kv_segments"), (jnp.asarray(packed_rows(scale)) for scale in (1, 2))))
    taken = []
    monkeypatch.setattr(event_attention, "attend_events", lambda *args: taken.append(args[-1]))
    attend(query, key, value, num_segments=EVENTS, **segments)
    assert taken == [EVENTS]
    attend(query, key, value, num_segments=2, **segments)
    short = {name: array[:, :60] for name, array in segments.items()}
    attend(query[:, :, :60], key[:, :, :60], value[:, :, :60], num_segments=EVENTS, **short)
    assert taken == [EVENTS]


# ---------------------------------------------------------------- splash


def packed_segments(rng, rows, length, events, end):
    """`[rows, length]`: contiguous events 1..events, padding from `end` on."""
    cuts = np.sort(rng.integers(1, end, (rows, events - 1)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    return np.where(np.arange(length) < end, segments, 0)


@pytest.mark.parametrize("queries, keys", [(300, 300), (150, 520)])
def test_splash_equals_dense_attention_forward_and_backward(queries, keys):
    """The kernel's program, interpreted; lengths that no block divides, padding, and events without any key."""
    rng = np.random.default_rng(queries)
    q_segments = packed_segments(rng, B, queries, 5, queries - 17)
    kv_segments = packed_segments(rng, B, keys, 5, keys - 40)
    kv_segments[0] = np.where(kv_segments[0] == 3, 0, kv_segments[0])  # event 3 of the first row has no key
    allowed = (q_segments[:, :, None] == kv_segments[:, None]) & (kv_segments != 0)[:, None]
    q_segments, kv_segments = jnp.asarray(q_segments), jnp.asarray(kv_segments)
    query, key, value, weight = (
        jnp.asarray(rng.normal(size=(B, H, length, 64)), jnp.float32) for length in (queries, keys, keys, queries)
    )

    def dense_loss(*qkv):
        return (weight * attend(*qkv, q_segments=q_segments, kv_segments=kv_segments)).sum()

    def splash_loss(*qkv):
        mixed = splash_attention.attend_splash(*qkv, q_segments, kv_segments, 5, interpret=True)
        return (weight * mixed).sum(), mixed

    (_, mixed), gradients = jax.value_and_grad(splash_loss, (0, 1, 2), has_aux=True)(query, key, value)
    expected = attend(query, key, value, q_segments=q_segments, kv_segments=kv_segments)
    np.testing.assert_allclose(mixed, expected, atol=3e-6)
    assert (by_token(mixed)[~allowed.any(-1)] == 0).all() and (~allowed.any(-1)).sum() > 2 * 17
    for ours, theirs in zip(gradients, jax.grad(dense_loss, (0, 1, 2))(query, key, value)):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_triton_equals_dense_attention_forward_and_backward():
    """The GPU kernel's program, interpreted; a length that no block divides, padding in between and at the end."""
    rng, length = np.random.default_rng(3), 300
    segments = packed_segments(rng, B, length, 5, length - 17)
    segments[0] = np.where(segments[0] == 3, 0, segments[0])
    segments = jnp.asarray(segments)
    query, key, value, weight = (jnp.asarray(rng.normal(size=(B, H, length, 64)), jnp.float32) for _ in range(4))

    def dense_loss(*qkv):
        return (weight * attend(*qkv, q_segments=segments, kv_segments=segments)).sum()

    def triton_loss(*qkv):
        mixed = triton_attention.attend_triton(*qkv, segments, interpret=True)
        return (weight * mixed).sum(), mixed

    (_, mixed), gradients = jax.value_and_grad(triton_loss, (0, 1, 2), has_aux=True)(query, key, value)
    expected = attend(query, key, value, q_segments=segments, kv_segments=segments)
    np.testing.assert_allclose(mixed, expected, atol=3e-6)
    assert (by_token(mixed)[np.asarray(segments) == 0] == 0).all()
    for ours, theirs in zip(gradients, jax.grad(dense_loss, (0, 1, 2))(query, key, value)):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("platform, is_self, length, taken", [
    ("gpu", True, 600, True), ("gpu", False, 600, False), ("gpu", True, 300, False), ("cpu", True, 600, False)
])  # fmt: skip
def test_long_self_attention_on_gpu_takes_the_kernel(monkeypatch, platform, is_self, length, taken):
    monkeypatch.setattr(attention, "target", lambda: (platform, 2))
    seen = []
    monkeypatch.setattr(triton_attention, "attend_triton", lambda q, *_: seen.append(q.shape) or q)
    x, segments = jnp.ones((1, 2, length, 16)), jnp.ones((1, length), jnp.int32)
    attend(x, x, x, q_segments=segments, kv_segments=segments if is_self else segments + 0, num_segments=4)
    assert bool(seen) == taken


@pytest.mark.extended
def test_splash_on_a_mesh_equals_one_device():
    """Rows, heads and queries split over eight devices by shard_map."""
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from wallwm_jax.models.splash_attention import attend_splash
from wallwm_jax.parallel.mesh import make_mesh
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.normal(size=(4, 2, n, 32)), jnp.float32) for n in (256, 130, 130))
s, t = (jnp.asarray(rng.integers(0, 3, (4, n))) for n in (256, 130))
def run(*args): return attend_splash(*args, 2, interpret=True)
mesh = make_mesh(dict(slice=1, data=1, fsdp=2, context=2, tensor=2))
def on_mesh(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run(*args)
rows = jax.NamedSharding(mesh, jax.P(("slice", "data", "fsdp")))
split = jax.jit(on_mesh, in_shardings=rows)(q, k, v, s, t)
np.testing.assert_allclose(split, run(q, k, v, s, t), atol=1e-6)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("length, block", [(1, 128), (128, 128), (1428, 512), (4284, 512), (513, 128), (272, 384)])
def test_blocks_pad_little(length, block):
    assert splash_attention.block_size(length) == block
