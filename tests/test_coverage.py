"""What a config draws of a store, as planned: held against what the sampler then draws."""

import json

import numpy as np
import pytest

from configs import base
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.evaluation.coverage import coverage, picture, table


def configured(**data):
    config = base.get_config().copy_and_resolve_references().unlock()
    for name, value in data.items():
        config.data[name] = value
    return config


@pytest.mark.parametrize("balance", ["product", "raking"])
def test_draws_and_windows_never_seen_are_those_of_the_sampler(clustered_store, balance):
    store, config = open_store(clustered_store), configured(balance=balance, rows=4, draw_block_rows=16)
    found = coverage(store, config, steps=24)
    sampler = Sampler(store.index, config)
    visits = np.zeros(len(store), int)
    for block in range(24 * 4 // 16):
        np.add.at(visits, np.concatenate(sampler.block(block)).astype(int), 1)
    assert found["rows"] == 96
    assert visits.sum() == pytest.approx(found["drawn"], rel=0.05)
    drawn = visits[sampler.candidates]
    assert found["windows"] + found["left_out"] == len(store)
    assert (drawn == 0).sum() == pytest.approx(found["never"], abs=0.05 * found["windows"])
    for part, entries in found["parts"].items():
        assert sum(entry["windows"] for entry in entries) == found["windows"], part
        for share in ("before", "after", "latents"):
            assert sum(entry[share] for entry in entries) == pytest.approx(1.0)
    by_level = {entry["name"]: entry for entry in found["parts"]["level"]}
    assert by_level["action"]["after"] == pytest.approx(0.5)
    actions = store.index["level"][sampler.candidates] == 2
    assert drawn[actions].mean() == pytest.approx(by_level["action"]["passes"], rel=0.1)


def test_a_window_that_is_drawn_often_enough_is_never_missed_and_an_unlikely_one_is(clustered_store):
    store = open_store(clustered_store)
    assert coverage(store, configured(), steps=100_000)["never"] == 0
    few = coverage(store, configured(), steps=1)
    assert few["never"] > 0.3 * few["windows"]
    assert few["passes"] == pytest.approx(few["drawn"] / few["windows"], rel=0.02)


def test_the_table_names_every_part_and_a_store_without_clusters_has_none(clustered_store, small_store, tmp_path):
    found = coverage(open_store(clustered_store), configured(), steps=10)
    text = table(found)
    for word in ("dataset", "synthetic", "subtask", "latents", "seen and said", "motion", "residual"):
        assert word in text
    assert json.loads(json.dumps(found)) == found
    uniform = coverage(open_store(small_store), configured(vl_power=0.0, action_power=0.0), steps=10)
    assert set(uniform["parts"]) == {"dataset", "level", "length"}


@pytest.mark.extended
def test_the_picture_is_a_png(clustered_store):
    assert picture(coverage(open_store(clustered_store), configured(), steps=10)).startswith(b"\x89PNG")
