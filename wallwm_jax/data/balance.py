r"""How often each window is drawn: cluster balance, then shares of levels, datasets and lengths; and what they achieve.

WALL-WM (arXiv 2606.01955, page 18) draws so that the clusters of what is seen and said and those of motion are both
balanced; the report gives no formula. Ours is for clusters of `n` windows to be drawn `n^(1 - power)` times:

- product: a window weighs `n_vl^-a * n_action^-b`. Simple, but where the two clusterings depend on each other, a rare
  motion of a rare scene is raised twice, and neither clustering ends at its shares;
- raking: weights are fitted until both hold (iterative proportional fitting, Deming and Stephan 1940).

Raking is no default: scenes without most motions make the shares contradict each other, and the fit then pays in
effective sample size. Of the 3272 action events of OCBench's quickstart store it leaves 1419, and the worst cluster is
0.004 off its share; the product leaves 2809 and is 0.010 off:

    python -m wallwm_jax.evaluation.coverage --config=configs/ocbench_quickstart.py --store=runs/quickstart/store \
        --config.data.balance=raking --json

Shares of levels, datasets and lengths are of drawn windows, not of latents, and are fitted the same way, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS

BALANCES = ("product", "raking")
_TOLERANCE = 1e-6  # of a share, where raking ends
_MOST_SWEEPS = 1000
_MISSED = 1e-3  # of a share of levels, datasets or lengths: more is an error


@dataclass(frozen=True)
class Draw:
    """Which windows are drawn, and how often.

    Attributes:
      candidates: `[n]` index positions of the windows that can be drawn.
      target: `[n]` probability of each in one draw; sums to 1.
      group: `[n]` number of its dataset and length bucket. Windows of the same group, level and clusters are drawn
        equally often.
    """

    candidates: np.ndarray
    target: np.ndarray
    group: np.ndarray


@dataclass(frozen=True)
class _Margin:
    """Shares that a config asks for: of the windows labelled `k`, `shares[k]`."""

    knob: str
    names: Sequence[str]
    shares: np.ndarray  # [k], sum 1
    labels: np.ndarray  # [n]


def plan_draw(index: np.ndarray, data: ConfigDict, sources: Sequence[str] = ()) -> Draw:
    """What `config.data` asks for: windows of one kind, balanced, in the shares of levels, datasets and lengths.

    Args:
      index: structured array of windows, see `data.event_store`.
      data: the section `data` of the config.
      sources: names of the datasets, `meta["sources"]` of the store.

    Raises:
      UserError: no window of the asked kind, level, dataset or length, or windows without a share; no clusters to
        balance by; shares that cannot hold together.
    """
    if data.window_kind not in KINDS:
        raise UserError(f"data.window_kind={data.window_kind!r} is not one of {KINDS}")
    candidates = np.flatnonzero(index["kind"] == KINDS.index(data.window_kind))
    if not len(candidates):
        present = [KINDS[kind] for kind in np.unique(index["kind"])]
        raise UserError(
            f"the store has no windows of kind {data.window_kind!r}, only {present}; "
            "set data.window_kind, or build it with wallwm_jax.build_events --windows"
        )
    windows = index[candidates]
    margins = [_levels(windows, data)] if data.window_kind == "event" else []
    mixture, lengths = (_pairs(name, data.get(name, ())) for name in ("mixture", "lengths"))
    margins += [_mixture(windows, mixture, sources)] if mixture else []
    margins += [_lengths(windows, lengths)] if lengths else []
    kept = np.ones(len(windows), bool)
    for margin in margins:
        _check_present(margin, margin.labels, "the store has only")
        kept &= margin.shares[margin.labels] > 0
    for margin in margins:
        _check_present(margin, margin.labels[kept], "those that have the other shares have only")
    if not kept.all():
        candidates, windows = candidates[kept], windows[kept]
    if (data.vl_power or data.action_power) and not all(
        (windows[name] >= 0).any() for name in ("cluster_vl", "cluster_action")
    ):
        raise UserError(
            "the store's windows have no cluster ids, so they cannot be balanced; run "
            "python -m wallwm_jax.data.clusters on it, or set data.vl_power=0 and data.action_power=0"
        )
    weights = sampling_weights(
        windows, data.vl_power, data.action_power, data.weight_clip, data.get("balance", "product")
    )
    labels = [margin.labels[kept] for margin in margins]
    target, _ = rake(weights, list(zip(labels, (margin.shares for margin in margins))))
    for margin, label in zip(margins, labels):
        _check_reached(margin, np.bincount(label, target, len(margin.shares)))
    group = np.zeros(len(windows), np.int64)
    for margin, label in zip(margins, labels):
        if margin.knob != "data.levels":
            group = group * len(margin.names) + label
    return Draw(candidates, target, group)


def sampling_weights(index: np.ndarray, a: float, b: float, clip: float, balance: str = "product") -> np.ndarray:
    """Weight of each window in one draw, within [1/clip, clip] times the mean of its kind and level.

    Args:
      index: structured array with kind, level, cluster_vl and cluster_action; `n_vl` and `n_action` are the sizes of
        the window's two clusters among the windows of its own kind and level.
      a, b: 0 for both gives equal weights; 1 gives every cluster of one clustering the same share.
      clip: at least 1. Where it cuts, shares are no longer those asked for; `balance_report` says how far off.
      balance: product, `n_vl^-a * n_action^-b`; or raking, such that clusters of either clustering have shares
        proportional to `n^(1 - power)`.

    Returns:
      `[n]` float64, mean 1 within each kind and level before clipping.

    Raises:
      UserError: a power below 0, `clip` below 1, or an unknown balance.
    """
    if not (math.isfinite(a + b) and min(a, b) >= 0):
        raise UserError(f"data.vl_power={a} and data.action_power={b} must be numbers of at least 0")
    if not clip >= 1:
        raise UserError(f"data.weight_clip={clip} must be at least 1")
    if balance not in BALANCES:
        raise UserError(f"data.balance={balance!r} is not one of {BALANCES}")
    weights = np.ones(len(index))
    for kind, level in kinds_and_levels(index):
        chosen = positions(index, kind, level)
        clusters = [_Clustering.of(index[name][chosen], power) for name, power in _powers(a, b)]
        if balance == "raking":
            raw, _ = rake(np.ones(len(chosen)), [(each.labels, each.target) for each in clusters])
        else:
            raw = math.prod((each.sizes**-each.power)[each.labels] for each in clusters)
        weights[chosen] = np.clip(raw / raw.mean(), 1 / clip, clip)
    return weights


def rake(
    weights: np.ndarray, margins: Sequence[tuple[np.ndarray, np.ndarray]], sweeps: int = _MOST_SWEEPS
) -> tuple[np.ndarray, float]:
    """Scales weights until the windows of every label of every margin have that label's share together.

    Windows with the same labels are scaled alike: the result is the one that is nearest to `weights` in
    Kullback-Leibler divergence. Combinations of labels that no window has stay empty, so the margins of a sparse table
    may contradict each other; the residual says by how much.

    Args:
      weights: `[n]` positive.
      margins: per margin, the label of each window, `[n]` integers below k, and the share of each label, `[k]`, sum 1.
      sweeps: over all margins, at most; it ends earlier when every share is within 1e-6.

    Returns:
      `[n]` weights with sum 1, and the largest difference of a share and what was asked for.
    """
    if not margins:
        return weights / weights.sum(), 0.0
    shape = [len(shares) for _, shares in margins]
    cells, cell, _ = tally(np.ravel_multi_index([labels for labels, _ in margins], shape))
    start = np.bincount(cell, weights)
    mass, places = start / start.sum(), np.unravel_index(cells, shape)
    for _ in range(sweeps):
        for place, (_, shares) in zip(places, margins):
            held = np.bincount(place, mass, len(shares))
            mass = mass * np.divide(shares, held, out=np.zeros_like(held), where=held > 0)[place]
        residual = max(
            float(np.abs(np.bincount(place, mass, len(shares)) - shares).max())
            for place, (_, shares) in zip(places, margins)
        )
        if residual < _TOLERANCE:
            break
    return weights * (mass / start)[cell], residual


def balance_report(index: np.ndarray, weights: np.ndarray, a: float, b: float) -> list[dict[str, Any]]:
    """Balance of each kind and level before (one window, one vote) and after weighting.

    Args:
      index, a, b: as in `sampling_weights`.
      weights: `[n]`, of any scale.

    Returns:
      One dictionary per kind and level: `kind`, `level` (names), `windows`, `effective_sample_size`
      (of the weighted draw, `(sum w)^2 / sum w^2`), and for `cluster_vl` and `cluster_action` the number of `clusters`,
      their `ids` and shares `before` and `after`, `gini` and `entropy` (normalised, 1 is uniform) as [before, after],
      and `residual`, the largest difference of a share and that asked for, proportional to `n^(1 - power)`.
    """
    report = []
    for kind, level in kinds_and_levels(index):
        chosen = positions(index, kind, level)
        inside = weights[chosen]
        entry: dict[str, Any] = {
            "kind": KINDS[kind],
            "level": LEVELS[level],
            "windows": len(inside),
            "effective_sample_size": effective_sample_size(inside),
        }
        for name, power in _powers(a, b):
            clustering = _Clustering.of(index[name][chosen], power)
            before = clustering.sizes / len(inside)
            after = np.bincount(clustering.labels, inside) / inside.sum()
            entry[name] = {
                "clusters": len(before),
                "ids": clustering.ids.tolist(),
                "before": before.tolist(),
                "after": after.tolist(),
                "gini": [gini(before), gini(after)],
                "entropy": [normalised_entropy(before), normalised_entropy(after)],
                "residual": float(np.abs(after - clustering.target).max()),
            }
        report.append(entry)
    return report


def effective_sample_size(weights: np.ndarray) -> float:
    """`(sum w)^2 / sum w^2`: how many windows drawn equally often would tell as much."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def gini(shares: np.ndarray) -> float:
    """Gini coefficient of non-negative shares: 0 where all are equal, towards 1 where one has everything."""
    ordered = np.sort(shares)
    count = len(ordered)
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * ordered.sum()))


def normalised_entropy(shares: np.ndarray) -> float:
    """Entropy of shares over its maximum; 1 for a single share."""
    positive = shares[shares > 0] / shares.sum()
    return float(-(positive * np.log(positive)).sum() / math.log(len(shares))) if len(shares) > 1 else 1.0


def kinds_and_levels(index: np.ndarray) -> list[tuple[int, int]]:
    """The (kind, level) pairs that occur, as numbers."""
    keys = np.flatnonzero(np.bincount(index["kind"] * len(LEVELS) + index["level"]))
    return [divmod(int(key), len(LEVELS)) for key in keys]


def tally(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`np.unique` with inverse and counts, of whole numbers close to each other: it counts instead of sorting."""
    least = int(values.min())
    places = np.subtract(values, least, dtype=np.result_type(values, np.int32)) if least else values
    counts = np.bincount(places)
    present = counts > 0
    return np.flatnonzero(present) + least, (np.cumsum(present) - 1)[places], counts[present]


def positions(index: np.ndarray, kind: int, level: int) -> np.ndarray:
    """Where the windows of a kind and level are."""
    return np.flatnonzero((index["kind"] == kind) & (index["level"] == level))


@dataclass(frozen=True)
class _Clustering:
    """One clustering of some windows, and the share of each cluster that a power asks for."""

    ids: np.ndarray  # [k]
    labels: np.ndarray  # [n] positions in ids
    sizes: np.ndarray  # [k] float64
    power: float
    target: np.ndarray  # [k]

    @classmethod
    def of(cls, clusters: np.ndarray, power: float) -> _Clustering:
        ids, labels, counts = tally(clusters)
        sizes = counts.astype(np.float64)
        wanted = sizes ** (1 - power)
        return cls(ids, labels, sizes, power, wanted / wanted.sum())


def _powers(a: float, b: float) -> tuple[tuple[str, float], ...]:
    return ("cluster_vl", a), ("cluster_action", b)


def level_shares(data: ConfigDict) -> dict[str, float]:
    """Level → share of `data.levels`, where it is not 0.

    Raises:
      UserError: an unknown level, no share, or one that is no positive number.
    """
    wanted = {name: float(share) for name, share in data.levels.items() if share}
    if set(wanted) - set(LEVELS) or not wanted or not all(0 < share < math.inf for share in wanted.values()):
        raise UserError(f"data.levels={dict(data.levels)}: need positive shares of levels among {LEVELS}")
    return wanted


def _levels(windows: np.ndarray, data: ConfigDict) -> _Margin:
    wanted = level_shares(data)
    return _margin("data.levels", LEVELS, [wanted.get(name, 0.0) for name in LEVELS], windows["level"])


def _mixture(windows: np.ndarray, wanted: Sequence[tuple[Any, float]], sources: Sequence[str]) -> _Margin:
    """A dataset belongs to the longest name that it begins with."""
    names = [name for name, _ in wanted]
    known = f"the store has {', '.join(map(repr, sources))}"
    for name in names:
        if not isinstance(name, str) or not any(source.startswith(name) for source in sources):
            raise UserError(f"data.mixture names {name!r}, with which no dataset begins; {known}")
    owner = np.full(len(sources), -1)
    for number in sorted(range(len(names)), key=lambda number: len(names[number])):
        owner[[source.startswith(names[number]) for source in sources]] = number
    for number in np.unique(windows["source"]):
        if owner[number] < 0:
            raise UserError(
                f"data.mixture gives {sources[number]!r} no share; name it, with 0 to leave it out, or the rest with ''"
            )
    return _margin("data.mixture", names, [share for _, share in wanted], owner[windows["source"]])


def _lengths(windows: np.ndarray, wanted: Sequence[tuple[Any, float]]) -> _Margin:
    ends = [end for end, _ in wanted]
    if not all(isinstance(end, int) for end in ends) or ends != sorted(set(ends)):
        raise UserError(f"data.lengths: the last lengths of its buckets, {ends}, must be whole numbers that rise")
    longest = int(windows["length"].max())
    if longest > ends[-1]:
        raise UserError(
            f"data.lengths ends at {ends[-1]} latents, but a window has {longest}; add ({longest}, 0) to leave such out"
        )
    names = [f"{first} to {last} latents" for first, last in zip([1, *(end + 1 for end in ends)], ends)]
    return _margin("data.lengths", names, [share for _, share in wanted], np.searchsorted(ends, windows["length"]))


def _pairs(knob: str, value: Any) -> list[tuple[Any, float]]:
    try:
        pairs = [(name, float(share)) for name, share in value]
    except (TypeError, ValueError):
        raise UserError(f"data.{knob}={value!r}: write pairs, as in (('a', 0.8), ('b', 0.2)); see base.py") from None
    if pairs and not (all(0 <= share < math.inf for _, share in pairs) and any(share for _, share in pairs)):
        raise UserError(f"data.{knob}={value!r}: shares must not be negative, and one must be positive")
    return pairs


def _margin(knob: str, names: Sequence[str], shares: Sequence[float], labels: np.ndarray) -> _Margin:
    return _Margin(knob, names, np.array(shares) / sum(shares), labels.astype(np.int64))


def _check_present(margin: _Margin, labels: np.ndarray, there: str) -> None:
    counts = np.bincount(labels, minlength=len(margin.names))
    for name, share, count in zip(margin.names, margin.shares, counts):
        if share and not count:
            present = [other for other, found in zip(margin.names, counts) if found]
            raise UserError(f"{margin.knob} asks for {name!r} events, but {there} {present}")


def _check_reached(margin: _Margin, shares: np.ndarray) -> None:
    worst = int(np.abs(shares - margin.shares).argmax())
    if abs(shares[worst] - margin.shares[worst]) > _MISSED:
        raise UserError(
            f"{margin.knob} asks for {margin.shares[worst]:.1%} of {margin.names[worst]!r}, but it gets "
            f"{shares[worst]:.1%}: no window has what is asked for beside it by data.levels, data.mixture or "
            "data.lengths; change one of them"
        )
