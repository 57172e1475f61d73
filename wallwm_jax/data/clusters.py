"""Offline clusterings of an event store, and the sampling weights and balance figures that follow from them.

WALL-WM (arXiv 2606.01955, page 18) balances two clusterings of the same windows: by what is seen and said, and by how
the arm moves. The report names neither encoder nor algorithm nor weights; ours need no pretrained network. Each kind
and level of windows is clustered on its own, so that no cluster mixes a whole subtask with one of its actions:

- vision-language: hashed character n-grams of the caption (TF-IDF, truncated SVD) beside a small grey thumbnail of the
  first frame of each view (PCA), L2-normalised;
- action: the trajectory resampled to 32 steps, robustly scaled, with log-duration and the number of gripper flips.

Loader workers import this module for the weights, so scikit-learn is imported only where clusters are fitted.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from wallwm_jax.console import UserError, progress
from wallwm_jax.data.event_store import BadRecord, EventStore, open_store, write_clusters
from wallwm_jax.events.actions import ACTION_DIM, ARM_DIM, GRIPPER_OFFSET, MAX_ARMS
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS

STEPS = 32  # of a resampled trajectory
FILE_NAME = "clusters.json"
_THUMBNAIL = 12  # pixels
_EXAMPLES = 5  # captions kept per cluster
_CHUNK = 8192  # windows described at a time when ids are assigned
_MINI_BATCH_FROM = 20_000
_CAPTION_DIMENSIONS, _IMAGE_DIMENSIONS = 32, 16
_IMAGE_WEIGHT = 0.5  # of the thumbnail beside the caption, before L2 normalisation
_FLIP_WEIGHT = _DURATION_WEIGHT = 0.5  # beside the trajectory, see _PART_WEIGHT
# Position, rotation and gripper of an arm count alike, however many dimensions each has.
_PART_WEIGHT = np.resize(3 * [3**-0.5] + 6 * [6**-0.5] + [1.0], ACTION_DIM)


def resample(actions: np.ndarray, steps: int) -> np.ndarray:
    """Actions `[T, D]` at `steps` equally spaced times, `[steps, D]` float32; action k stands at time (k + 1) / T."""
    old, new = (np.arange(1, count + 1) / count for count in (len(actions), steps))
    columns = [np.interp(new, old, column) for column in np.asarray(actions, np.float64).T]
    return np.stack(columns, axis=1).astype(np.float32)


def gripper_flips(actions: np.ndarray) -> int:
    """How often any commanded gripper of actions `[T, 32]` crosses half closed."""
    closed = actions[:, [ARM_DIM * arm + GRIPPER_OFFSET for arm in range(MAX_ARMS)]] > 0.5
    return int((closed[1:] != closed[:-1]).sum())


def sampling_weights(index: np.ndarray, a: float, b: float, clip: float) -> np.ndarray:
    """Weight of each window in one draw: `n_vl^-a * n_action^-b`, within [1/clip, clip] times the mean of its level.

    Args:
      index: structured array with kind, level, cluster_vl and cluster_action; `n_vl` and `n_action` are the sizes of
        the window's two clusters among the windows of its own kind and level.
      a, b: 0 for both gives equal weights; 1 gives every cluster of one clustering the same share.
      clip: at least 1.

    Returns:
      `[n]` float64, mean 1 within each kind and level before clipping.

    Raises:
      UserError: `clip` below 1.
    """
    if clip < 1:
        raise UserError(f"data.weight_clip={clip} must be at least 1")
    weights = np.ones(len(index))
    for kind, level in _kinds_and_levels(index):
        chosen = _positions(index, kind, level)
        vl, action = (_cluster_sizes(index[name][chosen]) for name in ("cluster_vl", "cluster_action"))
        raw = vl**-a * action**-b
        weights[chosen] = np.clip(raw / raw.mean(), 1 / clip, clip)
    return weights


def balance_report(index: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
    """Balance of each kind and level before (one window, one vote) and after weighting.

    Returns:
      One dictionary per kind and level: `kind`, `level` (names), `windows`, `effective_sample_size`
      (of the weighted draw, `(sum w)^2 / sum w^2`), and for `cluster_vl` and `cluster_action` the number of `clusters`,
      their shares `before` and `after`, and `gini` and `entropy` (normalised, 1 is uniform) as [before, after].
    """
    report = []
    for kind, level in _kinds_and_levels(index):
        chosen = _positions(index, kind, level)
        inside = weights[chosen]
        entry: dict[str, Any] = {
            "kind": KINDS[kind],
            "level": LEVELS[level],
            "windows": len(inside),
            "effective_sample_size": float(inside.sum() ** 2 / (inside**2).sum()),
        }
        for name in ("cluster_vl", "cluster_action"):
            ids, group = np.unique(index[name][chosen], return_inverse=True)
            before, after = (np.bincount(group, weights=w) / w.sum() for w in (np.ones(len(inside)), inside))
            entry[name] = {
                "clusters": len(ids),
                "before": before.tolist(),
                "after": after.tolist(),
                "gini": [gini(before), gini(after)],
                "entropy": [normalised_entropy(before), normalised_entropy(after)],
            }
        report.append(entry)
    return report


def gini(shares: np.ndarray) -> float:
    """Gini coefficient of non-negative shares: 0 where all are equal, towards 1 where one has everything."""
    ordered = np.sort(shares)
    count = len(ordered)
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * ordered.sum()))


def normalised_entropy(shares: np.ndarray) -> float:
    """Entropy of shares over its maximum; 1 for a single share."""
    positive = shares[shares > 0] / shares.sum()
    return float(-(positive * np.log(positive)).sum() / math.log(len(shares))) if len(shares) > 1 else 1.0


@dataclass(frozen=True)
class Clusters:
    """The clusters of a store, as written by `cluster_store`.

    Attributes:
      vision_language, action: one dictionary per cluster, at the position of its id: `id`, `kind`, `level`, `train` and
        `heldout` (numbers of windows), `captions` (most frequent first), `duration_s` (mean); vision-language clusters
        also have `actions`, the mean trajectory `[32][32]` in un-normalised canonical actions.
    """

    vision_language: list[dict[str, Any]]
    action: list[dict[str, Any]]

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
        return Clusters(content["vision_language"], content["action"])
    except FileNotFoundError:
        raise UserError(
            f"event store {str(path)!r} has no {FILE_NAME}; run wallwm_jax.data.clusters.cluster_store"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{str(file)!r} is damaged ({error}); run wallwm_jax.data.clusters.cluster_store again"
        ) from error


def cluster_store(
    path: str | Path,
    *,
    seed: int = 0,
    scale: float = 3.0,
    most_vl: int = 4096,
    most_action: int = 1024,
    fit_windows: int = 100_000,
) -> Clusters:
    """Clusters every window of a store: writes the ids into its indices, and `clusters.json` beside them.

    The train split is fitted; held-out windows go to the nearest centre of their kind and level. Records that cannot be
    read keep -1. Running it again replaces the earlier clusters; the same seed gives the same ones.

    Args:
      path: the event store.
      seed: of the fits and of the sample they see.
      scale: each clustering of a kind and level of n windows has `scale * sqrt(n / 10)` clusters,
      most_vl, most_action: but at most these many.
      fit_windows: windows per kind and level that a fit sees at most; a random sample of more.

    Returns:
      What `load_clusters` would return.

    Raises:
      UserError: no store there, or one that is damaged.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums in a fixed order: the same clusters on any machine
        return _cluster_store(Path(path), seed, scale, (most_vl, most_action), fit_windows)


def _cluster_store(path: Path, seed: int, scale: float, most: tuple[int, int], fit_windows: int) -> Clusters:
    train = open_store(path, "train")
    splits = {split: train if split == "train" else open_store(path, split) for split in train.meta["splits"]}
    ids = {split: np.full((2, len(store)), -1, np.int32) for split, store in splits.items()}
    tables: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, (kind, level) in enumerate(_kinds_and_levels(train.index)):
        inside = {split: _positions(store.index, kind, level) for split, store in splits.items()}
        sample = np.random.default_rng([seed, number]).permutation(inside["train"])[:fit_windows]
        seen = _describe(train, np.sort(sample))
        spaces: tuple[_Space, _Space] = (_VisionLanguageSpace(train, seen, seed), _ActionSpace(seen))
        totals = []
        for which, space in enumerate(spaces):
            count = number_of_clusters(len(seen.windows), scale, most[which])
            space.centres = _fit_centres(space.features(train, seen), count, seed)
            totals.append(_Totals(len(tables[which]), len(space.centres), with_actions=which == 0))
        parts = [
            (split, windows[start : start + _CHUNK])
            for split, windows in inside.items()
            for start in range(0, len(windows), _CHUNK)
        ]
        for split, part in progress(parts, unit="part", label=f"clusters of {KINDS[kind]} windows, {LEVELS[level]}"):
            store = splits[split]
            whole = split == "train" and len(part) == len(sample)  # all that the fit saw: no need to read it again
            described = seen if whole else _describe(store, part)
            for which, space in enumerate(spaces):
                nearest = _nearest(space.features(store, described), space.centres)
                ids[split][which, described.windows] = totals[which].first + nearest
                totals[which].add(split, store, described, nearest)
        for table, total in zip(tables, totals):
            table.extend(total.rows(KINDS[kind], LEVELS[level]))
    _write_json(path / FILE_NAME, {"seed": seed, "vision_language": tables[0], "action": tables[1]})
    for split in splits:
        write_clusters(path, split, *ids[split])
    return Clusters(*tables)


def number_of_clusters(windows: int, scale: float, most: int) -> int:
    """`scale * sqrt(n / 10)`, rounded, from 1 to `most` and never more than the windows."""
    return max(1, min(round(scale * math.sqrt(windows / 10)), most, windows))


@dataclass(frozen=True)
class _Described:
    """What the clusterings see of `n` windows, records that could not be read left out."""

    windows: np.ndarray  # [n] index positions
    captions: np.ndarray  # [n] caption ids
    thumbnails: np.ndarray  # [n, V * side * side] uint8
    trajectories: np.ndarray  # [n, STEPS, 32] float32
    valid: np.ndarray  # [n, 32] bool
    flips: np.ndarray  # [n]
    log_duration: np.ndarray  # [n]


def _describe(store: EventStore, windows: np.ndarray) -> _Described:
    views, side = store.meta["views"], _THUMBNAIL
    rows = []
    for window in windows.tolist():
        try:
            record = store.read(window)
            thumbnails = np.zeros((len(views), side, side), np.uint8)
            for number, view in enumerate(views):
                if view in record.frames:
                    grey = cv2.cvtColor(record.picture(view, int(record.keyframes[0])), cv2.COLOR_RGB2GRAY)
                    thumbnails[number] = cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)
        except BadRecord:
            continue
        rows.append(
            (
                window,
                record.caption_id,
                thumbnails.reshape(-1),
                resample(record.actions, STEPS),
                record.action_valid,
                gripper_flips(record.actions),
                math.log(max(record.duration_s, 1e-3)),
            )
        )
    if not rows:
        raise UserError(f"no record of {len(windows)} windows of event store {str(store.path)!r} can be read")
    return _Described(*(np.array(column) for column in zip(*rows)))


class _Space(Protocol):
    """Where windows become points; `centres` are those of its clusters."""

    centres: np.ndarray

    def features(self, store: EventStore, seen: _Described) -> np.ndarray:
        """`[n, D]` float32."""


class _VisionLanguageSpace:
    """Features of what is seen and said, fitted on train windows."""

    def __init__(self, store: EventStore, seen: _Described, seed: int) -> None:
        from sklearn.decomposition import PCA, TruncatedSVD
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.pipeline import make_pipeline

        self.centres = np.empty((0, 0))
        texts = [store.caption(int(number)) for number in np.unique(seen.captions)]
        grams = HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), n_features=2**12, norm=None, alternate_sign=False
        )
        reduce = TruncatedSVD(min(_CAPTION_DIMENSIONS, len(texts)), random_state=seed)
        self._text = make_pipeline(grams, TfidfTransformer(), reduce)
        with np.errstate(invalid="ignore"):  # a single caption has no variance to explain
            self._text.fit(texts)
        pixels = seen.thumbnails / np.float32(255)
        self._image = PCA(min(_IMAGE_DIMENSIONS, *pixels.shape), random_state=seed).fit(pixels)
        self._scale = math.sqrt((self._image.transform(pixels) ** 2).sum(1).mean()) or 1.0

    def features(self, store: EventStore, seen: _Described) -> np.ndarray:
        from sklearn.preprocessing import normalize

        ids, which = np.unique(seen.captions, return_inverse=True)
        text = normalize(self._text.transform([store.caption(int(number)) for number in ids]))[which]
        image = self._image.transform(seen.thumbnails / np.float32(255)) / self._scale
        return normalize(np.concatenate([text, _IMAGE_WEIGHT * image], axis=1)).astype(np.float32)


class _ActionSpace:
    """Features of how the arm moves, fitted on train windows."""

    def __init__(self, seen: _Described) -> None:
        from sklearn.preprocessing import RobustScaler, StandardScaler

        self.centres = np.empty((0, 0))
        self.centres = np.empty((0, 0))
        self._used = seen.valid.any(0)
        steps = seen.trajectories[:, :, self._used].reshape(-1, int(self._used.sum()))
        self._trajectory = RobustScaler(quantile_range=(5, 95)).fit(steps)  # a gripper that is mostly open has no IQR
        self._summary = StandardScaler().fit(self._summaries(seen))

    def features(self, store: EventStore, seen: _Described) -> np.ndarray:
        count = int(self._used.sum())
        steps = self._trajectory.transform(seen.trajectories[:, :, self._used].reshape(-1, count))
        steps = np.clip(steps, -1.5, 1.5) * (_PART_WEIGHT[self._used] / math.sqrt(STEPS))
        steps = steps.reshape(len(seen.windows), -1)
        summary = np.clip(self._summary.transform(self._summaries(seen)), -3, 3)
        return np.concatenate([steps, summary * (_DURATION_WEIGHT, _FLIP_WEIGHT)], axis=1).astype(np.float32)

    @staticmethod
    def _summaries(seen: _Described) -> np.ndarray:
        return np.stack([seen.log_duration, seen.flips.astype(np.float64)], axis=1)


class _Totals:
    """Sums over the windows of each cluster of one clustering, kind and level."""

    def __init__(self, first: int, count: int, with_actions: bool) -> None:
        self.first, self._with_actions = first, with_actions
        self._windows: dict[str, np.ndarray] = {"train": np.zeros(count, int), "heldout": np.zeros(count, int)}
        self._captions: list[Counter[str]] = [Counter() for _ in range(count)]
        self._seconds = np.zeros(count)
        self._actions = np.zeros((count, STEPS, ACTION_DIM))

    def add(self, split: str, store: EventStore, seen: _Described, cluster: np.ndarray) -> None:
        np.add.at(self._windows[split], cluster, 1)
        if split != "train":
            return
        np.add.at(self._seconds, cluster, np.exp(seen.log_duration))
        np.add.at(self._actions, cluster, seen.trajectories)
        for number, caption in zip(cluster.tolist(), seen.captions.tolist()):
            self._captions[number][store.caption(caption)] += 1

    def rows(self, kind: str, level: str) -> list[dict[str, Any]]:
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
                "captions": [text for text, _ in captions.most_common(_EXAMPLES)],
                "duration_s": round(float(self._seconds[number]) / train, 4),
            }
            if self._with_actions:
                row["actions"] = np.round(self._actions[number] / train, 5).tolist()
            rows.append(row)
        return rows


def _fit_centres(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """K-means centres `[<= count, D]` that at least one window is nearest to."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(features) > _MINI_BATCH_FROM:
        fit: Any = MiniBatchKMeans(count, n_init=3, batch_size=4096, random_state=seed)
    else:
        fit = KMeans(count, n_init=4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters; handled below
        centres = fit.fit(features).cluster_centers_
    return centres[np.unique(_nearest(features, centres))]


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Position of the nearest centre of each row, `[n]`."""
    from sklearn.metrics import pairwise_distances_argmin

    return pairwise_distances_argmin(features, centres.astype(features.dtype))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _kinds_and_levels(index: np.ndarray) -> list[tuple[int, int]]:
    """The (kind, level) pairs that occur, as numbers."""
    keys = np.unique(np.stack([index["kind"], index["level"]], axis=1), axis=0)
    return [(int(kind), int(level)) for kind, level in keys]


def _positions(index: np.ndarray, kind: int, level: int) -> np.ndarray:
    return np.flatnonzero((index["kind"] == kind) & (index["level"] == level))


def _cluster_sizes(ids: np.ndarray) -> np.ndarray:
    """Size of each window's cluster, as float64."""
    _, group, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return counts[group].astype(np.float64)
