"""A store with windows of every kind: what is in it, how it is clustered, drawn from, trained on and compared."""

import json
import subprocess
import sys

import numpy as np
import pytest
from synthetic import synthetic_episode
from tiny_model import store_config
from training_setup import subprocess_environment

from wallwm_jax.console import UserError
from wallwm_jax.data.balance import sampling_weights
from wallwm_jax.data.clusters import cluster_store, load_clusters
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.pipeline import check_store
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.data.store_writer import StoreOptions, write_store
from wallwm_jax.events.actions import relative_actions
from wallwm_jax.events.windows import KINDS
from wallwm_jax.training.stages import get_stage


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    target = tmp_path_factory.mktemp("kinds")
    options = StoreOptions(kinds=KINDS, fixed_steps=16, history=2, heldout_fraction=0.25, latent_sample=8)
    write_store(target, (synthetic_episode(seed, size=32) for seed in range(4)), options)
    cluster_store(target)
    return target


@pytest.fixture(scope="module")
def store(path):
    return open_store(path)


def test_every_kind_is_clustered_on_its_own(path, store):
    kinds = [row["kind"] for row in load_clusters(path).vision_language]
    assert set(kinds) == set(KINDS)
    weights = sampling_weights(store.index, 0.5, 0.5, 10.0)
    for number, kind in enumerate(KINDS):
        inside = store.index["kind"] == number
        for name in ("cluster_vl", "cluster_action"):
            mine, others = (set(store.index[name][where].tolist()) for where in (inside, ~inside))
            assert mine and min(mine) >= 0 and not mine & others
        assert {kinds[cluster] for cluster in store.index["cluster_vl"][inside]} == {kind}
        alone = sampling_weights(store.index[inside], 0.5, 0.5, 10.0)  # what the other kinds hold changes nothing
        np.testing.assert_array_equal(weights[inside], alone)


def test_a_random_window_holds_what_happened_from_its_first_frame_on(store):
    windows = np.flatnonzero(store.index["kind"] == KINDS.index("random"))
    events = np.flatnonzero(store.index["kind"] == KINDS.index("event"))
    assert sorted(store.index["length"][windows]) == sorted(store.index["length"][events])
    for window in windows[::5]:
        record = store.read(int(window))
        entry = store.episodes[record.episode_id]
        episode = synthetic_episode(entry["seed"], size=32)
        steps = slice(record.start, record.start + record.num_actions)
        expected, _ = relative_actions(
            episode.command_poses[steps], episode.command_grippers[steps], episode.poses[record.start]
        )
        np.testing.assert_allclose(record.actions, expected, atol=1e-6)
        assert store.caption(record.caption_id) == entry["spans"]["task"][0]["caption"]
        assert (record.history, record.past_actions, record.parent_caption_id) == (0, 0, -1)


def test_a_sampler_of_random_windows_draws_nothing_else(store):
    config = store_config(store)
    with config.unlocked():
        config.data.update(window_kind="random", fill_target=0.9)
    drawn = {window for row in Sampler(store.index, config).block(0) for window in row}
    assert drawn and {KINDS[kind] for kind in store.index["kind"][list(drawn)]} == {"random"}
    assert all("random" in get_stage(stage).window_kinds for stage in ("joint", "video", "action"))


def test_an_unknown_kind_of_caption_is_refused(store):
    config = store_config(store)
    with config.unlocked():
        config.data.caption = "everything"
    with pytest.raises(UserError, match=r"data\.caption='everything' is not own, instruction or events"):
        check_store(store, config)


def test_windows_are_told_of_levels_that_the_store_has(path):
    store = open_store(path)
    config = store_config(store)
    for episode in store.episodes:
        del episode["spans"]["segment"]
    with config.unlocked():
        config.data.update(window_kind="random", caption="events", levels={"subtask": 1.0, "segment": 1.0})
    with pytest.raises(UserError, match=r"no episode of .* has events of level 'segment'"):
        check_store(store, config)
    with config.unlocked():
        config.data.levels = {"subtask": 0.0}
    with pytest.raises(UserError, match="need positive shares of levels"):
        check_store(store, config)


@pytest.mark.extended
def test_runs_on_random_windows_and_on_events_are_paired_on_the_same_events(path, tmp_path):
    """The whole command: two arms train, are measured on held-out events, and their errors are paired."""
    (tmp_path / "config.py").write_text(
        "from training_setup import training_config\n\n"
        f"def get_config():\n    config = training_config({str(path)!r}).unlock()\n"
        "    config.sampling.update(buckets=(5,), steps=2, video_steps=1)\n    return config.lock()\n"
    )
    (tmp_path / "sweep.py").write_text(
        "from wallwm_jax.evaluation.sweeps import Sweep\n\n"
        "def get_sweep():\n"
        f"    return Sweep({str(tmp_path / 'config.py')!r},\n"
        "        {'event': {}, 'random': {'data.window_kind': 'random', 'data.caption': 'events'}},\n"
        "        measure='wallwm_jax.evaluation.event_errors', paired_with='event')\n"
    )
    command = [sys.executable, "-m", "wallwm_jax.sweep", str(tmp_path / "sweep.py"), f"--store={path}", "--seeds=3"]
    command.append(f"--out={tmp_path / 'out'}")
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    error = {arm: results["arms"][arm]["action error"]["values"][0] for arm in ("event", "random")}
    pair = results["pairs"]["random"]["action error"]
    assert pair["difference"] == pytest.approx(error["event"] - error["random"], abs=1e-9)
    assert "action error, subtask" in results["pairs"]["random"]
    assert "below event's, event by event" in done.stdout
    found = json.loads((tmp_path / "out" / "random" / "seed-3" / "figures.json").read_text())
    heldout = open_store(path, "heldout").index
    assert len(found["paired"]["action error"]["values"]) == (heldout["kind"] == 0).sum()
