"""From the action loss to the VLM: the gradient goes through both towers, the latents, the branch and the backbone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_batch import random_batch, tiny_config
from tiny_model import random_like, random_params

from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.vlm import language_model, staircase
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.staircase import StaircaseConfig

CONFIG = tiny_config(rows=1, latents_per_row=6, actions_per_row=40, events_per_row=2)
LANGUAGE = LanguageConfig.tiny(
    width=32, ffn=48, depth=4, heads=2, kv_heads=1, head_dim=16, rotary_dim=8, mrope_section=(2, 1, 1),
    linear_key_heads=1, linear_value_heads=2, linear_key_dim=16, linear_value_dim=16,
)  # fmt: skip
LAST = "blocks/full"  # the only layer of its kind here, and the last: latents read its keys and values, nothing behind
ONLY_FOR_WORDS = {
    "norm/scale",
    f"{LAST}/ffn_norm/scale",
    *(f"{LAST}/ffn/{name}/kernel" for name in ("up", "gate", "down")),
    f"{LAST}/attention/query/kernel",
    f"{LAST}/attention/query_norm/scale",
    f"{LAST}/attention/output/kernel",
}
STAIRS = StaircaseConfig((0, 1, 2, 3), out_width=CONFIG.model.text.width, prefix_width=16)


def action_loss(branch, backbone, towers, batch, ids, noise):
    """The flow-matching error of an event's actions, whose video tower is told what to do by latents alone."""
    _, cache = language_model.prefill(backbone, LANGUAGE, ids, slots=ids.shape[1] + len(STAIRS.entry_depths))
    latents = staircase.decode(branch, STAIRS, LANGUAGE, cache)
    features = staircase.project(branch, STAIRS, LANGUAGE, latents)[:, None]
    events = batch["view_id"].shape[1]
    text = wam.TextContext(jnp.repeat(features, events, 1), jnp.full((1, events), features.shape[2], jnp.int32))
    sigma = jnp.full((1, events), 0.357)
    _, context = wam.video_context(towers, CONFIG.model, batch, batch["latents"], sigma, text)
    velocity = wam.action_velocity(towers, CONFIG.model, batch, context, noise, jnp.full((1, 1, events), 0.5))
    error = jnp.square(velocity - (noise - batch["actions"])) * batch["action_valid"]
    return jnp.sum(error) / jnp.sum(batch["action_valid"])


@pytest.mark.extended
def test_the_gradient_from_action_to_vlm_is_unbroken():
    """Finite, not zero for every parameter of branch and backbone that latents depend on, the finite difference along a
    random direction, and exactly zero for what is frozen."""
    towers, backbone = random_params(CONFIG.model, seed=1), random_like(language_model.abstract_params(LANGUAGE), 2)
    branch = random_like(jax.eval_shape(lambda: staircase.init(STAIRS, LANGUAGE, backbone, jax.random.key(0))), seed=3)
    batch = {name: jnp.asarray(value) for name, value in random_batch(CONFIG, seed=4, views=2).items()}
    rng = np.random.default_rng(5)
    noise = jnp.asarray(rng.normal(size=(1, *batch["actions"].shape)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 256, (1, 6)))
    loss = jax.jit(functools.partial(action_loss, towers=towers, batch=batch, ids=ids, noise=noise))
    grads = jax.jit(jax.grad(lambda both: loss(*both)))((branch, backbone))
    frozen = jax.jit(jax.grad(lambda both: loss(both[0], jax.lax.stop_gradient(both[1]))))((branch, backbone))
    untouched = [set(), set()]
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.all(jnp.isfinite(grad))), path
        if not bool(jnp.any(grad)):
            untouched[path[0].idx].add(jax.tree_util.keystr(path[1:], simple=True, separator="/"))
    assert untouched[0] == {"border/prefix/kernel", "border/prefix/bias"}  # which the small model reads
    assert untouched[1] == ONLY_FOR_WORDS
    direction = random_like(jax.eval_shape(lambda: (branch, backbone)), seed=6, scale=1.0)
    moved = [
        loss(*optax.apply_updates((branch, backbone), optax.tree.scale(step, direction))) for step in (2e-3, -2e-3)
    ]
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
    assert float(moved[0] - moved[1]) / 4e-3 == pytest.approx(slope, rel=0.03)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(frozen[1]))
    for grad, other in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(frozen[0])):
        np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-7)
