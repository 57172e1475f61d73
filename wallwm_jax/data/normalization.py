"""Normalisation of actions, states and latents, and the streaming statistics it needs; never decodes video.

Actions and states map their 1 % and 99 % quantiles to -1 and 1, without clipping, so that the way back is exact.
Latents are normalised by the mean and standard deviation of each channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wallwm_jax.console import UserError

TINY_RANGE = 1e-3  # a dimension whose quantiles are closer than this (1 mm, 0.06 degrees) is noise: centre it only
DEAD_CHANNEL = 1e-3  # latent channels below this share of the largest deviation are lifted to it
RESERVOIR_ROWS = 100_000


@dataclass(frozen=True)
class DimensionStats:
    """Statistics per dimension; a dimension never seen has count 0, all else 0.

    Attributes:
      q01, q99, mean, std: `[D]` float64.
      count: `[D]` int, rows in which the dimension was valid.
    """

    q01: np.ndarray
    q99: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    count: np.ndarray

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre and half range `[D]` float32; the half range of a dimension with a tiny range is 1."""
        centre = (self.q01 + self.q99) / 2
        wide = self.q99 - self.q01 >= TINY_RANGE
        return centre.astype(np.float32), np.where(wide, (self.q99 - self.q01) / 2, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Stats:
    """All statistics of an event store; `save` and `load` are its `stats.json`.

    Attributes:
      action, state: per dimension, `[32]`.
      latent_mean, latent_std: `[C]` float32 over the future latents; `latent_std` is floored, so it can divide.
      counts: how many windows of each kind and level, and how many of them the latent statistics saw.
    """

    action: DimensionStats
    state: DimensionStats
    latent_mean: np.ndarray
    latent_std: np.ndarray
    counts: dict[str, int]

    def normalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """`[..., 32]` canonical actions to float32 where 1 % and 99 % quantiles are -1 and 1."""
        return _normalize(actions, self.action)

    def denormalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """The inverse of `normalize_actions`."""
        return _denormalize(actions, self.action)

    def normalize_state(self, state: np.ndarray) -> np.ndarray:
        """`[..., 32]` states to float32 where 1 % and 99 % quantiles are -1 and 1."""
        return _normalize(state, self.state)

    def denormalize_state(self, state: np.ndarray) -> np.ndarray:
        """The inverse of `normalize_state`."""
        return _denormalize(state, self.state)

    def normalize_latents(self, latents: np.ndarray) -> np.ndarray:
        """`[..., C]` latents of the codec to zero mean and unit deviation per channel, float32."""
        return (np.asarray(latents, np.float32) - self.latent_mean) / self.latent_std

    def denormalize_latents(self, latents: np.ndarray) -> np.ndarray:
        """The inverse of `normalize_latents`."""
        return np.asarray(latents, np.float32) * self.latent_std + self.latent_mean

    def channel_weights(self) -> np.ndarray:
        """`[C]` float32: loss weight of each latent channel, its deviation over the mean one."""
        return (self.latent_std / self.latent_std.mean()).astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Writes JSON; numbers survive the round trip exactly."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse, exactly."""
        return json.loads(json.dumps(asdict(self), default=lambda array: array.tolist()))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Stats:
        """The inverse of `to_dict`; raises KeyError, TypeError or ValueError where `raw` is something else."""
        return cls(
            action=_dimension_stats(raw["action"]),
            state=_dimension_stats(raw["state"]),
            latent_mean=np.asarray(raw["latent_mean"], np.float32),
            latent_std=np.asarray(raw["latent_std"], np.float32),
            counts={key: int(value) for key, value in raw["counts"].items()},
        )

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Reads what `save` wrote.

        Raises:
          UserError: the file is missing or damaged.
        """
        try:
            stats = cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"statistics {str(path)!r} are missing or damaged ({error!r}); build the store again"
            ) from None
        if not (np.isfinite(stats.latent_mean).all() and (stats.latent_std > 0).all()):
            raise UserError(
                f"statistics {str(path)!r} hold latent deviations that cannot divide; build the store again"
            )
        return stats


class StreamingMoments:
    """Mean and deviation per dimension, batch by batch (Chan's form of Welford's update), in float64."""

    def __init__(self, dimensions: int) -> None:
        self.count = np.zeros(dimensions, np.int64)
        self.mean = np.zeros(dimensions)
        self._squares = np.zeros(dimensions)

    def add(self, values: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Adds rows `[..., D]`; `valid`, `[D]` bool, leaves out dimensions that these rows do not use."""
        rows = np.asarray(values, np.float64).reshape(-1, len(self.count))
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = ((rows - mean) ** 2).sum(0)
        added = np.full(len(self.count), len(rows)) * (1 if valid is None else valid)
        total = np.maximum(self.count + added, 1)
        share = added / total
        self._squares += np.where(added > 0, squares + (mean - self.mean) ** 2 * self.count * share, 0.0)
        self.mean += (mean - self.mean) * share
        self.count += added

    @property
    def std(self) -> np.ndarray:
        """`[D]`: population standard deviation; 0 where nothing was seen."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))


class StreamingQuantiles:
    """Quantiles per dimension of a stream of any length, in bounded memory.

    Keeps the rows with the smallest random keys: all of them, hence exact quantiles, up to `capacity` rows; beyond, a
    uniform sample without replacement, in which the 1 % quantile of 100,000 rows lies between the true 0.9 % and 1.1 %
    ones (three deviations).
    """

    def __init__(self, dimensions: int, capacity: int = RESERVOIR_ROWS, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._capacity = capacity
        self._keys = [np.empty(0)]
        self._rows = [np.empty((0, dimensions), np.float32)]
        self._held = 0
        self._threshold = np.inf  # no row with a larger key can still enter

    def add(self, values: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Adds rows `[..., D]`; `valid`, `[D]` bool, leaves out dimensions that these rows do not use."""
        rows = np.asarray(values, np.float32).reshape(-1, self._rows[0].shape[1])
        if valid is not None:
            rows = np.where(valid, rows, np.float32(np.nan))
        keys = self._rng.random(len(rows))
        entering = keys < self._threshold
        self._keys.append(keys[entering])
        self._rows.append(rows[entering])
        self._held += int(entering.sum())
        if self._held > 2 * self._capacity:
            self._shrink()

    def _shrink(self) -> None:
        keys, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        if len(keys) > self._capacity:
            kept = np.argpartition(keys, self._capacity)[: self._capacity]
            keys, rows = keys[kept], rows[kept]
            self._threshold = float(keys.max())
        self._keys, self._rows, self._held = [keys], [rows], len(keys)

    def quantiles(self, shares: tuple[float, ...]) -> np.ndarray:
        """`[len(shares), D]` float64; 0 where a dimension was never valid."""
        self._shrink()
        result = np.zeros((len(shares), self._rows[0].shape[1]))
        for dimension, column in enumerate(self._rows[0].T):
            seen = column[~np.isnan(column)]
            if len(seen):
                result[:, dimension] = np.quantile(seen.astype(np.float64), shares)
        return result


class StatsAccumulator:
    """Gathers `DimensionStats` from a stream of rows."""

    def __init__(self, dimensions: int) -> None:
        self._moments = StreamingMoments(dimensions)
        self._quantiles = StreamingQuantiles(dimensions)

    def add(self, values: np.ndarray, valid: np.ndarray) -> None:
        """Adds rows `[..., D]`, of which the dimensions `valid` (`[D]` bool) count."""
        self._moments.add(values, valid)
        self._quantiles.add(values, valid)

    def result(self) -> DimensionStats:
        """The statistics of everything added so far."""
        q01, q99 = self._quantiles.quantiles((0.01, 0.99))
        return DimensionStats(q01, q99, self._moments.mean.copy(), self._moments.std, self._moments.count.copy())


def floor_deviation(std: np.ndarray) -> np.ndarray:
    """`[C]` float32 with dead and almost dead channels lifted, so that dividing by it amplifies no noise.

    Raises:
      UserError: every channel is constant: the sample shows no picture that changes.
    """
    largest = float(np.max(std))
    if not largest > 0:
        raise UserError("all latent channels are constant; the frames of the sampled windows are blank")
    return np.maximum(std, DEAD_CHANNEL * largest).astype(np.float32)


def _normalize(values: np.ndarray, stats: DimensionStats) -> np.ndarray:
    centre, scale = stats.affine()
    return (np.asarray(values, np.float32) - centre) / scale


def _denormalize(values: np.ndarray, stats: DimensionStats) -> np.ndarray:
    centre, scale = stats.affine()
    return np.asarray(values, np.float32) * scale + centre


def _dimension_stats(raw: dict[str, list[float]]) -> DimensionStats:
    floats = {name: np.asarray(raw[name], np.float64) for name in ("q01", "q99", "mean", "std")}
    return DimensionStats(**floats, count=np.asarray(raw["count"], np.int64))
