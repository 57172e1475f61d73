"""The benchmark of sampling: its made-up events have long tails, and each step does what it is named for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from configs import base
from wallwm_jax.benchmarks import sampling
from wallwm_jax.console import UserError
from wallwm_jax.data.clusters import find_clusters
from wallwm_jax.data.embedders import open_embedder
from wallwm_jax.events.schema import LEVELS


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> sampling.MadeUp:
    folder = tmp_path_factory.mktemp("made_up")
    assert sampling.make_store(folder, 4000) == {"clusters": [81, 81], "index_bytes": 34 * 4000}
    return sampling.MadeUp(folder)


def test_made_up_events_have_real_lengths_and_long_tails(store):
    subtasks = store.index["level"] == LEVELS.index("subtask")
    assert subtasks.mean() == pytest.approx(0.2, abs=0.02)
    for level, shortest, longest in ((subtasks, 24, 100), (~subtasks, 4, 20)):
        steps, latents = store.index["num_actions"][level], store.index["length"][level]
        assert (steps.min(), steps.max()) == (shortest, longest)
        np.testing.assert_array_equal(latents, 1 + -(-steps // 8))
        sizes = np.sort(np.bincount(store.index["cluster_vl"][level]))[::-1]
        assert sizes[0] > 10 * np.median(sizes[sizes > 0])
    pairs = len(np.unique(store.index[["cluster_vl", "cluster_action"]][~subtasks]))
    assert pairs < 0.5 * 54**2  # of the table of scenes and motions, much is empty


def test_what_is_described_falls_into_the_clusters_that_are_said(store):
    few = sampling.MadeUp(store.path)
    few.index = few.index[:600]
    splits = {"train": few}
    _, ids = find_clusters(
        splits, open_embedder("hashed", splits), 0, 3.0, (99, 99), 300, read=lambda _, rows: few.describe(rows)
    )
    actions = few.index["level"] == LEVELS.index("action")
    for found, name, least in zip(ids["train"], ("cluster_vl", "cluster_action"), (0.5, 0.5)):
        assert adjusted_mutual_info_score(few.index[name][actions], found[actions]) > least
    assert few.seconds > 0


def test_a_sampler_is_made_asked_for_rows_and_resumed(store):
    config = base.get_config()
    with config.unlocked():
        config.data.draw_block_rows = 32
        found = sampling.STEPS_TAKEN["sampler"](store, config)
    assert set(found) == {"cpu_seconds", "held_bytes", "rows_per_s", "resume_s"}
    assert found["rows_per_s"] > 100 and found["resume_s"] > 0
    assert sampling.STEPS_TAKEN["coverage"](store, config)["never"] == 0


def test_each_step_has_its_own_process_and_figures():
    found = sampling.measure(windows=2000, rows=("index", "raking"))
    assert json.loads(json.dumps(found)) == found
    index, raking = found["rows"]["index"], found["rows"]["raking"]
    assert raking["peak_bytes"] >= index["peak_bytes"] - 2**22 > 2e7
    assert 100 < raking["effective_sample_size"] < 2000
    assert raking["cpu_seconds"] > 0 and "raking" in sampling.table(found)
    with pytest.raises(UserError, match="--rows=all: one of index, clusters, product"):
        sampling.measure(rows=("all",))
