"""Benchmarks: figures agree with each other and with what they measured; wrong flags are refused before any work."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from random_batch import random_batch, tiny_config
from tiny_model import save_run, store_config
from training_setup import subprocess_environment, training_config

from wallwm_jax.benchmarks import figures, inference, loader, train_step
from wallwm_jax.benchmarks.timing import Seconds
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.packing import META_FIELDS
from wallwm_jax.data.pipeline import PackedRows, make_loader
from wallwm_jax.data.recaption import read_episodes
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.model_flops import RowShape, batch_flops, training_flops
from wallwm_jax.parallel.chips import peak_flops
from wallwm_jax.parallel.mesh import AXES, make_mesh
from wallwm_jax.parallel.sharding import rows_sharding
from wallwm_jax.sources.lerobot.export import write_lerobot


def check_spread(found):
    spread = Seconds(**found)
    assert 0 < spread.min <= spread.q25 <= spread.median <= spread.q75 <= spread.p95 <= spread.max
    return spread


def command(*arguments):
    line = [sys.executable, "-m", "wallwm_jax.benchmark", *arguments]
    return subprocess.run(line, env=subprocess_environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", ["bytes", "features"])
@pytest.mark.parametrize("stage", ["video", "action", "joint"])
def test_a_full_batch_is_the_row_that_the_formula_counts(stage, kind):
    config = tiny_config(latents_per_row=13)
    with config.unlocked():
        config.train.stage = stage
        config.model.text.kind = kind
    batch = random_batch(config, views=3, full=True)
    assert np.all(np.sum(batch["latent_event"] > 0, 1) == 12)  # two events of six latents; one place stays empty
    row = RowShape.of(config, 3)
    assert batch_flops(config, batch) == pytest.approx(config.data.rows * training_flops(config, row, stage))


def lean_config(**sampling):
    """One whose programs compile quickly: no cross-view attention, no text encoder, no Muon."""
    config = tiny_config()
    with config.unlocked():
        config.train.stage, config.optim.name, config.model.text.kind = "video", "adamw", "features"
        config.model.view_attention = config.model.sight_cone.on = False
        config.sampling.update(sampling)
    return config


def test_train_step_on_random_events():
    config = lean_config()
    found = train_step.measure(config, steps=3, views=2)
    spread = check_spread(found["step_seconds"])
    assert spread.count == 3 and found["compile_seconds"] > 0 and math.isfinite(found["loss"])
    assert (found["latents"], found["events"], found["tokens"]) == (2 * 12, 2 * 2, 2 * 12 * 2 * 4)
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / spread.median)
    assert found["events_per_s"] == pytest.approx(found["events"] / spread.median)
    assert found["model_flops"] == 2 * training_flops(config, RowShape.of(config, 2), "video")
    assert found["flops_per_s_per_device"] == pytest.approx(found["model_flops"] / spread.median / jax.device_count())
    assert found["mfu"] is None and found["peak_bytes_in_use"] is None  # a CPU has no table entry and tells no memory
    assert found["program_bytes_per_device"] > 3 * 4 * found["parameters"]  # with average and moments, float32
    assert json.loads(json.dumps(found)) == found
    assert "MFU unknown" in train_step.table(found)


@pytest.mark.parity
def test_the_peer_is_the_same_tower_on_the_same_events():
    pytest.importorskip("diffusers", reason="needs the parity extra")
    config = lean_config()
    with config.unlocked():
        config.model.text.pad_to = 16
    found = train_step.measure(config, steps=2, views=1, peer=True)
    ours = {key: leaf for key, leaf in wam.abstract_params(config.model)["video"].items() if key != "cameras"}
    assert found["peer"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(ours))
    assert check_spread(found["peer"]["step_seconds"]).count == 2
    assert "times ours: diffusers" in train_step.table(found)


def test_the_batch_of_a_store_is_its_first(clustered_store):
    config = training_config(clustered_store)
    with make_loader(open_store(clustered_store), config) as batches:
        first = next(batches)
    config, batch, channel_weight = train_step.prepare(config, str(clustered_store), 0)
    assert set(first) - set(batch) == set(META_FIELDS) and channel_weight.shape == (config.model.latent_channels,)
    for name, value in batch.items():
        np.testing.assert_array_equal(value, first[name], err_msg=name)
    full = config.data.rows * training_flops(config, RowShape.of(config, 2), "joint")
    assert 0.3 * full < batch_flops(config, batch) < full  # its events are shorter than the longest


def test_the_share_of_the_peak_is_known_for_known_devices_only():
    assert peak_flops("TPU v5p") == 459e12 and peak_flops("cpu") is None


def test_the_loader_packs_what_the_sampler_reports(clustered_store):
    """By the command: 24 rows are three whole blocks of eight, so the two agree; standard output is JSON alone."""
    done = command(
        "loader",
        "--json",
        "--steps=9",
        f"--store={clustered_store}",
        "--config=configs/base.py",
        *(f"--config.data.{knob}" for knob in ("rows=2", "latents_per_row=17", "draw_block_rows=8", "prefetch=1")),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    packing = found["packing"]
    assert packing["rows"] == 24 and packing["sampler"]["blocks"] == 3
    assert packing["fill"] == pytest.approx(packing["sampler"]["fill"], abs=1e-12)
    assert packing["events_per_row"] == pytest.approx(packing["sampler"]["events_per_row"])
    threads, processes = found["runs"]
    assert (threads["workers"], processes["workers"]) == (0, 1)
    assert threads["worker_bytes"] is None and 2e7 < processes["worker_bytes"] < 2e9
    for run in found["runs"]:
        spread = check_spread(run["batch_seconds"])
        assert spread.count == 9 and run["rows_per_s"] <= 2 / spread.min
        assert run["windows_per_s"] / run["rows_per_s"] == pytest.approx(packing["events_per_row"], rel=0.3)
        assert run["windows_per_core_s"] * run["cpu_seconds"] == pytest.approx(
            run["windows_per_s"] * 18 / run["rows_per_s"]
        )
        assert run["first_batch_seconds"] > 0
    files = [path for path in clustered_store.rglob("*") if path.is_file()]
    stored = sum(open_store(clustered_store, split).index.size for split in ("train", "heldout"))
    assert found["disk_bytes_per_window"] == sum(path.stat().st_size for path in files) / stored
    assert found["pixel_events_per_s"] == max(run["windows_per_core_s"] for run in found["runs"])
    assert not {"events_per_s", "lerobot_events_per_s"} & set(found)
    assert f"{100 * packing['fill']:.2f} % of the latents of 24 rows are real" in loader.table(found)


def test_the_peer_of_the_loader_is_told_the_same_windows(clustered_store, tmp_path):
    store, config = open_store(clustered_store), training_config(clustered_store)
    ids = [entry["id"] for entry in store.episodes if entry["split"] == "train"]
    episodes = list(read_episodes(clustered_store, ids))
    write_lerobot(tmp_path / "set", episodes, level="task")
    table = pq.read_table(tmp_path / "set" / "data" / "chunk-000" / "file-000.parquet")
    actions, steps = np.stack(table["action"].to_numpy()), table["frame_index"].to_numpy()
    batches = loader.peer_batches(store, config, loader.first_rows(episodes), 3)
    sampler = PackedRows(store, config).sampler
    for step, batch in enumerate(batches):
        planned = [*sampler.row(2 * step), *sampler.row(2 * step + 1)]
        assert len(batch) == len(planned) > 2
        for (row, frames, commands), index in zip(batch, planned):
            record = store.read(index)
            assert (steps[row], frames, commands) == (record.start, len(record.frame_steps), 2 * (frames - 1))
            told = record.state[:3] + record.actions[:, :3]
            np.testing.assert_allclose(actions[row : row + commands, :3], told, atol=1e-5)


@pytest.mark.parity
def test_lerobot_is_timed_on_the_windows_of_frames_and_latents(clustered_store):
    pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="LeRobot is not installed", exc_type=ImportError)
    found = loader.measure(training_config(clustered_store), steps=3, store=str(clustered_store), peer=True, episodes=3)
    readers = found["comparison"]["readers"]
    keys = {"latents": "events_per_s", "pixels": "pixel_events_per_s", "lerobot": "lerobot_events_per_s"}
    assert found["comparison"]["episodes"] == 3 and list(readers) == list(keys)
    for name, key in keys.items():
        runs = readers[name]["runs"]
        assert [run["workers"] for run in runs] == [0, 1] and readers[name]["disk_bytes"] > 1e4
        assert found[key] == max(run["windows_per_core_s"] for run in runs)
        assert runs[0]["worker_bytes"] is None and 2e7 < runs[1]["worker_bytes"] < 4e9
    for latents, pixels, lerobot in zip(*(readers[name]["runs"] for name in keys)):
        windows = [round(run["windows_per_core_s"] * run["cpu_seconds"], 6) for run in (latents, pixels, lerobot)]
        assert windows[0] == windows[1] == windows[2] > 6
        assert lerobot["frames"] >= 2 * 2 * windows[0]  # two views, and no window has fewer frames than two
    assert found["pixels_times_lerobot"] == found["pixel_events_per_s"] / found["lerobot_events_per_s"] > 1
    assert found["statistics"]["times_faster"] > 2
    assert json.loads(json.dumps(found)) == found
    assert f"latents {found['latents_times_lerobot']:.1f}, pixels" in loader.table(found)


def test_the_peer_of_the_loader_has_no_history(clustered_store):
    config = training_config(clustered_store)
    with config.unlocked():
        config.data.window_kind = "history"
    with pytest.raises(UserError, match="--peer knows windows of kind event and fixed"):
        loader.measure(config, store=str(clustered_store), peer=True)


def test_inference_of_a_config_alone_runs_the_denoising_program():
    found = inference.measure(lean_config(buckets=(3,), steps=2, video_steps=2), steps=3, views=2)
    (bucket,) = found["buckets"]
    spread = check_spread(bucket["seconds"])
    assert (bucket["latents"], bucket["actions"], spread.count) == (3, 16, 3)
    assert bucket["cold_seconds"] > 3 * spread.median and bucket["seconds_per_action"] == spread.median / 16
    assert found["includes"].startswith("denoising alone") and found["parameters_from"] == "random"
    assert "denoising alone" in inference.table(found)


def test_inference_of_a_run_goes_the_whole_way(small_store, tmp_path):
    store = open_store(small_store)
    config = store_config(store, buckets=(2,))
    with config.unlocked():
        config.model.view_attention = config.model.sight_cone.on = False
    average = save_run(tmp_path, store, config)
    found = inference.measure(workdir=str(tmp_path), steps=2)
    assert found["includes"].startswith("encoding the pictures")
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(average))
    assert found["parameters_from"] == str(tmp_path) and len(found["buckets"]) == 1


def test_inference_takes_a_run_or_a_config():
    for wrong in (dict(), dict(config=tiny_config(), workdir="run"), dict(workdir="run", views=2)):
        with pytest.raises(UserError, match="--workdir=RUN alone, or --config"):
            inference.measure(**wrong)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["everything"],
            "say what to measure: python -m wallwm_jax.benchmark "
            "{train_step,loader,inference,serving,staircase,muon,context,segment,sync,sampling}",
        ),
        (["loader", "--topology=v5p:2x2x1"], "--topology is not for loader, which takes --config, --steps, --store"),
        (["train_step"], "train_step needs --config=FILE"),
        (["inference", "--store=x"], "inference needs --config=FILE or --workdir=RUN"),
    ],
)
def test_wrong_flags_are_one_line_before_any_work(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda config: train_step.measure(config), "give --views=N"),
        (lambda config: train_step.measure(config, views=4), "model.max_views=4"),
        (lambda config: train_step.measure(config, store="nowhere"), "'nowhere' does not exist"),
        (lambda config: train_step.measure(config, views=2, peer=True), "--peer knows stage video, one view"),
        (lambda config: inference.measure(config), "give --views=N"),
        (lambda config: loader.measure(config), "loader needs --store=DIR"),
    ],
)
def test_what_is_missing_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(tiny_config())


def test_the_parameter_table_adds_up():
    params = wam.abstract_params(tiny_config().model)
    mesh = jax.sharding.AbstractMesh((1, 1, 4, 1, 2), AXES)
    table = figures.parameter_table(params, mesh)
    total = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    assert f"all together: {total / 2**30:.3f} GiB" in table
    up = next(line.split() for line in table.splitlines() if "2 x 32 x 64 " in line)
    assert " ".join(up[:-1]) == "blocks/ffn/up/kernel 2 x 32 x 64 layers, embed, mlp -, fsdp, tensor"
    assert up[-1] == f"{2 * 32 * 64 * 4 / 8 / 2**20:.3f}"


def test_pictures_are_pngs():
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": -1})
    shards = figures.shard_pictures({"latents": ((8, 6), rows_sharding(mesh), ("rows", "frames"))})
    bars = figures.stacked_bars("Memory", {"chip": {"parameters": 1.0, "temporaries": 3.0}}, "GiB")
    for picture in (figures.mesh_picture(mesh), shards, bars):
        assert picture.startswith(b"\x89PNG")
