"""The loader: from an open event store to batches of packed rows on this host, through Grain, with no iterator state.

Batch `s` holds the global rows `s * B .. s * B + B - 1`; host `h` of `n` makes its contiguous share of them. Which
windows a row holds, and how their captions are worded, follows from (seed, row) alone: any number of hosts and workers
sees the same rows, and to resume is to start at a step.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags
from grain.experimental import DatasetOptions, WithOptionsIterDataset
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits

from wallwm_jax.console import UserError
from wallwm_jax.data.balance import level_shares
from wallwm_jax.data.event_store import BadRecord, EventStore
from wallwm_jax.data.packing import Spec, batch_spec, blank_rows, pack_row, row_of
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.events.schema import LEVELS

Batch = dict[str, np.ndarray]

_SHARED_BYTES = 1 << 20  # arrays from this size on come from a worker through shared memory
_FAREWELL_S = 2.0  # an orphaned worker ends the batch it is at, so that its shared memory is known and cleaned up
_BATCHES = 1 << 40  # length of the endless source


def resolve_views(store: EventStore, config: ConfigDict) -> tuple[str, ...]:
    """The views of a batch, in order: `config.data.views`, or all of the store's where that is empty.

    Raises:
      UserError: a view that the store does not have.
    """
    views = tuple(config.data.views) or tuple(store.meta["views"])
    for view in views:
        if view not in store.meta["views"]:
            raise UserError(f"data.views asks for {view!r}; event store {str(store.path)!r} has {store.meta['views']}")
    return views


def uncalibrated_views(store: EventStore, views: tuple[str, ...], look_at: int = 16) -> tuple[str, ...]:
    """Those of `views` that have no camera calibration in any of `look_at` windows spread over the split."""
    stored, known = store.meta["views"], np.zeros(len(store.meta["views"]), bool)
    for index in np.unique(np.linspace(0, len(store.index) - 1, look_at).round().astype(int)):
        with contextlib.suppress(BadRecord):
            known |= np.any(store.read(int(index)).geometry != 0.0, axis=(1, 2))
    return tuple(view for view in views if not known[stored.index(view)])


def check_store(store: EventStore, config: ConfigDict) -> None:
    """Compares what the store holds with what the model expects, before anything is computed.

    Raises:
      UserError: they differ; the message names both values and the knob.
    """
    codec, model = store.codec, config.model
    text = "features" if store.has_text_features else "bytes"
    text_width = store.meta.get("text_width", model.text.width)  # the bytes encoder has the model's
    cells = tuple(side // codec.stride[1] for side in store.meta["size"])
    expected: list[tuple[str, str, Any, Any]] = [
        ("latent cells per view", "model.latent_shape", cells, tuple(model.latent_shape)),
        (f"channels of codec {codec.name!r}", "model.latent_channels", codec.channels, model.latent_channels),
        ("text", "model.text.kind", text, model.text.kind),
        ("width of text features", "model.text.width", text_width, model.text.width),
        ("action dimensions", "model.action_dim", ACTION_DIM, model.action_dim),
        ("actions per latent", "model.actions_per_latent", store.meta["actions_per_latent"], model.actions_per_latent),
    ]
    for what, knob, stored, wanted in expected:
        if stored != wanted:
            raise UserError(
                f"event store {str(store.path)!r} has {what} {stored}, but {knob} is {wanted}; "
                "set it to the store's value or build a store that fits"
            )
    _check_captions(store, config.data)
    views = resolve_views(store, config)
    table = store.meta["cameras"]
    highest = max(table[view] for view in views)
    if highest >= model.max_views:
        raise UserError(f"view ids go up to {highest}, but model.max_views is {model.max_views}; raise it")
    blind = [episode["name"] for episode in store.episodes if not set(views) & set(episode["views"])]
    if blind:
        raise UserError(f"{len(blind)} episodes, {blind[0]!r} among them, have none of {views}; change data.views")
    if len(store.index):
        _check_lengths(store, config)


def _check_captions(store: EventStore, data: ConfigDict) -> None:
    if data.caption not in ("own", "instruction", "events"):
        raise UserError(f"data.caption={data.caption!r} is not own, instruction or events")
    if data.caption == "events" and data.window_kind != "event" and store.has_text_features:
        raise UserError(
            f"data.caption='events' joins captions, and event store {str(store.path)!r} has features of single ones; "
            "set data.caption, or build it with --text_encoder=bytes"
        )
    if data.window_kind != "event" and (data.caption == "events" or data.chunk_event_prob):
        for level in level_shares(data):
            if not any(episode["spans"].get(level) for episode in store.episodes):
                raise UserError(
                    f"captions of windows name the events of data.levels={dict(data.levels)}, and no episode of event "
                    f"store {str(store.path)!r} has events of level {level!r}; take it out"
                )


def _check_lengths(store: EventStore, config: ConfigDict) -> None:
    longest = int(store.index["length"].max()) - 1
    if longest > config.model.max_latents:
        raise UserError(
            f"event store {str(store.path)!r} has windows of {longest} future latents, but model.max_latents is "
            f"{config.model.max_latents}; raise it"
        )


class Rows(Protocol):
    """What makes the rows of a kind of batch, each a pure function of (seed, row).

    Attributes:
      sampler: decides which windows a row holds.
    """

    sampler: Sampler

    def __init__(self, store: EventStore, config: ConfigDict) -> None: ...

    def __call__(self, row: int, out: Batch | None = None) -> Batch:
        """The arrays of a global row without their leading axis, and `packing.META_FIELDS`; in `out`, if given: zeros,
        a row of `packing.blank_rows`."""

    @staticmethod
    def spec(config: ConfigDict, global_rows: int, *, num_views: int | None = None) -> Spec:
        """Name → (shape, dtype) of every array that goes to the devices."""

    @staticmethod
    def check(store: EventStore, config: ConfigDict) -> None:
        """Raises `UserError` where store and config do not fit together."""


class PackedRows:
    """Rows of packed events, see `packing.pack_row`."""

    def __init__(self, store: EventStore, config: ConfigDict) -> None:
        """Raises `UserError` where the sampler cannot draw as the config says."""
        self.sampler = Sampler(store.index, config, sources=store.meta["sources"])
        self._store, self._config, self._views = store, config, resolve_views(store, config)

    def __call__(self, row: int, out: Batch | None = None) -> Batch:
        return pack_row(self._store, self._config, self.sampler.row(row), row, self._views, out)

    @staticmethod
    def spec(config: ConfigDict, global_rows: int, *, num_views: int | None = None) -> Spec:
        return batch_spec(config, global_rows, num_views=num_views)

    @staticmethod
    def check(store: EventStore, config: ConfigDict) -> None:
        check_store(store, config)


class BatchSource:
    """The batches of one host by number: a Grain `RandomAccessDataSource` that can be pickled into worker processes.

    Batch `i` of host `h` of `n` holds global rows `(start_step + i) * B + h * B / n` and the `B / n - 1` after it.
    """

    def __init__(
        self,
        store: EventStore,
        config: ConfigDict,
        kind: type[Rows] = PackedRows,
        *,
        host_index: int = 0,
        host_count: int = 1,
        start_step: int = 0,
    ) -> None:
        """Raises `UserError` where the hosts cannot share the rows evenly."""
        rows = int(config.data.rows)
        if rows % host_count:
            raise UserError(f"data.rows={rows} does not divide among {host_count} hosts")
        self._store, self._config, self._kind = store, config, kind
        self._rows, self._share = rows, rows // host_count
        self._first = start_step * rows + host_index * self._share

    def __len__(self) -> int:
        return _BATCHES

    def __getitem__(self, number: int) -> Batch:
        """The arrays of one batch, see `Rows`; each row is written where it stays."""
        views = resolve_views(self._store, self._config)
        batch = blank_rows(self._kind.spec(self._config, self._share, num_views=len(views)))
        for place, row in enumerate(self.global_rows(int(number))):
            self._make(row, row_of(batch, place))
        return batch

    def global_rows(self, number: int) -> range:
        """The global rows of this host's batch `number`."""
        first = self._first + number * self._rows
        return range(first, first + self._share)

    def __repr__(self) -> str:
        return f"BatchSource({str(self._store.path)!r}, first={self._first}, share={self._share} of {self._rows})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_make"}

    @property
    def sampler(self) -> Sampler:
        """What decides which windows a row holds."""
        return self._make.sampler

    @functools.cached_property
    def _make(self) -> Rows:
        """Made once per process."""
        return self._kind(self._store, self._config)


class Loader(Iterator[Batch]):
    """Endless iterator of host batches; close it, or use it in a `with` block, so that its workers end.

    Attributes:
      bad_records: window index → what is wrong with its record, for every bad record met so far.
      sampler: the plan of the draw.
    """

    def __init__(self, store: EventStore, config: ConfigDict, source: BatchSource) -> None:
        """Use `make_loader`."""
        self.bad_records: dict[int, str] = {}
        self.sampler = source.sampler
        self._store, self._most_bad = store, int(config.data.max_bad_records)
        # Copied out of the workers' shared memory, which is then free at once and not when the last user lets go of it.
        self._own = np.array if config.data.workers else np.asarray
        self._batches = _grain_iterator(source, config)
        self._batches.start_prefetch()  # the first batches are made while the caller still compiles

    def __next__(self) -> Batch:
        """The next batch: the arrays of the rows' `spec` for this host, and `packing.META_FIELDS`.

        Raises:
          UserError: more than `data.max_bad_records` different records are bad.
        """
        batch = {name: self._own(value) for name, value in next(self._batches).items()}
        bad = batch["bad_index"]
        for window in np.unique(bad[bad >= 0]).tolist():
            if window not in self.bad_records:
                self._report_bad(window)
        return batch

    def close(self) -> None:
        """Ends worker processes and threads; no batch can be had afterwards."""
        self._batches.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _report_bad(self, window: int) -> None:
        entry = self._store.index[window]
        reason = "its pictures are damaged"
        try:
            self._store.read(window)
        except BadRecord as error:
            reason = error.reason
        name = self._store.episodes[entry["episode"]]["name"]
        where = f"window {window} (episode {name!r}, {LEVELS[entry['level']]} {entry['event_index']})"
        self.bad_records[window] = f"{where}: {reason}"
        count = len(self.bad_records)
        print(
            f"warning: bad record, used as padding: {self.bad_records[window]} [{count} of at most {self._most_bad}]",
            file=sys.stderr,
            flush=True,
        )
        if count > self._most_bad:
            raise UserError(
                f"{count} records of event store {str(self._store.path)!r} are bad, more than "
                f"data.max_bad_records={self._most_bad}; the last is {self.bad_records[window]}. Build the store again"
            )


def make_loader(
    store: EventStore,
    config: ConfigDict,
    kind: type[Rows] = PackedRows,
    *,
    host_index: int = 0,
    host_count: int = 1,
    start_step: int = 0,
) -> Loader:
    """The batches of this host, beginning at step `start_step`.

    Args:
      store: an open event store.
      config: the whole config; reads `seed`, `data` and, for the checks, `model`.
      kind: what makes the rows.
      host_index, host_count: which contiguous share of the rows this host makes. Hosts that hold the same rows (a mesh
        whose other axes cross hosts) give the same index.
      start_step: batches before this one are skipped at no cost.

    Raises:
      UserError: store and config do not fit (see `check_store` and `Sampler`), or rows do not divide among hosts.
    """
    kind.check(store, config)
    source = BatchSource(store, config, kind, host_index=host_index, host_count=host_count, start_step=start_step)
    return Loader(store, config, source)


def _grain_iterator(source: BatchSource, config: ConfigDict) -> grain.DatasetIterator:
    workers, prefetch = int(config.data.workers), max(1, int(config.data.prefetch))
    batches = grain.MapDataset.source(source)
    if not workers:
        thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)  # two wait for each other's bytecode
        return iter(batches.to_iter_dataset(thread))
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers, also in notebooks and tests
        flags.FLAGS.mark_as_parsed()
    made = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    made = WithOptionsIterDataset(made, DatasetOptions(min_shm_size=_SHARED_BYTES))
    depth = max(1, prefetch // (2 * workers))  # Grain keeps this many both in the worker's queue and behind it
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=depth)
    return iter(made.mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(worker: int, workers: int) -> None:
    """Keeps a worker to one core (the others are its siblings' and training's), and ends it if its parent is killed."""
    cv2.setNumThreads(1)
    threadpool_limits(1)
    threading.Thread(target=_follow_parent, name="follow-parent", daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    time.sleep(_FAREWELL_S)
    os._exit(1)
