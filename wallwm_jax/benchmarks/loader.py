"""The loader of training on one event store: windows per second and core, first batch, packing, memory, disk.

Loads with threads of this process and with worker processes. What is per core counts the seconds of processor time that
this process and its workers spent, so that a busy machine or an idle core does not change it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.benchmarks.timing import Result, Seconds, host, machine_line
from wallwm_jax.console import UserError, phase
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.pipeline import make_loader

MIB = 2**20


def measure(config: ConfigDict, steps: int = 20, store: str = "") -> Result:
    """Times `steps` batches as they arrive, without workers and with `config.data.workers` (at least one).

    Args:
      config: as for training; `config.data.rows` is the batch.
      steps: how many batches are timed, after those that were made ahead.
      store: the event store; "" takes `config.data.store`.

    Raises:
      UserError: no store, or one that does not fit the config.
    """
    path = store or config.data.store
    if not path:
        raise UserError("loader needs --store=DIR, an event store made by python -m wallwm_jax.build_events")
    opened = open_store(path, config.data.split)
    runs = {}
    for workers in (0, max(1, int(config.data.workers))):
        with phase(f"{steps} batches with {workers} workers"):
            runs[workers] = _run(opened, config, workers, steps)
    return {
        "machine": host(),
        "store": str(path),
        "codec": opened.meta["codec"],
        "size": list(opened.meta["size"]),
        "views": len(config.data.views) or len(opened.meta["views"]),
        "rows": int(config.data.rows),
        "batches": steps,
        "disk_bytes_per_window": _disk_bytes(opened),
        "packing": runs[0].pop("packing"),
        "runs": [{name: value for name, value in run.items() if name != "packing"} for run in runs.values()],
    }


def table(result: Result) -> str:
    """The figures as lines for people."""
    packing, (height, width) = result["packing"], result["size"]
    return "\n".join(
        [
            machine_line(result["machine"]),
            f"store        {result['store']}: codec {result['codec']}, {height}x{width} pixels, "
            f"{result['disk_bytes_per_window'] / 1024:.1f} KiB on disk per window, all included",
            f"packing      {100 * packing['fill']:.2f} % of the latents of {packing['rows']} rows are real, "
            f"{packing['events_per_row']:.2f} events per row; whole blocks of the sampler: "
            f"{100 * packing['sampler']['fill']:.2f} %",
            f"batch        {result['rows']} rows, {result['views']} views; median and quartiles of {result['batches']}",
            f"{'workers':<9}{'s per batch':<28}{'rows/s':>8}{'windows/s':>11}{'per core':>10}{'first batch':>13}"
            f"{'MiB per worker':>16}",
            *(
                f"{run['workers']:<9}{Seconds(**run['batch_seconds'])!s:<28}{run['rows_per_s']:>8.1f}"
                f"{run['windows_per_s']:>11.1f}{run['windows_per_core_s']:>10.1f}{run['first_batch_seconds']:>11.2f} s"
                + (f"{run['worker_bytes'] / MIB:>16.0f}" if run["workers"] else "")
                for run in result["runs"]
            ),
            "per core: windows per second of processor time; MiB: proportional share of memory, at the end",
        ]
    )


def _run(store: EventStore, config: ConfigDict, workers: int, steps: int) -> dict[str, Any]:
    """The figures with one number of workers; `packing` is that of all rows loaded, beside the sampler's report."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.workers = workers
    others = set(multiprocessing.active_children())
    begun = time.perf_counter()
    with make_loader(store, config) as loader:
        sizes = [_size(next(loader))]
        first = time.perf_counter() - begun
        mine = [child.pid for child in multiprocessing.active_children() if child not in others and child.pid]
        ahead = 2 * (max(1, int(config.data.prefetch)) + workers)  # at least what was made before anybody asked
        sizes += [_size(next(loader)) for _ in range(ahead)]
        seconds, cpu = [], _cpu_seconds(mine)
        for _ in range(steps):
            begun = time.perf_counter()
            batch = next(loader)
            seconds.append(time.perf_counter() - begun)
            sizes.append(_size(batch))
        cpu, memory = _cpu_seconds(mine) - cpu, [_memory(pid) for pid in mine]
        rows = len(sizes) * config.data.rows
        plan = loader.sampler.report(blocks=-(-rows // loader.sampler.rows_per_block))
    latents, windows = np.sum(sizes, axis=0).tolist()
    timed = sum(windows for _, windows in sizes[-steps:])
    return {
        "workers": workers,
        "first_batch_seconds": first,
        "warm_up": 1 + ahead,
        "batch_seconds": Seconds.of(seconds).to_json(),
        "rows_per_s": steps * config.data.rows / sum(seconds),
        "windows_per_s": timed / sum(seconds),
        "windows_per_core_s": timed / cpu,
        "cpu_seconds": cpu,
        "worker_bytes": float(np.median(memory)) if memory else None,
        "packing": {
            "rows": rows,
            "fill": latents / (rows * config.data.latents_per_row),
            "events_per_row": windows / rows,
            "sampler": plan,
        },
    }


def _size(batch: dict[str, np.ndarray]) -> tuple[int, int]:
    """Real latent frames and windows of a batch."""
    return int(np.count_nonzero(batch["latent_event"])), int(np.count_nonzero(batch["window_index"] >= 0))


def _cpu_seconds(children: Sequence[int]) -> float:
    """Processor time that this process and `children` have spent so far."""
    ticks = 0
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> int:
    """Bytes of a process; memory that it shares counts by its share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _disk_bytes(store: EventStore) -> float:
    """Bytes of the whole store, captions and features included, per window of all its splits."""
    size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    return size / sum(split["windows"] for split in store.meta["splits"].values())
