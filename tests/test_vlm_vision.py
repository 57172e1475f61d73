"""The vision half of the VLM without a twin: images stay apart, text round trips, mistakes are named."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models import param_axes
from wallwm_jax.models.convert import qwen3_5, qwen3_5_vision
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.vlm import images as pictures
from wallwm_jax.models.vlm import vision_tower, vlm
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.positions import multimodal_positions
from wallwm_jax.models.vlm.tokenizer import BytesTokenizer, FolderTokenizer, pad, prompt
from wallwm_jax.models.vlm.vision_tower import VisionConfig
from wallwm_jax.models.vlm.vlm import VLMConfig

# Two layers, one of each kind: what is asked here does not depend on their number, compile time does.
CONFIG = VLMConfig(
    LanguageConfig.tiny(depth=2, interval=2, width=32, ffn=48), VisionConfig.tiny(out_width=32), BytesTokenizer.image_id
)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENIZER = BytesTokenizer()
TEXTS = [
    "",
    "press the red button",
    "naïve café",
    "按下红色按钮",
    "🤖 ok\n\ttab",
    "<|image_pad|><|im_end|>",
    "\x00\x7f",
]


@functools.cache
def params() -> dict:
    """Every parameter drawn from a normal, so that no zero at the start hides a mistake."""
    rng = np.random.default_rng(0)
    leaves = vlm.abstract_params(CONFIG)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), leaves)


def batch(instructions=("press the red button", "lift it"), images: int = 2, size=(16, 32), seed: int = 0):
    """Inputs of a few rows with random images."""
    tokens = CONFIG.image_tokens(*size)
    ids, mask = pad(TOKENIZER, [prompt(TOKENIZER, text, images, tokens) for text in instructions])
    shape = (len(instructions), images, *size, 3)
    return vlm.prepare(CONFIG, ids, mask, np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@functools.cache
def jitted(name: str, **options):
    return jax.jit(functools.partial(getattr(vlm, name), **({"config": CONFIG} | options)), compiler_options=QUICK)


@functools.partial(jax.jit, compiler_options=QUICK)
def encode_images(images: jax.Array) -> jax.Array:
    return vision_tower.encode(params()["vision"], CONFIG.vision, images)


def test_a_changed_image_of_one_row_leaves_the_others_bit_unchanged():
    inputs = batch()
    poisoned = inputs.images.copy()
    poisoned[1, 0, :8, :8] += 100
    before, after = (np.asarray(jitted("forward")(params(), inputs=inputs._replace(images=images)))
                     for images in (inputs.images, poisoned))  # fmt: skip
    np.testing.assert_array_equal(after[0], before[0])
    first_image = int(np.flatnonzero(inputs.ids[1] == CONFIG.image_id)[0])
    np.testing.assert_array_equal(after[1, :first_image], before[1, :first_image])
    assert np.abs(after[1, first_image] - before[1, first_image]).max() > 1e-3


def test_images_attend_within_themselves_and_keep_their_order():
    images = pictures.normalise(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 16, 3), np.uint8))
    tokens = np.asarray(encode_images(images))
    assert tokens.shape == (1, 3, 2, 32)
    np.testing.assert_array_equal(np.asarray(encode_images(images[:, ::-1])), tokens[:, ::-1])
    changed = np.asarray(encode_images(jnp.asarray(images).at[0, 1].set(0.0)))
    np.testing.assert_array_equal(changed[0, [0, 2]], tokens[0, [0, 2]])
    assert np.abs(changed[0, 1] - tokens[0, 1]).max() > 1e-3


def test_image_tokens_stand_at_their_placeholders():
    inputs = batch()
    embedded = np.asarray(jitted("embed")(params(), inputs=inputs))
    encoded = encode_images(pictures.normalise(inputs.images))
    for row in range(2):
        is_image = inputs.ids[row] == CONFIG.image_id
        np.testing.assert_allclose(embedded[row, is_image], np.asarray(encoded[row]).reshape(-1, 32), atol=1e-5)
        text = params()["language"]["embedding"][inputs.ids[row, ~is_image]]
        np.testing.assert_array_equal(embedded[row, ~is_image], text)


def test_a_wrong_number_of_images_is_named():
    inputs = batch()
    for images, message in [
        (inputs.images[:, :1], r"row 0 has 4 image placeholders, but 1 images with 1 x 2 tokens each"),
        (None, r"row 0 has 4 image placeholders, but 0 images"),
        (inputs.images.repeat(2, 2), r"row 0 has 4 image placeholders, but 2 images with 2 x 2 tokens each"),
        (inputs.images[:, :, :12], r"images of 12 x 32 pixels: height and width must be multiples of 16"),
        (inputs.images.astype(np.float32), r"images float32\[2, 2, 16, 32, 3\]: uint8 \[2, images"),
        (inputs.images[:1], r"uint8\[1, 2, 16, 32, 3\]: uint8 \[2, images"),
    ]:
        with pytest.raises(UserError, match=message):
            vlm.prepare(CONFIG, inputs.ids, inputs.mask, images)
    swapped = inputs.ids.copy()
    first, last = np.flatnonzero(swapped[0] == CONFIG.image_id)[[0, -1]]
    swapped[0, [first - 1, last]] = swapped[0, [last, first - 1]]
    with pytest.raises(UserError, match=r"row 0, token 6: 3 image placeholders in a run; an image has 1 x 2 tokens"):
        vlm.prepare(CONFIG, swapped, inputs.mask, inputs.images)


def test_positions_count_on_from_the_longer_side_of_an_image():
    ids = np.array([[5, 9, 9, 9, 9, 9, 9, 6, 7]])
    positions, delta = multimodal_positions(ids, 9, (2, 3))
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    assert delta.tolist() == [6 - 9]


def forward_with(inputs: vlm.Inputs, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features `[B, S, D]` of the whole rows, each followed by `more [B, n]`; and where the prompts end, `[B]`."""
    rows = [[*ids[mask], *tail] for ids, mask, tail in zip(inputs.ids, inputs.mask, more)]
    whole = vlm.prepare(CONFIG, *pad(TOKENIZER, rows), inputs.images)
    return np.asarray(jitted("forward")(params(), inputs=whole)), inputs.mask.sum(1)


def test_cached_decoding_with_images_equals_the_full_forward():
    inputs = batch(("press it", "press the red button"))
    more = np.random.default_rng(1).integers(0, 256, (2, 3)).astype(np.int32)
    hidden, cache = jitted("prefill", slots=inputs.ids.shape[1] + 3)(params(), inputs=inputs)
    steps = []
    for token in more.T:
        step, cache = jitted("extend")(params(), ids=token[:, None], cache=cache)
        steps.append(step)
    full, ends = forward_with(inputs, more)
    for row, end in enumerate(ends):
        ours = np.concatenate([np.asarray(hidden)[row, :end], *(np.asarray(step)[row] for step in steps)])
        np.testing.assert_allclose(ours, full[row, : end + 3], atol=2e-5 * np.abs(full).max())


def test_greedy_generation_picks_the_likeliest_token_and_stops_at_the_end():
    inputs = batch(("press it", "press the red button"))
    run = jitted("generate", steps=3, pad_id=TOKENIZER.pad_id)
    free = np.asarray(run(params(), inputs=inputs, end_id=-1))
    assert CONFIG.image_id not in free
    full, ends = forward_with(inputs, free)
    scores = np.asarray(vlm.logits(params(), CONFIG, full))
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(np.argmax(scores[row, end - 1 : end + 2], -1), free[row])
    stopped = np.asarray(run(params(), inputs=inputs, end_id=int(free[0, 1])))
    kept = list(free[0]).index(free[0, 1]) + 1
    assert stopped[0].tolist() == [*free[0, :kept], *[TOKENIZER.pad_id] * (3 - kept)]


def test_bfloat16_is_close_to_float32():
    inputs = batch()
    exact = np.asarray(jitted("forward")(params(), inputs=inputs))
    config = VLMConfig.from_sizes(CONFIG.sizes(), compute_dtype="bfloat16")
    ours = jitted("forward", config=config)(params(), inputs=inputs)
    assert ours.dtype == jnp.bfloat16
    error = np.abs(np.asarray(ours, np.float32) - exact)[inputs.mask].max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05


def test_every_parameter_has_one_rule_and_the_blocks_are_muons():
    tree = {"vlm": vlm.abstract_params(CONFIG)}
    matrices = param_axes.map_params(lambda path, rule, leaf: rule.kind == param_axes.MATRIX, tree)["vlm"]["vision"]
    assert jax.tree.leaves(matrices["patch_embedding"]) == [False, False]
    assert matrices["blocks"]["qkv"] == {"kernel": True, "bias": False}
    assert matrices["blocks"]["ffn"]["down"] == {"kernel": True, "bias": False}
    assert not any(jax.tree.leaves(matrices["merger"]))


def test_bytes_round_trip_and_no_text_yields_a_special_id():
    rng = np.random.default_rng(0)
    codes = np.setdiff1d(np.arange(0x110000), np.arange(0xD800, 0xE000))
    for text in [*TEXTS, *("".join(map(chr, rng.choice(codes, 12))) for _ in range(200))]:
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert max(ids, default=0) < 256
    assert TOKENIZER.decode([256, *TOKENIZER.encode("é")[:1], 111, 261]) == "o"
    assert TOKENIZER.vocabulary == 262 <= CONFIG.language.vocabulary


def test_the_prompt_is_the_published_turn():
    ids = prompt(TOKENIZER, " press \n", images=2, image_tokens=3)
    image = [TOKENIZER.vision_start_id, *[TOKENIZER.image_id] * 3, TOKENIZER.vision_end_id]
    assert ids == [
        TOKENIZER.start_id, *b"user\n", *image, *image, *b"press", TOKENIZER.end_id, *b"\n",
        TOKENIZER.start_id, *b"assistant\n",
    ]  # fmt: skip
    rows, mask = pad(TOKENIZER, [ids, [1, 2]], length=len(ids) + 1)
    assert rows[1].tolist() == [1, 2] + [TOKENIZER.pad_id] * (len(ids) - 1)
    assert mask.sum(1).tolist() == [len(ids), 2]
    with pytest.raises(UserError, match=f"a text of {len(ids)} tokens is longer than the 4 there is room for"):
        pad(TOKENIZER, [ids], length=4)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer '.*tokenizer\.json'; copy"):
        FolderTokenizer(tmp_path)


def test_images_are_fitted_to_multiples_of_a_token_within_the_area_limits():
    sizes = {(128, 128): (256, 256), (480, 640): (480, 640), (100, 300): (160, 448), (5000, 5000): (4096, 4096)}
    for size, expected in sizes.items():
        assert pictures.model_size(*size, 32) == expected
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 50, 3), np.uint8)
    fitted = pictures.fit(images, 16, min_pixels=1)
    assert (fitted.shape, fitted.dtype) == ((2, 3, 16, 48, 3), np.uint8)
    np.testing.assert_array_equal(pictures.fit(images[1, 2], 16, min_pixels=1), fitted[1, 2])
    assert pictures.fit(fitted, 16, min_pixels=1) is fitted
    with pytest.raises(UserError, match="one side may be at most 200 times the other"):
        pictures.model_size(1, 201, 32)
    with pytest.raises(UserError, match=r"images float64\[2, 2, 3\]: uint8"):
        pictures.fit(np.zeros((2, 2, 3)), 16)


def test_published_sizes_give_the_published_numbers_of_parameters():
    """Qwen3.5-0.8B: 873,438,784 values in 488 tensors, of them 752,393,024 in the language model; and the tower of the
    larger models, here with tokens 2560 wide: 448,931,056 values in 333 tensors."""
    config = dict(
        model_type="qwen3_5", image_token_id=248056, tie_word_embeddings=True,
        text_config=dict(
            vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24,
            full_attention_interval=4, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
            linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
            linear_conv_kernel_dim=4, mtp_num_hidden_layers=1,
            rope_parameters=dict(mrope_section=[11, 11, 10], rope_theta=1e7, partial_rotary_factor=0.25),
        ),
        vision_config=dict(
            depth=12, hidden_size=768, num_heads=12, intermediate_size=3072, patch_size=16, temporal_patch_size=2,
            spatial_merge_size=2, out_hidden_size=1024, num_position_embeddings=2304,
        ),
    )  # fmt: skip
    table = qwen3_5.table({"mtp.fc.weight": ()}, config)
    language = Table("", {}, tuple(rule for rule in table.rules if rule.path.startswith("language/")))
    tower = Table("", {}, tuple(qwen3_5_vision.vision_rules(VisionConfig(out_width=2560))))
    counts = [(part.parameters(), sum(len(rule.names()) for rule in part.rules)) for part in (table, language, tower)]
    assert counts == [(873_438_784, 488), (752_393_024, 320), (448_931_056, 333)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"deepstack_visual_indexes": [5, 11]}, r"deepstack_visual_indexes = \[5, 11\] is not supported"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta = 500000.0 is not supported"),
        ({"depth": None}, "config.json has no 'depth'"),
        ({"num_position_embeddings": 2300}, "must be a square"),
        ({"num_heads": 7}, "width 1152 over 7 heads"),
    ],
)
def test_other_towers_are_refused(change, message):
    published = dict(
        depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, in_channels=3, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=4096, num_position_embeddings=2304,
        deepstack_visual_indexes=[], hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    assert VisionConfig.from_json(published) == VisionConfig()
    with pytest.raises(UserError, match=message):
        VisionConfig.from_json(published | change)
