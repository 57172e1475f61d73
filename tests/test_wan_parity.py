"""The video tower is diffusers' WanTransformer3DModel: outputs and all gradients, for Wan 2.1 T2V and Wan 2.2 TI2V-5B.

The twin runs in float32 and in float64. The gradients of its text queries and keys are sums over hundreds of equal
padding keys that nearly cancel, so in float32 the twin is up to 1e-3 away from itself in float64; the one biased key of
the tower is not. Ours is held against float64, and against float32 with the twin's own error added.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.convert import wan
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.rope import axis_dims

torch = pytest.importorskip("torch", reason="needs the parity extra")
diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # relative to the largest value of the tensor, float32
PAD_TO = 512


@dataclass(frozen=True)
class Case:
    """One comparison; `first_clean` is Wan 2.2 TI2V's per-token timestep (0 on the first latent frame)."""

    channels: int
    first_clean: bool
    frames: int
    cells: tuple[int, int]
    texts: tuple[int, ...]
    heads: int
    head_dim: int
    depth: int = 2
    pad_to: int = PAD_TO


CASES = {
    "wan21-odd": Case(16, False, 5, (4, 6), (1, 9), heads=2, head_dim=14),
    "wan21-full-head": Case(16, False, 3, (6, 4), (7, 2), heads=1, head_dim=128, depth=1),
    "wan22-odd": Case(48, True, 5, (6, 4), (11, 1), heads=2, head_dim=16),
    "wan22-text-fills": Case(48, True, 4, (2, 6), (12, 5), heads=3, head_dim=12, pad_to=12),
}
# What a test runs once need not be optimised: half the compile time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_twin(case: Case, seed: int) -> torch.nn.Module:
    """The twin with every parameter random, norms and biases included."""
    torch.manual_seed(seed)
    twin = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        in_channels=case.channels,
        out_channels=case.channels,
        text_dim=20,
        freq_dim=32,
        ffn_dim=3 * case.head_dim,
        num_layers=case.depth,
    ).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
                if "attn2.norm" in name:  # sharp enough that captions count beside 500 paddings
                    parameter.mul_(2.5)
            elif "scale_shift_table" not in name:
                parameter.mul_(1.5)
    return twin


def table_of(twin: torch.nn.Module) -> Table:
    shapes = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    return wan.table(shapes, dict(twin.config))


def our_config(case: Case, sizes: dict, compute_dtype: str = "float32") -> ConfigDict:
    model = base.get_config().model.copy_and_resolve_references()
    with model.unlocked():
        sizes = dict(sizes)
        text_width = sizes.pop("text_width")
        model.update(sizes)
        model.update(dict(latent_shape=case.cells, view_attention=False, compute_dtype=compute_dtype))
        model.update(dict(action_width=12, action_heads=2, action_ffn=8))
        model.text.update(dict(kind="features", width=text_width, heads=2, pad_to=case.pad_to))
    return model


@dataclass
class Inputs:
    """Random inputs of both sides; the cotangent defines the scalar that is differentiated."""

    latents: np.ndarray  # [B, C, F, h, w]
    text: np.ndarray  # [B, L, Dt], zero beyond each caption
    sigma: np.ndarray  # [B]
    cotangent: np.ndarray  # as latents

    @staticmethod
    def channels_last(latents: np.ndarray) -> np.ndarray:
        """`[B, C, F, h, w]` as the tower's `[B, 1, F, h, w, C]`."""
        return np.moveaxis(latents, 1, -1)[:, None]


def make_inputs(case: Case, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    shape = (len(case.texts), case.channels, case.frames, *case.cells)
    text = rng.normal(size=(len(case.texts), max(case.texts), 20)).astype(np.float32)
    for row, length in enumerate(case.texts):
        text[row, length:] = 0
    return Inputs(
        rng.normal(size=shape).astype(np.float32),
        text,
        rng.uniform(0.05, 1, len(case.texts)).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
    )


def run_twin(
    twin: torch.nn.Module, case: Case, inputs: Inputs, dtype: torch.dtype
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output, and gradients of sum(output * cotangent) by name ("latents" and "text" beside the parameters')."""
    twin = copy.deepcopy(twin).to(dtype)
    latents = torch.tensor(inputs.latents, dtype=dtype, requires_grad=True)
    text = torch.tensor(inputs.text, dtype=dtype, requires_grad=True)
    padded = torch.nn.functional.pad(text, (0, 0, 0, case.pad_to - text.shape[1]))
    timestep = torch.tensor(np.float32(1000) * inputs.sigma)
    if case.first_clean:
        per_frame = case.cells[0] // 2 * case.cells[1] // 2
        timestep = timestep[:, None].repeat(1, case.frames * per_frame)
        timestep[:, :per_frame] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))  # its norms ask for float32 by name
        output = twin(latents, timestep, padded, return_dict=False)[0]
    assert output.dtype == dtype
    (output * torch.tensor(inputs.cotangent)).sum().backward()
    grads = {name: value.grad.numpy() for name, value in twin.named_parameters()}
    assert all(np.abs(grad).max() > 0 for grad in grads.values())
    for row, length in enumerate(case.texts):
        text.grad[row, length:] = 0  # the padding's own gradient; in the tower padding is a constant
    return output.detach().numpy(), {**grads, "latents": latents.grad.numpy(), "text": text.grad.numpy()}


def tower(config: ConfigDict, case: Case, inputs: Inputs) -> Callable[..., jax.Array]:
    """The tower as a function of (params, latents `[B, 1, F, h, w, C]`, text), one event of one view per row."""
    rows, frames = len(case.texts), case.frames
    role = np.full((rows, frames), 2, np.int32)
    if case.first_clean:
        role[:, 0] = 1
    batch = dict(
        latent_event=np.ones((rows, frames), np.int32),
        latent_role=role,
        latent_pos=np.tile(np.arange(frames, dtype=np.int32), (rows, 1)),
        view_id=np.ones((rows, 1, 1), np.int32),
    )
    length = np.array(case.texts, np.int32)[:, None]

    def outputs(params: dict, latents: jax.Array, text: jax.Array) -> jax.Array:
        return wam.forward(
            params,
            config,
            {**batch, "latents": latents},
            noisy_latents=latents,
            video_sigma=inputs.sigma[:, None],
            text=wam.TextContext(text[:, None], length),
            run_actions=False,
        ).video_velocity

    return outputs


def run_ours(
    params: dict, config: ConfigDict, table: Table, case: Case, inputs: Inputs
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `run_twin` returns, from our tower; gradients of parameters under the twin's names."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: dict, latents: jax.Array, text: jax.Array, cotangent: jax.Array) -> tuple:
        value, pull = jax.vjp(tower(config, case, inputs), params, latents, text)
        return value, pull(cotangent)

    latents, cotangent = (inputs.channels_last(value) for value in (inputs.latents, inputs.cotangent))
    output, (param_grads, latent_grad, text_grad) = jax.device_get(run(params, latents, inputs.text, cotangent))
    grads = {**table.to_tensors(param_grads), "latents": np.moveaxis(latent_grad[:, 0], -1, 1), "text": text_grad}
    return np.moveaxis(output[:, 0], -1, 1), grads


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def ours_from(twin: torch.nn.Module, case: Case, compute_dtype: str = "float32") -> tuple[dict, ConfigDict, Table]:
    """Our parameters, config and conversion table of the twin's weights; what is not the video tower is zero."""
    table = table_of(twin)
    config = our_config(case, table.sizes, compute_dtype)
    expected = wam.abstract_params(config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), expected)
    params |= table.to_params({name: value.detach().numpy() for name, value in twin.named_parameters()})
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    return params, config, table


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_twins(name):
    case, seed = CASES[name], sum(map(ord, name))
    twin, inputs = make_twin(case, seed), make_inputs(case, seed)
    output, grads = run_ours(*ours_from(twin, case), case, inputs)
    exact_output, exact_grads = run_twin(twin, case, inputs, torch.float64)
    twin_output, twin_grads = run_twin(twin, case, inputs, torch.float32)
    ours, exact, theirs = (
        {"output": out, **by_name}
        for out, by_name in ((output, grads), (exact_output, exact_grads), (twin_output, twin_grads))
    )
    assert ours.keys() == exact.keys()
    errors = {key: relative_error(ours[key], exact[key]) for key in exact}
    twin_errors = {key: relative_error(theirs[key], exact[key]) for key in exact}
    worst = max(errors, key=errors.__getitem__)
    print(
        f"{name}: output {errors['output']:.1e} (twin's own {twin_errors['output']:.1e}); "
        f"gradients {errors[worst]:.1e} at {worst} (twin's own {max(twin_errors.values()):.1e})"
    )
    assert errors[worst] <= TOLERANCE, worst
    for key in exact:
        assert relative_error(ours[key], theirs[key]) <= TOLERANCE + twin_errors[key], key


@pytest.mark.parametrize("name", ["wan21-odd", "wan22-odd"])
def test_bfloat16_compute_stays_near_float32(name):
    case = CASES[name]
    twin, inputs = make_twin(case, 3), make_inputs(case, 3)
    params, config, _ = ours_from(twin, case, "bfloat16")
    output = jax.jit(tower(config, case, inputs), compiler_options=QUICK)(
        params, inputs.channels_last(inputs.latents), inputs.text
    )
    error = relative_error(np.moveaxis(output[:, 0], -1, 1), run_twin(twin, case, inputs, torch.float32)[0])
    print(f"{name}: bfloat16 output error {error:.1e}")
    assert 1e-4 < error <= 4e-2


def test_the_original_names_hold_the_same_weights():
    """Our parameters under the original names, renamed by diffusers' own converter, are the twin's state dict."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    case = CASES["wan22-odd"]
    twin = make_twin(case, 0)
    diffusers_table = table_of(twin)
    params = diffusers_table.to_params({name: value.numpy() for name, value in twin.state_dict().items()})
    config = dict(
        model_type="ti2v",
        in_dim=48,
        out_dim=48,
        dim=32,
        ffn_dim=48,
        freq_dim=32,
        num_heads=2,
        num_layers=2,
        text_dim=20,
    )
    original_table = wan.table({"time_projection.1.weight": (192, 32)}, config)
    assert original_table.sizes == diffusers_table.sizes
    tensors = original_table.to_tensors(params)
    original_table.check({name: value.shape for name, value in tensors.items()}, "original")
    renamed = convert_wan_transformer_to_diffusers({name: torch.tensor(value) for name, value in tensors.items()})
    assert renamed.keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        assert torch.equal(renamed[name], value), name


def test_a_head_of_128_is_split_44_42_42():
    twin = make_twin(CASES["wan21-full-head"], 0)
    assert axis_dims(128) == (44, 42, 42) == (twin.rope.t_dim, twin.rope.h_dim, twin.rope.w_dim)
