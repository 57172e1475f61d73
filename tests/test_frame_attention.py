"""The kernel of attention inside frames: equal to dense attention, forward and backward, masks and biases included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models import frame_attention
from wallwm_jax.models.attention import attend
from wallwm_jax.models.frame_attention import Rotary, attend_frames
from wallwm_jax.models.rope import rotate

ROWS, FRAMES, HEADS, WIDTH = 1, 2, 4, 128


def _dense(query, key, value, bias, angles):
    """The same in the operations of `attend` and `rotate`."""

    def heads(x):
        return jnp.swapaxes(x.reshape(-1, x.shape[2], HEADS, WIDTH), 1, 2)

    query, key, value = map(heads, (query, key, value))
    if angles is not None:
        angles = angles.reshape(-1, *angles.shape[2:])
        query, key = rotate(query, angles), rotate(key, angles)
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[2], bias.shape[3])).reshape(
        -1, query.shape[2], bias.shape[3]
    )
    mixed = attend(query, key, value, key_bias=jnp.max(bias, 1), mask=bias > -jnp.inf)
    return jnp.swapaxes(mixed, 1, 2).reshape(ROWS, FRAMES, query.shape[2], -1)


@pytest.mark.parametrize(("queries", "keys", "masked"), [(126, 126, True), (126, 97, False), (530, 65, False)])
def test_it_is_dense_attention(queries, keys, masked):
    """`masked` is attention across views: a mask, rotary embeddings; else to captions, of many queries in blocks."""
    draws = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draws.normal(size=(ROWS, FRAMES, *shape)), jnp.float32)

    query, key, value, probe = (normal(size, HEADS * WIDTH) for size in (queries, keys, keys, queries))
    bias = np.zeros((ROWS, FRAMES, queries if masked else 1, keys), np.float32)
    bias[..., : keys // 3] = -np.inf  # absent, or behind the caption's end
    bias[..., -1] = np.log(400.0)
    if masked:
        bias[draws.random(bias.shape) < 0.3] = -np.inf
        bias[:, 1, 5] = -np.inf  # a query without any key
    angles = normal(queries, WIDTH // 2) if masked else None

    def ours(query, key, value, angles):
        rotary = None if angles is None else Rotary.of(angles)
        return attend_frames(query, key, value, jnp.asarray(bias), rotary, heads=HEADS, interpret=True)

    def theirs(query, key, value, angles):
        return _dense(query, key, value, jnp.asarray(bias), angles)

    def values_and_gradients(attention):
        def loss(*arrays):
            mixed = attention(*arrays)
            return jnp.sum(mixed * probe), mixed

        arguments = (0, 1, 2, 3) if masked else (0, 1, 2)
        gradients, mixed = jax.jit(jax.grad(loss, arguments, has_aux=True))(query, key, value, angles)
        return mixed, *gradients

    for found, wanted in zip(values_and_gradients(ours), values_and_gradients(theirs), strict=True):
        assert jnp.max(jnp.abs(found - wanted)) < 2e-5 * jnp.max(jnp.abs(wanted))
    if masked:
        assert jnp.all(ours(query, key, value, angles)[:, 1, 5] == 0)


def test_which_frames_it_takes():
    assert frame_attention.worthwhile(126, 128)
    assert not frame_attention.worthwhile(126, 32)  # a head of less than the lanes
    assert not frame_attention.worthwhile(16, 128)
    assert not frame_attention.worthwhile(2048, 128)
