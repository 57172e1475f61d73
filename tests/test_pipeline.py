"""The loader: same rows on any number of hosts and workers, resume by number, bad records, checks, the device feed."""

import dataclasses
import itertools
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import base
from wallwm_jax.console import UserError
from wallwm_jax.data.device_feed import feed
from wallwm_jax.data.event_store import open_store, write_index
from wallwm_jax.data.packing import META_FIELDS, batch_spec, row_of
from wallwm_jax.data.pipeline import (
    BatchSource,
    PackedRows,
    check_store,
    make_loader,
    resolve_views,
    uncalibrated_views,
)
from wallwm_jax.parallel.mesh import AXES
from wallwm_jax.parallel.sharding import host_rows

_LOAD_FOREVER = """
import multiprocessing, sys, time
from configs import base
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.pipeline import make_loader
if __name__ == "__main__":
    config = base.get_config()
    config.data.rows = 1
    with make_loader(open_store(sys.argv[1]), config) as loader:
        next(loader)
        print([child.pid for child in multiprocessing.active_children() if "grain" in child.name][0], flush=True)
        time.sleep(600)
"""


def configured(**changes):
    """The base config with small rows; keys are `section__name`, or names of the data section."""
    config = base.get_config().copy_and_resolve_references().unlock()
    config.data.update(dict(rows=2, latents_per_row=17, draw_block_rows=8, workers=0, prefetch=1))
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        config[section or "data"][name] = value
    return config.lock()


@pytest.fixture(scope="module")
def store(clustered_store):
    return open_store(clustered_store)


def take(store, config, count, **where):
    with make_loader(store, config, **where) as loader:
        return list(itertools.islice(loader, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def batches(store):
    return take(store, configured(), 5)


def test_a_batch_is_what_its_spec_says(store, batches):
    spec = batch_spec(configured(), 2, num_views=2)
    for step, batch in enumerate(batches):
        assert set(batch) == set(spec) | set(META_FIELDS)
        for name, (shape, dtype) in spec.items():
            assert (batch[name].shape, batch[name].dtype) == (shape, dtype), name
        assert batch["row"].tolist() == [2 * step, 2 * step + 1]
        real = (batch["latent_event"] > 0).mean()
        assert real > 0.7  # of one batch; see the sampler's tests for many
    assert all(np.isfinite(batch["latents"]).all() for batch in batches)


def test_two_hosts_load_the_two_halves_of_the_same_rows(store, batches):
    parts = [take(store, configured(), 3, host_index=host, host_count=2) for host in (0, 1)]
    joined = [{name: np.concatenate([one[name], two[name]]) for name in one} for one, two in zip(*parts)]
    assert_same(joined, batches[:3])


def test_resume_is_the_step_number(store, batches):
    assert_same(take(store, configured(), 2, start_step=3), batches[3:])
    (far,) = take(store, configured(), 1, start_step=10**9)
    assert far["row"].tolist() == [2 * 10**9, 2 * 10**9 + 1]


class Chip:
    """All that the index math and a mesh know of a device."""

    platform = device_kind = "nothing"

    def __init__(self, number):
        self.id, self.process_index = number, number // 4


def pod(hosts, tensor):
    """A mesh over hosts of four chips each, without devices: rows over "fsdp", and `tensor` chips that share rows."""
    chips = np.array([Chip(number) for number in range(4 * hosts)]).reshape(1, 1, 4 * hosts // tensor, 1, tensor)
    return Mesh(chips, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def test_512_hosts_serve_each_row_once_and_384_or_one_go_on_with_the_rows_that_come_next(store):
    """Three steps of 3072 rows on 512 hosts, then two on 384, then one on a single host."""
    rows, config = 3072, configured(rows=3072)
    served: list[int] = []
    for hosts, start, steps in ((512, 0, 3), (384, 3, 2), (1, 5, 1)):
        mesh = pod(hosts, tensor=2)
        sources = []
        for host in range(hosts):
            index, parts = host_rows(mesh, rows, process=host)
            sources.append(BatchSource(store, config, host_index=index, host_count=parts, start_step=start))
        for step in range(steps):
            made = [source.global_rows(step) for source in sources]
            assert {len(part) for part in made} == {rows // hosts}
            served += [row for part in made for row in part]
    assert served == list(range(6 * rows))  # each once, none left out, in the order of the global batch


def test_hosts_that_share_rows_make_the_same_ones():
    """Eight chips, two hosts, form one model replica."""
    mesh = pod(512, tensor=8)
    assert [host_rows(mesh, 1024, process=host) for host in range(512)] == [(host // 2, 256) for host in range(512)]


def test_a_row_is_the_same_whichever_of_any_number_of_hosts_makes_it(store):
    config, row = configured(rows=1536), 4 * 1536 + 1027
    made = []
    for hosts, start in ((384, 4), (512, 3)):
        share = 1536 // hosts
        source = BatchSource(store, config, host_index=1027 // share, host_count=hosts, start_step=start)
        made.append(row_of(source[4 - start], 1027 % share))
    assert [int(one["row"]) for one in made] == [row] * 2
    assert_same(made, [PackedRows(store, config)(row)] * 2)


def test_a_worker_process_loads_the_same_batches_and_reports_bad_records(clustered_store, tmp_path, capfd):
    sampler = BatchSource(open_store(clustered_store), configured()).sampler
    bad = {sampler.row(1)[0], sampler.row(4)[1], sampler.row(5)[0]}
    copy = _with_bad_records(clustered_store, tmp_path, windows=bad)
    expected = take(open_store(copy), configured(), 4)
    threads = capfd.readouterr().err
    assert_same(take(open_store(copy), configured(workers=1), 4), expected)
    workers = capfd.readouterr().err
    warnings = [line for line in workers.splitlines() if line.startswith("warning: bad record, used as padding: ")]
    assert warnings == [line for line in threads.splitlines() if line.startswith("warning: bad record")]
    assert len(warnings) == len(bad)  # each is named once, however often it is drawn


@pytest.mark.fault
def test_workers_do_not_outlive_a_killed_training_process(clustered_store):
    process = subprocess.Popen(
        [sys.executable, "-c", _LOAD_FOREVER, str(clustered_store)], stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    assert _is_running(worker)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(worker)


def test_a_bad_record_is_named_by_episode_and_event(clustered_store, tmp_path, capfd):
    copy = _with_bad_records(clustered_store, tmp_path, windows=range(200))
    store = open_store(copy)
    with make_loader(store, configured(max_bad_records=10**6)) as loader:
        batch = next(loader)
        window = int(batch["bad_index"].max())
        entry = store.index[window]
        assert loader.bad_records[window].startswith(f"window {window} (episode 'synthetic-")
        assert f"{entry['event_index']}): the checksum differs from the index" in loader.bad_records[window]
    assert (batch["window_index"] == -1).all()
    assert not batch["latent_event"].any()


def test_too_many_bad_records_end_the_run(clustered_store, tmp_path):
    copy = _with_bad_records(clustered_store, tmp_path, windows=range(200))
    with make_loader(open_store(copy), configured(max_bad_records=3)) as loader, pytest.raises(UserError) as error:
        list(itertools.islice(loader, 4))
    assert "4 records of event store" in str(error.value)
    assert "data.max_bad_records=3" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__latent_shape": (4, 4)}, r"latent cells per view \(8, 8\), but model.latent_shape is \(4, 4\)"),
        ({"model__latent_channels": 48}, r"channels of codec 'haar8' 768, but model.latent_channels is 48"),
        ({"model__action_dim": 14}, "action dimensions 32, but model.action_dim is 14"),
        ({"model__actions_per_latent": 4}, "actions per latent 8, but model.actions_per_latent is 4"),
        ({"model__max_latents": 1}, "future latents, but model.max_latents is 1; raise it"),
        ({"model__max_views": 2}, "view ids go up to 2, but model.max_views is 2"),
        ({"views": ("top",)}, r"data.views asks for 'top'; event store .* has \['front_pixels', 'ur5e/wrist'\]"),
        ({"latents_per_row": 2}, "more than a row holds"),
        ({"window_kind": "tile"}, "data.window_kind='tile'"),
    ],
)
def test_a_store_that_does_not_fit_is_an_error_before_anything_is_computed(store, change, message):
    with pytest.raises(UserError, match=message):
        make_loader(store, configured(**change))


def test_cached_text_features_need_a_store_that_has_them(store):
    config = configured().unlock()
    config.model.text.kind = "features"
    with pytest.raises(UserError, match=r"has text bytes, but model\.text\.kind is features"):
        check_store(store, config)


def test_rows_must_divide_among_hosts(store):
    with pytest.raises(UserError, match=r"data\.rows=2 does not divide among 3 hosts"):
        make_loader(store, configured(), host_index=0, host_count=3)


def test_views_come_from_the_config_or_else_from_the_store(store):
    assert resolve_views(store, configured()) == ("front_pixels", "ur5e/wrist")
    assert resolve_views(store, configured(views=("ur5e/wrist",))) == ("ur5e/wrist",)


def test_a_source_survives_pickling(store, batches):
    source = BatchSource(store, configured())
    source.sampler  # noqa: B018 - what was computed must not travel
    blob = pickle.dumps(source)
    assert len(blob) < 10_000
    np.testing.assert_array_equal(pickle.loads(blob)[1]["latents"], batches[1]["latents"])


def test_the_feed_yields_global_arrays_in_order_and_keeps_meta_fields_on_the_host(store, batches):
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    with make_loader(store, configured()) as loader, feed(loader, sharding) as fed:
        for batch, (arrays, meta, waited) in zip(batches[:3], fed):
            assert set(meta) == set(META_FIELDS)
            assert set(arrays) == set(batch) - set(META_FIELDS)
            assert all(array.sharding == sharding for array in arrays.values())
            for name, array in arrays.items():
                np.testing.assert_array_equal(np.asarray(array), batch[name], err_msg=name)
            np.testing.assert_array_equal(meta["row"], batch["row"])
            assert waited >= 0


def test_the_feed_moves_only_what_has_a_sharding():
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    sharding = {"a": NamedSharding(mesh, PartitionSpec("rows"))}
    source = iter([{"a": np.ones((2, 3)), "b": np.zeros(2)}])
    with feed(source, sharding) as fed:
        arrays, meta, _ = next(fed)
        assert (list(arrays), meta) == (["a"], {})
        with pytest.raises(StopIteration):
            next(fed)


def test_an_error_of_the_loader_reaches_the_training_loop():
    def failing():
        yield {"a": np.ones(1)}
        raise UserError("too many bad records")

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("rows",)), PartitionSpec())
    with feed(failing(), sharding) as fed:
        next(fed)
        with pytest.raises(UserError, match="too many bad records"):
            next(fed)


def _is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _with_bad_records(path, tmp_path, windows):
    """A copy of a store in which the records of some windows fail their check."""
    copy = tmp_path / "store"
    shutil.copytree(path, copy)
    index = np.array(open_store(copy).index)
    index["checksum"][[window for window in windows if window < len(index)]] ^= 1
    write_index(copy / "index-train.npy", index)
    return copy


def test_views_without_calibration_are_named(small_store, monkeypatch):
    store = open_store(small_store)
    views = tuple(store.meta["views"])
    assert uncalibrated_views(store, views) == ()
    read = store.read

    def read_blind(index):
        record = read(index)
        return dataclasses.replace(record, geometry=record.geometry * (np.arange(len(views)) == 0)[:, None, None])

    monkeypatch.setattr(store, "read", read_blind)
    assert uncalibrated_views(store, views) == views[1:]
