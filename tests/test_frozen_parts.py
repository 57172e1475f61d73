"""Stores with frozen parts: latents of a Wan autoencoder and features of UMT5, computed once, at build."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from random_batch import tiny_config
from synthetic import synthetic_episode
from tiny_model import save_run
from weight_files import write_umt5, write_wan22_vae

from wallwm_jax.console import UserError
from wallwm_jax.data.caption_files import TEXT_FEATURES
from wallwm_jax.data.clusters import cluster_store
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.packing import draw_caption, pack_row, random_stream
from wallwm_jax.data.pipeline import check_store
from wallwm_jax.data.recaption import stored_spans, write_layer
from wallwm_jax.data.store_writer import StoreOptions, write_store
from wallwm_jax.evaluation import sight_cones
from wallwm_jax.evaluation.open_loop import evaluate_open_loop
from wallwm_jax.events.captioners import Caption, with_captions
from wallwm_jax.inference.policy import Policy
from wallwm_jax.models.codecs import get_codec, open_codec
from wallwm_jax.models.convert.stream import import_weights
from wallwm_jax.models.text import open_text_encoder
from wallwm_jax.models.text.umt5 import CaptionEncoder
from wallwm_jax.train import run

WIDTH = 16  # of the text features


def episodes():
    """Three short episodes; the last has one view less."""
    yield from (synthetic_episode(seed, steps=20 + 4 * seed, size=32) for seed in range(2))
    yield synthetic_episode(2, steps=20, size=32, views=["front_pixels"])


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder with converted weights `vae`, `other_vae` and `umt5`."""
    directory = tmp_path_factory.mktemp("weights")
    captions = [span.caption for episode in episodes() for spans in episode.spans.values() for span in spans]
    write_wan22_vae(directory / "published" / "vae")
    write_umt5(directory / "published" / "text_encoder", captions)
    for kind, name in (("wan_vae", "vae"), ("umt5", "umt5")):
        import_weights(kind, directory / "published", directory / name)
    shutil.copytree(directory / "vae", directory / "other_vae")
    with open(directory / "other_vae" / "tensors.tsv", "a") as table:
        table.write("one more line\n")
    return directory


def options(weights, **changes):
    frozen = dict(codec="wan22", codec_weights=str(weights / "vae"), text_encoder="umt5",
                  text_weights=str(weights / "umt5"), codec_batch=4)  # fmt: skip
    return StoreOptions(**{**frozen, "kinds": ("event",), "heldout_fraction": 0.34, **changes})


@pytest.fixture(scope="module")
def frozen(weights, tmp_path_factory):
    """Path of a store of latents and text features."""
    path = tmp_path_factory.mktemp("frozen") / "store"
    path.mkdir()
    write_store(path, episodes(), options(weights))
    cluster_store(path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same episodes as a store of frames and bytes."""
    path = tmp_path_factory.mktemp("plain") / "store"
    path.mkdir()
    write_store(path, episodes(), StoreOptions(kinds=("event",), heldout_fraction=0.34))
    return open_store(path)


def config_for(store: EventStore, **model):
    config = tiny_config()
    with config.unlocked():
        config.data.update(store=str(store.path), rows=2, latents_per_row=8, actions_per_row=64, events_per_row=4)
        config.data.update(draw_block_rows=8, workers=0, text_length=32, views=tuple(store.meta["views"]))
        config.data.fill_target = 0.8
        config.model.update(latent_shape=(2, 2), latent_channels=48, patch=(1, 1), max_latents=16)
        config.model.text.update(kind="features", width=WIDTH, pad_to=512)
        config.model.update(model)
        config.sampling.update(steps=2, video_steps=2, buckets=(2, 3))
        config.train.update(steps=2, save_every=2, log_every=1)
        config.optim.warmup_steps = 1
    return config


def test_stored_latents_are_the_codecs_and_keyframes_the_pictures(frozen, plain, weights):
    store, codec = open_store(frozen), get_codec("wan22", str(weights / "vae"), batch=4)
    assert len(store) == len(plain) > 8
    for index in range(0, len(store), 3):
        record, whole = store.read(index), plain.read(index)
        assert record.frames.keys() == whole.frames.keys() == record.latents.keys()
        for view, latents in record.latents.items():
            assert latents.dtype == ml_dtypes.bfloat16 and latents.shape == (whole.num_latents, 2, 2, 48)
            expected = codec.encode(whole.video(view))
            np.testing.assert_allclose(latents.astype(np.float32), expected, rtol=2**-8, atol=1e-5)  # one digit of it
            assert len(record.frames[view]) == len(set(whole.keyframes))
            for stored, position in zip(record.keyframes, whole.keyframes):
                assert record.frames[view][stored] == whole.frames[view][position]
        with pytest.raises(ValueError, match="latents and keyframes"):
            record.video("front_pixels")
        recorded = store.video(record, "front_pixels", codec)
        assert recorded.shape == whole.video("front_pixels").shape and recorded.dtype == np.uint8
    one, other = (store.read(index).latents["front_pixels"][0] for index in (0, 3))
    assert np.abs(one.astype(np.float32) - other.astype(np.float32)).max() > 1e-3


def test_an_episode_without_a_view_stores_no_latents_of_it(frozen):
    store = (
        open_store(frozen, "heldout") if open_store(frozen).episodes[2]["split"] == "heldout" else open_store(frozen)
    )
    lacking = [record for record in map(store.read, range(len(store))) if record.episode_id == 2]
    assert lacking and all(list(record.latents) == ["front_pixels"] for record in lacking)


def test_latents_are_normalised_by_the_published_statistics_and_weighed_alike(frozen):
    store, codec = open_store(frozen), get_codec("wan22")
    row = pack_row(store, config_for(store), [0], 0, store.meta["views"])
    latents = store.read(0).latents["ur5e/wrist"].astype(np.float32)
    np.testing.assert_allclose(
        row["latents"][1, : len(latents)], (latents - codec.latent_mean) / codec.latent_std, atol=1e-6
    )
    np.testing.assert_array_equal(store.channel_weights(), np.ones(48))


def test_every_wording_that_can_be_drawn_has_the_encoders_features(frozen, weights):
    store = open_store(frozen)
    encoder = open_text_encoder(store.meta)
    config = config_for(store)
    with config.unlocked():
        config.data.update(caption_drop=0.1, parent_caption_prob=0.5, duration_clause_prob=0.5)
    drawn = set()
    for index in range(len(store)):
        for row in range(24):
            text = draw_caption(store, store.read(index), config.data, random_stream(0, 3, row, index)).text
            drawn.add(text)
            assert store.text_tokens(text) == len(store.text_features(text)), text
    assert "" in drawn and any(": " in text and "takes" in text for text in drawn)
    some = sorted(drawn)[::7]
    for text, expected in zip(some, encoder.encode(some)):
        np.testing.assert_array_equal(store.text_features(text), expected)
    assert store.text_tokens("no such wording") is None
    row = pack_row(store, config, [0, 1], 0, store.meta["views"])
    assert row["text_features"].shape == (4, 32, WIDTH) and "text_ids" not in row
    null = encoder.encode([""])[0]
    np.testing.assert_array_equal(row["text_features"][3, : len(null)], null.astype(np.float32))
    assert row["text_length"][3] == len(null) and not row["text_features"][3, len(null) :].any()


@pytest.mark.extended
def test_a_run_trains_on_the_store_and_acts_with_the_frozen_parts(frozen, tmp_path):
    store = open_store(frozen)
    assert run(config_for(store), tmp_path / "run").step == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"]) and lines[-1]["loss_video"] > 0
    policy = Policy.from_checkpoint(tmp_path / "run", batch_size=4, sampling={"guidance": 2.0})
    assert "text" not in policy.event_mode.params
    result = evaluate_open_loop(policy.event_mode, open_store(frozen, "heldout"), levels=["action"], limit=4, strips=1)
    shown = result.strips[0].views["front_pixels"]
    assert np.isfinite(result.to_json()["model"]) and shown[0].shape == shown[1].shape


def test_weights_that_are_not_the_stores_are_refused(frozen, weights, tmp_path):
    store = open_store(frozen)
    with pytest.raises(UserError, match=r"holds weights .* built with .*--codec_weights"):
        open_codec(store.meta, str(weights / "other_vae"))
    with pytest.raises(UserError, match=r"no converted weights.*--text_weights=DIR"):
        open_text_encoder(store.meta, str(tmp_path))
    moved = {**store.meta, "codec_weights": {**store.meta["codec_weights"], "folder": str(tmp_path / "gone")}}
    with pytest.raises(UserError, match="--codec_weights=DIR"):
        open_codec(moved)
    assert open_codec(moved, str(weights / "vae")).stored
    save_run(tmp_path / "run", store, config_for(store))
    with pytest.raises(UserError, match="--codec_weights"):
        Policy.from_checkpoint(tmp_path / "run", codec_weights=str(weights / "other_vae"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codec_weights": ""}, "codec 'wan22' needs its weights: --codec_weights=DIR"),
        ({"text_weights": ""}, "text encoder 'umt5' needs its weights: --text_weights=DIR"),
        ({"codec_weights": "/nowhere"}, "'/nowhere' holds no converted weights"),
        ({"codec": "haar8"}, "codec 'haar8' has no weights, but .* was given"),
        ({"text_encoder": "t5"}, "unknown text encoder 't5'; choose of bytes, umt5"),
        ({"compute_dtype": "float16"}, "float32 or bfloat16, not 'float16'"),
    ],
)
def test_builds_that_cannot_work_are_refused_before_anything_is_recorded(weights, changes, message):
    with pytest.raises(UserError, match=message):
        options(weights, **changes)


def test_frames_that_do_not_divide_into_cells_are_refused_at_the_first_episode(tmp_path):
    with pytest.raises(UserError, match="frames of 36x36 pixels do not divide into cells of codec 'haar8', 8x8"):
        write_store(tmp_path, iter([synthetic_episode(0, steps=20, size=36)]), StoreOptions())


def test_a_model_that_does_not_fit_is_refused(frozen):
    store = open_store(frozen)
    config = config_for(store)
    config.model.text.kind = "bytes"
    with pytest.raises(UserError, match=r"text features, but model\.text\.kind is bytes"):
        check_store(store, config)
    config = config_for(store)
    config.model.text.width = 32
    with pytest.raises(UserError, match=r"width of text features 16, but model\.text\.width is 32"):
        check_store(store, config)


def test_the_picture_of_sight_cones_asks_for_frames(frozen):
    with pytest.raises(UserError, match="holds latents, not pictures"):
        sight_cones.draw(open_store(frozen), 0, ("ur5e/wrist", "front_pixels"), 4, 0.1, 3.0)


def test_a_recaption_encodes_only_what_is_new(frozen, tmp_path, monkeypatch):
    copy = shutil.copytree(frozen, tmp_path / "store")
    old, encoded = open_store(copy), []
    encode = CaptionEncoder.encode
    monkeypatch.setattr(CaptionEncoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    spans = [
        with_captions(row, {("action", 0): Caption("reach", ("go there",), 1.0, "human")}) for row in stored_spans(copy)
    ]
    write_layer(copy, spans, "human")
    store, config = open_store(copy), config_for(old)
    with config.unlocked():
        config.data.update(caption_drop=0.1, parent_caption_prob=0.5, duration_clause_prob=0.5)
    assert encoded and not [text for text in encoded if old.text_tokens(text) is not None]
    for index in range(len(store)):
        for row in range(12):
            text = draw_caption(store, store.read(index), config.data, random_stream(0, 3, row, index)).text
            assert store.text_tokens(text) == len(store.text_features(text)), text
    kept = old.caption(old.read(0).level_caption_ids[0])
    np.testing.assert_array_equal(store.text_features(kept), old.text_features(kept))


def test_damaged_features_are_named(frozen, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(frozen, copy)
    file = copy / TEXT_FEATURES
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = open_store(copy)
    with pytest.raises(UserError, match=f"text features of caption {len(store.captions) - 1} .* are damaged"):
        store.text_features(store.captions[-1])
    file.write_bytes(content[:-64])
    with pytest.raises(UserError, match=r"text features .* build"):
        open_store(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"text features of event store .* are missing"):
        open_store(copy)
