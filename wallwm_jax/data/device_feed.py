"""From host batches to global arrays on the devices, one step ahead of the training loop, and how long the loop waits.

A thread takes batches from the loader and starts their transfer while the devices compute; a short queue holds what is
ready. What the loop then waits is all that the input pipeline costs it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

import jax
import numpy as np
from jax.sharding import Sharding

from wallwm_jax.data.packing import META_FIELDS

Fed = tuple[dict[str, jax.Array], dict[str, np.ndarray], float]

_POLL_S = 0.2  # how often a full queue looks whether it was closed


class DeviceFeed(Iterator[Fed]):
    """Iterator of (global arrays by name, meta fields of this host's rows, seconds waited for them); see `feed`."""

    def __init__(
        self, batches: Iterator[dict[str, np.ndarray]], shardings: Sharding | Mapping[str, Sharding], depth: int
    ) -> None:
        """Use `feed`."""
        self._batches, self._shardings = batches, shardings
        self._ready: queue.Queue[tuple[dict[str, jax.Array], dict[str, np.ndarray]] | BaseException] = queue.Queue(
            depth
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-feed", daemon=True)
        self._thread.start()

    def __next__(self) -> Fed:
        """The next batch. An exception of the loader is raised here; after it, or `close`, there is no more."""
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        waited = time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        return *item, waited

    def close(self) -> None:
        """Stops the thread and drops what is ready; the loader itself stays open."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> DeviceFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if not self._offer(self._transfer(batch)):
                    return
            self._offer(StopIteration())
        except BaseException as error:  # handed to the loop, which raises it
            self._offer(error)

    def _transfer(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
        meta = {name: batch[name] for name in META_FIELDS if name in batch}
        shardings = self._shardings
        if not isinstance(shardings, Mapping):
            shardings = {name: shardings for name in batch if name not in meta}
        arrays = {
            name: jax.make_array_from_process_local_data(sharding, batch[name]) for name, sharding in shardings.items()
        }
        return arrays, meta

    def _offer(self, item: tuple[dict[str, jax.Array], dict[str, np.ndarray]] | BaseException) -> bool:
        """Puts an item into the queue; False where the feed was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


def feed(
    batches: Iterator[dict[str, np.ndarray]], shardings: Sharding | Mapping[str, Sharding], *, depth: int = 1
) -> DeviceFeed:
    """Starts moving batches to the devices, `depth` ahead of the one in use (1 is double buffering).

    Args:
      batches: a `pipeline.Loader`, or anything that yields host batches with leading axis "rows of this host".
      shardings: one for every array, or by name (then only the named arrays move). The global number of rows follows
        from the sharding. `packing.META_FIELDS` stay on the host.
      depth: batches that wait on the devices, at least 1; each costs its size in device memory.

    Returns:
      An iterator that must be closed (or used in a `with` block) before the loader is.
    """
    return DeviceFeed(batches, shardings, max(1, depth))
