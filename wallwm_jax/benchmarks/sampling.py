r"""Choosing what is drawn of very many events: seconds and peak memory of each step, from clusters to rows.

The index is made up and memory-mapped: subtasks and actions with the lengths of OCBench's, four datasets, scenes and
motions with Zipf's long tail, as many as clusters would be made, and most motions tied to a few scenes. No records are
behind it: clusters are fitted to made-up captions, thumbnails and trajectories, whose making is not timed. Each step
has a process of its own, so that its peak (of the whole process, the index that it has mapped included) is its own.

All of it grows in proportion to the events, except that rows come as fast, and a run resumes as soon.

| processor seconds (peak MiB)             | 1 M events  | 10 M events  |
|------------------------------------------|-------------|--------------|
| weights by product                       | 0.26 (210)  | 2.7 (1354)   |
| weights by raking                        | 0.31 (217)  | 3.5 (1420)   |
| shares of datasets, levels and lengths   | 0.42 (228)  | 4.1 (1576)   |
| sampler, made                            | 0.67 (216)  | 6.4 (1432)   |
| memory of a process that holds it, MiB   | 92          | 606          |
| rows per second, of one core             | 30,600      | 28,300       |
| a run resumed at block 10,000,000        | 0.07        | 0.09         |
| coverage of 10,000 steps                 | 1.4 (276)   | 11.7 (1613)  |

Printed on a core of an AMD EPYC that other work shared, hence processor seconds, by

    python -m wallwm_jax.benchmark sampling --windows=10000000 --rows=index,product,raking,shares,sampler,coverage

Clusters (`--rows=clusters`) take 125 s of processor time and 614 MiB of one million, 1273 of either kind, and 624 s and
1234 MiB of ten million, 4025 of what is seen and said and 2048 of motion. The memory held includes the mapped index,
324 MiB of ten million events, which processes share.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits

from wallwm_jax.benchmarks.processes import memory, peak_memory
from wallwm_jax.console import UserError, phase
from wallwm_jax.data import clusters
from wallwm_jax.data.balance import effective_sample_size, plan_draw
from wallwm_jax.data.embedders import STEPS, Described, open_embedder
from wallwm_jax.data.event_store import INDEX_DTYPE, EventStore
from wallwm_jax.data.sampler import BLOCKS_PER_DECK, Sampler
from wallwm_jax.evaluation.coverage import coverage
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.events.schema import LEVELS

_SOURCES = {"ocbench/chamber": 0.7, "ocbench/switch": 0.2, "ocbench/block": 0.08, "metaworld/reach": 0.02}
_SUBTASKS = 0.2  # of the events; the others are actions
_TIED = 0.7  # of the events have one of the few motions of their scene
_MOTIONS_OF_A_SCENE = 4
_CHUNK = 1 << 20  # windows made up at a time
_VIEWS, _PIXELS, _DIMENSIONS = 2, 144, 10  # of what is described: two thumbnails, the motion of one arm
_WORDS = ("reach", "grasp", "lift", "place", "push", "open", "close", "turn"), ("red", "green", "blue", "white")
_SCALE, _MOST = 3.0, (4096, 1024)  # how many clusters: the defaults of `cluster_store`
_FAR = 10**7  # the block that a run resumes at


def measure(windows: int = 1_000_000, rows: Sequence[str] = ()) -> dict[str, Any]:
    """Makes up an index of `windows` events and takes the steps `rows` (default all, see `STEPS_TAKEN`).

    Returns:
      `machine`, `windows`, `clusters` (of what is seen and said, of motion), `index_bytes`, and `rows`: step →
      `cpu_seconds` (of the processor), `seconds` (by the clock), `peak_bytes`, and what the step alone has.

    Raises:
      UserError: an unknown step, or no configs here.
    """
    from wallwm_jax.benchmarks.timing import host  # imports JAX, which the steps do not need

    if unknown := [name for name in rows if name not in STEPS_TAKEN]:
        raise UserError(f"--rows={unknown[0]}: one of {', '.join(STEPS_TAKEN)}")
    try:
        config = importlib.import_module("configs.base").get_config()
    except ModuleNotFoundError:
        raise UserError("there is no configs/base.py here; run from the repository's root") from None
    with tempfile.TemporaryDirectory() as folder:
        with phase(f"make up {windows} events"):
            found = make_store(Path(folder), windows)
        result = {"machine": host(), "windows": windows, **found, "rows": {}}
        for name in rows or STEPS_TAKEN:
            with phase(name), ProcessPoolExecutor(1, get_context("spawn")) as alone:
                result["rows"][name] = alone.submit(_take, name, Path(folder), config).result()
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    from wallwm_jax.benchmarks.timing import machine_line

    lines = [
        machine_line(result["machine"]),
        f"{result['windows']} windows, {result['clusters'][0]} clusters of what is seen and said, "
        f"{result['clusters'][1]} of motion; index of {result['index_bytes'] / 2**20:.0f} MiB",
        f"{'':<10}{'cpu s':>9}{'s':>9}{'peak MiB':>10}",
    ]
    for name, row in result["rows"].items():
        more = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in row.items() if key not in _SHOWN)
        lines.append(
            f"{name:<10}{row['cpu_seconds']:>9.2f}{row['seconds']:>9.2f}{row['peak_bytes'] / 2**20:>10.0f}  {more}"
        )
    return "\n".join(lines)


_SHOWN = ("cpu_seconds", "seconds", "peak_bytes")


def make_store(folder: Path, windows: int, seed: int = 0) -> dict[str, Any]:
    """Writes `index-train.npy` and `clusters.json` of a made-up store; returns `clusters` and `index_bytes`."""
    levels = [LEVELS.index("subtask"), LEVELS.index("action")]
    per_level = [round(windows * share) for share in (_SUBTASKS, 1 - _SUBTASKS)]
    counts = np.array([[clusters.number_of_clusters(n, _SCALE, most) for most in _MOST] for n in per_level])
    firsts = np.cumsum(counts, 0) - counts
    index = np.lib.format.open_memmap(folder / "index-train.npy", "w+", INDEX_DTYPE, (windows,))
    for start in range(0, windows, _CHUNK):
        rng, part = np.random.default_rng([seed, start]), index[start : start + _CHUNK]
        kind = (rng.random(len(part)) >= _SUBTASKS).astype(int)
        steps = np.where(kind, rng.integers(4, 21, len(part)), rng.integers(25, 101, len(part))) // 2 * 2
        part["level"] = np.array(levels)[kind]
        part["length"], part["num_actions"] = 1 + -(-steps // 8), steps
        part["duration_s"] = steps / 10
        part["episode"] = (start + np.arange(len(part))) // 50
        part["source"] = rng.choice(len(_SOURCES), len(part), p=list(_SOURCES.values()))
        for which in (0, 1):
            here = np.flatnonzero(kind == which)
            scene, motion = (_zipf(rng, len(here), count) for count in counts[which])
            tied = scene * _MOTIONS_OF_A_SCENE + rng.integers(0, _MOTIONS_OF_A_SCENE, len(here))
            motion = np.where(rng.random(len(here)) < _TIED, tied % counts[which, 1], motion)
            part["cluster_vl"][here], part["cluster_action"][here] = scene + firsts[which, 0], motion + firsts[which, 1]
    index.flush()
    moved = [[0.12345] * ACTION_DIM] * STEPS
    seen, motions = (
        [{"level": LEVELS[level], "captions": ["reach"], **more} for level, n in zip(levels, each) for _ in range(n)]
        for each, more in zip(counts.T.tolist(), ({"actions": moved}, {}))
    )
    (folder / clusters.FILE_NAME).write_text(json.dumps({"vision_language": seen, "action": motions}))
    return {"clusters": counts.sum(0).tolist(), "index_bytes": index.nbytes}


class MadeUp:
    """What the steps use of an `EventStore`: the train split of what `make_store` wrote."""

    split = "train"

    def __init__(self, folder: Path) -> None:
        self.path, self.index = folder, np.load(folder / "index-train.npy", mmap_mode="r")
        self.meta = {"sources": list(_SOURCES)}
        self.seconds = 0.0  # of processor time, spent on describing

    def __len__(self) -> int:
        return len(self.index)

    def caption(self, number: int) -> str:
        """A wording of three words and a number."""
        verbs, colours = _WORDS
        verb, colour = verbs[number % len(verbs)], colours[number // len(verbs) % len(colours)]
        return f"{verb} the {colour} block {number // len(verbs) // len(colours)}"

    def describe(self, windows: np.ndarray) -> Described:
        """What `embedders.describe` would read of them: that of the clusters that they are said to be in, and noise."""
        begun = time.process_time()
        rows, count, (looks, moves, noise) = self.index[windows], len(windows), _appearances()
        scene, motion = rows["cluster_vl"].astype(np.int64), rows["cluster_action"].astype(np.int64)
        draw = np.random.default_rng(int(windows[0])).integers(0, len(noise), count)
        found = Described(
            windows,
            scene,
            looks[scene % len(looks)] + (draw % 40).astype(np.uint8)[:, None, None],
            moves[motion % len(moves)] + noise[draw],
            np.broadcast_to(np.arange(ACTION_DIM) < _DIMENSIONS, (count, ACTION_DIM)),
            motion % 3,
            np.log(rows["duration_s"]).astype(np.float64),
        )
        self.seconds += time.process_time() - begun
        return found


@functools.cache
def _appearances() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thumbnails of scenes, `[509, V, pixels]`, trajectories of motions, `[2048, steps, 32]`, and noise for these."""
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 200, (509, _VIEWS, _PIXELS), np.uint8)
    moves, noise = (np.zeros((2048, STEPS, ACTION_DIM), np.float32) for _ in range(2))
    moves[..., :_DIMENSIONS] = rng.normal(0, 0.1, (2048, STEPS, _DIMENSIONS)).cumsum(1)
    noise[..., :_DIMENSIONS] = rng.normal(0, 0.05, (2048, STEPS, _DIMENSIONS))
    return looks, moves, noise


def _clusters(store: MadeUp, config: ConfigDict) -> dict[str, float]:
    splits = {"train": cast(EventStore, store)}
    begun = time.process_time()
    with threadpool_limits(1):
        clusters.find_clusters(
            splits,
            open_embedder("hashed", splits),
            0,
            _SCALE,
            _MOST,
            20_000,
            read=lambda _, windows: store.describe(windows),
        )
    return {"cpu_seconds": time.process_time() - begun - store.seconds}


def _product(store: MadeUp, config: ConfigDict) -> dict[str, float]:
    draw = plan_draw(store.index, config.data, store.meta["sources"])
    return {"effective_sample_size": effective_sample_size(draw.target)}


def _raking(store: MadeUp, config: ConfigDict) -> dict[str, float]:
    config.data.balance = "raking"
    return _product(store, config)


def _shares(store: MadeUp, config: ConfigDict) -> dict[str, float]:
    config.data.mixture, config.data.lengths = (("ocbench/", 0.7), ("metaworld/", 0.3)), ((3, 0.5), (14, 0.5))
    return _product(store, config)


def _sampler(store: MadeUp, config: ConfigDict) -> dict[str, float]:
    before, begun = memory(os.getpid()), time.process_time()
    sampler = Sampler(store.index, config)
    made, held = time.process_time(), memory(os.getpid()) - before
    for block in range(BLOCKS_PER_DECK):
        sampler.block(block)
    drawn = time.process_time()
    sampler.block(_FAR)
    return {
        "cpu_seconds": made - begun,
        "held_bytes": held,
        "rows_per_s": BLOCKS_PER_DECK * sampler.rows_per_block / (drawn - made),
        "resume_s": time.process_time() - drawn,
    }


def _coverage(store: MadeUp, config: ConfigDict) -> dict[str, float]:
    return {"never": coverage(cast(EventStore, store), config, 10_000)["never"]}


STEPS_TAKEN: dict[str, Callable[[MadeUp, ConfigDict], dict[str, float]]] = {
    "index": lambda store, config: {"windows": len(store)},  # what a process holds that has only opened it
    "clusters": _clusters,
    "product": _product,
    "raking": _raking,
    "shares": _shares,
    "sampler": _sampler,
    "coverage": _coverage,
}


def _take(name: str, folder: Path, config: ConfigDict) -> dict[str, float]:
    """One step, in a process of its own."""
    store = MadeUp(folder)
    clock, processor = time.perf_counter(), time.process_time()
    with config.unlocked():
        found = STEPS_TAKEN[name](store, config)
    spent = {"cpu_seconds": time.process_time() - processor, "seconds": time.perf_counter() - clock}
    return {**spent, "peak_bytes": peak_memory(), **found}


def _zipf(rng: np.random.Generator, windows: int, count: int) -> np.ndarray:
    """`[windows]` numbers below `count`, the k-th of which comes in proportion to 1 / k."""
    share = np.cumsum(1 / np.arange(1, count + 1))
    return np.searchsorted(share, rng.random(windows) * share[-1])
