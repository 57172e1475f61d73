"""The kernels of norms equal XLA's operations, values and all gradients."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_setup import subprocess_environment

from wallwm_jax.models import norms
from wallwm_jax.models.layers import modulate


@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "root mean square"])
@pytest.mark.parametrize(("tokens", "block"), [(42, 2**19), (42, 16 * 256), (64, 32 * 256)])
def test_a_norm_is_one_and_so_are_its_gradients(monkeypatch, tokens, block, centred):
    """All tokens of a group at once, blocks of them of which the last reaches beyond the end, and whole blocks."""
    monkeypatch.setattr(norms, "_BLOCK", block)
    draws = np.random.default_rng(tokens)
    x, of_normed, of_x = (jnp.asarray(draws.normal(1, 2, (2, 3, tokens, 256)), jnp.float32) for _ in range(3))
    shift, scale = (jnp.asarray(draws.normal(size=(2, 3, 1, 256)), jnp.float32) for _ in range(2))

    def values_and_gradients(norm):
        results, gradients = jax.vjp(norm, x, shift, scale)
        return *results, *gradients((of_normed, of_x))

    def kernel(*arrays):
        return norms.normalise(norms._Plan(centred, beside=True, interpret=True), *arrays)

    def plain(x, shift, scale):
        if centred:
            return modulate(x, shift, scale), x
        return norms.rms_scaled(x, jnp.ones(256), x.dtype, norms.VIEWS) * (1.0 + scale) + shift, x

    for one, other in zip(values_and_gradients(kernel), values_and_gradients(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.max(jnp.abs(other))))


def test_what_goes_on_beside_a_norm_can_be_left_out():
    x, shift, scale = jnp.ones((1, 1, 16, 128)), jnp.zeros((1, 1, 1, 128)), jnp.zeros((1, 1, 1, 128))
    alone = norms._Plan(centred=False, beside=False, interpret=True)
    gradient = jax.grad(lambda x: jnp.sum(norms.normalise(alone, x, shift, scale)))(x)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)  # a length does not change what is normalised


_ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from wallwm_jax.models import norms
from wallwm_jax.parallel.mesh import make_mesh
mesh, draws = make_mesh(dict(slice=1, data=1, fsdp=2, context=2, tensor=2)), np.random.default_rng(0)
for frames in (3, 4):  # the context axis splits cells, or frames
    arrays = [jnp.asarray(draws.normal(1, 2, (2, frames, size, 128)), jnp.float32) for size in (32, 1, 1, 32, 32)]
    def run(*arrays):
        norm = lambda *inputs: norms.normalise(norms._Plan(True, True, interpret=True), *inputs)
        results, gradients = jax.vjp(norm, *arrays[:3])
        return *results, *gradients(arrays[3:])
    def on_mesh(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*arrays)
    where = jax.NamedSharding(mesh, jax.P("fsdp"))
    for one, other in zip(jax.jit(on_mesh, in_shardings=where)(*arrays), jax.jit(run)(*arrays)):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.max(jnp.abs(other))))
"""


@pytest.mark.extended
def test_on_a_mesh_sums_over_cells_are_those_of_all_devices():
    command = [sys.executable, "-c", _ON_A_MESH]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
