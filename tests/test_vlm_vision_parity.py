"""Qwen3.5 with images is transformers' Qwen3_5ForConditionalGeneration: pixels, positions, tower, logits, gradients.

The twin runs in float64 and in float32: ours is held against the first; its own float32 error is printed beside.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models.convert import qwen3_5, qwen3_5_vision, stream
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.vlm import images as pictures
from wallwm_jax.models.vlm import vision_tower, vlm
from wallwm_jax.models.vlm.positions import multimodal_positions
from wallwm_jax.models.vlm.tokenizer import BytesTokenizer, FolderTokenizer, pad, prompt
from wallwm_jax.models.vlm.vision_tower import VisionConfig
from wallwm_jax.models.vlm.vlm import VLMConfig

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")
tokenizers = pytest.importorskip("tokenizers", reason="needs the parity extra")

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402
from transformers.models.qwen3_5 import modeling_qwen3_5 as twins  # noqa: E402

transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.parity

TOLERANCE = 5e-5  # relative to the largest value of the tensor, float32
# What a test runs once need not be optimised: half the compile time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VISION = dict(
    depth=3, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=4, temporal_patch_size=2,
    spatial_merge_size=2, out_hidden_size=32, num_position_embeddings=25,
)  # fmt: skip


def randomise(twin: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases that matter; branches of the language model scaled as deep models start, by 1 / sqrt(2 depth),
    and short steps of the delta nets: else a rounding at the input grows a thousandfold, in the twin as in ours."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-1, 1)
            elif name.endswith("dt_bias"):
                parameter.normal_(-2, 0.3)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.normal_()
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.25)
    return twin.eval()


@functools.cache
def make_tower() -> torch.nn.Module:
    config = transformers.models.qwen3_5.Qwen3_5VisionConfig(**VISION, attn_implementation="eager")
    return randomise(twins.Qwen3_5VisionModel(config))


def processor(**limits) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, **limits
    )


def random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def exactly(patch: pytest.MonkeyPatch) -> None:
    """Lets a float64 twin be one: it asks for float32 by name in its norms, rotary angles and interpolation."""
    patch.setattr(torch, "float32", torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def patches_of(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin's processor on `[N, H, W, 3]`: flat patches and grids."""
    out = processor(min_pixels=1).preprocess(list(images), return_tensors="np")
    return torch.tensor(out["pixel_values"]), torch.tensor(out["image_grid_thw"])


def run_tower(images: np.ndarray, cotangent: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, dict]:
    twin = copy.deepcopy(make_tower()).to(dtype)
    patches, grids = patches_of(images)
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            exactly(patch)
        output = twin(patches.to(dtype), grid_thw=grids).pooler_output
    assert output.dtype == dtype
    (output * torch.tensor(cotangent.reshape(output.shape)).to(dtype)).sum().backward()
    prefix = qwen3_5_vision.SOURCE
    return output.detach().numpy(), {prefix + name: value.grad.numpy() for name, value in twin.named_parameters()}


@pytest.mark.parametrize("size", [(8, 8), (32, 16), (24, 40), (48, 48)])
def test_image_tokens_and_gradients_equal_the_twins(size):
    config = VisionConfig.from_json(make_tower().config.to_dict(), compute_dtype="float32")
    table = Table("transformers", {}, tuple(qwen3_5_vision.vision_rules(config)))
    weights = {qwen3_5_vision.SOURCE + name: value.detach().numpy() for name, value in make_tower().named_parameters()}
    table.check({name: value.shape for name, value in weights.items()}, "twin")
    images = random_images((2, 2, *size))
    rows, columns = config.token_grid(*size)
    cotangent = np.random.default_rng(1).normal(size=(2, 2, rows * columns, 32)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, images, cotangent):
        value, pull = jax.vjp(lambda params: vision_tower.encode(params, config, pictures.normalise(images)), params)
        return value, pull(cotangent)[0]

    params = table.to_params(weights)["vision"]
    expected = jax.tree.map(lambda leaf: leaf.shape, vision_tower.abstract_params(config))
    assert jax.tree.map(np.shape, params) == expected
    ours, grads = jax.device_get(run(params, images, cotangent))
    grads = table.to_tensors({"vision": grads})

    flat = images.reshape(-1, *size, 3)
    theirs, exact_grads = run_tower(flat, cotangent, torch.float64)
    same, twin_grads = run_tower(flat, cotangent, torch.float32)
    assert grads.keys() == exact_grads.keys()
    output = relative_error(ours.reshape(theirs.shape), theirs)
    errors = {name: relative_error(grad, exact_grads[name]) for name, grad in grads.items()}
    own = max(relative_error(grad, exact_grads[name]) for name, grad in twin_grads.items())
    worst = max(errors, key=errors.__getitem__)
    print(
        f"{size}: tokens {output:.1e} (twin's own {relative_error(same, theirs):.1e}); "
        f"gradients {errors[worst]:.1e} at {worst} (twin's own {own:.1e})"
    )
    assert output <= TOLERANCE
    assert errors[worst] <= TOLERANCE, worst


def test_pixels_are_exactly_the_twins_processors():
    """Without a resize, and with one, up or down, to an area limit or a multiple of a token: all bits equal."""
    side = 8
    for height, width, limits in [
        (64, 96, dict(min_pixels=1, max_pixels=10**6)),
        (50, 77, dict(min_pixels=1, max_pixels=10**6)),
        (60, 90, dict(min_pixels=1, max_pixels=2000)),
        (20, 33, dict(min_pixels=5000, max_pixels=10**6)),
    ]:
        images = random_images((2, height, width))
        theirs = processor(**limits).preprocess(list(images), return_tensors="np")
        fitted = pictures.fit(images, side, **limits)
        rows, columns = np.array(fitted.shape[1:3]) // 4
        assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]] * 2
        ours = np.asarray(jax.jit(pictures.normalise)(fitted))
        grid = ours.reshape(2, rows // 2, 2, 4, columns // 2, 2, 4, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
        flat = np.repeat(grid[:, :, :, :, :, :, None], 2, 6).reshape(2 * rows * columns, -1)
        np.testing.assert_array_equal(flat, theirs["pixel_values"])


def test_every_grey_level_is_exactly_the_twins():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    theirs = processor(min_pixels=1).preprocess([levels], return_tensors="np")["pixel_values"]
    assert set(np.asarray(jax.jit(pictures.normalise)(levels)).ravel()) == set(theirs.ravel())


TEXT = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
)  # fmt: skip
IMAGE, VISION_START, VISION_END = 70, 71, 72


@functools.cache
def make_twin(tied: bool = False) -> torch.nn.Module:
    config = transformers.Qwen3_5Config(
        text_config=TEXT, vision_config=VISION, image_token_id=IMAGE, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return randomise(twins.Qwen3_5ForConditionalGeneration(config))


def sequence(rng: np.random.Generator, length: int, images: int, tokens: int) -> np.ndarray:
    """Ids `[S]` of random text with `images` images at random places in it."""
    ids = list(rng.integers(0, 70, length - images * (tokens + 2)))
    for place in sorted(rng.choice(len(ids) + 1, images), reverse=True):
        ids[place:place] = [VISION_START, *[IMAGE] * tokens, VISION_END]
    return np.array(ids)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 2)])
def test_positions_and_delta_equal_the_twins(grid, padding):
    rng = np.random.default_rng(sum(grid))
    rows, columns = grid
    ids = np.stack([sequence(rng, 40, 3, rows * columns) for _ in range(4)])
    mask = np.ones_like(ids, bool)
    if padding != "none":
        for row, count in enumerate((5, 0, 3, 1)):
            pads = [0] * count
            ids[row] = [*pads, *sequence(rng, 40 - count, 3, rows * columns)]
            mask[row] = np.arange(40) >= count
            if padding == "right":
                ids[row], mask[row] = np.roll(ids[row], -count), mask[row][::-1]
    expected, delta = make_twin().model.get_rope_index(
        torch.tensor(ids),
        torch.tensor((ids == IMAGE).astype(np.int32)),
        torch.tensor([[1, 2 * rows, 2 * columns]] * 12),
        attention_mask=torch.tensor(mask.astype(np.int64)),
    )
    ours, ours_delta = multimodal_positions(ids, IMAGE, grid, mask)
    np.testing.assert_array_equal(ours, expected.numpy())
    np.testing.assert_array_equal(ours_delta, delta.numpy()[:, 0])


def ours_from(twin: torch.nn.Module) -> tuple[dict, VLMConfig, Table]:
    tensors = {name: value.detach().numpy() for name, value in twin.named_parameters() if name not in tied_names(twin)}
    table = qwen3_5.table({name: value.shape for name, value in tensors.items()}, twin.config.to_dict())
    table.check({name: value.shape for name, value in tensors.items()}, "twin")
    config = VLMConfig.from_sizes(table.sizes, compute_dtype="float32")
    params = table.to_params(tensors)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, vlm.abstract_params(config))
    return params, config, table


def tied_names(twin: torch.nn.Module) -> set[str]:
    return {"lm_head.weight"} if twin.config.tie_word_embeddings else set()


def batch(config: VLMConfig, size: tuple[int, int], images: int, lengths: list[int], seed: int = 0) -> vlm.Inputs:
    """Rows of random text with images in it, padded on the right."""
    rng, tokens = np.random.default_rng(seed), config.image_tokens(*size)
    ids, mask = pad(BytesTokenizer(), [sequence(rng, length, images, tokens) for length in lengths])
    return vlm.prepare(config, np.where(mask, ids, 0), mask, random_images((len(lengths), images, *size), seed))


def run_twin(
    twin: torch.nn.Module, inputs: vlm.Inputs, cotangent: np.ndarray, dtype: torch.dtype
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and gradients of sum(logits * cotangent) by name."""
    twin = copy.deepcopy(twin).to(dtype)
    patches, grids = patches_of(inputs.images.reshape(-1, *inputs.images.shape[2:]))
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            exactly(patch)
        output = twin(
            input_ids=torch.tensor(inputs.ids.astype(np.int64)),
            attention_mask=torch.tensor(inputs.mask.astype(np.int64)),
            mm_token_type_ids=torch.tensor((inputs.ids == IMAGE).astype(np.int32)),
            pixel_values=patches.to(dtype),
            image_grid_thw=grids,
        ).logits
        assert output.dtype == dtype
        (output * torch.tensor(cotangent).to(dtype)).sum().backward()
    grads = {name: as_numpy(value.grad) for name, value in twin.named_parameters()}
    return as_numpy(output.detach()), grads


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize(
    ("tied", "size", "images", "lengths"), [(False, (24, 16), 2, [40, 31, 40]), (True, (16, 16), 1, [70, 12])]
)
def test_logits_and_gradients_with_images_equal_the_twins(tied, size, images, lengths):
    twin = make_twin(tied)
    params, config, table = ours_from(twin)
    inputs = batch(config, size, images, lengths)
    shape = (*inputs.ids.shape, TEXT["vocab_size"])
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32) * inputs.mask[..., None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, inputs, cotangent):
        value, pull = jax.vjp(lambda params: vlm.logits(params, config, vlm.forward(params, config, inputs)), params)
        return value, pull(cotangent)[0]

    ours, grads = jax.device_get(run(params, inputs, cotangent))
    grads = table.to_tensors(grads)
    theirs, exact_grads = run_twin(twin, inputs, cotangent, torch.float64)
    same, twin_grads = run_twin(twin, inputs, cotangent, torch.float32)
    assert grads.keys() == exact_grads.keys()
    output = relative_error(ours[inputs.mask], theirs[inputs.mask])
    errors = {name: relative_error(grad, exact_grads[name]) for name, grad in grads.items()}
    own = {name: relative_error(grad, exact_grads[name]) for name, grad in twin_grads.items()}
    worst = max(errors, key=errors.__getitem__)
    twins_output = relative_error(same[inputs.mask], theirs[inputs.mask])
    print(
        f"{size}, tied {tied}: logits {output:.1e} (twin's own {twins_output:.1e}); "
        f"gradients {errors[worst]:.1e} at {worst} (twin's own {max(own.values()):.1e}, there {own[worst]:.1e})"
    )
    assert output <= TOLERANCE
    assert errors[worst] <= TOLERANCE, worst


def test_cached_decoding_with_images_equals_the_full_forward_and_the_twins():
    twin = make_twin()
    params, config, _ = ours_from(twin)
    inputs = batch(config, (24, 16), 1, [17, 24])
    start = 20
    first = jax.tree.map(lambda x: x, inputs)._replace(
        ids=inputs.ids[1:, :start], mask=inputs.mask[1:, :start], positions=inputs.positions[:, 1:, :start],
        images=inputs.images[1:],
    )  # fmt: skip
    whole = vlm.Inputs(inputs.ids[1:], inputs.mask[1:], inputs.positions[:, 1:], inputs.images[1:])
    assert (whole.ids[:, start:] != IMAGE).all()
    full = np.asarray(jax.jit(lambda: vlm.logits(params, config, vlm.forward(params, config, whole)))())
    hidden, cache = jax.jit(functools.partial(vlm.prefill, config=config, slots=24))(params, inputs=first)
    steps = [hidden]
    extend = jax.jit(functools.partial(vlm.extend, config=config))
    for at in range(start, 24):
        hidden, cache = extend(params, ids=whole.ids[:, at : at + 1], cache=cache)
        steps.append(hidden)
    ours = np.asarray(vlm.logits(params, config, np.concatenate(steps, 1)))
    theirs, _ = run_twin(twin, whole, np.zeros_like(ours), torch.float64)
    errors = relative_error(ours, full), relative_error(ours, theirs)
    print("cached decoding: {:.1e} from the full forward, {:.1e} from the twin's".format(*errors))
    assert max(errors) <= TOLERANCE


def test_bfloat16_is_as_near_to_float32_as_the_twins():
    """Weights as published, in bfloat16, computed in bfloat16, against the same weights in float64."""
    twin = copy.deepcopy(make_twin()).to(torch.bfloat16)
    _, config, table = ours_from(copy.deepcopy(twin).float())
    inputs = batch(config, (24, 16), 1, [30, 30])
    tensors = {name: value.detach().float().numpy() for name, value in twin.named_parameters()}
    params = table.to_params({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
    config = VLMConfig.from_sizes(config.sizes(), compute_dtype="bfloat16")
    ours = jax.jit(lambda params: vlm.logits(params, config, vlm.forward(params, config, inputs)))(params)
    zero = np.zeros(ours.shape, np.float32)
    exact, _ = run_twin(twin, inputs, zero, torch.float64)
    theirs, _ = run_twin(twin, inputs, zero, torch.bfloat16)
    errors = [float(np.sqrt(np.mean((np.asarray(value) - exact) ** 2) / np.mean(exact**2))) for value in (ours, theirs)]
    print("bfloat16 logits, root mean square error {:.1e}, twin's own {:.1e}".format(*errors))
    assert 1e-4 < errors[0] <= 1.2 * errors[1]


def test_files_written_by_the_twin_load_and_go_back_byte_for_byte(tmp_path):
    """A folder saved by transformers, with a tokenizer, through the converter: same logits, same files."""
    twin = make_twin()
    twin.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    stream.import_weights("qwen3_5", tmp_path / "source", tmp_path / "ours")
    params, config, tokenizer = vlm.load(tmp_path / "ours", "float32")
    assert (tokenizer.image_id, tokenizer.vocabulary) == (IMAGE, 76)
    inputs = batch(config, (16, 24), 1, [20, 20])
    expected, config_in_memory, _ = ours_from(twin)
    assert config == config_in_memory
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
    ours = np.asarray(jax.jit(lambda: vlm.logits(params, config, vlm.forward(params, config, inputs)))())
    theirs, _ = run_twin(twin, inputs, np.zeros_like(ours), torch.float64)
    assert relative_error(ours, theirs) <= TOLERANCE
    stream.export_weights("qwen3_5", tmp_path / "ours", tmp_path / "back")
    for file in (tmp_path / "source").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    changed = (tmp_path / "ours" / "tokenizer.json").read_text().replace("<|image_pad|>", "<|x|>")
    changed = changed.replace("<|vision_end|>", "<|image_pad|>").replace("<|x|>", "<|vision_end|>")
    (tmp_path / "ours" / "tokenizer.json").write_text(changed)
    with pytest.raises(UserError, match="images are 72; the model has 80 and 70: they were not published together"):
        vlm.load(tmp_path / "ours")


def write_tokenizer(directory: Path) -> None:
    """A byte-pair tokenizer of 70 letters, laid out as the published one: special ids behind its pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789<|>_,.!?-ĠĊABCDEFGHIJKLMNOPQRSTUVWX"[:70]
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


def test_the_folders_tokenizer_is_the_public_one_and_text_yields_no_special_id(tmp_path):
    write_tokenizer(tmp_path)
    ours = FolderTokenizer(tmp_path)
    public = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert (ours.image_id, ours.vision_start_id, ours.end_id, ours.pad_id) == (70, 71, 74, 75)
    for text in ["press the red button", "lift it, then put it down!", "a\nb  c"]:
        assert ours.encode(text) == public(text)["input_ids"]
        assert ours.decode([ours.start_id, *ours.encode(text), ours.end_id]) == text
    assert ours.encode("") == []
    for name in ("<|image_pad|>", "<|im_end|>"):
        assert public(name)["input_ids"] in ([70], [74])
        assert max(ours.encode(name)) < 70
        assert ours.decode(ours.encode(name)) == name
    for images, seen in enumerate(["", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"]):
        text = f"<|im_start|>user\n{seen}press it<|im_end|>\n<|im_start|>assistant\n"
        assert prompt(ours, "press it", images, 2) == public(text)["input_ids"]


def test_a_damaged_tokenizer_and_another_models_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        FolderTokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has no <\|endoftext\|>; is it Qwen3\.5's"):
        FolderTokenizer(tmp_path)
