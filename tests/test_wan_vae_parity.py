"""The Wan autoencoders are the same functions as diffusers' `AutoencoderKLWan`, at random weights and small widths.

`error` is the largest absolute difference over the largest absolute value. Forward passes have the published structure
(stages, blocks per stage, shortcuts) at small widths; gradients, which compile long, have three stages of one block.
Names and shapes are tested at the published widths.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models.codecs import get_codec, wan_vae
from wallwm_jax.models.codecs.wan_codec import LAYOUTS
from wallwm_jax.models.convert import wan_vae as conversion
from wallwm_jax.models.convert.stream import import_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
PUBLISHED = {
    "wan21": {"base_dim": 96, "z_dim": 16},
    "wan22": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": list(LAYOUTS["wan22"].latent_mean),
        "latents_std": list(LAYOUTS["wan22"].latent_std),
    },
}
SMALL = {"wan21": {"base_dim": 8}, "wan22": {"base_dim": 8, "decoder_base_dim": 12}}
SHORT = {"dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    torch.set_num_threads(1)


def make_twins(sizes):
    """(diffusers' model, our config, our parameters) with equal random weights; checks the round trip of names."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**sizes)
    for name, parameter in theirs.requires_grad_(False).named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    table = conversion.table(shapes, published_config(theirs))
    table.check(shapes, "random weights")
    assert all(np.array_equal(tensors[name], back) for name, back in table.to_tensors(table.to_params(tensors)).items())
    params = jax.tree.map(jnp.asarray, table.to_params(tensors))
    return theirs, wan_vae.from_sizes(table.sizes), params


@pytest.fixture(scope="module", params=["wan21", "wan22"])
def twins(request):
    return make_twins({**PUBLISHED[request.param], **SMALL[request.param]})


def published_config(model):
    """What its config.json holds."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def random_frames(config, count, cells):
    side = config.stride[1]
    shape = (2, count, cells[0] * side, cells[1] * side, 3)
    return np.random.default_rng(count).uniform(-1, 1, shape).astype(np.float32)


def random_latents(config, count, cells):
    return np.random.default_rng(count).normal(size=(2, count, *cells, config.latent_channels)).astype(np.float32)


def to_torch(video):
    return torch.tensor(video).permute(0, 4, 1, 2, 3)


def to_numpy(video):
    return video.detach().permute(0, 2, 3, 4, 1).numpy()


def error(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


ENCODE_STEP = jax.jit(wan_vae.encode_chunk, static_argnums=1)
DECODE_STEP = jax.jit(wan_vae.decode_chunk, static_argnums=1)


def stream(step, params, config, video, chunk):
    """`step` over the first frame and then `chunk` at a time; results joined over time."""
    result, cache = step(params, config, video[:, :1])
    results = [result]
    for start in range(1, video.shape[1], chunk):
        result, cache = step(params, config, video[:, start : start + chunk], cache)
        results.append(result)
    return jax.tree.map(lambda *parts: np.concatenate(parts, 1), *results)


@pytest.mark.parametrize("count", [1, 5, 9, 13, 17])
def test_encoding_any_number_of_frames(twins, count):
    theirs, config, params = twins
    frames = random_frames(config, count, (3, 5))
    expected = theirs.encode(to_torch(frames)).latent_dist
    posterior = stream(ENCODE_STEP, params, config, frames, 4)
    assert posterior.mean.shape == (2, 1 + count // 4, 3, 5, config.latent_channels)
    assert error(posterior.mean, to_numpy(expected.mode())) <= TOLERANCE
    assert error(posterior.log_variance, to_numpy(expected.logvar)) <= TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_decoding_any_number_of_latents(twins, count):
    theirs, config, params = twins
    latents = random_latents(config, count, (3, 5))
    expected = to_numpy(theirs.decode(to_torch(latents)).sample)
    frames = stream(DECODE_STEP, params, config, latents, 1)
    assert frames.shape == (2, 1 + 4 * (count - 1), 3 * config.stride[1], 5 * config.stride[1], 3)
    assert error(frames, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_scans_and_their_gradients(name):
    """Three latents, so that the gradient passes through the cache from chunk to chunk; cells 4 by 1."""
    theirs, config, params = make_twins({**PUBLISHED[name], **SMALL[name], **SHORT})
    frames, latents = random_frames(config, 9, (4, 1)), 0.5 * random_latents(config, 3, (4, 1))
    weights = [np.random.default_rng(n).normal(size=(2, 3, 4, 1, config.latent_channels)) for n in range(2)]
    weights = [weight.astype(np.float32) for weight in weights]
    frame_weights = random_frames(config, 9, (4, 1))

    @jax.jit
    def encoded(params, frames):
        def score(frames):
            posterior = wan_vae.encode(params, config, frames)
            return sum(jnp.sum(weight * part) for weight, part in zip(weights, posterior)), posterior

        return jax.grad(score, has_aux=True)(frames)

    gradient, posterior = encoded(params, frames)
    pixels = torch.tensor(frames, requires_grad=True)
    expected = theirs.encode(pixels.permute(0, 4, 1, 2, 3)).latent_dist
    sum((to_torch(weight) * part).sum() for weight, part in zip(weights, (expected.mean, expected.logvar))).backward()
    assert error(posterior.mean, to_numpy(expected.mean)) <= TOLERANCE
    assert error(posterior.log_variance, to_numpy(expected.logvar)) <= TOLERANCE
    assert error(gradient, pixels.grad.numpy()) <= TOLERANCE

    @jax.jit
    def decoded(params, latents):
        def score(latents):
            video = wan_vae.decode(params, config, latents)
            return jnp.sum(frame_weights * video), video

        return jax.grad(score, has_aux=True)(latents)

    gradient, video = decoded(params, latents)
    cells = torch.tensor(latents, requires_grad=True)
    expected = theirs.decode(cells.permute(0, 4, 1, 2, 3)).sample
    (to_torch(frame_weights) * expected).sum().backward()
    assert error(video, to_numpy(expected)) <= TOLERANCE
    assert error(gradient, cells.grad.numpy()) <= TOLERANCE


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_tables_of_the_published_sizes(name):
    """Every tensor of the published widths has its place in both layouts; sizes are found without config.json, too."""
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**PUBLISHED[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    table = conversion.table(shapes, published_config(theirs))
    table.check(shapes, name)
    assert table.layout == "diffusers"
    assert table.parameters() == {"wan21": 126_892_531, "wan22": 704_688_668}[name]
    assert wan_vae.from_sizes(table.sizes) == wan_vae.PUBLISHED[name]
    ours = jax.eval_shape(lambda: wan_vae.init(wan_vae.PUBLISHED[name], jax.random.key(0)))
    flat = {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(ours)}
    assert flat == {rule.path: rule.target_shape() for rule in table.rules}

    original = conversion._rules(table.sizes, "original")
    assert [rule.path for rule in original] == [rule.path for rule in table.rules]
    there = {rule.source: rule.shape for rule in original}
    again = conversion.table(there, {})
    again.check(there, name)
    assert (again.layout, again.sizes, again.rules) == ("original", table.sizes, original)


def test_original_names_of_wan21_are_those_that_diffusers_converts():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    sizes = dataclasses.asdict(wan_vae.PUBLISHED["wan21"])
    names = {layout: [rule.source for rule in conversion._rules(sizes, layout)] for layout in ("original", "diffusers")}
    converted = convert_wan_vae_to_diffusers({name: name for name in names["original"]})
    assert converted == dict(zip(names["diffusers"], names["original"]))


def test_original_names_of_wan22():
    """Diffusers does not read these; the names are those of the published Wan2.2_VAE file."""
    sizes = dataclasses.asdict(wan_vae.PUBLISHED["wan22"])
    rules = {rule.source: rule.path for rule in conversion._rules(sizes, "original")}
    for source, path in {
        "conv1.weight": "encoder/moments/kernel",
        "conv2.bias": "decoder/latents/bias",
        "encoder.conv1.weight": "encoder/conv_in/kernel",
        "encoder.downsamples.0.downsamples.0.residual.2.weight": "encoder/stages/0/blocks/0/conv_1/kernel",
        "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder/stages/1/blocks/0/shortcut/kernel",
        "encoder.downsamples.0.downsamples.2.resample.1.weight": "encoder/stages/0/downsample/conv/kernel",
        "encoder.downsamples.2.downsamples.2.time_conv.weight": "encoder/stages/2/downsample/time_conv/kernel",
        "encoder.downsamples.3.downsamples.1.residual.6.weight": "encoder/stages/3/blocks/1/conv_2/kernel",
        "encoder.middle.1.to_qkv.weight": "encoder/middle/attention/qkv/kernel",
        "decoder.upsamples.0.upsamples.3.time_conv.weight": "decoder/stages/0/upsample/time_conv/kernel",
        "decoder.upsamples.1.upsamples.2.residual.6.bias": "decoder/stages/1/blocks/2/conv_2/bias",
        "decoder.head.2.weight": "decoder/conv_out/kernel",
    }.items():
        assert rules[source] == path


def test_a_wrong_file_is_named():
    sizes = dataclasses.asdict(wan_vae.PUBLISHED["wan21"])
    shapes = {rule.source: rule.shape for rule in conversion._rules(sizes, "diffusers")}
    with pytest.raises(UserError, match="not the tensors of a Wan video autoencoder"):
        conversion.table({"blocks.0.attn1.to_q.weight": (8, 8)}, {})
    with pytest.raises(UserError, match="latents_mean is not that of wan21"):
        conversion.table(shapes, {"latents_mean": [0.0] * 16})
    with pytest.raises(UserError, match="attn_scales"):
        conversion.table(shapes, {"attn_scales": [0.5]})
    missing = {name: shape for name, shape in shapes.items() if name != "encoder.conv_in.weight"}
    with pytest.raises(UserError, match=r"missing tensor 'encoder\.conv_in\.weight'"):
        conversion.table(missing, {})


def test_published_statistics():
    """Those of Wan 2.1 are diffusers' defaults; those of Wan 2.2 stand in the config.json of its weights."""
    defaults = inspect.signature(diffusers.AutoencoderKLWan.__init__).parameters
    assert list(LAYOUTS["wan21"].latent_mean) == defaults["latents_mean"].default
    assert list(LAYOUTS["wan21"].latent_std) == defaults["latents_std"].default
    mean, std = LAYOUTS["wan22"].latent_mean, LAYOUTS["wan22"].latent_std
    assert (len(mean), mean[0], mean[19], mean[47]) == (48, -0.2289, 0.5109, -0.0667)
    assert (len(std), std[0], std[39], std[47]) == (48, 0.4765, 1.6887, 0.7744)


def test_codec_from_a_weight_folder(twins, tmp_path):
    """The way of a user: published folder, `convert wan_vae`, `get_codec` with the converted folder."""
    pytest.importorskip("safetensors")
    theirs, config, _ = twins
    theirs.save_pretrained(tmp_path / "published" / "vae")
    import_weights("wan_vae", tmp_path / "published", tmp_path / "converted")
    name, other = ("wan21", "wan22") if config.latent_channels == 16 else ("wan22", "wan21")
    frame = np.random.default_rng(0).integers(0, 256, (1, 3 * config.stride[1], 5 * config.stride[1], 3), np.uint8)
    expected = theirs.encode(to_torch(frame[None] / np.float32(127.5) - 1)).latent_dist.mode()
    latents = get_codec(name, str(tmp_path / "converted")).encode(frame)
    assert error(latents, to_numpy(expected)[0]) <= TOLERANCE
    with pytest.raises(UserError, match=f"{config.latent_channels} channels; codec '{other}' has"):
        get_codec(other, str(tmp_path / "converted")).encode(frame)
