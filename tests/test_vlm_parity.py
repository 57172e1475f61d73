"""The language model is transformers' Qwen3_5ForCausalLM: logits, all gradients, states, cached decoding.

The twin runs in float64 and in float32, with its eager attention and its own delta rule in PyTorch. Ours is held
against the first; against the second with its own error added, which is as large. The errors are printed by

    pytest -m parity -s tests/test_vlm_parity.py tests/test_vlm_vision_parity.py
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models.convert.qwen3_5 import language_rules
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.vlm import language_model
from wallwm_jax.models.vlm.config import LanguageConfig

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.parity

TOLERANCE = 5e-5  # relative to the largest value of the tensor, float32
VOCABULARY = 90
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def make_twin(tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, linear_key_head_dim=16, linear_value_head_dim=24, linear_num_key_heads=2,
        linear_num_value_heads=4, tie_word_embeddings=tied, attn_implementation="eager",
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[3, 2, 1],
                             mrope_interleaved=True),
    )  # fmt: skip
    twin = transformers.Qwen3_5ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if any(part in name for part in ("norm", "A_log", "dt_bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(0.5 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return twin


def published(name: str) -> str:
    """The name that a tensor of the language model has in the files of the whole model."""
    return name.replace("model.", "model.language_model.", 1)


def ours_from(twin: torch.nn.Module, remat: str = "none") -> tuple[dict, LanguageConfig, Table]:
    config = LanguageConfig.from_json(twin.config.to_dict(), compute_dtype="float32", remat=remat)
    table = Table("diffusers", {}, tuple(language_rules(config, prefix="")))
    tensors = {published(name): value.detach().numpy() for name, value in twin.named_parameters()}
    table.check({name: value.shape for name, value in tensors.items()}, "the twin")
    params = table.to_params(tensors)
    expected = jax.tree.map(lambda leaf: leaf.shape, language_model.abstract_params(config))
    assert jax.tree.map(np.shape, params) == expected
    return params, config, table


@functools.cache
def exact_twin(tied: bool = False) -> torch.nn.Module:
    return copy.deepcopy(make_twin(tied)).double()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def run_twin(twin: torch.nn.Module, **inputs: np.ndarray | None) -> torch.Tensor:
    """Logits, in the twin's own precision throughout: some of its parts ask for float32 by name."""
    dtype = next(twin.parameters()).dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", dtype)
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))
        tensors = {name: None if value is None else torch.tensor(value) for name, value in inputs.items()}
        logits = twin(**tensors).logits
    assert logits.dtype == dtype
    return logits


def masks(rows: str, length: int) -> np.ndarray | None:
    """`[3, L]`: none, or rows of all, about half and four tokens with padding at one side."""
    if rows == "whole":
        return None
    count = np.array([length, length // 2 + 1, 4])[:, None]
    at = np.arange(length)
    return at >= length - count if rows == "left" else at < count


def image_positions(length: int) -> np.ndarray:
    """(time, row, column) `[3, 3, L]` of texts around a picture of 3 rows and 5 columns."""
    before, after = 7, length - 22
    picture = np.stack([np.full(15, before), before + np.arange(15) // 5, before + np.arange(15) % 5])
    text = [np.broadcast_to(start + np.arange(n), (3, n)) for start, n in ((0, before), (before + 5, after))]
    return np.broadcast_to(np.concatenate([text[0], picture, text[1]], 1)[:, None], (3, 3, length)).copy()


@pytest.mark.parametrize(
    ("length", "rows", "tied", "image", "remat"),
    [
        (5, "whole", False, False, "none"),
        (64, "left", True, False, "full"),
        (150, "right", False, True, "none"),
        (150, "left", False, False, "selective"),
    ],
)
def test_logits_and_gradients_equal_the_twins(length, rows, tied, image, remat):
    params, config, table = ours_from(make_twin(tied), remat)
    rng = np.random.default_rng(length)
    ids, mask = rng.integers(0, VOCABULARY, (3, length)), masks(rows, length)
    labels = rng.integers(0, VOCABULARY, ids.shape)
    real = np.ones(ids.shape, bool) if mask is None else mask
    positions = image_positions(length) if image else np.broadcast_to(np.arange(length), (3, 3, length))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: dict) -> tuple:
        def loss(params: dict) -> tuple[jax.Array, jax.Array]:
            hidden = language_model.forward(params, config, ids, positions=positions, mask=mask)
            logits = language_model.logits(params, config, hidden)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
            return -jnp.sum(jnp.where(real, chosen, 0.0)) / real.sum(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, ours), grads = jax.device_get(run(params))
    grads = table.to_tensors(grads)

    def theirs(twin: torch.nn.Module) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        twin.zero_grad()
        attention = None if mask is None else mask.astype(np.int64)
        logits = run_twin(twin, input_ids=ids, attention_mask=attention, position_ids=positions)
        torch.nn.functional.cross_entropy(logits[torch.tensor(real)], torch.tensor(labels[real])).backward()
        return logits.detach().numpy(), {published(name): p.grad.numpy() for name, p in twin.named_parameters()}

    exact, exact_grads = theirs(exact_twin(tied))
    same, same_grads = theirs(make_twin(tied))
    assert grads.keys() == exact_grads.keys()
    errors = {name: relative_error(grads[name], exact_grads[name]) for name in grads}
    twins = {name: relative_error(same_grads[name], exact_grads[name]) for name in errors}
    output, worst = relative_error(ours[real], exact[real]), max(errors, key=errors.__getitem__)
    print(
        f"length {length}, {rows}: logits {output:.1e} (twin's own {relative_error(same[real], exact[real]):.1e}); "
        f"gradients {errors[worst]:.1e} at {worst} (twin's own {max(twins.values()):.1e})"
    )
    assert output <= TOLERANCE
    assert errors[worst] <= TOLERANCE, worst
    for name in errors:
        assert relative_error(grads[name], same_grads[name]) <= TOLERANCE + twins[name], name


@pytest.mark.parametrize("rows", ["left", "right"])
def test_cached_decoding_equals_the_twins_full_forward(rows):
    """Rows of different lengths, padded, then 20 tokens each, one by one; states and keys are the twin's too."""
    params, config, _ = ours_from(make_twin())
    length, more = 75, 20
    rng = np.random.default_rng(0)
    mask, ids = masks(rows, length), rng.integers(0, VOCABULARY, (3, length + more))
    prefill = jax.jit(functools.partial(language_model.prefill, config=config, slots=length + more))
    extend = jax.jit(functools.partial(language_model.extend, config=config))
    hidden, cache = prefill(params, inputs=ids[:, :length], mask=mask)
    parts, start = [hidden], cache
    for token in range(length, length + more):
        hidden, cache = extend(params, inputs=ids[:, token : token + 1], cache=cache)
        parts.append(hidden)
    ours = language_model.logits(params, config, jnp.concatenate(parts, 1))
    errors, states = [], []
    for row in range(3):
        real = np.concatenate([mask[row], np.ones(more, bool)])
        exact = run_twin(exact_twin(), input_ids=ids[row : row + 1, real]).detach().numpy()
        errors.append(relative_error(ours[row, real], exact[0]))
        memory = transformers.DynamicCache(config=make_twin().config)
        make_twin()(torch.tensor(ids[row : row + 1, :length][:, mask[row]]), past_key_values=memory)
        for layer in range(config.depth):
            index, group = layer - layer // 4, layer // 4
            if (layer + 1) % 4:
                theirs = memory.get_recurrent_state(layer, state_idx=0)[0]
                found = start.layers.linear.state[index, row]
            else:
                theirs = memory.layers[layer].keys[0]
                found = start.layers.full.key[group, row][:, np.flatnonzero(mask[row])]
            states.append(relative_error(found, theirs.detach().numpy()))
    print(f"decoding, {rows}: logits {max(errors):.1e}, states and keys {max(states):.1e} (against the float32 twin)")
    assert max(errors) <= TOLERANCE
    assert max(states) <= TOLERANCE


def test_bfloat16_compute_is_as_near_to_float32_as_the_twins():
    params, config, _ = ours_from(make_twin())
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 60))
    exact = run_twin(exact_twin(), input_ids=ids).detach().numpy()
    rounded = copy.deepcopy(make_twin()).to(torch.bfloat16)
    theirs = rounded(torch.tensor(ids)).logits.detach().float().numpy()
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    ours = language_model.logits(params, config, language_model.forward(params, config, ids))

    def spread(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((np.asarray(logits) - exact) ** 2) / np.mean(exact**2)))

    print(f"bfloat16 logits error {spread(ours):.1e}, twin's own {spread(theirs):.1e}, root mean squares")
    assert 1e-4 < spread(ours) <= 1.5 * spread(theirs)


def test_default_sizes_are_those_of_the_twin():
    with torch.device("meta"):
        twin = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig())
    published_sizes = {**twin.config.to_dict()}
    published_sizes["rope_parameters"] = dict(
        rope_type="default", rope_theta=10000000, partial_rotary_factor=0.25, mrope_section=[11, 11, 10]
    )
    config = LanguageConfig.from_json(published_sizes)
    assert config == LanguageConfig()
    leaves = jax.tree.leaves(language_model.abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == sum(p.numel() for p in twin.parameters()) == 8_953_803_264
    Table("", {}, tuple(language_rules(config))).check(
        {published(name): tuple(p.shape) for name, p in twin.named_parameters()}, "the twin"
    )
