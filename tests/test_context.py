"""Rows, weights, heads and sequences split over devices: the loss and gradients of one device."""

import json
import subprocess
import sys

import numpy as np
import pytest
from random_batch import tiny_config
from training_setup import subprocess_environment

from wallwm_jax.data.packing import batch_spec
from wallwm_jax.parallel.aot import statistics, topology_devices
from wallwm_jax.parallel.mesh import AXES, make_mesh
from wallwm_jax.training.train_step import build_train_step

_STEP = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from random_batch import random_batch, tiny_config
from tiny_model import random_params
from wallwm_jax.parallel.mesh import AXES, make_mesh
from wallwm_jax.training.objectives import compute_loss
from wallwm_jax.training.stages import get_stage
from wallwm_jax.training.train_step import build_train_step
import numpy as np
views, frames, stage, *meshes = json.loads(sys.argv[1])
config = tiny_config(latents_per_row=frames, rows=4, views=tuple("abc"[:views])).copy_and_resolve_references()
with config.unlocked():
    config.model.update(heads=4, action_heads=4, action_width=32)
    config.train.stage = stage
batch, found = random_batch(config, views=views), []
for sizes in meshes:
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **sizes}, jax.devices()[: int(np.prod(list(sizes.values())))])
    built = build_train_step(config, mesh)
    params, _ = built.stage.split(random_params(config.model))
    state = built.abstract_state
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, state.trainable))
    def loss(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return compute_loss(params, frozen={}, config=config, stage=built.stage, batch=batch,
                key=jax.random.key(3), channel_weight=np.ones(config.model.latent_channels, np.float32))[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(params, jax.device_put(batch, built.rows))
    found.append({"loss": float(value), "grads": {jax.tree_util.keystr(path): np.asarray(leaf).tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}})
print(json.dumps(found))
"""


@pytest.mark.extended
@pytest.mark.parametrize(
    ("views", "frames", "stage", "mesh"),
    [
        pytest.param(3, 12, "video", dict(context=2, tensor=2), id="frames of three views"),
        pytest.param(1, 11, "video", dict(context=4), id="cells where the frames do not divide"),
        pytest.param(3, 12, "joint", dict(fsdp=2, context=2, tensor=2), id="both towers, all inner axes"),
        pytest.param(3, 12, "action", dict(data=2, fsdp=2, tensor=2), id="action tower, all but context"),
    ],
)
def test_a_sequence_split_over_devices_gives_the_loss_and_gradients_of_one(views, frames, stage, mesh):
    command = [sys.executable, "-c", _STEP, json.dumps([views, frames, stage, dict(data=1), mesh])]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, split = json.loads(done.stdout.splitlines()[-1])
    assert split["loss"] == pytest.approx(one["loss"], rel=2e-6)
    scale = max(np.abs(grad).max() for grad in one["grads"].values())
    for path, grad in one["grads"].items():
        np.testing.assert_allclose(split["grads"][path], grad, atol=2e-6 * scale, err_msg=path)


_LINEAR = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from flax import nnx
from wallwm_jax.models.layers import Linear
from wallwm_jax.parallel.mesh import make_mesh
mesh, draws = make_mesh(dict(slice=1, data=2, fsdp=2, context=1, tensor=2)), np.random.default_rng(0)
for axes, heads, lead in [
    (("embed", "heads"), 2, (4, 3)), (("embed", "heads"), 3, (4, 3)), (("embed", "heads"), 2, ()),
    (("embed", "mlp"), 0, (4, 3)), (("mlp", "embed"), 0, (6, 3)), (("video", "split_heads"), 2, (4, 3)),
    (("embed", "heads"), 2, (3, 4)), (("mlp", "embed"), 0, (3, 4)),
]:
    linear = Linear(16, 12, rngs=nnx.Rngs(0), dtype=jnp.float32)
    linear.axes, linear.rows = axes, int(lead == (3, 4))
    graph, params = nnx.split(linear)
    x, probe = (jnp.asarray(draws.normal(size=(*lead, 5, size)), jnp.float32) for size in (16, 12))
    def loss(params, x):
        module = nnx.merge(graph, params)
        y = jnp.moveaxis(module.to_heads(x, heads), -3, -2).reshape(probe.shape) if heads else module(x)
        return jnp.sum(probe * jnp.tanh(y))
    def on_mesh(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(loss)(*arrays)
    whole = jax.NamedSharding(mesh, jax.P())
    found, wanted = jax.jit(on_mesh, in_shardings=whole)(params, x), jax.jit(jax.grad(loss))(params, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, atol=1e-5)
"""


@pytest.mark.extended
def test_gradients_of_weights_are_those_of_one_device_however_a_mesh_divides_them():
    """Heads that `tensor` does and does not divide; no rows, rows that the mesh does not divide, rows after draws;
    outputs over all axes."""
    command = [sys.executable, "-c", _LINEAR]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.tpu
@pytest.mark.parametrize(("heads", "kind"), [(4, "all-to-all"), (2, "all-gather")])
def test_on_tpu_heads_are_exchanged_for_tokens_where_they_divide(heads, kind):
    """12 frames of 64 cells over four chips: only with too few heads does every chip gather all keys and values."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    config = tiny_config(latents_per_row=12, rows=1, views=("front",)).copy_and_resolve_references()
    with config.unlocked():
        config.model.update(
            latent_shape=(16, 16), heads=heads, width=128 * heads, compute_dtype="bfloat16", remat="full"
        )
        config.train.stage = "video"
        config.optim.name = "adamw"
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "context": 4}, topology_devices("v5p:2x2x1"))
    built = build_train_step(config, mesh)
    found = statistics(built.step.lower(built.abstract_state, built.abstract_batch(batch_spec(config, 1))).compile())
    assert {"flash_attention_fwd", "flash_attention_dkv"} <= set(found.kernels)
    tokens, layers = 12 * 64, config.model.depth
    stream = 2 * tokens * config.model.width * 3 / 4  # bytes of one bfloat16 stream that a chip does not have
    moved = {name: found.received.get(name, 0.0) / (layers * stream) for name in ("all-to-all", "all-gather")}
    # Forward twice and backward: 3 x (query, key, value and output), of which a chip receives a quarter each.
    assert moved["all-to-all"] == pytest.approx(3.0 if kind == "all-to-all" else 0.0, rel=0.4, abs=0.1)
