"""Where windows become points: what the clusterings of `data.clusters` see, and how alike two windows are.

What is seen and said is embedded by one of

- hashed: hashed character n-grams of the caption (TF-IDF, truncated SVD), which needs nothing, beside a small grey
  thumbnail of the first frame of each view (PCA);
- wordllama: the caption by a static sentence embedding, `pip install wordllama`, whose wheel carries the model, so that
  nothing is downloaded; "lift the cube" is near "pick up the block". The thumbnail as before;
- features:FILE, vectors of your own encoder. FILE with {split} in its name, `vectors-{split}.npy`: `[windows, D]` of
  each split, in the order of its index, which then stand alone. Without: one vector per caption, instead of the
  n-grams: .npy, `[captions, D]` in the order of `EventStore.captions`, or .npz or .parquet with `caption` (its text)
  and `features`, in any order.

How the arm moves is the trajectory resampled to 32 steps, robustly scaled, with log-duration and the number of gripper
flips. scikit-learn is imported only where spaces are fitted.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import BadRecord, EventStore
from wallwm_jax.events.actions import ACTION_DIM, ARM_DIM, GRIPPER_OFFSET, MAX_ARMS

NAMES = ("hashed", "wordllama", "features:FILE")
STEPS = 32  # of a resampled trajectory
_THUMBNAIL = 12  # pixels
_CAPTION_DIMENSIONS, _IMAGE_DIMENSIONS = 32, 16
_IMAGE_WEIGHT = 0.5  # of the thumbnail beside the caption, before L2 normalisation
_FLIP_WEIGHT = _DURATION_WEIGHT = 0.5  # beside the trajectory, see _PART_WEIGHT
# Position, rotation and gripper of an arm count alike, however many dimensions each has.
_PART_WEIGHT = np.resize(3 * [3**-0.5] + 6 * [6**-0.5] + [1.0], ACTION_DIM)
_ROWS_CHECKED = 65536  # of a file of features at a time

Texts = Sequence[str]


def resample(actions: np.ndarray, steps: int) -> np.ndarray:
    """Actions `[T, D]` at `steps` equally spaced times, `[steps, D]` float32; action k stands at time (k + 1) / T."""
    old, new = (np.arange(1, count + 1) / count for count in (len(actions), steps))
    columns = [np.interp(new, old, column) for column in np.asarray(actions, np.float64).T]
    return np.stack(columns, axis=1).astype(np.float32)


def gripper_flips(actions: np.ndarray) -> int:
    """How often any commanded gripper of actions `[T, 32]` crosses half closed."""
    closed = actions[:, [ARM_DIM * arm + GRIPPER_OFFSET for arm in range(MAX_ARMS)]] > 0.5
    return int((closed[1:] != closed[:-1]).sum())


@dataclass(frozen=True)
class Described:
    """What the clusterings see of `n` windows, records that could not be read left out; 4.5 kB each of two views."""

    windows: np.ndarray  # [n] index positions
    captions: np.ndarray  # [n] caption ids
    thumbnails: np.ndarray  # [n, V, side * side] uint8
    trajectories: np.ndarray  # [n, STEPS, 32] float32
    valid: np.ndarray  # [n, 32] bool
    flips: np.ndarray  # [n]
    log_duration: np.ndarray  # [n]


def describe(store: EventStore, windows: np.ndarray) -> Described:
    """Reads some windows, `[n]` index positions."""
    views, side, count = store.meta["views"], _THUMBNAIL, len(windows)
    found = Described(
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.zeros((count, len(views), side * side), np.uint8),
        np.empty((count, STEPS, ACTION_DIM), np.float32),
        np.empty((count, ACTION_DIM), bool),
        np.empty(count, np.int64),
        np.empty(count),
    )
    read = 0
    for window in windows.tolist():
        try:
            record = store.read(window)
            for number, view in enumerate(views):
                if view in record.frames:
                    grey = cv2.cvtColor(record.picture(view, int(record.keyframes[0])), cv2.COLOR_RGB2GRAY)
                    small = cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)
                    found.thumbnails[read, number] = small.reshape(-1)
        except BadRecord:
            found.thumbnails[read] = 0
            continue
        found.windows[read] = window
        found.captions[read] = record.caption_id
        found.trajectories[read] = resample(record.actions, STEPS)
        found.valid[read] = record.action_valid
        found.flips[read] = gripper_flips(record.actions)
        found.log_duration[read] = math.log(max(record.duration_s, 1e-3))
        read += 1
    return Described(*(column[:read] for column in vars(found).values()))


class Space(Protocol):
    """Windows as points, the nearer the more alike; fitted to train windows of one kind and level."""

    def features(self, store: EventStore, seen: Described) -> np.ndarray:
        """`[n, D]` float32."""


class Embedder(Protocol):
    """Makes spaces of what is seen and said.

    Attributes:
      made_by: what `clusters.json` records: `name`, as `open_embedder` takes it, and what it depends on.
    """

    @property
    def made_by(self) -> dict[str, Any]: ...

    def fit(self, store: EventStore, seen: Described, seed: int) -> Space:
        """The space of windows like these, of the train split."""


def open_embedder(name: str, splits: Mapping[str, EventStore]) -> Embedder:
    """The embedder of that name, one of `NAMES`, for the splits of a store.

    Raises:
      UserError: unknown; not installed; or features that are missing, not finite, or not those of this store.
    """
    if name == "hashed":
        return _CaptionEmbedder({"name": name}, _hashed_words)
    if name == "wordllama":
        return _CaptionEmbedder({"name": name, "version": _wordllama_version()}, _sentences)
    kind, _, path = name.partition(":")
    if kind != "features" or not path:
        raise UserError(f"unknown embedder {name!r}; choose of {', '.join(NAMES)}")
    path = str(Path(path).expanduser().absolute())  # recorded, and opened again from other folders
    name = f"features:{path}"
    if "{split}" in path:
        arrays = {
            split: _load_rows(path.replace("{split}", split), len(store), "windows") for split, store in splits.items()
        }
        widths = {array.shape[1] for array in arrays.values()}
        if len(widths) > 1:
            raise UserError(f"{path!r}: splits have features of {sorted(widths)} dimensions; a space has one number")
        return _WindowFeatures({"name": name, "dimensions": widths.pop()}, arrays)
    rows = _caption_rows(path, next(iter(splits.values())).captions)
    nothing = np.zeros_like(next(iter(rows.values())))  # of a window that no event names
    return _CaptionEmbedder(
        {"name": name, "dimensions": len(nothing)},
        lambda texts, seed: lambda texts: np.stack([rows.get(text, nothing) for text in texts]),
    )


@dataclass(frozen=True)
class _CaptionEmbedder:
    """`words(texts, seed)` is fitted to these texts, and maps texts to `[n, d]`."""

    made_by: dict[str, Any]
    words: Callable[[Texts, int], Callable[[Texts], np.ndarray]]

    def fit(self, store: EventStore, seen: Described, seed: int) -> Space:
        texts = [store.caption(int(number)) for number in np.unique(seen.captions)]
        return _SeenAndSaid(self.words(texts, seed), seen, seed)


class _SeenAndSaid:
    """Caption and thumbnail, L2-normalised."""

    def __init__(self, words: Callable[[Texts], np.ndarray], seen: Described, seed: int) -> None:
        from sklearn.decomposition import PCA

        self._words = words
        pixels = _pixels(seen)
        self._image = PCA(min(_IMAGE_DIMENSIONS, *pixels.shape), random_state=seed).fit(pixels)
        self._scale = math.sqrt((self._image.transform(pixels) ** 2).sum(1).mean()) or 1.0

    def features(self, store: EventStore, seen: Described) -> np.ndarray:
        from sklearn.preprocessing import normalize

        ids, which = np.unique(seen.captions, return_inverse=True)
        text = normalize(self._words([store.caption(int(number)) for number in ids]))[which]
        image = self._image.transform(_pixels(seen)) / self._scale
        return normalize(np.concatenate([text, _IMAGE_WEIGHT * image], axis=1)).astype(np.float32)


@dataclass(frozen=True)
class _WindowFeatures:
    """Vectors of another encoder, L2-normalised: embedder and space in one, since there is nothing to fit."""

    made_by: dict[str, Any]
    arrays: Mapping[str, np.ndarray]  # split → [windows, D]

    def fit(self, store: EventStore, seen: Described, seed: int) -> Space:
        return self

    def features(self, store: EventStore, seen: Described) -> np.ndarray:
        from sklearn.preprocessing import normalize

        return normalize(self.arrays[store.split][seen.windows].astype(np.float32))


class ActionSpace:
    """Features of how the arm moves, fitted on train windows."""

    def __init__(self, seen: Described) -> None:
        from sklearn.preprocessing import RobustScaler, StandardScaler

        self._used = seen.valid.any(0)
        steps = seen.trajectories[:, :, self._used].reshape(-1, int(self._used.sum()))
        self._trajectory = RobustScaler(quantile_range=(5, 95)).fit(steps)  # a gripper that is mostly open has no IQR
        self._summary = StandardScaler().fit(self._summaries(seen))

    def features(self, store: EventStore, seen: Described) -> np.ndarray:
        count = int(self._used.sum())
        steps = self._trajectory.transform(seen.trajectories[:, :, self._used].reshape(-1, count))
        steps = np.clip(steps, -1.5, 1.5) * (_PART_WEIGHT[self._used] / math.sqrt(STEPS))
        steps = steps.reshape(len(seen.windows), -1)
        summary = np.clip(self._summary.transform(self._summaries(seen)), -3, 3)
        return np.concatenate([steps, summary * (_DURATION_WEIGHT, _FLIP_WEIGHT)], axis=1).astype(np.float32)

    @staticmethod
    def _summaries(seen: Described) -> np.ndarray:
        return np.stack([seen.log_duration, seen.flips.astype(np.float64)], axis=1)


def _pixels(seen: Described) -> np.ndarray:
    return seen.thumbnails.reshape(len(seen.windows), -1) / np.float32(255)


def _hashed_words(texts: Texts, seed: int) -> Callable[[Texts], np.ndarray]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline

    grams = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**12, norm=None, alternate_sign=False)
    reduce = TruncatedSVD(min(_CAPTION_DIMENSIONS, len(texts)), random_state=seed)
    words = make_pipeline(grams, TfidfTransformer(), reduce)
    with np.errstate(invalid="ignore"):  # a single caption has no variance to explain
        words.fit(texts)
    return words.transform


def _wordllama_version() -> str:
    try:
        return importlib.metadata.version("wordllama")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("embedder 'wordllama' is not installed: pip install 'wallwm_jax[data]'") from None


def _sentences(texts: Texts, seed: int) -> Callable[[Texts], np.ndarray]:
    import wordllama
    from sklearn.decomposition import PCA

    inside = Path(wordllama.__file__).parent  # of the wheel: it looks for its tokenizer elsewhere unless told
    model = wordllama.WordLlama.load(cache_dir=inside, disable_download=True)
    # Principal components rather than the vectors themselves: these share one large direction that tells nothing.
    reduce = PCA(min(_CAPTION_DIMENSIONS, len(texts)), random_state=seed)
    with np.errstate(invalid="ignore"):  # a single caption has no variance to explain
        reduce.fit(model.embed(list(texts)))
    return lambda texts: reduce.transform(model.embed(list(texts)))


def _caption_rows(path: str, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Caption → its features."""
    if path.endswith(".npy"):
        return dict(zip(captions, _load_rows(path, len(captions), "captions")))
    texts, features = _load_table(path)
    if len(texts) != len(features):
        raise UserError(f"{path!r} has {len(texts)} captions and {len(features)} rows of features")
    rows = dict(zip(texts, _check_rows(path, features)))
    missing = [caption for caption in captions if caption not in rows]
    if missing:
        raise UserError(
            f"{path!r} lacks {len(missing)} of {len(captions)} captions of the store, such as {missing[0]!r}"
        )
    return rows


def _load_table(path: str) -> tuple[list[str], np.ndarray]:
    """Columns `caption` and `features`."""
    try:
        if path.endswith(".npz"):
            with np.load(path) as table:
                return table["caption"].tolist(), table["features"]
        if path.endswith(".parquet"):
            import pyarrow.parquet

            columns = pyarrow.parquet.read_table(path, columns=["caption", "features"])
            return columns["caption"].to_pylist(), np.array(columns["features"].to_pylist(), np.float32)
    except ImportError as error:
        raise UserError(f"{error}; reading {path!r} needs pip install 'wallwm_jax[data]'") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"features {path!r} cannot be read as columns caption and features: {error}") from None
    raise UserError(f"features {path!r}: give a file that ends in .npy, .npz or .parquet")


def _load_rows(path: str, count: int, what: str) -> np.ndarray:
    """`[count, D]`, memory-mapped."""
    try:
        features = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"features {path!r} cannot be read as .npy: {error}") from None
    if features.ndim == 2 and len(features) != count:
        raise UserError(f"{path!r} has {len(features)} rows, the store {count} {what}; give one row for each")
    return _check_rows(path, features)


def _check_rows(path: str, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or not features.size or not np.issubdtype(features.dtype, np.floating):
        raise UserError(f"{path!r} must hold floating-point rows [n, D], not {features.dtype} {list(features.shape)}")
    for start in range(0, len(features), _ROWS_CHECKED):
        bad = np.flatnonzero(~np.isfinite(features[start : start + _ROWS_CHECKED]).all(1))
        if len(bad):
            raise UserError(f"{path!r}: row {start + bad[0]} is not finite; leave no NaN or infinity in it")
    return features
