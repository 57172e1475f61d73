"""Staircase Decoding against a slow, per-position reference; its gradients; its cost against decoding in turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import random_like

from wallwm_jax.benchmarks import staircase as benchmark
from wallwm_jax.console import UserError
from wallwm_jax.models.vlm import language_model as lm
from wallwm_jax.models.vlm import staircase
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.staircase import StaircaseConfig

LANGUAGE = LanguageConfig.tiny(
    width=32, ffn=48, depth=8, heads=2, kv_heads=1, head_dim=16, rotary_dim=8, mrope_section=(2, 1, 1),
    linear_key_heads=1, linear_value_heads=2, linear_key_dim=16, linear_value_dim=16,
)  # fmt: skip
KINDS = {
    "stairs": StaircaseConfig.stairs(4, out_width=24, prefix_width=16, spacing=2),
    "odd stairs": StaircaseConfig((0, 1, 4, 7), out_width=24, prefix_width=16),
    "flat": StaircaseConfig.flat(4, out_width=24, prefix_width=16, relay_depth=4),
    "prompt": StaircaseConfig((0, 0, 0, 0), out_width=24, prefix_width=16),
}


@pytest.fixture(autouse=True)
def quickly():
    yield


def setup(config, lengths=(5, 7)):
    """Random backbone and branch, different from each other, and the backbone's cache of two padded texts."""
    backbone = random_like(lm.abstract_params(LANGUAGE), seed=1)
    branch = random_like(jax.eval_shape(lambda: staircase.init(config, LANGUAGE, backbone, jax.random.key(0))), seed=2)
    ids = np.random.default_rng(0).integers(0, 256, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    prefill = jax.jit(functools.partial(lm.prefill, config=LANGUAGE, slots=max(lengths) + len(config.entry_depths)))
    return backbone, branch, prefill(backbone, inputs=ids, mask=mask)[1]


def by_position(branch, config, cache):
    """Each position by itself through its layers, one layer at a time, behind the text and the positions before it."""
    border, depth = staircase._bind(branch, config, LANGUAGE), LANGUAGE.depth
    streams, results = [], []  # of each position: its state before layer 0, 1, ..., depth
    for k, entry in enumerate(config.entry_depths):
        step = border.steps[k][None, None]
        if entry:
            source = max(j for j in range(k) if config.entry_depths[j] < entry)
            hidden = border.enter(streams[source][entry], step)
        else:
            hidden = jnp.broadcast_to(border.start[...] + step, (len(cache.position), 1, LANGUAGE.width))
        positions = jnp.broadcast_to(cache.position[:, None], (3, len(cache.position), 1))
        stream, states = [], []
        for layer in range(depth):
            if layer < entry:  # never read: no later position enters below this one
                place = jnp.zeros_like(hidden)
            else:
                place = hidden
                stream.append(hidden)
            after, state = lm.run_layers(
                branch["blocks"], LANGUAGE, place, positions, cache, first=layer, last=layer + 1
            )
            hidden = hidden if layer < entry else after
            states.append(state)
        stream = [None] * entry + [*stream, hidden]
        joined = lm.LayerStates(*(in_layer_order(kind) for kind in zip(*states)))
        cache = lm.append(cache, joined, positions, jnp.ones((len(cache.position), 1), bool))
        streams.append(stream)
        results.append(border.norm(hidden))
    return jnp.concatenate(results, 1)


def in_layer_order(states):
    """Stacks states of one layer or of none each."""
    present = [state for state in states if len(jax.tree.leaves(state)[0])]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *present)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=kind, marks=[pytest.mark.extended] * (kind != "stairs"))
        for kind, config in KINDS.items()
    ],
)
def test_one_pass_gives_what_position_after_position_gives(config):
    _, branch, cache = setup(config)
    found = jax.jit(lambda cache: staircase.decode(branch, config, LANGUAGE, cache))(cache)
    expected = jax.jit(lambda cache: by_position(branch, config, cache))(cache)
    assert found.shape == (2, 4, 32) and float(jnp.std(expected)) > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


def test_latents_depend_on_those_before_them_only():
    config = KINDS["stairs"]
    _, branch, cache = setup(config)
    decode = jax.jit(lambda branch: staircase.decode(branch, config, LANGUAGE, cache))
    poisoned = {**branch, "border": {**branch["border"], "steps": branch["border"]["steps"].at[2].add(3.0)}}
    before, after = decode(branch), decode(poisoned)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert float(jnp.min(jnp.max(jnp.abs(before - after)[:, 2:], -1))) > 1e-3


def test_a_row_depends_on_its_own_text_only():
    config = KINDS["stairs"]
    branch, both = setup(config, (5, 7))[1:]
    decode = jax.jit(functools.partial(staircase.decode, branch, config, LANGUAGE))
    np.testing.assert_allclose(decode(setup(config, (5, 3))[2])[0], decode(both)[0], atol=1e-5)


def test_a_branch_starts_as_its_backbone():
    """Relays copy at first, so a position that enters at 0 alone is the backbone's next token, embedded as `start`."""
    backbone, _, cache = setup(KINDS["prompt"])
    config = StaircaseConfig((0,), out_width=24, prefix_width=16)
    branch = staircase.init(config, LANGUAGE, backbone, jax.random.key(0))
    token = branch["border"]["start"] + branch["border"]["steps"]
    token = jnp.broadcast_to(token, (2, 1, LANGUAGE.width))
    hidden, _ = jax.jit(lambda token: lm.extend(backbone, LANGUAGE, token, cache))(token)
    latents = jax.jit(lambda branch: staircase.decode(branch, config, LANGUAGE, cache))(branch)
    np.testing.assert_allclose(latents, hidden, atol=1e-5)
    np.testing.assert_array_equal(staircase._bind(branch, config, LANGUAGE).enter(hidden, jnp.zeros(32)), hidden)


def test_stairs_that_do_not_fit_are_errors():
    for depths, words in [
        ((1, 2), "the first is 0"),
        ((0, 4, 2), "none is less"),
        ((0, 4, 8), "below the top of the 8"),
    ]:
        with pytest.raises(UserError, match=words):
            StaircaseConfig(depths, 24, 16).check(8)


@pytest.mark.extended
def test_every_parameter_gets_its_gradient_and_the_backbone_none_where_it_is_frozen():
    """Against finite differences along a random direction of each parameter; float64 is not at hand, so 2 %."""
    config = KINDS["stairs"]
    _, branch, cache = setup(config)
    target = jnp.asarray(np.random.default_rng(5).normal(size=(2, 4, 24)), jnp.float32)

    @jax.jit
    def loss(branch):
        latents = staircase.decode(branch, config, LANGUAGE, cache)
        return jnp.mean(jnp.square(staircase.project(branch, config, LANGUAGE, latents) - target))

    grads = jax.jit(jax.grad(loss))(branch)
    rng, leaves = np.random.default_rng(6), jax.tree_util.tree_leaves_with_path(branch)
    for (path, _), grad in zip(leaves, jax.tree.leaves(grads)):
        name = jax.tree_util.keystr(path)
        reached = "prefix" not in name  # which another loss reads
        assert bool(jnp.all(jnp.isfinite(grad))) and (float(jnp.max(jnp.abs(grad))) > 0) == reached, name
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), branch)
    moved = [loss(optax.apply_updates(branch, optax.tree.scale(step, direction))) for step in (1e-3, -1e-3)]
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
    assert float(moved[0] - moved[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


# What it costs


@pytest.mark.extended
def test_eight_latents_of_32_layers_take_32_steps_and_little_more_than_half_the_work_of_eight_tokens(capsys):
    """As compiled: 32 layers in a row against 256, and at most 0.6 of the work of eight tokens decoded in turn."""
    result = benchmark.measure(2, depth=32, latents=8, spacing=4, width=64)
    assert result["staircase"]["layer_steps"] == 32
    assert result["in_turn"]["layer_steps"] == 8 * 32
    ratio = result["staircase"]["flops"] / result["in_turn"]["flops"]
    assert 0.5 < ratio <= 0.6
    assert f"work         {ratio:.3f} of that in turn" in benchmark.table(result)
