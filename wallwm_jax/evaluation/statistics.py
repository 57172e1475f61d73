"""Statistics of an evaluation: rates, means and paired differences with 95 % intervals, PSNR, trajectory errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap, t

from wallwm_jax.events.actions import ARM_DIM, GRIPPER_OFFSET, rotation_from_columns


@dataclass(frozen=True)
class Rate:
    """A success rate with its 95 % Wilson score interval over `episodes` trials; 0 trials say nothing: [0, 1]."""

    rate: float
    low: float
    high: float
    episodes: int

    def to_json(self) -> dict[str, float | int]:
        """As the `{rate, low, high, episodes}` of `evaluation.json`."""
        return asdict(self)


def success_rate(successes: int, trials: int) -> Rate:
    """Rate and Wilson interval of `successes` among `trials`. Raises ValueError unless 0 <= successes <= trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes among {trials} trials")
    if trials == 0:
        return Rate(rate=0.0, low=0.0, high=1.0, episodes=0)
    interval = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(rate=successes / trials, low=float(interval.low), high=float(interval.high), episodes=trials)


def rate_text(rate: Mapping[str, float]) -> str:
    """A `Rate` of JSON for people: "28 % [21, 35] of 151"."""
    return f"{100 * rate['rate']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}] of {rate['episodes']}"


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of independent values and its 95 % interval by Student's t; one value has none: (value, None, None)."""
    if not values:
        raise ValueError("no values")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None, None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class PairedOutcomes:
    """Two policies on the same trials: how often only one of them succeeded, and McNemar's exact p-value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedOutcomes:
    """McNemar's exact test on the outcomes of the same trials, two-sided: a binomial test of those that differ.

    Raises ValueError where they are not equally many.
    """
    one, other = (np.asarray(outcomes, bool) for outcomes in (first, second))
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} outcomes beside {len(other)}")
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return PairedOutcomes(only_first, only_second, p_value)


@dataclass(frozen=True)
class Difference:
    """A difference of two rates or means and its 95 % interval; None where there is nothing to resample."""

    difference: float
    low: float | None
    high: float | None


def paired_rate_difference(
    first: Sequence[tuple[float, int]], second: Sequence[tuple[float, int]], *, seed: int = 0
) -> Difference:
    """Rate or mean of the first minus that of the second, with the percentile interval of a bootstrap over episodes.

    Subtasks of an episode are not independent, so whole episodes are drawn again, of both policies the same ones.

    Args:
      first, second: (successes, attempts), or (sum, count), of each episode, in the same order.
      seed: of the draws.

    Raises:
      ValueError: they are not equally many, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} episodes beside {len(second)}")

    def difference(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        won, tried, other_won, other_tried = (column.sum(axis) for column in columns)
        return np.asarray(won / np.maximum(tried, 1) - other_won / np.maximum(other_tried, 1))

    columns = [np.array(column, float) for pairs in (first, second) for column in zip(*pairs)]
    found = float(difference(*columns))
    if len(first) == 1:
        return Difference(found, None, None)
    rng = np.random.default_rng(seed)
    interval = bootstrap(columns, difference, paired=True, method="percentile", rng=rng).confidence_interval
    return Difference(found, float(interval.low), float(interval.high))


def difference_text(difference: Mapping[str, float | None]) -> str:
    """A `Difference` of rates, as JSON, for people: "+12 points [-3, +27]"."""
    points = [100 * value for key in ("difference", "low", "high") if (value := difference[key]) is not None]
    interval = f" [{points[1]:+.0f}, {points[2]:+.0f}]" if len(points) > 1 else ""
    return f"{points[0]:+.0f} points{interval}"


def psnr(predicted: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 pictures (or stacks); 99 where they are equal."""
    if predicted.shape != true.shape:
        raise ValueError(f"pictures differ in shape: {predicted.shape} and {true.shape}")
    error = np.mean((predicted.astype(np.float64) - true.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else float(min(99.0, 10.0 * np.log10(255.0**2 / error)))


def normalized_error(predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> float:
    """Mean absolute error over `valid [Da]` dimensions of trajectories `[T, Da]`, in normalised units."""
    return float(np.abs(predicted - true)[:, valid].mean())


@dataclass(frozen=True)
class PhysicalError:
    """Mean error of a trajectory over its steps and arms."""

    translation_mm: float
    rotation_degrees: float
    gripper: float


def physical_error(predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> PhysicalError:
    """Errors of canonical actions `[T, 32]` (metres, 6-D rotation, closing fraction) against the true ones."""
    arms = int(valid.sum()) // ARM_DIM
    left, right = (
        np.asarray(actions, np.float64)[:, : arms * ARM_DIM].reshape(len(actions), arms, ARM_DIM)
        for actions in (predicted, true)
    )
    turn = rotation_from_columns(left[..., 3:9]) @ np.swapaxes(rotation_from_columns(right[..., 3:9]), -1, -2)
    cosine = np.clip((np.trace(turn, axis1=-2, axis2=-1) - 1.0) / 2.0, -1.0, 1.0)
    return PhysicalError(
        translation_mm=float(1000.0 * np.linalg.norm(left[..., :3] - right[..., :3], axis=-1).mean()),
        rotation_degrees=float(np.degrees(np.arccos(cosine)).mean()),
        gripper=float(np.abs(left[..., GRIPPER_OFFSET] - right[..., GRIPPER_OFFSET]).mean()),
    )
