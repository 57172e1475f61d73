"""Clusterings of a store, the weights and balance figures that follow, and the mean trajectories evaluation uses."""

import json
import math
import shutil
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from wallwm_jax.console import UserError
from wallwm_jax.data import clusters
from wallwm_jax.data.clusters import (
    cluster_again,
    cluster_store,
    find_clusters,
    load_clusters,
    number_of_clusters,
)
from wallwm_jax.data.embedders import Described, gripper_flips, open_embedder, resample
from wallwm_jax.data.event_store import INDEX_DTYPE, open_store
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS


def test_resampling_keeps_the_times_of_a_straight_motion():
    steps = np.arange(1, 9) / 8.0
    line = np.stack([steps, 2 * steps], axis=1)
    np.testing.assert_allclose(resample(line, 4), line[1::2], atol=1e-6)
    np.testing.assert_allclose(resample(resample(line, 32), 8), line, atol=1e-6)
    np.testing.assert_allclose(resample(line, 1), line[-1:], atol=1e-6)


def test_gripper_flips_count_crossings_of_half_closed():
    actions = np.zeros((6, 32))
    actions[:, 9] = [0, 0.4, 0.6, 1.0, 0.2, 0.1]
    assert gripper_flips(actions) == 2


def test_number_of_clusters_grows_with_the_root_and_is_capped():
    assert number_of_clusters(1000, 3.0, 4096) == 30
    assert number_of_clusters(10**8, 3.0, 1024) == 1024
    assert number_of_clusters(2, 9.0, 1024) == 2


def test_every_window_of_both_splits_gets_clusters_of_its_own_level(clustered_store):
    found = load_clusters(clustered_store)
    for split in ("train", "heldout"):
        store = open_store(clustered_store, split)
        for name, table in (("cluster_vl", found.vision_language), ("cluster_action", found.action)):
            assert store.index[name].min() >= 0
            for window, number in enumerate(store.index[name]):
                assert table[number]["level"] == LEVELS[store.index["level"][window]]
                assert table[number]["kind"] == KINDS[store.index["kind"][window]]
            counts = np.bincount(store.index[name], minlength=len(table))
            assert counts.tolist() == [row[split] for row in table]
    assert [row["id"] for row in found.vision_language] == list(range(len(found.vision_language)))
    events = int((open_store(clustered_store).index["level"] == LEVELS.index("action")).sum())
    actions = [row for row in found.vision_language if row["level"] == "action"]
    assert len(actions) == round(3 * math.sqrt(events / 10))


def test_clusters_follow_what_is_said_and_how_the_arm_moves(clustered_store):
    """Mutual information, adjusted for chance: 0 for random clusters, 1 for clusters that equal the labels."""
    store = open_store(clustered_store)
    windows = np.flatnonzero((store.index["level"] == LEVELS.index("action")) & (store.index["kind"] == 0))
    spans = [store.span(int(window)) for window in windows]
    captions, verbs = ([span[name] for span in spans] for name in ("caption", "verb"))
    assert adjusted_mutual_info_score(captions, store.index["cluster_vl"][windows]) > 0.6
    assert adjusted_mutual_info_score(verbs, store.index["cluster_action"][windows]) > 0.3


def test_the_mean_trajectory_of_a_cluster_is_the_mean_of_its_train_windows(clustered_store):
    store, found = open_store(clustered_store), load_clusters(clustered_store)
    number = int(store.index["cluster_vl"][0])
    members = np.flatnonzero(store.index["cluster_vl"] == number)
    mean = np.mean([resample(store.read(int(window)).actions, 32) for window in members], axis=0)
    np.testing.assert_allclose(found.mean_actions(number, 32), mean, atol=1e-5)
    assert found.mean_actions(number, 7).shape == (7, 32)
    np.testing.assert_allclose(found.mean_actions(number, 7)[-1], mean[-1], atol=1e-5)
    durations = store.index["duration_s"][members]
    assert found.vision_language[number]["duration_s"] == pytest.approx(durations.mean(), abs=1e-3)
    with pytest.raises(UserError, match="no vision-language cluster -1"):
        found.mean_actions(-1, 4)


def test_the_same_seed_gives_the_same_clusters_and_a_rerun_replaces_them(clustered_store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(clustered_store, copy)
    cluster_store(copy)
    assert (copy / "index-train.npy").read_bytes() == (clustered_store / "index-train.npy").read_bytes()
    assert (copy / clusters.FILE_NAME).read_bytes() == (clustered_store / clusters.FILE_NAME).read_bytes()
    fewer = cluster_store(copy, scale=1.0, held_windows=20)
    assert len(fewer.vision_language) < len(load_clusters(clustered_store).vision_language)
    assert load_clusters(copy) == fewer
    assert open_store(copy).index["cluster_vl"].max() == len(fewer.vision_language) - 1
    assert not list(copy.glob("*.partial"))


def test_missing_or_damaged_clusters_are_named(small_store, clustered_store, tmp_path):
    with pytest.raises(UserError, match=r"no clusters\.json; run python -m wallwm_jax"):
        load_clusters(small_store)
    (tmp_path / clusters.FILE_NAME).write_text(json.dumps({"action": []}))
    with pytest.raises(UserError, match="damaged"):
        load_clusters(tmp_path)


class ManyWindows:
    """A train split without records: any number of windows about eight topics, half of them about the first."""

    split, path = "train", "made up"
    wordings = ("reach", "grasp the cube", "lift it", "place", "open the drawer", "push a button", "turn", "wait")

    def __init__(self, windows):
        self.index = np.zeros(windows, INDEX_DTYPE)
        self.topics = np.random.default_rng(0).choice(8, windows, p=[0.5, *(7 * [0.5 / 7])]).astype(np.int8)

    def __len__(self):
        return len(self.index)

    def caption(self, number):
        return self.wordings[number]

    def describe(self, windows):
        """What `embedders.describe` would read of them."""
        rng, topics, count = np.random.default_rng(int(windows[0])), self.topics[windows].astype(int), len(windows)
        return Described(
            windows,
            topics,
            (20 * topics[:, None, None] + rng.integers(0, 9, (count, 2, 144))).astype(np.uint8),
            (topics[:, None, None] + rng.normal(0, 0.1, (count, 32, 32))).astype(np.float32),
            np.ones((count, 32), bool),
            topics,
            rng.normal(size=count),
        )


@pytest.mark.extended
def test_memory_grows_by_a_few_bytes_per_window():
    def peak(windows, held):
        splits = {"train": ManyWindows(windows)}
        embedder = open_embedder("hashed", splits)
        tracemalloc.start()
        find_clusters(splits, embedder, 0, 1.0, (4, 4), held_windows=held, chunk=400, read=ManyWindows.describe)
        held_most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held_most

    peak(500, 100)  # loads libraries
    few = peak(1000, 100)
    per_window = (peak(7000, 100) - few) / 6000
    print(f"{per_window:.1f} bytes per window")
    assert per_window < 60  # a window that is described has 4500


def test_streamed_centres_are_nearly_as_good_as_those_of_all_windows_at_once():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(12, 16))
    labels = rng.choice(12, 20_000, p=np.array([0.45, *(11 * [0.05])]))
    features = (true[labels] + rng.normal(0, 0.15, (20_000, 16))).astype(np.float32)
    streamed = clusters._KMeans(features[:500], 12, seed=0)
    for start in range(0, 20_000, 1000):
        streamed.add(features[start : start + 1000])
    whole = clusters._KMeans(features, 12, seed=0)
    inertia = [
        ((features - each.centres[clusters._nearest(features, each.centres)]) ** 2).sum() for each in (streamed, whole)
    ]
    assert inertia[0] < 1.02 * inertia[1]
    assert adjusted_mutual_info_score(labels, clusters._nearest(features, streamed.centres)) > 0.99


@pytest.mark.parametrize(("held", "fitted"), [(600, 256), (150, 256), (150, 10)])
def test_a_stream_of_windows_gives_clusters_as_pure_as_holding_them_all(monkeypatch, held, fitted):
    """However few of them move the centres: with ten per cluster, each other window is read once, to find its own."""
    splits, described = {"train": ManyWindows(600)}, []

    def read(store, windows):
        described.append(len(windows))
        return store.describe(windows)

    monkeypatch.setattr(clusters, "_FITTED", fitted)
    tables, ids = find_clusters(splits, open_embedder("hashed", splits), 0, 1.0, (8, 8), held, chunk=150, read=read)
    assert sum(described) == (600 if held == 600 else held + min(450, 8 * fitted) + 600)
    assert adjusted_mutual_info_score(splits["train"].topics, ids["train"][0]) > 0.99
    for table, own in zip(tables, ids["train"]):
        assert [row["train"] for row in table] == np.bincount(own).tolist()
        assert min(row["train"] for row in table) > 0
    assert sorted(row["captions"][0] for row in tables[0]) == sorted(ManyWindows.wordings)


def test_clusters_of_earlier_builds_load_and_are_made_again_as_they_were(clustered_store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(clustered_store, copy)
    content = json.loads((copy / clusters.FILE_NAME).read_text())
    for name in ("scale", "embedder"):
        del content[name]
    (copy / clusters.FILE_NAME).write_text(json.dumps(content))
    assert load_clusters(copy).made_by == {"seed": 0}
    assert cluster_again(copy) == load_clusters(clustered_store)
