"""The language model: its recurrence, padding, caches and ranges of layers all compute one function."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models.convert.qwen3_5 import language_aliases, language_rules
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.vlm import gated_delta, language_model
from wallwm_jax.models.vlm.config import LanguageConfig

CONFIG = LanguageConfig.tiny(
    vocabulary=40, width=32, ffn=48, head_dim=16, rotary_dim=12, mrope_section=(2, 2, 2), linear_key_dim=8,
    linear_value_dim=12,
)  # fmt: skip
TEXT, LENGTH = 13, 21  # chunks are of 8 tokens, as keys are 8 wide
JSON = dict(
    model_type="qwen3_5_text", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_act="silu", linear_conv_kernel_dim=4,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
    rope_parameters=dict(rope_type="default", rope_theta=10000, partial_rotary_factor=0.75, mrope_section=[2, 2, 2]),
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick():
    yield


@pytest.fixture(scope="module")
def params():
    """Random, no norm or bias at its starting value."""
    rng = np.random.default_rng(0)
    shapes = language_model.abstract_params(CONFIG)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(
            rng.normal(size=leaf.shape) * (leaf.shape[-2] ** -0.5 if "kernel" in str(path) else 0.5), np.float32
        ),
        shapes,
    )


def embeddings() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, LENGTH, CONFIG.width)).astype(np.float32)


def prefill(params, inputs, mask=None, positions=None, config=CONFIG):
    """With the defaults of mask and positions filled in, so that few programs are compiled."""
    mask = np.ones(inputs.shape[:2], bool) if mask is None else mask
    positions = np.stack([np.maximum(np.cumsum(mask, 1) - 1, 0)] * 3) if positions is None else positions
    return _prefill(params, inputs, mask, positions, config)


@functools.partial(jax.jit, static_argnames="config")
def _prefill(params, inputs, mask, positions, config):
    return language_model.prefill(params, config, inputs, slots=LENGTH + 1, mask=mask, positions=positions)


@jax.jit
def extend(params, inputs, cache):
    return language_model.extend(params, CONFIG, inputs, cache)


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def worst(ours, theirs) -> float:
    return max(jax.tree.leaves(jax.tree.map(relative_error, ours, theirs)))


def delta_inputs(length: int, decay: float) -> tuple[jax.Array, ...]:
    """Two rows, 2 key heads for 4 value heads; the state is not zero before the first token."""
    rng = np.random.default_rng(length)
    query, key = (rng.normal(size=(2, length, 2, 8)) for _ in range(2))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value, state = rng.normal(size=(2, length, 4, 6)), rng.normal(size=(2, 4, 8, 6))
    log_decay, beta = -decay * rng.random((2, length, 4)), rng.random((2, length, 4))
    return tuple(np.asarray(x, np.float32) for x in (query, key, value, log_decay, beta, state))


def delta_by_definition(query, key, value, log_decay, beta, state):
    """Token after token, head after head, in float64."""
    query, key, value, log_decay, beta, state = (
        np.array(x, np.float64) for x in (query, key, value, log_decay, beta, state)
    )
    out = np.zeros_like(value)
    for row, t, head in np.ndindex(*value.shape[:3]):
        q, k, held = query[row, t, head // 2], key[row, t, head // 2], state[row, head]
        held *= np.exp(log_decay[row, t, head])
        held += beta[row, t, head] * np.outer(k, value[row, t, head] - held.T @ k)
        out[row, t, head] = held.T @ q
    return out, state


@pytest.mark.parametrize("decay", [0.1, 30.0])
def test_chunks_and_recurrence_are_the_delta_rule(decay):
    inputs = delta_inputs(29, decay)
    expected = delta_by_definition(*inputs)
    assert worst(jax.jit(gated_delta.recurrent)(*inputs), expected) < 2e-6
    assert worst(jax.jit(gated_delta.chunked)(*inputs), expected) < 2e-6


def test_two_halves_of_the_delta_rule_make_the_whole():
    *tokens, state = delta_inputs(29, 1.0)

    @jax.jit
    def by_halves(tokens, state):
        first, state = gated_delta.delta_rule(*(x[:, :13] for x in tokens), state)
        second, state = gated_delta.delta_rule(*(x[:, 13:] for x in tokens), state)
        return jnp.concatenate([first, second], 1), state

    assert worst(by_halves(tokens, state), delta_by_definition(*tokens, state)) < 2e-6


def test_equal_keys_without_decay_stay_exact():
    """The hardest system of a chunk: every token corrects what the one before wrote at the same key."""
    query, key, value, log_decay, beta, state = delta_inputs(29, 0.0)
    inputs = query, np.broadcast_to(key[:, :1], key.shape), value, log_decay, np.ones_like(beta), state
    assert worst(jax.jit(gated_delta.chunked)(*inputs), delta_by_definition(*inputs)) < 2e-6


def test_the_convolution_keeps_the_inputs_before_the_end():
    x, before = np.arange(1.0, 13.0).reshape(2, 3, 2), -np.ones((2, 3, 2))
    kernel = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [10.0, 0.0]])
    out, after = gated_delta.causal_conv(*map(jnp.asarray, (x, kernel, before)), jnp.array([0, 2]))
    np.testing.assert_array_equal(out[0], [[9, -1], [29, 2], [49, 4]])
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], [[-1, -1], [7, 8], [9, 10]])


def test_decoding_token_by_token_is_the_full_forward(params):
    whole, full = prefill(params, embeddings())
    hidden, cache = prefill(params, embeddings()[:, :TEXT])
    parts = [hidden]
    for token in range(TEXT, LENGTH):
        hidden, cache = extend(params, embeddings()[:, token : token + 1], cache)
        parts.append(hidden)
    assert relative_error(np.concatenate(parts, 1), whole) < 2e-5
    assert worst(cache.layers, full.layers) < 2e-5
    assert (int(cache.used), cache.position.tolist()) == (LENGTH, [LENGTH] * 2)

    last, cache = extend(params, embeddings()[:, :1], cache)
    assert np.isfinite(last).all()
    too_many, _ = extend(params, embeddings()[:, :1], cache)
    assert np.isnan(too_many).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace(params, side):
    """Whatever stands in it, and at whichever side: what follows goes on as after the text alone."""
    real = np.arange(LENGTH) < TEXT if side == "right" else np.arange(LENGTH) >= LENGTH - TEXT
    mask = np.stack([real, np.ones(LENGTH, bool)])
    hidden, cache = prefill(params, embeddings(), mask)
    poisoned, same = prefill(params, np.where(mask[..., None], embeddings(), np.float32(1e4)), mask)
    hidden, poisoned = np.asarray(hidden), np.asarray(poisoned)
    np.testing.assert_array_equal(poisoned[mask], hidden[mask])
    jax.tree.map(np.testing.assert_array_equal, same.layers.linear, cache.layers.linear)

    alone, short = prefill(params, embeddings()[:, real])
    row = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0], tree)  # noqa: E731
    assert relative_error(hidden[0, real], alone[0]) < 2e-5
    assert worst(row(cache.layers.linear), row(short.layers.linear)) < 2e-5
    assert same.position.tolist() == [TEXT, LENGTH]
    token = embeddings()[:, :1]
    assert relative_error(extend(params, token, same)[0][0], extend(params, token, short)[0][0]) < 2e-5


def test_ranges_of_layers_make_the_whole_stack(params):
    """Cut inside groups and between them, from a cache, with states of each range alone."""
    more = embeddings()[:, :3] + 1.0
    _, cache = prefill(params, embeddings()[:, :TEXT])
    whole, grown = extend(params, more, cache)
    positions = np.broadcast_to(TEXT + np.arange(3), (3, 2, 3))

    @jax.jit
    def by_ranges(params, hidden, cache):
        parts = []
        for first, last in ((0, 2), (2, 5), (5, 8)):
            run = functools.partial(language_model.run_layers, first=first, last=last)
            hidden, states = run(params["blocks"], CONFIG, hidden, positions, cache)
            parts.append(states)
        return hidden, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    hidden, states = by_ranges(params, more, cache)
    hidden = np.asarray(hidden)
    normed = hidden / np.sqrt(np.mean(hidden**2, -1, keepdims=True)) * (1 + np.asarray(params["norm"]["scale"]))
    assert relative_error(normed, whole) < 2e-5
    joined = language_model.append(cache, states, positions, np.ones((2, 3), bool))
    assert worst(joined.layers, grown.layers) < 2e-5
    assert joined.position.tolist() == [TEXT + 3] * 2


def test_positions_of_a_picture_move_the_next_text_position(params):
    picture = np.stack([np.full(6, 15), 15 + np.arange(6) // 3, 15 + np.arange(6) % 3])
    positions = np.broadcast_to(np.concatenate([np.tile(np.arange(15), (3, 1)), picture], 1)[:, None], (3, 2, LENGTH))
    _, cache = prefill(params, embeddings(), positions=positions)
    assert cache.position.tolist() == [18, 18]
    moved = positions + np.array([0, 0, 1])[:, None, None] * (np.arange(LENGTH) > 16)
    others = prefill(params, embeddings(), positions=moved)[1]
    keys, others = np.asarray(cache.layers.full.key), np.asarray(others.layers.full.key)
    np.testing.assert_array_equal(others[:, :, :, :17], keys[:, :, :, :17])
    assert relative_error(others[:, :, :, 17:LENGTH], keys[:, :, :, 17:LENGTH]) > 0.01


def test_bfloat16_is_close_to_float32(params):
    exact, _ = prefill(params, embeddings())
    rounded, cache = prefill(params, embeddings(), config=dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    assert (rounded.dtype, cache.layers.full.key.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert cache.layers.linear.state.dtype == jnp.float32
    exact, rounded = np.asarray(exact), np.asarray(rounded, np.float32)
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 0.1


def test_every_parameter_has_a_finite_gradient(params):
    """Rematerialised, with padding, and through the tied embedding."""
    config = dataclasses.replace(CONFIG, remat="full")
    ids, mask = jnp.array([[5, 9, 7, 9], [3, 2, 0, 0]]), jnp.array([[True] * 4, [True, True, False, False]])

    def loss(params):
        logits = language_model.logits(params, config, language_model.forward(params, config, ids, mask=mask))
        return -jnp.mean(jnp.where(mask, jax.nn.log_softmax(logits)[..., 0], 0.0))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_an_untrained_model_guesses_nearly_evenly():
    """Its logits have unit variance, which costs half a nat."""
    params = jax.jit(lambda key: language_model.init(CONFIG, key))(jax.random.key(0))
    ids = np.arange(2 * LENGTH).reshape(2, LENGTH) % CONFIG.vocabulary
    hidden, _ = prefill(params, np.asarray(params["embedding"])[ids])
    logits = np.asarray(language_model.logits(params, CONFIG, hidden))
    loss = np.log(np.sum(np.exp(logits), -1))[..., None] - logits
    assert loss.mean() == pytest.approx(np.log(CONFIG.vocabulary) + 0.5, abs=0.25)


def test_sizes_are_read_from_a_published_config():
    assert LanguageConfig.from_json(JSON, compute_dtype="float32", tied=True) == CONFIG
    whole = {"text_config": JSON, "tie_word_embeddings": True}
    assert LanguageConfig.from_json(whole, compute_dtype="float32") == CONFIG
    without = {key: value for key, value in JSON.items() if key != "layer_types"}
    assert LanguageConfig.from_json({**without, "full_attention_interval": 2}).interval == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layer_types=["full_attention"] + ["linear_attention"] * 7), "layer_types must be 8 names"),
        (dict(num_hidden_layers=12), "layer_types must be 12 names"),
        (dict(layer_types=["linear_attention"] * 8), "whole groups"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
        (dict(model_type="qwen3_5_moe_text"), "model_type"),
        (dict(head_dim=None), "no 'head_dim'"),
        (dict(num_key_value_heads=3), "4 heads over 3"),
        (dict(head_dim=32), "must sum to half of the rotary dimensions, 24 of 32"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        LanguageConfig.from_json({**JSON, **change})


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_go_to_parameters_and_back(tied):
    config = LanguageConfig.from_json(JSON, tied=tied)
    table = Table("diffusers", {}, tuple(language_rules(config)), tuple(language_aliases(config)))
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=rule.shape) for rule in table.rules for name in rule.names()}
    assert len(tensors) == (2 if tied else 3) + 6 * 14 + 2 * 11
    params = table.to_params(tensors)["language"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, language_model.abstract_params(config))
    name = "model.language_model.layers.{}.linear_attn.conv1d.weight"
    for stacked, layer in enumerate((0, 1, 2, 4, 5, 6)):
        kept = params["blocks"]["linear"]["delta"]["conv"][stacked]
        np.testing.assert_array_equal(kept, tensors[name.format(layer)][:, 0].T)
    back = table.to_tensors({"language": params})
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
