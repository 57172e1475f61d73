"""The loader of training on one event store: windows per second and core, first batch, packing, memory, disk.

Loads with a thread of this process and with worker processes. What is per core counts the processor seconds that
this process and its workers spent, so that a busy machine or an idle core does not change it.

With a peer, some episodes of the store are written three times: as frames, as latents, and as a LeRobot set with MP4
(H.264, a key frame every second row). All three are then read in turn, the same windows in the same batches of the same
views. Ours ends with packed rows, as training takes them: records checked, frames decoded from JPEG and transformed by
the codec, or latents as they are; normalised, with states, geometry and captions. LeRobot's ends with the windows'
frames, decoded and float32, actions, states and instructions; it neither transforms nor normalises. Latents are noise
in the layout of Wan 2.2's autoencoder: to read them costs the same.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.benchmarks import lerobot_peer
from wallwm_jax.benchmarks.processes import cpu_seconds, memory
from wallwm_jax.benchmarks.timing import Result, Seconds, host, machine_line
from wallwm_jax.console import UserError, phase
from wallwm_jax.data.clusters import cluster_store
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.normalization import StatsAccumulator
from wallwm_jax.data.pipeline import PackedRows, make_loader, resolve_views
from wallwm_jax.data.recaption import read_episodes
from wallwm_jax.data.store_writer import StoreOptions, write_store
from wallwm_jax.events.schema import Episode
from wallwm_jax.models.codecs.wan_codec import WanCodec

MIB = 2**20
_LATENTS = "wan22"


def measure(config: ConfigDict, steps: int = 20, store: str = "", peer: bool = False, episodes: int = 20) -> Result:
    """Times `steps` batches as they arrive, without workers and with `config.data.workers` (at least one).

    Args:
      config: as for training; `config.data.rows` is the batch.
      steps: how many batches are timed, after those that were made ahead.
      store: the event store; "" takes `config.data.store`.
      peer: time frames, latents and LeRobot beside each other, too, and statistics with and without video.
      episodes: the first so many of the split that are compared with the peer.

    Returns:
      The figures, and windows per second of processor time, at the better number of workers: `events_per_s` of latents,
      `pixel_events_per_s` of frames, `lerobot_events_per_s`; without a peer only that of the store.

    Raises:
      UserError: no store, or one that does not fit the config; or `peer` with a store of latents, with windows that
        have a history, or without LeRobot.
    """
    path = store or config.data.store
    if not path:
        raise UserError("loader needs --store=DIR, an event store made by python -m wallwm_jax.build_events")
    opened = open_store(path, config.data.split)
    if peer:
        _check_peer(opened, config)
    runs = {}
    for workers in _numbers_of_workers(config):
        with phase(f"{steps} batches with {workers} workers"):
            runs[workers] = _run(opened, config, workers, steps)
    found = {
        "machine": host(),
        "store": str(path),
        "codec": opened.meta["codec"],
        "size": list(opened.meta["size"]),
        "views": len(config.data.views) or len(opened.meta["views"]),
        "rows": int(config.data.rows),
        "batches": steps,
        "disk_bytes_per_window": _disk_bytes(opened.path)
        / sum(one["windows"] for one in opened.meta["splits"].values()),
        "packing": runs[0].pop("packing"),
        "runs": [{name: value for name, value in run.items() if name != "packing"} for run in runs.values()],
    }
    if not peer:
        return found | {"events_per_s" if opened.codec.stored else "pixel_events_per_s": _best(found["runs"])}
    with tempfile.TemporaryDirectory(prefix="wallwm_loader_") as folder:
        return found | _compare(opened, config, steps, episodes, Path(folder))


def table(result: Result) -> str:
    """The figures as lines for people."""
    packing, (height, width) = result["packing"], result["size"]
    lines = [
        machine_line(result["machine"]),
        f"store        {result['store']}: codec {result['codec']}, {height}x{width} pixels, "
        f"{result['disk_bytes_per_window'] / 1024:.1f} KiB on disk per window, all included",
        f"packing      {100 * packing['fill']:.2f} % of the latents of {packing['rows']} rows are real, "
        f"{packing['events_per_row']:.2f} events per row; whole blocks of the sampler: "
        f"{100 * packing['sampler']['fill']:.2f} %",
        f"batch        {result['rows']} rows, {result['views']} views; median and quartiles of {result['batches']}",
        *_rows_of(result["runs"]),
        "per core: windows per second of processor time; MiB: proportional share of memory, at the end",
    ]
    if "comparison" in result:
        lines += ["", *_comparison_lines(result)]
    return "\n".join(lines)


def _rows_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A header and a line for each run."""
    return [
        f"{'workers':<9}{'s per batch':<28}{'windows/s':>11}{'per core':>10}{'first batch':>13}{'MiB per worker':>16}",
        *(
            f"{run['workers']:<9}{Seconds(**run['batch_seconds'])!s:<28}"
            f"{run['windows_per_s']:>11.1f}{run['windows_per_core_s']:>10.1f}{run['first_batch_seconds']:>11.2f} s"
            + (f"{run['worker_bytes'] / MIB:>16.0f}" if run["workers"] else "")
            for run in runs
        ),
    ]


def _comparison_lines(result: Result) -> list[str]:
    found, statistics = result["comparison"], result["statistics"]
    lines = [
        f"compared     {found['episodes']} episodes, {found['windows']} windows of "
        f"{found['frames_per_window']:.1f} frames per view; the same windows in the same batches",
    ]
    for key, (name, read) in zip(_KEYS, found["readers"].items()):
        size = f"{read['disk_bytes'] / 1e6:.1f} MB on disk"
        lines += ["", f"{name:<13}{read['what']}; {size}; {result[key]:.1f} windows per core", *_rows_of(read["runs"])]
    ours = ", ".join(f"{name} {result[f'{name}_times_lerobot']:.1f}" for name in ("latents", "pixels"))
    return [
        *lines,
        "",
        f"per core, times LeRobot, each at its better number of workers: {ours}",
        f"statistics   {statistics['seconds']:.3f} s of processor time, {statistics['seconds_with_video']:.3f} s where "
        f"video is decoded, too: {statistics['times_faster']:.1f} times faster without, "
        f"{statistics['times_faster_with_opening']:.1f} with opening the set ({statistics['open_seconds']:.3f} s)",
    ]


_KEYS = ("events_per_s", "pixel_events_per_s", "lerobot_events_per_s")


def _check_peer(store: EventStore, config: ConfigDict) -> None:
    if store.codec.stored:
        raise UserError(f"--peer needs frames, and event store {str(store.path)!r} keeps latents; give one of haar8")
    if config.data.window_kind == "history":
        raise UserError("--peer knows windows of kind event and fixed; give --config.data.window_kind=event")
    lerobot_peer.check()


def _numbers_of_workers(config: ConfigDict) -> tuple[int, int]:
    return 0, max(1, int(config.data.workers))


def _best(runs: Iterable[dict[str, Any]]) -> float:
    return max(run["windows_per_core_s"] for run in runs)


def _compare(store: EventStore, config: ConfigDict, steps: int, count: int, folder: Path) -> Result:
    """The part of the result that is about the peer; writes its stores and its set into `folder`."""
    from wallwm_jax.sources.lerobot.export import write_lerobot

    views = resolve_views(store, config)
    numbers = [entry["id"] for entry in store.episodes if entry["split"] == store.split][:count]
    with phase(f"write {len(numbers)} episodes as frames, latents and LeRobot set"):
        episodes = [_with_views(episode, views) for episode in read_episodes(store.path, numbers)]
        options: dict[str, Any] = {
            "kinds": (config.data.window_kind,),
            "levels": tuple(level for level, share in config.data.levels.items() if share),
            "fixed_steps": store.meta["fixed_steps"] or StoreOptions.fixed_steps,
            "heldout_fraction": 0.0,
        }
        stores = {
            "latents": _written(folder / "latents", episodes, _NoiseOptions(codec=_LATENTS, **options)),
            "pixels": _written(folder / "pixels", episodes, StoreOptions(codec=store.meta["codec"], **options)),
        }
        write_lerobot(folder / "lerobot", episodes, level="task")
    configs = {name: _fitted(config, one) for name, one in stores.items()}
    places = first_rows(episodes)
    runs: dict[str, list[dict[str, Any]]] = {"latents": [], "pixels": [], "lerobot": []}
    for workers in _numbers_of_workers(config):  # in turn, so that what else the machine does meets all of them
        with phase(f"{steps} batches of each reader with {workers} workers"):
            for name, one in stores.items():
                runs[name].append(_run(one, configs[name], workers, steps))
            warm_up = runs["pixels"][-1]["warm_up"]
            batches = peer_batches(stores["pixels"], configs["pixels"], places, warm_up + steps + 2 * workers)
            stride = store.meta["video_stride"]
            job = lerobot_peer.Job(str(folder / "lerobot"), stride, workers, warm_up, steps, batches)
            runs["lerobot"].append(_peer_run(job))
    what = {
        "latents": f"codec {_LATENTS}, {'x'.join(map(str, configs['latents'].model.latent_shape))} cells, bfloat16",
        "pixels": f"codec {store.meta['codec']}, JPEG frames",
        "lerobot": runs["lerobot"][-1].pop("what"),
    }
    windows = [window for batch in batches for window in batch]
    rates = dict(zip(_KEYS, (_best(runs[name]) for name in what)))
    return {
        **rates,
        **{f"{name}_times_lerobot": _best(runs[name]) / _best(runs["lerobot"]) for name in ("latents", "pixels")},
        "comparison": {
            "episodes": len(episodes),
            "windows": len(stores["pixels"]),
            "frames_per_window": float(np.mean([frames for _, frames, _ in windows])),
            "readers": {
                name: {"what": what[name], "disk_bytes": _disk_bytes(folder / name), "runs": runs[name]}
                for name in what
            },
        },
        "statistics": _statistics(folder / "lerobot", stride),
    }


@dataclass(frozen=True)
class _NoiseOptions(StoreOptions):
    """Options of a store whose latents are noise in the layout of a codec, for which no weights are needed."""

    def __post_init__(self) -> None: ...

    def open_codec(self) -> WanCodec:
        return _NoiseCodec(self.codec)


class _NoiseCodec(WanCodec):
    def encode_videos(self, videos: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        rng, (time_, *space) = np.random.default_rng(0), self.stride
        for video in videos:
            cells = [side // stride for side, stride in zip(video.shape[1:3], space)]
            yield rng.standard_normal((1 + len(video) // time_, *cells, self.channels), np.float32)


def _with_views(episode: Episode, views: Sequence[str]) -> Episode:
    return replace(
        episode,
        frames={view: episode.frames[view] for view in views if view in episode.frames},
        cameras={view: camera for view, camera in episode.cameras.items() if view in views},
    )


def _written(path: Path, episodes: Sequence[Episode], options: StoreOptions) -> EventStore:
    path.mkdir()
    write_store(path, episodes, options)
    cluster_store(path)
    return open_store(path)


def _fitted(config: ConfigDict, store: EventStore) -> ConfigDict:
    """The config with all views and the latents of a store that holds the captions as bytes."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.views = ()
        config.model.latent_shape = tuple(side // store.codec.stride[1] for side in store.meta["size"])
        config.model.latent_channels = store.codec.channels
        config.model.text.kind = "bytes"
    return config


def first_rows(episodes: Sequence[Episode]) -> dict[tuple[str, str], int]:
    """(source, name) of each episode → its first row in a LeRobot set of them all."""
    starts = itertools.accumulate((episode.num_steps + 1 for episode in episodes), initial=0)
    return {(episode.source, episode.episode_id): start for episode, start in zip(episodes, starts)}


def peer_batches(
    store: EventStore, config: ConfigDict, places: dict[tuple[str, str], int], count: int
) -> list[list[lerobot_peer.Window]]:
    """The windows of the first `count` batches, as the peer knows them; `places` as `first_rows` returns them."""
    sampler, rows = PackedRows(store, config).sampler, int(config.data.rows)
    known: dict[int, lerobot_peer.Window] = {}
    for index in set(itertools.chain.from_iterable(map(sampler.row, range(count * rows)))):
        record = store.read(index)
        entry = store.episodes[record.episode_id]
        row = places[entry["source"], entry["name"]] + record.start
        known[index] = row, len(record.frame_steps), record.num_actions
    return [
        [known[index] for row in range(step * rows, (step + 1) * rows) for index in sampler.row(row)]
        for step in range(count)
    ]


def _peer_run(job: lerobot_peer.Job) -> dict[str, Any]:
    """The figures of one run of the peer, named as those of ours."""
    found = lerobot_peer.run(job)
    windows = sum(map(len, job.batches[job.warm_up : job.warm_up + job.steps]))
    sizes = found["worker_bytes"]
    return {
        "what": found["what"],
        "workers": job.workers,
        "first_batch_seconds": found["first_batch_seconds"],
        "warm_up": job.warm_up,
        "batch_seconds": Seconds.of(found["seconds"]).to_json(),
        "windows_per_s": windows / sum(found["seconds"]),
        "windows_per_core_s": windows / found["cpu_seconds"],
        "cpu_seconds": found["cpu_seconds"],
        "frames": found["frames"],
        "worker_bytes": float(np.median(sizes)) if sizes else None,
    }


def _statistics(path: Path, stride: int, passes: int = 5) -> dict[str, float]:
    """Processor time of the statistics of a set, from rows alone and with video; medians of passes taken in turn."""
    spent = np.array([[_read_statistics(path, stride, decode) for decode in (False, True)] for _ in range(passes)])
    (opening, alone), (_, decoded) = np.median(spent, axis=0).tolist()
    return {
        "open_seconds": opening,
        "seconds": alone,
        "seconds_with_video": decoded,
        "times_faster": decoded / alone,
        "times_faster_with_opening": (opening + decoded) / (opening + alone),
    }


def _read_statistics(path: Path, stride: int, decode: bool) -> tuple[float, float]:
    """Seconds to open a set, and to gather the statistics of states and actions of all rows.

    With `decode` every frame of every camera is read, too.
    """
    from wallwm_jax.sources.columns import Column
    from wallwm_jax.sources.embodiment import ActionColumns, Arm, Embodiment, PoseColumns
    from wallwm_jax.sources.lerobot.dataset import LeRobotSet

    state, action = Column("observation.state"), Column("action")
    begun = time.process_time()
    dataset = LeRobotSet(path)
    opened = time.process_time()
    whole = Embodiment("any", dataset.fps or 0.0, {}, (Arm(PoseColumns(state), ActionColumns(action)),))
    gathered: dict[str, StatsAccumulator] = {}
    for number in range(len(dataset)):
        recording = dataset.recording(number, whole)
        for key, values in recording.columns.items():
            valid = np.ones(values.shape[1], bool)
            gathered.setdefault(key, StatsAccumulator(len(valid))).add(values, valid)
        for camera in dataset.pictures if decode else ():
            for _ in recording.pictures(camera, range(0, len(recording.times), stride)):
                pass
    for one in gathered.values():
        one.result()
    return opened - begun, time.process_time() - opened


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
        seconds, cpu = [], cpu_seconds(mine)
        for _ in range(steps):
            begun = time.perf_counter()
            batch = next(loader)
            seconds.append(time.perf_counter() - begun)
            sizes.append(_size(batch))
        cpu, used = cpu_seconds(mine) - cpu, [memory(pid) for pid in mine]
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
        "worker_bytes": float(np.median(used)) if used else None,
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


def _disk_bytes(folder: Path) -> int:
    """Bytes of a whole store or set, captions and features included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
