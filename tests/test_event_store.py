"""Event stores: what goes in comes out, damage is found and named, and a store appears whole or not at all."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import synthetic_episode

from wallwm_jax import build_events
from wallwm_jax.benchmarks.planted_faults import paused
from wallwm_jax.benchmarks.processes import memory
from wallwm_jax.console import UserError
from wallwm_jax.data import event_store, record_files
from wallwm_jax.data.event_store import BadRecord, open_store, write_clusters
from wallwm_jax.data.store_writer import HeldoutChoice, StoreOptions, atomic_directory, write_store
from wallwm_jax.events.actions import relative_actions, state_vector
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import cut_windows
from wallwm_jax.models.codecs import get_codec
from wallwm_jax.sources.opening import SourceOptions

EPISODES = [synthetic_episode(seed, steps=64 + 7 * seed) for seed in range(6)]  # as the fixture has them


@pytest.fixture
def store_copy(small_store, tmp_path) -> Path:
    return Path(shutil.copytree(small_store, tmp_path / "copy"))


def build(target, episodes, **options):
    with atomic_directory(target, overwrite=False) as directory:
        return write_store(directory, episodes, StoreOptions(latent_sample=4, **options))


def records_file(path, split="train") -> Path:
    return path / event_store.RECORDS / open_store(path, split).meta["splits"][split]["shards"][0]["file"]


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


# What goes in comes out


def test_every_window_of_every_episode_is_there_once(small_store):
    stores = {split: open_store(small_store, split) for split in ("train", "heldout")}
    found = [
        (int(row["episode"]), int(row["kind"]), int(row["level"]), int(row["event_index"]))
        for store in stores.values()
        for row in store.index
    ]
    expected = [
        (number, ("event", "fixed").index(window.kind), LEVELS.index(window.level), window.event_index)
        for number, episode in enumerate(EPISODES)
        for window in cut_windows(episode, ("event", "fixed"), levels=("subtask", "action"), fixed_steps=16)
    ]
    assert sorted(found) == sorted(expected) and len(set(found)) == len(found)
    assert set(stores["train"].index["episode"].tolist()) == {0, 1, 2, 4, 5}
    assert set(stores["heldout"].index["episode"].tolist()) == {3}


def test_a_store_of_pruned_windows_says_when_each_frame_was(tmp_path):
    episode = paused(synthetic_episode(1, steps=60, size=16, smooth=True), 30, 40)
    build(tmp_path / "store", [episode], heldout_fraction=0.0, levels=("task",), fixed_steps=16, prune_static=0.4)
    store = open_store(tmp_path / "store")
    windows = cut_windows(episode, ("event", "fixed"), levels=("task",), fixed_steps=16, longest_pause_s=0.4)
    for window, record in zip(windows, map(store.read, range(len(store))), strict=True):
        assert np.array_equal(record.frame_steps, 2 * window.frame_indices)
        assert record.frames["front_pixels"] == [episode.frames["front_pixels"][i] for i in window.frame_indices]
        commands = episode.command_poses[window.action_steps], episode.command_grippers[window.action_steps]
        assert np.array_equal(record.actions, relative_actions(*commands, episode.poses[window.start])[0])
    event = store.read(0)
    assert (event.duration_s, event.num_actions) == (10.0, 64)  # 18 of 50 pairs of frames are left out
    assert np.diff(event.frame_steps).tolist() == [2] * 16 + [38] + [2] * 15


def test_records_hold_the_window_exactly(small_store):
    store = open_store(small_store)
    for index in range(0, len(store), 7):
        record, row = store.read(index), store.index[index]
        episode = EPISODES[record.episode_id]
        windows = cut_windows(episode, [record.kind], levels=[record.level], fixed_steps=16)
        window = windows[record.event_index]
        assert (row["length"], row["num_actions"]) == (window.num_latents, window.num_actions)
        assert (record.start, record.span_start, record.span_end) == (window.start, window.span_start, window.span_end)
        assert record.duration_s == pytest.approx(window.duration_s) == row["duration_s"]
        for view, frames in episode.frames.items():
            assert record.frames[view] == [frames[frame] for frame in window.frame_indices]
        assert np.array_equal(record.frame_steps, np.arange(window.start, window.start + window.num_actions + 1, 2))
        steps = slice(window.start, window.start + window.num_actions)
        observed = episode.poses[window.start]
        actions, valid = relative_actions(episode.command_poses[steps], episode.command_grippers[steps], observed)
        assert np.array_equal(record.actions, actions) and np.array_equal(record.action_valid, valid)
        state, valid = state_vector(observed, episode.grippers[window.start])
        assert np.array_equal(record.state, state) and np.array_equal(record.state_valid, valid)


def test_video_is_decoded_in_rgb_and_held_to_the_end(small_store):
    store = open_store(small_store)
    index = int(np.flatnonzero(store.index["num_actions"] == 14)[0])  # 8 frames, padded to 9
    record = store.read(index)
    video = record.video("front_pixels")
    assert video.shape == (9, 64, 64, 3) and video.dtype == np.uint8
    assert np.array_equal(video[8], video[7]) and not np.array_equal(video[7], video[6])
    bgr = cv2.imdecode(np.frombuffer(record.frames["front_pixels"][2], np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(video[2], bgr[..., ::-1])
    assert np.array_equal(record.picture("front_pixels", int(record.keyframes[2])), video[3])
    assert record.keyframes.tolist() == [0, 1, 3, 5]


def test_captions_name_the_event_its_parents_its_next_and_its_past(small_store):
    store = open_store(small_store)
    is_action = (store.index["level"] == LEVELS.index("action")) & (store.index["episode"] == 1)
    for index in np.flatnonzero(is_action):
        record = store.read(index)
        spans = EPISODES[1].spans
        own = spans["action"][record.event_index]
        parent = spans["subtask"][own.parent]
        captions = [store.caption(caption) for caption in record.level_caption_ids]
        assert captions == [EPISODES[1].instruction, parent.caption, own.caption, ""]
        assert store.caption(record.caption_id) == own.caption == store.span(index)["caption"]
        assert store.caption(record.parent_caption_id) == parent.caption
        assert tuple(map(store.caption, record.paraphrase_ids)) == own.paraphrases
        past = [store.caption(caption) for caption in record.previous_caption_ids]
        assert past == [span.caption for span in spans["action"][: record.event_index]]
        following = {
            level: next((span.caption for span in spans[level] if span.start >= own.end), "") for level in LEVELS
        }
        assert [store.caption(caption) for caption in record.next_caption_ids] == list(following.values())
    assert following == dict.fromkeys(LEVELS, "")  # nothing follows the last event


def test_fixed_windows_carry_the_task(small_store):
    store = open_store(small_store)
    index = int(np.flatnonzero((store.index["kind"] == 1) & (store.index["episode"] == 0))[1])
    record = store.read(index)
    assert (record.kind, record.level, record.start, record.num_actions) == ("fixed", "task", 16, 16)
    assert store.caption(record.caption_id) == "sort the squares by colour"
    assert [store.caption(caption) for caption in record.paraphrase_ids] == ["put every square in its place"]
    assert record.parent_caption_id == -1 and record.previous_caption_ids == () and store.span(index) is None
    assert store.caption(record.next_caption_ids[1]) == EPISODES[0].spans["subtask"][2].caption


def test_geometry_is_taken_at_the_last_frame_of_each_latent(small_store):
    store = open_store(small_store)
    record = store.read(int(np.flatnonzero(store.index["length"] == 3)[0]))
    assert record.geometry.shape == (2, 3, 21) and store.meta["views"] == ["front_pixels", "ur5e/wrist"]
    episode = EPISODES[record.episode_id]
    for number, view in enumerate(store.meta["views"]):
        for latent in range(3):
            frame = min(record.start // 2 + 4 * latent, record.start // 2 + len(record.frames[view]) - 1)
            row = record.geometry[number, latent]
            np.testing.assert_allclose(row[:9], [1.1, 1.1, 0.5, 0.5, 0, 0, 0, 0, 0], rtol=1e-6)
            np.testing.assert_allclose(
                row[9:].reshape(3, 4), episode.cameras[view].extrinsics[frame, :3], rtol=1e-6, atol=1e-7
            )
    assert not np.allclose(record.geometry[1, 0], record.geometry[1, 2])  # the wrist camera moves


def test_metadata_and_episodes_describe_the_store(small_store):
    store = open_store(small_store, "heldout")
    meta = store.meta
    assert {key: meta[key] for key in ("codec", "clock_hz", "video_fps", "action_hz", "actions_per_latent")} == {
        "codec": "haar8",
        "clock_hz": 10.0,
        "video_fps": 5.0,
        "action_hz": 10.0,
        "actions_per_latent": 8,
    }
    assert meta["cameras"] == {"front_pixels": 1, "ur5e/wrist": 2} and meta["size"] == [64, 64]
    assert [entry["split"] for entry in store.episodes] == ["train"] * 3 + ["heldout"] + ["train"] * 2
    assert store.episodes[3]["seed"] == 3 and store.episodes[3]["num_steps"] == 85
    assert [len(spans) for spans in store.episodes[3]["spans"].values()] == [1, 4, 16, 28]


def test_statistics_are_those_of_the_train_split(small_store):
    store = open_store(small_store)
    records = [store.read(index) for index in range(len(store))]
    actions = np.concatenate([record.actions for record in records])
    np.testing.assert_allclose(store.stats.action.mean[:10], actions[:, :10].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(store.stats.action.q01[:10], np.quantile(actions[:, :10], 0.01, axis=0), atol=1e-6)
    assert store.stats.action.count.tolist() == [len(actions)] * 10 + [0] * 22
    assert store.stats.state.count[0] == len(store)
    codec = get_codec("haar8")
    futures = [codec.encode(record.video(view))[1:].reshape(-1, 768) for record in records for view in record.frames]
    normal = store.stats.normalize_latents(np.concatenate(futures))
    lively = store.stats.latent_std > 1.1e-3 * store.stats.latent_std.max()
    assert lively.sum() > 300 and np.all(store.stats.latent_std > 0)
    assert 0.9 < np.median(normal[:, lively].std(0)) < 1.1  # 64 of 128 windows were sampled
    assert store.stats.counts["latent_sample"] == 64


def test_tfds_opens_the_same_records_without_tensorflow_or_jax(small_store):
    code = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds
from wallwm_jax.data.event_store import open_store
store = open_store({str(small_store)!r})
record = store.read(9)
for source in (
    tfds.data_source("events", data_dir={str(small_store / "tfds")!r}, split="train"),
    tfds.builder_from_directory({str(small_store / event_store.RECORDS)!r}).as_data_source("train"),
):
    assert len(source) == len(store), (len(source), len(store))
    example = source[9]
    assert np.array_equal(example["actions"], record.actions)
    assert example["frames"]["ur5e_wrist"][0].shape == (64, 64, 3)
    assert len(example["frames"]["front_pixels"]) == len(record.frames["front_pixels"])
    assert example["num_latents"] == record.num_latents and example["episode"] == record.episode_id
assert not {{"tensorflow", "jax"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_episode_may_lack_a_view_and_its_calibration(tmp_path):
    full, blind = synthetic_episode(0, steps=24, size=16), synthetic_episode(1, steps=24, size=16)
    front = {"front_pixels": blind.frames["front_pixels"]}
    build(tmp_path / "store", [full, dataclasses.replace(blind, frames=front, cameras={})], heldout_fraction=0.0)
    store = open_store(tmp_path / "store")
    record = store.read(len(store) - 1)
    assert record.episode_id == 1 and list(record.frames) == ["front_pixels"]
    assert np.all(record.geometry == 0.0) and record.geometry.shape[0] == 2
    assert list(store.meta["splits"]) == ["train"]


def test_shards_are_read_in_the_order_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "SHARD_BYTES", 40_000)
    build(tmp_path / "store", [synthetic_episode(0, steps=64, size=16)], heldout_fraction=0.0)
    store = open_store(tmp_path / "store")
    shards = store.meta["splits"]["train"]["shards"]
    assert len(store) == 22 == sum(shard["windows"] for shard in shards) and len(shards) > 2
    for index in range(len(store)):
        assert store.read(index).event_index == store.index[index]["event_index"]
    with pytest.raises(IndexError, match="window 22 of 22"):
        store.read(22)


def test_the_same_episodes_give_the_same_store_in_another_process(small_store, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from conftest import build_small_store
build_small_store(Path({str(tmp_path / "again")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    again = tmp_path / "again"
    for split in ("train", "heldout"):
        assert open_store(again, split).fingerprint == open_store(small_store, split).fingerprint
    for name in ("store.json", "stats.json", "episodes.json", "captions.npz"):
        assert (again / name).read_bytes() == (small_store / name).read_bytes()


def test_stores_are_read_from_threads_and_pickled_into_processes(small_store):
    store = pickle.loads(pickle.dumps(open_store(small_store)))
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(store.read, list(range(len(store))) * 4))
    for index, record in enumerate(parallel):
        assert record.frames == store.read(index % len(store)).frames


# Held-out episodes


def test_held_out_episodes_are_spread_over_sources_in_the_asked_share():
    choice = HeldoutChoice(0.15)
    sources = list("abcd") * 20
    held = [source for source in sources if choice.split_of(source) == "heldout"]
    assert [held.count(source) for source in "abcd"] == [3, 3, 3, 3]
    assert [HeldoutChoice(0.15).split_of("a") for _ in range(3)] == ["train"] * 3
    single = HeldoutChoice(0.15)
    assert [single.split_of("a") for _ in range(6)].index("heldout") == 3
    assert {HeldoutChoice(0.0).split_of(source) for source in sources} == {"train"}


# Damage


def test_a_flipped_byte_is_one_bad_record_with_its_name(store_copy):
    file = records_file(store_copy)
    reference = open_store(store_copy)
    _flip(file, 200_000)  # far inside the records
    store, caught = open_store(store_copy), []
    for index in range(len(store)):
        try:
            assert store.read(index).frames == reference.read(index).frames
        except BadRecord as bad:
            caught.append(bad)
    (bad,) = caught
    assert bad.episode_id == store.index["episode"][bad.index] and "unreadable (Corrupted" in bad.reason
    assert str(bad).startswith(f"window {bad.index} of episode {bad.episode_id}: ") and "\n" not in str(bad)
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_to_a_file_of_records_is_either_found_or_harmless(heldout_copy, data):
    check_damage_is_found(*heldout_copy, data)


@pytest.mark.extended
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_much_damage_to_a_file_of_records_is_either_found_or_harmless(heldout_copy, data):
    check_damage_is_found(*heldout_copy, data)


@pytest.fixture(scope="module")
def heldout_copy(small_store, tmp_path_factory):
    """(store whose heldout records may be damaged, their content, the records as they are read)."""
    path = Path(shutil.copytree(small_store, tmp_path_factory.mktemp("damage") / "store"))
    store = open_store(path, "heldout")
    return path, records_file(path, "heldout").read_bytes(), [store.read(index) for index in range(len(store))]


def check_damage_is_found(path, content, good, data):
    file = records_file(path, "heldout")
    file.write_bytes(data.draw(damaged(content)))
    try:
        store = open_store(path, "heldout")
    except UserError as error:
        assert str(file) in str(error)
        return
    for index, expected in enumerate(good):
        try:
            record = store.read(index)
        except BadRecord as bad:
            assert (bad.index, bad.episode_id) == (index, expected.episode_id) and bad.reason
            continue
        assert record.frames == expected.frames and np.array_equal(record.actions, expected.actions)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_record_that_is_no_window_is_a_bad_record_although_its_checksum_is_right(clustered_store, data):
    store = open_store(clustered_store, "heldout")
    changed = data.draw(damaged(store._records[1]))
    store.index = np.array(store.index)
    store.index["checksum"][1] = zlib.crc32(changed)
    store._records = {1: changed}
    try:
        store.read(1)
    except BadRecord as bad:
        assert (bad.index, bad.episode_id) == (1, store.index["episode"][1]) and bad.reason


@st.composite
def damaged(draw, content):
    """Bytes cut off, or up to twenty changed."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


def test_a_record_from_another_build_fails_its_checksum(store_copy):
    index = np.array(open_store(store_copy).index)
    index["checksum"][2] ^= 1
    event_store.write_index(store_copy / "index-train.npy", index)
    store = open_store(store_copy)
    with pytest.raises(BadRecord, match="window 2 of episode 0: the checksum differs from the index"):
        store.read(2)
    assert store.read(1).index == 1


def test_a_picture_that_is_no_jpeg_is_a_bad_record(small_store):
    record = open_store(small_store).read(0)
    broken = dataclasses.replace(record, frames={"front_pixels": [record.frames["front_pixels"][0], b"not a picture"]})
    with pytest.raises(BadRecord, match="frame 1 of view 'front_pixels' is not a JPEG picture"):
        broken.video("front_pixels")


def _schema(path):
    meta = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**meta, "schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "does not exist; make one with python -m wallwm_jax.build_events"),
        (lambda path: (path / "store.json").unlink(), "not an event store: it has no store.json"),
        (lambda path: (path / "store.json").write_text("{"), "store.json.* is damaged"),
        (_schema, "schema version 99, this code reads 1"),
        (lambda path: (path / "index-train.npy").unlink(), "index .* is missing or damaged"),
        (lambda path: _flip(path / "index-train.npy", 300), "index .* is damaged: its checksum"),
        (lambda path: _flip(path / "index-train.npy", 20), "index .* is damaged: its checksum"),
        (lambda path: os.truncate(path / "index-train.npy", 900), "index .* is damaged: its checksum"),
        (lambda path: shutil.copy(path / "index-heldout.npy", path / "index-train.npy"), "has 26 rows, the store 127"),
        (lambda path: (path / "stats.json").write_text("[]"), "statistics .* are missing or damaged"),
        (lambda path: _flip(path / "captions.npz", 400), "captions .* are missing or damaged"),
        (lambda path: records_file(path).unlink(), "lacks the records 'events-train.array_record-00000-of-00001'"),
        (lambda path: (path / "UNFINISHED").write_text("1"), "is an unfinished build"),
    ],
)
def test_a_damaged_store_is_one_clear_line(store_copy, damage, message):
    damage(store_copy)
    with pytest.raises(UserError, match=message) as caught:
        open_store(store_copy)
    assert "\n" not in str(caught.value)


def test_an_unknown_split_names_those_there_are(small_store):
    with pytest.raises(UserError, match="has no split 'test'; it has train, heldout"):
        open_store(small_store, "test")


def test_clusters_are_written_into_the_index(store_copy):
    before = open_store(store_copy)
    assert set(before.index["cluster_vl"].tolist()) == {-1}
    write_clusters(store_copy, "train", np.arange(len(before)) % 5, np.arange(len(before)) % 3)
    after = open_store(store_copy)
    assert after.index["cluster_vl"][:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert after.index["cluster_action"][:4].tolist() == [0, 1, 2, 0]
    assert np.array_equal(after.index["checksum"], before.index["checksum"])
    assert after.fingerprint != open_store(store_copy, "heldout").fingerprint
    assert sorted(path.name for path in store_copy.glob("index*")) == ["index-heldout.npy", "index-train.npy"]
    with pytest.raises(ValueError, match="read-only"):
        after.index["length"][0] = 1


# Building


def test_episodes_that_do_not_fit_together_are_refused(tmp_path):
    first, other = synthetic_episode(0, steps=24, size=16), synthetic_episode(1, steps=24, size=16)
    with pytest.raises(UserError, match=r"'synthetic-0001' .* has clock_hz 20.0, the store 10.0"):
        build(tmp_path / "store", [first, dataclasses.replace(other, clock_hz=20.0)])
    with pytest.raises(UserError, match=r"has views \['top'\] that the first episode lacks"):
        build(tmp_path / "store", [first, synthetic_episode(1, steps=24, size=16, views=("top",))])
    with pytest.raises(UserError, match="no episode gave a window for the train split"):
        build(tmp_path / "store", [])
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked_before_any_episode():
    with pytest.raises(UserError, match="unknown window kind 'tile'; choose of event, fixed, history, random"):
        StoreOptions(kinds=("event", "tile"))
    with pytest.raises(UserError, match="unknown level 'phase'"):
        StoreOptions(levels=("phase",))
    with pytest.raises(UserError, match=r"heldout_fraction is 1\.0"):
        StoreOptions(heldout_fraction=1.0)
    with pytest.raises(UserError, match="unknown codec"):
        StoreOptions(codec="mp4")


def test_an_existing_store_stays_unless_overwrite_is_given(tmp_path):
    target = tmp_path / "store"
    build(target, [synthetic_episode(0, steps=24, size=16)], heldout_fraction=0.0)
    before = open_store(target).fingerprint
    with pytest.raises(UserError, match="already exists; give --overwrite"):
        build(target, [synthetic_episode(1, steps=24, size=16)], heldout_fraction=0.0)
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True) as directory:
        (directory / "half").touch()
        raise RuntimeError
    assert open_store(target).fingerprint == before
    with atomic_directory(target, overwrite=True) as directory:
        write_store(
            directory, [synthetic_episode(1, steps=24, size=16)], StoreOptions(heldout_fraction=0.0, latent_sample=4)
        )
    assert open_store(target).episodes[0]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    # Killed between moving the old store away and the new one in: the next build finds the old one again.
    host = socket.gethostname().replace("-", "_").replace(".", "_")
    target.rename(tmp_path / f".store.replaced-{host}-1")
    with pytest.raises(UserError, match="already exists; give --overwrite"):
        build(target, [])
    assert open_store(target).episodes[0]["seed"] == 1


def test_a_killed_build_leaves_nothing_that_opens(tmp_path):
    target = tmp_path / "store"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from synthetic import synthetic_episode
from wallwm_jax.data.store_writer import StoreOptions, atomic_directory, write_store
with atomic_directory({str(target)!r}, overwrite=False) as directory:
    write_store(directory, [synthetic_episode(0, steps=24, size=16)], StoreOptions(heldout_fraction=0.0))
    print("written", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".store.partial-")
    for path in (target, leftover):
        with pytest.raises(UserError, match=r"does not exist|is an unfinished build"):
            open_store(path)
    build(target, [synthetic_episode(0, steps=24, size=16)], heldout_fraction=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]  # and the next build cleans up


def test_build_writes_clusters_and_a_summary(tmp_path, monkeypatch):
    def four_episodes(sources, options, embodiments):
        assert (sources, options.episodes, options.size, embodiments) == (["ocbench:chamber"], 4, 16, ())
        stream = (synthetic_episode(options.seed + number, steps=48, size=16) for number in range(4))
        return stream, lambda: {"chamber": build_events.FamilyCount(4, 1, ("episode 2: no rows",))}

    monkeypatch.setattr(build_events, "open_sources", four_episodes)
    target = str(tmp_path / "store")
    start = time.monotonic()
    built = build_events.build("ocbench:chamber", target, StoreOptions(latent_sample=8), SourceOptions(4, size=16))
    store = open_store(target)
    assert store.index["cluster_vl"].min() >= 0 and store.index["cluster_action"].min() >= 0
    assert sum(built.seconds.values()) < time.monotonic() - start
    lines = [line.split() for line in build_events.report(built, target).splitlines()]
    assert ["episodes", "chamber", "4", "kept", "1", "dropped"] in lines
    assert ["dropped", "episode", "2:", "no", "rows"] in lines
    assert ["episodes", "train", "3"] in lines and ["episodes", "heldout", "1"] in lines
    assert ["windows", "event/subtask", "12"] in lines and ["windows", "fixed/task", "8"] in lines
    pace = f"{60 * 4 / built.cpu_seconds:,.1f}"
    assert ["speed", pace, "episodes", "per", "minute", "of", "processor", "time"] in lines
    assert built.peak_bytes[0] > 0.9 * memory(os.getpid()) > 1e7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=zarr:x", "--out=new"], "error: unknown source 'zarr:x'; give ocbench:FAMILY"),
        (["--source=lerobot:x", "--out=new"], "error: 'x' is no LeRobot set: meta/info.json"),
        (
            ["--source=ocbench:block", "--out=.", "--overwrite"],
            "already exists; it is no event store: give another path",
        ),
        (["--out=new"], "error: say where episodes come from"),
    ],
)
def test_the_command_explains_bad_flags_in_one_line(tmp_path, flags, message):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "wallwm_jax.build_events", *flags]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
