"""Layer stacks: scan and remat compute what a plain loop over the blocks computes, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wallwm_jax.models import layer_stack
from wallwm_jax.models.layers import FeedForward

DEPTH, WIDTH = 3, 8


@pytest.fixture(scope="module")
def blocks():
    make = lambda rngs: FeedForward(WIDTH, 16, rngs=rngs, dtype=jnp.float32)  # noqa: E731
    return nnx.split(layer_stack.build(make, DEPTH, nnx.Rngs(0)))


def test_parameters_are_stacked_and_each_layer_has_its_own(blocks):
    kernel = blocks[1]["up"]["kernel"][...]
    assert kernel.shape == (DEPTH, WIDTH, 16)
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1


@pytest.mark.parametrize("policy", layer_stack.REMAT)
def test_gradients_equal_the_unrolled_stack(blocks, policy):
    graph, state = blocks
    x = jax.random.normal(jax.random.key(1), (5, WIDTH))
    shifts = jnp.arange(DEPTH, dtype=jnp.float32)

    def scanned(state):
        def step(x, layer, shift):
            out = layer_stack.remat(lambda x: x + layer[0](x) + shift, policy)(x)
            return out, out.sum()

        out, sums = layer_stack.run(step, x, (nnx.merge(graph, state),), shifts)
        return jnp.sum(out**2) + jnp.sum(sums)

    def unrolled(state):
        out, total = x, 0.0
        for i in range(DEPTH):
            out = out + nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(out) + shifts[i]
            total += out.sum()
        return jnp.sum(out**2) + total

    (value, gradient), (expected, reference) = (jax.value_and_grad(f)(state) for f in (scanned, unrolled))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()))


def test_groups_hold_the_blocks_of_a_stack_in_order(blocks):
    stack = nnx.merge(*blocks)
    kernel = blocks[1]["up"]["kernel"][...]
    np.testing.assert_array_equal(layer_stack.group(stack, 1, 2, 1).up.kernel[...], kernel[1:, None])
    np.testing.assert_array_equal(layer_stack.group(stack, 0, 1, 3).up.kernel[...], kernel[None])
    assert layer_stack.group(stack, 2, 1, 0).up.kernel.shape == (1, 0, WIDTH, 16)


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="'some': one of none, products, most, selective, attention, full"):
        layer_stack.remat(lambda x: x, "some")
