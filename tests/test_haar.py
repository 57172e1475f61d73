"""The Haar codec: exact inverse, causal in time, orthonormal, with the documented layout of channels."""

import subprocess
import sys

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.models.codecs import get_codec


@pytest.mark.parametrize(
    ("name", "lead", "count", "height", "width"),
    [
        ("haar8", (), 1, 8, 8),
        ("haar8", (3,), 17, 64, 64),
        ("haar8", (2, 3), 5, 24, 16),
        ("haar4", (1, 2, 2), 9, 12, 20),
        ("haar16", (2,), 13, 32, 48),
    ],
)
def test_decode_inverts_encode(name, lead, count, height, width):
    rng = np.random.default_rng(count * height)
    frames = rng.uniform(-1, 1, (*lead, count, height, width, 3)).astype(np.float32)
    codec = get_codec(name)
    latents = codec.encode(frames)
    side = codec.stride[1]
    assert latents.shape == (*lead, 1 + count // 4, height // side, width // side, codec.channels)
    assert latents.dtype == np.float32
    restored = codec.decode(latents)
    assert restored.shape == frames.shape and restored.dtype == np.float32
    assert np.abs(restored - frames).max() <= 1e-6


def test_haar8_has_768_channels():
    codec = get_codec("haar8")
    assert (codec.name, codec.stride, codec.channels) == ("haar8", (4, 8, 8), 768)


def test_uint8_is_scaled_to_minus_one_to_one():
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 16, 16, 3), dtype=np.uint8)
    codec = get_codec("haar8")
    np.testing.assert_allclose(codec.encode(frames), codec.encode(frames / 127.5 - 1.0), atol=4e-6)
    assert np.array_equal(np.rint((codec.decode(codec.encode(frames)) + 1) * 127.5), frames)


@pytest.mark.parametrize("name", ["haar4", "haar8", "haar16"])
def test_normalisation_is_part_of_the_transform_and_undone_by_decode(name):
    rng, codec = np.random.default_rng(4), get_codec(name)
    frames = rng.integers(0, 256, (2, 9, 32, 48, 3), dtype=np.uint8)
    mean, std = (rng.uniform(0.5, 2.0, codec.channels).astype(np.float32) for _ in range(2))
    normalized, cells = codec.normalized(mean, std), (32 // codec.stride[1], 48 // codec.stride[1])
    out = np.full((2, 4, *cells, codec.channels), 7.0, np.float32)
    normalized.encode(frames, out=out[:, :3])
    np.testing.assert_allclose(out[:, :3], (codec.encode(frames) - mean) / std, atol=2e-5)
    assert np.all(out[:, 3] == 7.0)
    np.testing.assert_allclose(normalized.decode(out[:, :3]), codec.decode(codec.encode(frames)), atol=4e-6)
    with pytest.raises(ValueError, match="copy"):
        normalized.encode(frames[:1, :, :, : -codec.stride[1]], out=out[:1, :3, :, :-1])


def test_latent_depends_only_on_its_own_frames():
    codec = get_codec("haar8")
    frames = np.random.default_rng(1).uniform(-1, 1, (17, 16, 16, 3)).astype(np.float32)
    reference = codec.encode(frames)
    for frame in range(17):
        changed = frames.copy()
        changed[frame] += 0.5
        differs = [n for n in range(5) if not np.array_equal(codec.encode(changed)[n], reference[n])]
        assert differs == [-(-frame // 4)]  # frame 0 is latent 0; frames 4n-3 .. 4n are latent n


def test_first_latent_is_the_frame_shown_four_times():
    codec = get_codec("haar8")
    frame = np.random.default_rng(2).uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    latents = codec.encode(np.stack([frame] * 5))
    np.testing.assert_allclose(latents[0], latents[1], atol=1e-6)
    details = codec.bands()[:, 0] > 0
    assert details.sum() == 768 * 3 // 4
    assert np.all(latents[0][..., details] == 0.0)


def test_energy_is_kept_after_the_first_frame():
    frames = np.random.default_rng(3).uniform(-1, 1, (9, 16, 24, 3)).astype(np.float32)
    latents = get_codec("haar8").encode(frames)
    np.testing.assert_allclose((latents[1:] ** 2).sum(), (frames[1:] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose((latents[0] ** 2).sum(), 4 * (frames[0] ** 2).sum(), rtol=1e-5)


def test_bands_name_where_a_signal_lands():
    codec = get_codec("haar8")
    bands = codec.bands()
    assert bands.shape == (768, 3) and bands.max(0).tolist() == [2, 3, 3]

    def lands(frames):
        cell = codec.encode(frames)[1, 0, 0]
        channels = np.flatnonzero(np.abs(cell) > 1e-5)
        return {(int(channel) // 256, *map(int, bands[channel])) for channel in channels}

    base = np.zeros((5, 8, 8, 3), np.float32)
    constant, rows, columns, blinking, slow = (base.copy() for _ in range(5))
    constant[..., 1] = 0.5
    rows[:, ::2, :, 0] = 0.5
    columns[:, :, :4, 2] = 0.5
    blinking[1::2, ..., 0] = 0.5
    slow[3:, ..., 0] = 0.5
    assert lands(constant) == {(1, 0, 0, 0)}
    assert lands(rows) == {(0, 0, 0, 0), (0, 0, 3, 0)}
    assert lands(columns) == {(2, 0, 0, 0), (2, 0, 0, 1)}
    assert lands(blinking) == {(0, 0, 0, 0), (0, 2, 0, 0)}
    assert lands(slow) == {(0, 0, 0, 0), (0, 1, 0, 0)}
    # A constant 0.5 over a block of 256 values: the orthonormal mean is 0.5 * sqrt(256).
    assert codec.encode(constant)[1, 0, 0, 256] == pytest.approx(8.0)


def test_wrong_input_is_one_clear_line():
    codec = get_codec("haar8")
    with pytest.raises(UserError, match=r"6 frames; the causal layout needs 1 \+ 4N"):
        codec.encode(np.zeros((6, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="60x64 pixels do not divide into cells of 8x8"):
        codec.encode(np.zeros((5, 60, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"expected \[..., 1\+N, h, w, 768\]"):
        codec.decode(np.zeros((5, 8, 8, 48), np.float32))
    with pytest.raises(UserError, match="unknown codec 'vae'; choose one of haar4, haar8, haar16"):
        get_codec("vae")


def test_importing_codecs_does_not_import_jax():
    code = "import sys, wallwm_jax.models.codecs; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
