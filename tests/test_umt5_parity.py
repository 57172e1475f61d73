"""The UMT5 encoder is transformers' UMT5EncoderModel: features and all gradients; its tokenizer is the public one.

The twin runs in float64 and in float32: ours is held against the first, and against the second with
its own error added.
"""

from __future__ import annotations

import copy
import functools
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models.convert import stream
from wallwm_jax.models.convert import umt5 as names
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.text import umt5
from wallwm_jax.models.text.sentence_pieces import MODEL_FILE, Tokenizer, clean

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")
sentencepiece = pytest.importorskip("sentencepiece", reason="needs the parity extra")

transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # relative to the largest value of the tensor, float32
VOCABULARY = 120
# What a test runs once need not be optimised: half the compile time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CAPTIONS = [
    "",
    "press the red button on the left",
    "reach for the green block",
    "lift it",
    "place the block on the right, slowly and with care, then release it and retract",
]


@functools.cache
def make_twin() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=3, attn_implementation="eager"
    )
    twin = transformers.UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return twin


def ours_from(twin: torch.nn.Module) -> tuple[dict, umt5.UMT5Config, Table]:
    tensors = {name: value.detach().numpy() for name, value in twin.named_parameters()}
    table = names.table({name: value.shape for name, value in tensors.items()}, twin.config.to_dict())
    params, config = table.to_params(tensors), umt5.config_from_sizes(table.sizes, "float32")
    expected = jax.tree.map(lambda leaf: leaf.shape, umt5.abstract_params(config))
    assert jax.tree.map(np.shape, params) == expected
    return params, config, table


def masks(length: int, rng: np.random.Generator) -> np.ndarray:
    """Rows `[5, L]`: all text; right-padded at random; one token; left-padded; random holes."""
    rows = np.ones((5, length), bool)
    rows[1, rng.integers(1, length + 1) :] = False
    rows[2, 1:] = False
    rows[3, : length // 2] = False
    rows[4] = rng.random(length) < 0.6
    rows[4, rng.integers(length)] = True
    return rows


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    scale = np.abs(theirs).max() or 1.0  # one key alone has no gradient in its query and key
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / scale)


def run_twin(
    ids: np.ndarray, mask: np.ndarray, cotangent: np.ndarray, dtype: torch.dtype
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features, and gradients of sum(features * cotangent) by name, that of the embedded ids under "input"."""
    twin = copy.deepcopy(make_twin()).to(dtype)
    embedded = twin.shared(torch.tensor(ids)).detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", dtype)  # its norms ask for float32 by name
        output = twin(inputs_embeds=embedded, attention_mask=torch.tensor(mask.astype(np.int64))).last_hidden_state
    assert output.dtype == dtype
    (output * torch.tensor(cotangent)).sum().backward()
    grads = {name: value.grad.numpy() for name, value in twin.named_parameters() if value.grad is not None}
    grads["input"] = embedded.grad.numpy()
    grads["shared.weight"] = rows_to_table(grads["input"], ids)
    return output.detach().numpy(), grads


def rows_to_table(input_grad: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Gradient of the embedding `[vocabulary, D]` from that of every embedded id."""
    table = np.zeros((VOCABULARY, input_grad.shape[-1]), input_grad.dtype)
    np.add.at(table, ids, input_grad)
    return table


@pytest.mark.parametrize("length", [1, 7, 40, 200])
def test_features_and_gradients_equal_the_twins(length):
    params, config, table = ours_from(make_twin())
    rng = np.random.default_rng(length)
    mask = masks(length, rng)
    ids = rng.integers(0, VOCABULARY, mask.shape)
    cotangent = rng.normal(size=(*mask.shape, 24)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: dict, mask: jax.Array, cotangent: jax.Array) -> tuple:
        each = np.arange(mask.size).reshape(mask.shape)
        value, pull = jax.vjp(lambda params: umt5.encode(params, config, each, mask), params)
        return value, pull(cotangent)[0]

    rows = {**params, "embedding": params["embedding"][ids.reshape(-1)]}  # a row per position: gradient of the input
    ours, grads = jax.device_get(run(rows, mask, cotangent))
    input_grad = grads["embedding"].reshape(*ids.shape, -1)
    grads = {**table.to_tensors({**grads, "embedding": rows_to_table(input_grad, ids)}), "input": input_grad}

    theirs, exact_grads = run_twin(ids, mask, cotangent, torch.float64)
    same, twin_grads = run_twin(ids, mask, cotangent, torch.float32)
    assert grads.keys() == exact_grads.keys()
    errors = {name: relative_error(grad, exact_grads[name]) for name, grad in grads.items()}
    twin_errors = {name: relative_error(grad, exact_grads[name]) for name, grad in twin_grads.items()}
    output, worst = relative_error(ours, theirs), max(errors, key=errors.__getitem__)
    print(
        f"length {length}: features {output:.1e} (twin's own {relative_error(same, theirs):.1e}); "
        f"gradients {errors[worst]:.1e} at {worst} (twin's own {max(twin_errors.values()):.1e})"
    )
    assert output <= TOLERANCE
    assert errors[worst] <= TOLERANCE, worst
    for name, grad in grads.items():
        assert relative_error(grad, twin_grads[name]) <= TOLERANCE + twin_errors[name], name


def test_bfloat16_compute_is_as_near_to_float32_as_the_twins():
    twin = copy.deepcopy(make_twin()).to(torch.bfloat16)
    table = ours_from(twin.float())[2]
    tensors = {name: value.detach().numpy().astype(ml_dtypes.bfloat16) for name, value in twin.named_parameters()}
    ids = np.arange(30)[None] % VOCABULARY
    exact = twin(torch.tensor(ids)).last_hidden_state.detach().numpy()
    theirs = twin.to(torch.bfloat16)(torch.tensor(ids)).last_hidden_state.detach().float().numpy()
    config = umt5.config_from_sizes(table.sizes, "bfloat16")
    ours = umt5.encode(table.to_params(tensors), config, ids, np.ones_like(ids, bool))
    errors = relative_error(ours, exact), relative_error(theirs, exact)
    print("bfloat16 features error {:.1e}, twin's own {:.1e}".format(*errors))
    assert ours.dtype == jnp.bfloat16
    assert 1e-4 < errors[0] <= 1.5 * errors[1]


def test_position_buckets_equal_the_twins_at_every_distance():
    attention = make_twin().encoder.block[0].layer[0].SelfAttention
    offset = torch.arange(512)[None] - torch.arange(512)[:, None]
    np.testing.assert_array_equal(umt5.position_buckets(512, 32, 128), attention._relative_position_bucket(offset))


def test_published_sizes_give_the_published_number_of_parameters():
    """UMT5-XXL's encoder has 5.68 billion parameters."""
    leaves = jax.tree.leaves(umt5.abstract_params(umt5.UMT5Config()))
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336


def test_original_names_hold_the_same_weights():
    params, _, table = ours_from(make_twin())
    sizes = {**table.sizes, "head_dim": 64, "heads": 1}
    tensors = {rule.source: rule.shape for rule in names._rules(names._ORIGINAL, sizes)}
    shapes = {name.format(layer): shape for name, shape in tensors.items() for layer in range(3)}
    original = names.table(shapes, {})
    assert original.layout == "original"
    assert original.sizes == sizes
    assert [rule.path for rule in original.rules] == [rule.path for rule in table.rules]
    assert "blocks.2.ffn.gate.0.weight" in shapes
    assert params["blocks"]["gate"]["kernel"].shape == (3, 24, 40)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a SentencePiece model of 120 pieces, trained on a few captions, ids as UMT5 numbers them."""
    directory = tmp_path_factory.mktemp("tokenizer")
    text = directory / "captions.txt"
    text.write_text("\n".join(CAPTIONS[1:] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "spiece"), vocab_size=VOCABULARY, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert (directory / MODEL_FILE).is_file()
    return directory


def test_ids_equal_the_public_tokenizers(weights):
    tokenizer, public = Tokenizer(weights), transformers.T5Tokenizer.from_pretrained(str(weights), extra_ids=0)
    for caption in CAPTIONS:
        ids, count = tokenizer.encode(f" {caption}  ", 24)
        expected = public(clean(caption), padding="max_length", max_length=24, truncation=True)
        assert ids.tolist() == expected["input_ids"], caption
        assert count == sum(expected["attention_mask"])


def test_the_end_id_is_kept_and_text_is_cleaned(weights):
    tokenizer = Tokenizer(weights)
    assert tokenizer.encode("", 3)[0].tolist() == [1, 0, 0]
    ids, count = tokenizer.encode(CAPTIONS[-1], 4)
    assert (count, ids[-1]) == (4, 1)
    assert clean("  red &amp;amp; blue\n\tblock ") == "red & blue block"


def test_captions_are_encoded_unpadded_and_as_the_twin_encodes_them_padded(weights):
    twin = make_twin()
    params, config, _ = ours_from(twin)
    encoder = umt5.CaptionEncoder(params, config, Tokenizer(weights), max_length=40)
    features = encoder.encode(CAPTIONS, batch=2)
    for caption, feature in zip(CAPTIONS, features):
        ids, count = Tokenizer(weights).encode(caption, 40)
        mask = torch.tensor((np.arange(40) < count).astype(np.int64))[None]
        theirs = twin(torch.tensor(ids.astype(np.int64))[None], attention_mask=mask).last_hidden_state[0, :count]
        assert feature.dtype == ml_dtypes.bfloat16
        assert feature.shape == (count, 24)
        assert relative_error(feature, theirs.detach().numpy()) <= 2**-8  # the rounding of the stored features


def test_converted_weights_encode_captions(tmp_path, weights):
    """From the public model's own files to features, through the converter."""
    twin = copy.deepcopy(make_twin()).to(torch.bfloat16)
    twin.save_pretrained(tmp_path / "source")
    shutil.copy(weights / MODEL_FILE, tmp_path / "source")
    stream.import_weights("umt5", tmp_path / "source", tmp_path / "ours")
    features = umt5.CaptionEncoder.from_directory(tmp_path / "ours").encode(CAPTIONS[:2])
    table = ours_from(twin.float())[2]
    tensors = {name: value.detach().numpy().astype(ml_dtypes.bfloat16) for name, value in twin.named_parameters()}
    config = umt5.config_from_sizes(table.sizes, "bfloat16")
    expected = umt5.CaptionEncoder(table.to_params(tensors), config, Tokenizer(weights)).encode(CAPTIONS[:2])
    for ours, theirs in zip(features, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_folder_without_a_tokenizer_is_named(tmp_path, weights):
    with pytest.raises(UserError, match=r"no tokenizer .*spiece\.model"):
        Tokenizer(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path)
    params = ours_from(make_twin())[0]
    with pytest.raises(UserError, match="were not published together"):
        umt5.CaptionEncoder(params, umt5.config_from_sizes({"vocabulary": 8}), Tokenizer(weights))
