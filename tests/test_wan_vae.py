"""Wan's autoencoders at work: any chunking gives the same result in constant memory; batches, streams and bad input.

`tests/test_wan_vae_parity.py` holds the functions themselves against the public implementation.
"""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models.codecs import get_codec, wan_vae

# Three stages of one block, each with every kind of resampling and shortcut that the published ones have.
SHORT = dict(encoder_width=4, decoder_width=6, multipliers=(1, 2, 2), blocks=1, over_time=(True, True))
ROUNDING = 1e-5
KINDS = {
    "wan21": wan_vae.WanVaeConfig(**SHORT, latent_channels=3, averaging=False, patch=1),
    "wan22": wan_vae.WanVaeConfig(**SHORT, latent_channels=6, averaging=True, patch=2),
}


def make_codec(kind, **changes):
    config = dataclasses.replace(KINDS[kind], **changes)
    return wan_vae.BatchCodec(config, wan_vae.init(config, jax.random.key(0)), batch=2, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def codec():
    return make_codec("wan22")


def random_frames(config, *shape):
    side = config.stride[1]
    *lead, rows, columns = shape
    return np.random.default_rng(0).uniform(-1, 1, (*lead, rows * side, columns * side, 3)).astype(np.float32)


def error(values, reference):
    return float(np.abs(np.asarray(values) - np.asarray(reference)).max() / np.abs(np.asarray(reference)).max())


def root_mean_square_error(values, reference):
    return float(np.sqrt(np.mean(np.square(values - reference)) / np.mean(np.square(reference))))


@pytest.mark.extended
@pytest.mark.parametrize("kind", KINDS)
def test_all_later_frames_at_once_equal_chunks_of_four(kind):
    codec = make_codec(kind)
    params, config = codec._params, codec.config
    frames = random_frames(config, 2, 13, 2, 2)
    latents = codec.encode(frames)
    assert latents.shape == (2, 4, 2, 2, config.latent_channels)
    first, cache = wan_vae._encode_step(params, config, frames[:, :1], None)
    rest, _ = wan_vae._encode_step(params, config, frames[:, 1:], cache)
    assert error(latents, np.concatenate([first, rest], 1)) <= ROUNDING

    decoded = codec.decode(latents)
    assert decoded.shape == frames.shape
    first, cache = wan_vae._decode_step(params, config, latents[:, :1], None)
    rest, _ = wan_vae._decode_step(params, config, latents[:, 1:], cache)
    assert error(decoded, np.concatenate([first, rest], 1)) <= ROUNDING


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_scan_needs_no_more_memory_for_more_frames(codec, direction):
    inputs = random_frames(codec.config, 2, 9, 2, 2)
    inputs = codec.encode(inputs) if direction == "decode" else inputs
    scan = jax.jit(getattr(wan_vae, direction), static_argnums=1)

    def program(length):
        shape = jax.ShapeDtypeStruct((2, length, *inputs.shape[2:]), jnp.float32)
        return scan.lower(codec._params, codec.config, shape).compile()

    short, long = program(inputs.shape[1]), program({"encode": 65, "decode": 17}[direction])
    memory = [each.memory_analysis() for each in (short, long)]
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes > 0
    assert memory[0].output_size_in_bytes < memory[1].output_size_in_bytes < 8 * memory[0].output_size_in_bytes
    result = short(codec._params, inputs)
    expected = getattr(codec, direction)(inputs)
    assert error(result.mean if direction == "encode" else result, expected) <= ROUNDING


def test_a_stream_of_any_length_needs_two_programs(codec):
    for program in (wan_vae._encode_step, wan_vae._decode_step):
        program.clear_cache()
    for count in (1, 5, 9, 17, 33):
        latents = codec.encode(random_frames(codec.config, 2, count, 2, 2))
        assert codec.decode(latents).shape == (2, count, 16, 16, 3)
    assert wan_vae._encode_step._cache_size() == 2
    assert wan_vae._decode_step._cache_size() == 2


def test_latents_depend_on_no_later_frame(codec):
    frames = random_frames(codec.config, 13, 2, 2)
    reference = codec.encode(frames)
    for frame, first_latent in ((1, 1), (4, 1), (5, 2), (12, 3)):
        changed = frames.copy()
        changed[frame:] += 0.3
        latents = codec.encode(changed)
        assert np.array_equal(latents[:first_latent], reference[:first_latent])
        assert np.abs(latents[first_latent] - reference[first_latent]).max() > 1e-4


def test_batches_are_the_single_videos(codec):
    """Five videos in batches of two: three times the same program, and the last one padded."""
    frames = random_frames(codec.config, 5, 1, 9, 2, 2)
    latents = codec.encode(frames)
    assert latents.shape == (5, 1, 3, 2, 2, 6) and latents.dtype == np.float32
    assert max(error(codec.encode(video), one) for video, one in zip(frames, latents)) <= ROUNDING
    decoded = codec.decode(latents)
    assert decoded.shape == frames.shape and np.abs(decoded).max() <= 1
    assert max(error(codec.decode(one), video) for one, video in zip(latents, decoded)) <= ROUNDING


def test_videos_of_different_lengths_share_batches(codec):
    videos = [random_frames(codec.config, count, 2, 2) for count in (9, 1, 17, 5, 5)]
    results = list(codec.encode_videos(iter(videos)))
    assert [len(result) for result in results] == [3, 1, 5, 2, 2]
    assert max(error(result, codec.encode(video)) for result, video in zip(results, videos)) <= ROUNDING
    with pytest.raises(UserError, match=r"frames of \(16, 16\) and \(8, 16\) pixels together"):
        list(codec.encode_videos([videos[0], random_frames(codec.config, 5, 1, 2)]))


def test_uint8_is_scaled_to_minus_one_to_one(codec):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert error(codec.encode(frames), codec.encode(frames.astype(np.float32) / 127.5 - 1)) <= ROUNDING


def test_bfloat16_stays_close(codec):
    quick = make_codec("wan22", compute_dtype="bfloat16")
    frames = random_frames(codec.config, 2, 9, 2, 2)
    latents = codec.encode(frames)
    assert 1e-4 < root_mean_square_error(quick.encode(frames), latents) <= 0.03
    assert 1e-4 < root_mean_square_error(quick.decode(latents), codec.decode(latents)) <= 0.03


@pytest.mark.extended
def test_batches_are_spread_over_devices():
    code = """
import jax, numpy as np
from test_wan_vae import KINDS, ROUNDING, error, random_frames
from wallwm_jax.models.codecs import wan_vae
jax.config.update("jax_disable_most_optimizations", True)
config = KINDS["wan21"]
params = wan_vae.init(config, jax.random.key(0))
frames = random_frames(config, 3, 5, 2, 2)
codec = wan_vae.BatchCodec(config, params, batch=2)
latents = codec.encode(frames)
assert len(jax.devices()) == 4
assert codec._params["encoder"]["conv_in"]["bias"].sharding.device_set == set(jax.devices())
assert max(error(codec.encode(video), one) for video, one in zip(frames, latents)) <= ROUNDING
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(__file__), env=environment)


def test_layout_is_known_without_weights_and_without_jax():
    code = """
import sys
from wallwm_jax.models.codecs import get_codec
codec = get_codec("wan22")
assert (codec.name, codec.stride, codec.channels) == ("wan22", (4, 16, 16), 48)
assert codec.latent_mean.shape == codec.latent_std.shape == (48,) and codec.latent_std.min() > 0.3
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (get_codec("wan21").stride, get_codec("wan21").channels) == ((4, 8, 8), 16)
    assert {name: config.stride for name, config in wan_vae.PUBLISHED.items()} == {
        "wan21": (4, 8, 8),
        "wan22": (4, 16, 16),
    }


def test_wrong_input_is_one_clear_line(codec):
    with pytest.raises(UserError, match="codec 'wan22' needs its weights"):
        get_codec("wan22").encode(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="computes in float32 or bfloat16, not 'float16'"):
        get_codec("wan21", compute_dtype="float16")
    with pytest.raises(UserError, match=r"6 frames; the causal layout needs 1 \+ 4N"):
        codec.encode(np.zeros((6, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="60x64 pixels do not divide into cells of 8x8"):
        codec.encode(np.zeros((5, 60, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"expected \[..., 1\+4N, H, W, 3\]"):
        codec.encode(np.zeros((5, 64, 64), np.uint8))
    with pytest.raises(UserError, match=r"expected \[..., 1\+N, h, w, 6\]"):
        codec.decode(np.zeros((5, 8, 8, 16), np.float32))
