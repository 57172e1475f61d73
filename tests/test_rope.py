"""Rotary embeddings: the head split, relative positions, and agreement with complex rotation of pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models import rope


@pytest.mark.parametrize("head_dim, split", [(128, (44, 42, 42)), (32, (12, 10, 10)), (16, (8, 4, 4)), (6, (2, 2, 2))])
def test_the_head_is_split_as_wan_does(head_dim, split):
    assert rope.axis_dims(head_dim) == split
    assert sum(split) == head_dim


@pytest.mark.parametrize("head_dim", [5, 4])
def test_an_impossible_head_is_refused(head_dim):
    with pytest.raises(ValueError, match="even number, at least 6"):
        rope.axis_dims(head_dim)


def test_rotation_is_complex_multiplication_of_the_pairs():
    rng = np.random.default_rng(0)
    x, angles = rng.normal(size=(3, 2, 5, 8)), rng.normal(size=(3, 5, 4))
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag], -1)
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), jnp.asarray(angles)), expected, atol=1e-6)


def test_products_depend_on_the_distance_of_signed_positions_only():
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(2, 1, 1, 16)).astype(np.float32)

    def product(i, j):
        rotated = [rope.rotate(x, rope.position_angles(jnp.asarray([p]), 16)) for x, p in ((query, i), (key, j))]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert product(-3, 2) == pytest.approx(product(4, 9), abs=1e-5)
    assert abs(product(0, 0) - product(0, 5)) > 1e-2


def test_grid_angles_hold_frame_row_and_column():
    head_dim, rows, columns = 16, 2, 3
    frame = rope.position_angles(jnp.asarray([7, -2]), 8)
    angles = rope.grid_angles(frame, rows, columns, head_dim)
    assert angles.shape == (2, rows * columns, head_dim // 2)
    slow = rope.frequencies(4)
    for f, position in enumerate((7, -2)):
        for cell in range(rows * columns):
            expected = np.concatenate(
                [position * rope.frequencies(8), (cell // columns) * slow, (cell % columns) * slow]
            )
            np.testing.assert_allclose(angles[f, cell], expected, atol=1e-6)
