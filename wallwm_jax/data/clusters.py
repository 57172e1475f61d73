r"""Offline clusterings of an event store: by what is seen and said, and by how the arm moves.

A build clusters its windows; again, otherwise, and as `wallwm_jax.data.embedders` describes what is compared:

    python -m wallwm_jax.data.clusters --store=runs/store --embedder=wordllama

    python -m wallwm_jax.data.clusters --store=runs/store --embedder='features:vectors-{split}.npy' --seed=1 --scale=1

WALL-WM (arXiv 2606.01955, page 18) balances two clusterings of the same windows, and names neither encoder nor
algorithm. Here each kind and level of windows is clustered on its own by k-means, so that no cluster mixes a whole
subtask with one of its actions. What follows from the clusters for sampling is in `wallwm_jax.data.balance`.

The ids go into the indices of the store, `clusters.json` beside them says what each cluster holds and what made it. A
run that was begun with other clusters draws other rows, and does not resume with these.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from wallwm_jax.console import UserError, progress, run_command
from wallwm_jax.data.balance import gini, kinds_and_levels, positions
from wallwm_jax.data.embedders import (
    NAMES,
    STEPS,
    ActionSpace,
    Described,
    Embedder,
    Space,
    describe,
    open_embedder,
    resample,
)
from wallwm_jax.data.event_store import EventStore, open_store, write_clusters
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS

FILE_NAME = "clusters.json"
_EXAMPLES = 5  # captions kept per cluster
_FITTED = 256  # windows per cluster that move the centres, as in FAISS: more tell k-means nothing new
_WORDINGS = 64  # captions counted per cluster: the most frequent so far

Reader = Callable[[EventStore, np.ndarray], Described]
"""Describes windows, `[n]` index positions, of a split."""


@dataclass(frozen=True)
class Clusters:
    """The clusters of a store, as written by `cluster_store`.

    Attributes:
      vision_language, action: one dictionary per cluster, at the position of its id: `id`, `kind`, `level`, `train` and
        `heldout` (numbers of windows), `captions` (most frequent first), `duration_s` (mean); vision-language clusters
        also have `actions`, the mean trajectory `[32][32]` in un-normalised canonical actions.
      made_by: `seed`, `scale` and `embedder` (see `Embedder.made_by`); stores of earlier builds have `seed` alone.
    """

    vision_language: list[dict[str, Any]]
    action: list[dict[str, Any]]
    made_by: dict[str, Any]

    def mean_actions(self, cluster: int, num_actions: int) -> np.ndarray:
        """Mean trajectory of a vision-language cluster over `num_actions` steps: `[T, 32]` float32, un-normalised.

        Raises:
          UserError: no such cluster (-1: the window was never clustered).
        """
        if not 0 <= cluster < len(self.vision_language):
            raise UserError(f"no vision-language cluster {cluster}; the store has {len(self.vision_language)}")
        return resample(np.array(self.vision_language[cluster]["actions"], np.float32), num_actions)


def load_clusters(path: str | Path) -> Clusters:
    """Reads what `cluster_store` wrote into the store at `path`.

    Raises:
      UserError: the store was not clustered, or the file is damaged.
    """
    file = Path(path) / FILE_NAME
    try:
        content = json.loads(file.read_text())
        made_by = {name: content[name] for name in ("seed", "scale", "embedder") if name in content}
        return Clusters(content["vision_language"], content["action"], made_by)
    except FileNotFoundError:
        raise UserError(
            f"event store {str(path)!r} has no {FILE_NAME}; run python -m wallwm_jax.data.clusters --store={path}"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{str(file)!r} is damaged ({error}); run python -m wallwm_jax.data.clusters --store={path} again"
        ) from error


def cluster_store(
    path: str | Path,
    *,
    seed: int = 0,
    embedder: str = "hashed",
    scale: float = 3.0,
    most_vl: int = 4096,
    most_action: int = 1024,
    held_windows: int = 20_000,
) -> Clusters:
    """Clusters every window of a store: writes the ids into its indices, and `clusters.json` beside them.

    The train split is fitted; held-out windows go to the nearest centre of their kind and level. Records that cannot be
    read keep -1. Running it again replaces the earlier clusters; the same seed gives the same ones.

    Memory does not grow with the records: of all windows only numbers are held, some 40 bytes each beside the
    memory-mapped index (tests/test_clusters.py::test_memory_grows_by_a_few_bytes_per_window measures them), which is
    0.4 GB for ten million; and what k-means needs for `held_windows`, some 24 kB each.

    Args:
      path: the event store.
      seed: of the fits and of the sample they see.
      embedder: of what is seen and said, see `open_embedder`.
      scale: each clustering of a kind and level of n windows has `scale * sqrt(n / 10)` clusters,
      most_vl, most_action: but at most these many.
      held_windows: a kind and level of up to so many windows is clustered by k-means at once. Of more, a random sample
        of so many gives the spaces and the first centres, and others, up to 256 per cluster, move these in
        mini-batches, each seen once.

    Returns:
      What `load_clusters` would return.

    Raises:
      UserError: no store there, or one that is damaged; what `open_embedder` raises.
    """
    from threadpoolctl import threadpool_limits

    path = Path(path).expanduser()
    train = open_store(path, "train")
    splits = {"train": train} | {split: open_store(path, split) for split in train.meta["splits"] if split != "train"}
    embed = open_embedder(embedder, splits)
    with threadpool_limits(1):  # sums in a fixed order: the same clusters on any machine
        (vision_language, action), ids = find_clusters(splits, embed, seed, scale, (most_vl, most_action), held_windows)
    made_by = {"seed": seed, "scale": scale, "embedder": embed.made_by}
    found = Clusters(vision_language, action, made_by)
    _write_json(path / FILE_NAME, {**made_by, "vision_language": vision_language, "action": action})
    for split in splits:
        write_clusters(path, split, *ids[split])
    return found


def check_cluster_again(path: str | Path) -> None:
    """Finds out, before captions change, whether `cluster_again` can follow.

    Raises:
      UserError: the store was never clustered, or by vectors per caption, which new captions do not have.
    """
    name = _embedder_of(load_clusters(path))
    if name.startswith("features:") and "{split}" not in name:
        raise UserError(
            f"event store {str(path)!r} is clustered by {name!r}, vectors of its present captions; give --nocluster, "
            f"and once there are vectors of the new ones: python -m wallwm_jax.data.clusters --store={path} "
            "--embedder=features:FILE"
        )


def cluster_again(path: str | Path) -> Clusters:
    """Clusters a store as it was clustered before, after its captions have changed; see `check_cluster_again`.

    Raises:
      UserError: it was never clustered, or by vectors per caption; what `cluster_store` raises.
    """
    check_cluster_again(path)
    before = load_clusters(path)
    made_by = {name: value for name, value in before.made_by.items() if name != "embedder"}
    return cluster_store(path, embedder=_embedder_of(before), **made_by)


def _embedder_of(found: Clusters) -> str:
    return found.made_by.get("embedder", {"name": "hashed"})["name"]


def find_clusters(
    splits: Mapping[str, EventStore],
    embedder: Embedder,
    seed: int,
    scale: float,
    most: tuple[int, int],
    held_windows: int,
    chunk: int = 8192,
    read: Reader = describe,
) -> tuple[tuple[list[dict[str, Any]], list[dict[str, Any]]], dict[str, np.ndarray]]:
    """The work of `cluster_store`, which writes what this returns.

    Args:
      splits: the store by split, first `train`, which is fitted.
      chunk: windows described at a time.
      read: how windows are described.

    Returns:
      The two tables of `Clusters`, and per split the ids `[2, windows]` int32.
    """
    train = splits["train"]
    ids = {split: np.full((2, len(store)), -1, np.int32) for split, store in splits.items()}
    tables: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, (kind, level) in enumerate(kinds_and_levels(train.index)):
        name = f"{KINDS[kind]} windows, {LEVELS[level]}"
        order = np.random.default_rng([seed, number]).permutation(positions(train.index, kind, level))
        seen = read(train, np.sort(order[:held_windows]))
        if not len(seen.windows):
            raise UserError(f"no record of {name} of event store {str(train.path)!r} can be read")
        spaces: tuple[Space, Space] = (embedder.fit(train, seen, seed), ActionSpace(seen))
        unread = max(0, len(order) - held_windows)
        counts = [number_of_clusters(len(seen.windows) + unread, scale, limit) for limit in most]
        others = order[held_windows:][: _FITTED * max(counts)]
        fits = [_KMeans(space.features(train, seen), count, seed) for space, count in zip(spaces, counts)]
        stream = itertools.chain([seen], _chunks(train, others, chunk, read, f"fit {name}"))
        for described in stream if unread else ():
            for fit, space in zip(fits, spaces):
                fit.add(space.features(train, described))
        totals = [
            _Totals(len(table), len(fit.centres), with_actions=table is tables[0]) for table, fit in zip(tables, fits)
        ]
        for split, store in splits.items():
            inside = positions(store.index, kind, level)
            whole = store is train and not unread  # all that the fit saw: no need to read it again
            for described in [seen] if whole else _chunks(store, inside, chunk, read, f"clusters of {split} {name}"):
                for which, (fit, space) in enumerate(zip(fits, spaces)):
                    nearest = _nearest(space.features(store, described), fit.centres)
                    ids[split][which, described.windows] = totals[which].first + nearest
                    totals[which].add(split, store, described, nearest)
            if store is train:
                for which, (fit, total) in enumerate(zip(fits, totals)):
                    used = total.drop_empty()
                    fit.centres = fit.centres[used]
                    here = inside[ids[split][which, inside] >= 0]
                    ids[split][which, here] = total.first + (np.cumsum(used) - 1)[ids[split][which, here] - total.first]
        for table, total in zip(tables, totals):
            table.extend(total.rows(KINDS[kind], LEVELS[level], train))
    return tables, ids


def number_of_clusters(windows: int, scale: float, most: int) -> int:
    """`scale * sqrt(n / 10)`, rounded, from 1 to `most` and never more than the windows."""
    return max(1, min(round(scale * math.sqrt(windows / 10)), most, windows))


def _chunks(store: EventStore, windows: np.ndarray, chunk: int, read: Reader, label: str) -> Iterator[Described]:
    starts = range(0, len(windows), chunk)
    for start in progress(starts, total=len(starts), unit="part", label=label):
        described = read(store, np.sort(windows[start : start + chunk]))
        if len(described.windows):
            yield described


class _Totals:
    """Sums over the windows of each cluster of one clustering, kind and level."""

    def __init__(self, first: int, count: int, with_actions: bool) -> None:
        self.first, self._with_actions = first, with_actions
        self._windows: dict[str, np.ndarray] = {"train": np.zeros(count, int), "heldout": np.zeros(count, int)}
        self._captions: list[Counter[int]] = [Counter() for _ in range(count)]
        self._seconds = np.zeros(count)
        self._actions = np.zeros((count if with_actions else 0, STEPS, ACTION_DIM))

    def add(self, split: str, store: EventStore, seen: Described, cluster: np.ndarray) -> None:
        np.add.at(self._windows[split], cluster, 1)
        if split != "train":
            return
        np.add.at(self._seconds, cluster, np.exp(seen.log_duration))
        if self._with_actions:
            order = np.argsort(cluster, kind="stable")
            numbers, starts = np.unique(cluster[order], return_index=True)
            self._actions[numbers] += np.add.reduceat(seen.trajectories[order], starts, dtype=np.float64)
        for number, caption in zip(cluster.tolist(), seen.captions.tolist()):
            counts = self._captions[number]
            counts[caption] += 1
            if len(counts) > 2 * _WORDINGS:  # captions without end: the rare ones go
                self._captions[number] = Counter(dict(counts.most_common(_WORDINGS)))

    def drop_empty(self) -> np.ndarray:
        """Forgets clusters without a train window; `[count]` bool, which are left."""
        used = self._windows["train"] > 0
        self._windows = {split: windows[used] for split, windows in self._windows.items()}
        self._captions = [captions for captions, any_ in zip(self._captions, used) if any_]
        self._seconds = self._seconds[used]
        if self._with_actions:
            self._actions = self._actions[used]
        return used

    def rows(self, kind: str, level: str, store: EventStore) -> list[dict[str, Any]]:
        """The dictionaries of `Clusters`."""
        rows = []
        for number, captions in enumerate(self._captions):
            train = max(1, int(self._windows["train"][number]))
            row = {
                "id": self.first + number,
                "kind": kind,
                "level": level,
                "train": int(self._windows["train"][number]),
                "heldout": int(self._windows["heldout"][number]),
                "captions": [store.caption(caption) for caption, _ in captions.most_common(_EXAMPLES)],
                "duration_s": round(float(self._seconds[number]) / train, 4),
            }
            if self._with_actions:
                row["actions"] = np.round(self._actions[number] / train, 5).tolist()
            rows.append(row)
        return rows


class _KMeans:
    """K-means `centres` `[count, D]` of the features it began with, until others are added."""

    def __init__(self, features: np.ndarray, count: int, seed: int) -> None:
        from sklearn.cluster import KMeans, MiniBatchKMeans
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some stay empty
            self.centres = KMeans(min(count, len(features)), n_init=4, random_state=seed).fit(features).cluster_centers_
        # Never reassigned: small clusters are what balance is about.
        self._stream = MiniBatchKMeans(
            len(self.centres), init=self.centres, n_init=1, reassignment_ratio=0.0, random_state=seed
        )

    def add(self, features: np.ndarray) -> None:
        """Moves each centre to the mean of all features `[n, D]` added so far that it was nearest to."""
        self.centres = self._stream.partial_fit(features).cluster_centers_


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Position of the nearest centre of each row, `[n]`."""
    from sklearn.metrics import pairwise_distances_argmin

    return pairwise_distances_argmin(features, centres.astype(features.dtype))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _define_flags() -> None:
    flags.DEFINE_string("store", None, "The event store", required=True)
    flags.DEFINE_string("embedder", "hashed", f"Of what is seen and said: {', '.join(NAMES)}")
    flags.DEFINE_integer("seed", 0, "Everything random follows from it")
    flags.DEFINE_float("scale", 3.0, "n windows of a kind and level make scale * sqrt(n / 10) clusters", 0.0)


def main(_: Sequence[str]) -> None:
    """Clusters the store and prints how many clusters there are and how uneven."""
    values = flags.FLAGS
    found = cluster_store(values.store, seed=values.seed, embedder=values.embedder, scale=values.scale)
    print(f"{values.store}: clustered by {json.dumps(found.made_by)}")
    for name, table in (("seen and said", found.vision_language), ("motion", found.action)):
        for kind, level in dict.fromkeys((row["kind"], row["level"]) for row in table):
            sizes = np.array([row["train"] for row in table if (row["kind"], row["level"]) == (kind, level)])
            print(
                f"  {f'{kind}/{level}':<16} {name:<14} {len(sizes):>5} clusters of {sizes.sum():>8} train windows, "
                f"{sizes.min()} to {sizes.max()}, Gini {gini(sizes):.2f}"
            )


if __name__ == "__main__":
    _define_flags()
    run_command(main)
