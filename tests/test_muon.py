"""Muon: its numerics and what it claims; on meshes, see muon_on_meshes.py."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as optax_scale_by_muon

from wallwm_jax.optim.muon import ADAMW, MatrixSpec, muon, scale_by_muon
from wallwm_jax.optim.muon_cost import muon_cost_report
from wallwm_jax.optim.newton_schulz import COEFFICIENTS, flops, orthogonalize

SPEC = MatrixSpec(1, 2)


def random(shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_spectrum(singular, m, n, seed=0):
    """A matrix `[m, n]` with the given singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (m, n))
    return jnp.asarray(left[:, : len(singular)] * singular @ right[: len(singular)], jnp.float32)


SPECTRA = {
    "gaussian": np.linspace(0.2, 1.8, 48),
    "three decades": np.logspace(0, -3, 48),
    "five decades": np.logspace(0, -5, 48),
    "half rank": np.concatenate([np.ones(24), np.zeros(24)]),
    "two spikes": np.concatenate([[1.0, 1.0], np.full(46, 1e-6)]),
    "huge": 1e12 * np.linspace(0.5, 1.0, 48),
    "tiny": 1e-4 * np.linspace(0.5, 1.0, 48),
}


# The iteration


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_singular_values_end_near_one_and_hardly_ever_a_fifth_above(spectrum, name, dtype):
    """Directions of a matrix's larger singular values come out with about one, whatever its scale; none blows up."""
    singular = SPECTRA[spectrum]
    x = with_spectrum(singular, 48, 96)
    factor = np.asarray(orthogonalize(x, COEFFICIENTS[name], dtype=dtype), np.float32)
    highest = np.linalg.svd(factor, compute_uv=False).max()
    assert highest <= (1.205 if name == "jordan" else 1.2)  # that polynomial's own overshoot is 1.202
    left, values, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    large = values > 2e-2 * np.linalg.norm(values)
    along = np.einsum("ik,ij,kj->k", left, factor, right)[large]  # u^T X v: one for the polar factor
    assert along.min() > 0.65 and along.max() < 1.22


def test_polar_express_is_the_polar_factor_of_a_well_conditioned_matrix():
    x = with_spectrum(np.linspace(0.5, 1.0, 48), 48, 96)
    left, _, right = np.linalg.svd(np.asarray(x), full_matrices=False)
    factor = orthogonalize(x, COEFFICIENTS["polar_express"], dtype=jnp.float32)
    assert np.linalg.norm(factor - left @ right) < 0.12 * np.linalg.norm(left @ right)
    twice = orthogonalize(factor, ((1.875, -1.25, 0.375),) * 12, dtype=jnp.float32)  # a convergent polynomial
    np.testing.assert_allclose(twice, left @ right, atol=2e-5)


def test_a_tall_matrix_is_the_transposed_wide_one_and_stacks_do_not_mix():
    x = random((3, 16, 40)) * jnp.asarray([1e-3, 1.0, 1e3])[:, None, None]
    wide = orthogonalize(x, COEFFICIENTS["you"], dtype=jnp.float32)
    tall = orthogonalize(jnp.swapaxes(x, 1, 2), COEFFICIENTS["you"], dtype=jnp.float32)
    np.testing.assert_allclose(jnp.swapaxes(tall, 1, 2), wide, atol=1e-6)
    alone = [orthogonalize(one, COEFFICIENTS["you"], dtype=jnp.float32) for one in x]
    np.testing.assert_allclose(wide, jnp.stack(alone), atol=1e-5)


def test_zero_stays_zero_and_a_nan_stays_in_its_matrix():
    grads = {"a": random((3, 8, 12)).at[0].set(0.0).at[1, 2, 3].set(jnp.nan), "b": random((2, 12, 8))}
    rule = scale_by_muon({"a": SPEC, "b": SPEC}, dtype=jnp.float32)
    update, state = rule.update(grads, rule.init(grads))
    np.testing.assert_array_equal(update["a"][0], 0.0)
    assert np.isnan(update["a"][1]).all()
    assert np.isfinite(update["a"][2]).all() and np.isfinite(update["b"]).all()
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [leaf.dtype for leaf in jax.tree.leaves(rule.init(grads))]


def test_flops_are_those_of_the_products():
    x = jnp.zeros((6, 10))
    lowered = jax.jit(lambda x: orthogonalize(x, COEFFICIENTS["jordan"][:1], dtype=jnp.float32)).lower(x)
    counted = lowered.cost_analysis()["flops"]
    assert flops((10, 6), 1) == 4 * 36 * 10 + 2 * 216
    assert flops((10, 6), 1) <= counted <= flops((10, 6), 1) + 800  # beside them some element-wise ones


def test_the_plan_counts_what_is_alive_at_once():
    """Of one matrix, iterated in place: itself and a Gram matrix; the next iterate takes the gradient's memory."""
    shapes = {"w": jax.ShapeDtypeStruct((1, 256, 512), jnp.float32)}
    assert muon_cost_report({"w": SPEC}, shapes).peak_bytes_per_chip == 2 * (256 * 512 + 256 * 256)
    stack = {"w": jax.ShapeDtypeStruct((3, 250, 512), jnp.float32)}  # rows padded to 256; copied to be replaced
    cost = muon_cost_report({"w": SPEC}, stack)
    assert cost.peak_bytes_per_chip == 2 * (3 * 256 * 512 + 2 * 256 * 512 + 256 * 256)


# The rule


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_optax_muon_in_compatible_mode(nesterov):
    shapes = {"stack": (3, 16, 24), "tall": (2, 24, 8), "one": (1, 8, 8)}
    specs = {name: SPEC for name in shapes}
    ours = scale_by_muon(
        specs,
        coefficients="jordan",
        dtype=jnp.float32,
        eps=1e-8,
        update_scale="none",
        nesterov=nesterov,
        optax_compat=True,
    )
    theirs = optax_scale_by_muon(
        nesterov=nesterov, weight_dimension_numbers={name: MuonDimensionNumbers(1, 2) for name in shapes}
    )
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    our_state, their_state = ours.init(params), theirs.init(params)
    for step in range(4):
        grads = {name: random(shape, seed=10 * step + i) for i, (name, shape) in enumerate(shapes.items())}
        our_update, our_state = ours.update(grads, our_state)
        their_update, their_state = theirs.update(grads, their_state)
        for name in shapes:
            np.testing.assert_allclose(our_update[name], their_update[name], atol=1e-5)


def test_nesterov_momentum_is_that_of_the_formula():
    rule = scale_by_muon({"w": SPEC}, momentum=0.9, dtype=jnp.float32, update_scale="none")
    state, buffer = rule.init({"w": jnp.zeros((1, 6, 8))}), 0.0
    for step in range(3):
        grad = random((1, 6, 8), seed=step)
        update, state = rule.update({"w": grad}, state)
        buffer = 0.9 * buffer + grad
        expected = orthogonalize(grad + 0.9 * buffer, COEFFICIENTS["polar_express"], dtype=jnp.float32)
        np.testing.assert_allclose(update["w"], expected, atol=1e-6)
        np.testing.assert_allclose(state.momentum["w"], buffer, atol=1e-6)


@pytest.mark.parametrize(
    "scale, factor",
    [("rms", 0.2 * 24**0.5), ("jordan", 1.5**0.5), ("spectral", 1.5**0.5), ("none", 1.0)],
)
def test_update_scales(scale, factor):
    grads = {"w": random((2, 16, 24))}
    plain, scaled = (
        scale_by_muon({"w": SPEC}, dtype=jnp.float32, update_scale=kind).update(
            grads, scale_by_muon({"w": SPEC}).init(grads)
        )[0]["w"]
        for kind in ("none", scale)
    )
    np.testing.assert_allclose(scaled, factor * plain, rtol=1e-6)
    if scale == "rms":
        assert np.sqrt(np.mean(np.square(scaled))) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("split", [(8, 8, 8), (4, 20)])
def test_a_fused_kernel_with_a_split_is_its_parts(split):
    fused = random((2, 12, 24))
    cuts = np.cumsum(split)[:-1]
    parts = dict(enumerate(jnp.split(fused, cuts, 2)))
    options = dict(dtype=jnp.float32, neuron_decay=0.9)
    rule = scale_by_muon({"w": MatrixSpec(1, 2, split)}, **{**options, "neuron_decay": None})
    apart = scale_by_muon({i: SPEC for i in parts}, **{**options, "neuron_decay": None})
    together, _ = rule.update({"w": fused}, rule.init({"w": fused}))
    separate, _ = apart.update(parts, apart.init(parts))
    np.testing.assert_allclose(jnp.split(together["w"], cuts, 2)[0], separate[0], atol=1e-5)
    np.testing.assert_allclose(together["w"], jnp.concatenate(list(separate.values()), 2), atol=1e-5)


def test_a_stack_is_its_layers_and_other_axes_may_be_the_matrix():
    stack = random((3, 2, 12, 8))
    rule = scale_by_muon({"w": MatrixSpec(3, 2)}, dtype=jnp.float32)
    update, _ = rule.update({"w": stack}, rule.init({"w": stack}))
    for i in range(3):
        for j in range(2):
            one = {"w": stack[i, j].T}
            alone = scale_by_muon({"w": MatrixSpec(0, 1)}, dtype=jnp.float32)
            expected, _ = alone.update(one, alone.init(one))
            np.testing.assert_allclose(update["w"][i, j].T, expected["w"], atol=1e-6)


def test_normuon_evens_rows_out_and_keeps_the_norm():
    grads = {"w": random((2, 16, 8)) * jnp.linspace(0.01, 3.0, 8)}
    plain = scale_by_muon({"w": SPEC}, dtype=jnp.float32)
    even = scale_by_muon({"w": SPEC}, dtype=jnp.float32, neuron_decay=0.95)
    before, _ = plain.update(grads, plain.init(grads))
    after, state = even.update(grads, even.init(grads))
    rows = np.linalg.norm(after["w"], axis=1)
    np.testing.assert_allclose(rows, np.broadcast_to(rows.mean(1, keepdims=True), rows.shape), rtol=1e-3)
    np.testing.assert_allclose(
        np.linalg.norm(after["w"], axis=(1, 2)), np.linalg.norm(before["w"], axis=(1, 2)), rtol=1e-4
    )
    assert state.mean_square["w"].shape == (2, 1, 8)


def test_cautious_decay_spares_what_the_update_makes_larger():
    params = {"w": jnp.asarray([[[1.0, -1.0], [-1.0, 1.0]]])}
    grads = {"w": jnp.asarray([[[1.0, 0.0], [0.0, 1.0]]])}  # the update lowers the diagonal towards zero
    rule = muon(1.0, {"w": SPEC}, weight_decay=0.5, cautious=True, dtype=jnp.float32)
    bare = muon(1.0, {"w": SPEC}, dtype=jnp.float32)
    decayed = rule.update(grads, rule.init(params), params)[0]["w"]
    undecayed = bare.update(grads, bare.init(params), params)[0]["w"]
    np.testing.assert_allclose(decayed - undecayed, [[[-0.5, 0.0], [0.0, -0.5]]], atol=1e-6)


# What it claims


def test_every_matrix_needs_a_claim():
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4), "table": jnp.zeros((5, 4))}
    specs = {"w": MatrixSpec(0, 1), "b": None, "table": None}
    with pytest.raises(ValueError, match=r"'table' of shape \(5, 4\) needs a MatrixSpec, or 'adamw'"):
        muon(1e-3, specs).init(params)
    muon(1e-3, {**specs, "table": ADAMW}).init(params)


@pytest.mark.parametrize(
    "spec, message",
    [
        (MatrixSpec(1, 1), "has no matrix axes 1 and 1"),
        (MatrixSpec(1, 3), "has no matrix axes 1 and 3"),
        (MatrixSpec(1, 2, (3, 4)), r"the split \(3, 4\) of 'w' must add up to its 8 outputs"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_error(spec, message):
    params = {"w": jnp.zeros((2, 4, 8))}
    rule = scale_by_muon({"w": spec})
    with pytest.raises(ValueError, match=message):
        rule.update(params, rule.init(params))


def test_a_parameter_of_adamw_must_be_masked_out():
    params = {"w": jnp.zeros((4, 4))}
    rule = scale_by_muon({"w": ADAMW})
    with pytest.raises(ValueError, match="met 'w', which has no MatrixSpec"):
        rule.update(params, rule.init(params))


@pytest.mark.parametrize("options", [dict(coefficients="fast"), dict(update_scale="big")])
def test_unknown_names_are_errors(options):
    with pytest.raises(ValueError, match="one of"):
        scale_by_muon({}, **options)


# On a mesh


@pytest.mark.extended
def test_on_eight_devices():
    """Runs muon_on_meshes.py in a process of its own, since the number of devices is fixed when JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "muon_on_meshes.py"]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
