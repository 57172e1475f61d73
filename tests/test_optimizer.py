"""The optimizer: who gets Muon, how large its updates are, schedule, clip and decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_batch import tiny_config

from wallwm_jax.console import UserError
from wallwm_jax.models import param_axes, world_action_model
from wallwm_jax.optim.muon import ADAMW, MatrixSpec, MuonState
from wallwm_jax.optim.optimizer import build_optimizer, learning_rate, muon_specs
from wallwm_jax.optim.ownership import matrix_paths
from wallwm_jax.training.train_state import flatten

CONFIG = tiny_config()


@pytest.fixture(autouse=True)
def _quick():
    yield


def optim(**changes):
    config = CONFIG.optim.copy_and_resolve_references()
    with config.unlocked():
        config.update({"warmup_steps": 0, "weight_decay": 0.0, "final_lr_fraction": 1.0, "clip_norm": 1e9, **changes})
    return config


def first_update(config, matrices, decay, params, grads, steps=10):
    optimizer = build_optimizer(config, steps, matrices, decay)
    return optimizer.update(grads, optimizer.init(params), params)[0]


# Who gets Muon


def test_muon_takes_the_matrices_of_the_blocks():
    """At least 90 % of the blocks' parameters, scanned stacks included; nothing outside the blocks."""
    params = world_action_model.abstract_params(CONFIG.model)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(params).items()}
    blocks = [path for path in sizes if "/blocks/" in path]
    muon = list(matrix_paths(muon_specs(optim(), param_axes.muon_matrices(params)), params))
    assert set(muon) < set(blocks)
    assert sum(sizes[path] for path in muon) >= 0.9 * sum(sizes[path] for path in blocks)
    assert "video/patch_embedding/kernel" not in muon


def test_muon_keeps_one_momentum_per_matrix_stack_and_adam_none_of_them():
    params = world_action_model.abstract_params(CONFIG.model)
    matrices = param_axes.muon_matrices(params)
    optimizer = build_optimizer(optim(), 10, matrices, param_axes.decay_mask(params))
    state = jax.eval_shape(optimizer.init, params)
    muon = [node for node in jax.tree.leaves(state, is_leaf=is_muon_state) if is_muon_state(node)]
    assert len(muon) == 1
    shapes = flatten(params)
    momentum = flatten(muon[0].momentum)
    assert {path: leaf.shape for path, leaf in momentum.items()} == {
        path: shapes[path].shape for path in matrix_paths(matrices, params)
    }
    assert momentum["video/blocks/ffn/up/kernel"].shape == (2, 32, 64)  # [L, in, out]
    arrays = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
    muon_size = sum(int(np.prod(leaf.shape)) for leaf in momentum.values())
    adam_size = sum(int(np.prod(leaf.shape)) for path, leaf in shapes.items() if path not in momentum)
    assert abs(arrays - (muon_size + 2 * adam_size)) < 30  # one moment, two moments, a few counters


def test_adamw_alone_takes_everything():
    params = world_action_model.abstract_params(CONFIG.model)
    assert matrix_paths(muon_specs(optim(name="adamw"), param_axes.muon_matrices(params)), params) == {}


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(UserError, match=r"optim.name='lion'"):
        build_optimizer(optim(name="lion"), 10, {"a": ADAMW}, {"a": False})


# The updates


@pytest.mark.parametrize("shape", [(3, 32, 128), (3, 128, 32)])
def test_muon_updates_are_orthogonal_matrices_of_rms_one_fifth(shape):
    """0.2 * sqrt(max(m, n)) times a nearly orthogonal matrix, for each layer of a stack on its own."""
    grads = jax.random.normal(jax.random.key(0), shape) * jnp.asarray([1e-3, 1.0, 1e3])[:, None, None]
    params = {"w": jnp.zeros(shape)}
    update = first_update(optim(muon_lr=1.0), {"w": MatrixSpec(1, 2)}, {"w": False}, params, {"w": grads})["w"]
    for layer in range(shape[0]):  # the scale of a layer's gradient does not matter, so layers do not mix
        singular = np.linalg.svd(np.asarray(update[layer]), compute_uv=False) / (0.2 * np.sqrt(max(shape[1:])))
        assert singular.min() > 0.6 and singular.max() < 1.3
        assert np.sqrt(np.mean(np.asarray(update[layer]) ** 2)) == pytest.approx(0.2, rel=0.2)
        assert np.vdot(update[layer], grads[layer]) < 0  # downhill


def test_the_first_adamw_update_is_the_learning_rate():
    params = {"b": jnp.zeros(5)}
    grads = {"b": jnp.asarray([1e-4, -1e-2, 1.0, -1e2, 1e4])}
    update = first_update(optim(lr=0.3), {"b": None}, {"b": False}, params, grads)["b"]
    np.testing.assert_allclose(update, [-0.3, 0.3, -0.3, 0.3, -0.3], rtol=1e-3)


def test_decay_is_decoupled_masked_and_scaled_by_the_groups_rate():
    params = {name: jnp.full((1, 4, 4), 2.0) for name in ("matrix", "table", "vector")}
    matrices = {"matrix": MatrixSpec(1, 2), "table": ADAMW, "vector": ADAMW}
    decay = {"matrix": True, "table": True, "vector": False}
    config = optim(muon_lr=0.5, lr=0.1, weight_decay=0.01)
    zero = jax.tree.map(jnp.zeros_like, params)
    update = first_update(config, matrices, decay, params, zero)
    np.testing.assert_allclose(update["matrix"], -0.5 * 0.01 * 2.0, rtol=1e-4)
    np.testing.assert_allclose(update["table"], -0.1 * 0.01 * 2.0, rtol=1e-4)
    np.testing.assert_array_equal(update["vector"], 0.0)


def test_the_clip_comes_before_momentum_and_sees_all_parameters():
    """Norm 5 clipped to 1 divides every gradient by 5, that of both groups; AdamW's first moment shows it."""
    params = {"matrix": jnp.zeros((1, 2, 2)), "vector": jnp.zeros(1)}
    grads = {"matrix": jnp.zeros((1, 2, 2)).at[0, 0, 0].set(3.0), "vector": jnp.asarray([4.0])}
    config = optim(clip_norm=1.0)
    optimizer = build_optimizer(
        config, 10, {"matrix": MatrixSpec(1, 2), "vector": None}, {"matrix": False, "vector": False}
    )
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = {path.split("/")[-2] + path.split("/")[-1]: leaf for path, leaf in flatten({"s": state}).items()}
    np.testing.assert_allclose(moments["muvector"], (1 - config.b1) * 4.0 / 5.0, rtol=1e-5)
    np.testing.assert_allclose(moments["momentummatrix"][0, 0, 0], 3.0 / 5.0, rtol=1e-5)


# The schedule


def test_warmup_is_linear_and_the_cosine_ends_at_the_last_step():
    rate = learning_rate(2.0, optim(warmup_steps=4, final_lr_fraction=0.1), 24)
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(23), 0.2, rtol=1e-5)
    middle = 4 + 19 / 2  # half of the cosine: the mean of peak and end
    np.testing.assert_allclose(rate(middle), 1.1, rtol=1e-5)


def test_a_run_shorter_than_its_warmup_is_an_error():
    with pytest.raises(UserError, match=r"optim.warmup_steps=50 must be below train.steps=20; .*warmup_steps=2"):
        learning_rate(1.0, optim(warmup_steps=50), 20)


def test_an_update_chain_leaves_no_gradient_unapplied():
    """Muon on a quadratic with an AdamW bias: both parts come down."""
    target = jax.random.normal(jax.random.key(1), (2, 8, 8))
    params = {"w": jnp.zeros((2, 8, 8)), "b": jnp.zeros(8)}
    config = optim(lr=0.05, muon_lr=0.2, final_lr_fraction=0.0)
    optimizer = build_optimizer(config, 200, {"w": MatrixSpec(1, 2), "b": None}, {"w": False, "b": False})

    def loss(params):
        return jnp.sum((params["w"] - target) ** 2) + jnp.sum((params["b"] - 1.0) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 200))((params, optimizer.init(params)))
    np.testing.assert_allclose(params["w"], target, atol=0.02)
    np.testing.assert_allclose(params["b"], 1.0, atol=0.02)


def is_muon_state(node):
    return isinstance(node, MuonState)
