"""Which events make which row: cluster-balanced draws, laid into blocks of rows, as a pure function of (seed, row).

There is no iterator state. Row `i` belongs to block `i // R`; block `b` belongs to deck `b // BLOCKS_PER_DECK`; a deck
is computed from its number alone. It holds the exact quota of every cell (level x vision-language cluster x action
cluster, and dataset x length bucket where these have shares), spread evenly over its blocks in jittered order, so that
every block is close to the target and every deck meets it. Inside a cell the windows are visited without replacement,
in a new order on each pass; a pass goes on where the deck before stopped. A deck is cut into blocks of equal load, and
each block's draws are packed into its rows.

Cluster-balanced sampling is WALL-WM's (arXiv 2606.01955, page 18); the weights are ours (`data.balance`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.balance import plan_draw
from wallwm_jax.data.packing import pack_events, random_stream

BLOCKS_PER_DECK = 256
_UNDRAWN_SHARE = 1e-3  # of a block's load may stay undrawn, in the mean of the trial blocks
_TRIAL_BLOCKS = 16  # packed at start, to learn whether fill_target can be reached with these lengths
_JITTER, _ROW_ORDER = 1, 2  # streams of random numbers; `packing` has 3


@dataclass(frozen=True)
class _Deck:
    windows: np.ndarray  # [D] candidate numbers in draw order
    starts: np.ndarray  # [BLOCKS_PER_DECK + 1] first draw of each block


@dataclass(frozen=True)
class _Block:
    """`R` rows of window indices, and the windows of the draw's tail that found no place (skipped in this pass)."""

    rows: tuple[tuple[int, ...], ...]
    undrawn: tuple[int, ...]


class Sampler:
    """Draws windows of an index by balanced weights and packs them into rows.

    Attributes:
      rows_per_block: R.
      candidates: `[n]` index positions of the windows that can be drawn.
      target: `[n]` probability of each candidate in one draw; sums to 1.
      fill: planned share of the `R * F` latents of a block that are real. `fill_target`, or less where these lengths
        cannot be packed that tightly, or where actions or event slots run out first.
      events_per_row: planned, in the mean.
    """

    def __init__(
        self, index: np.ndarray, config: ConfigDict, seed: int | None = None, *, sources: Sequence[str] = ()
    ) -> None:
        """Plans the draw.

        Args:
          index: structured array of windows (see `data.event_store`): kind, level, length, num_actions, cluster ids.
          config: the whole config; reads `config.data` and, without `seed`, `config.seed`.
          sources: names of the datasets, `meta["sources"]` of the store; `data.mixture` needs them.

        Raises:
          UserError: what `balance.plan_draw` raises; a window that no row can hold; a fill target outside (0, 1].
        """
        data = config.data
        if not 0 < data.fill_target <= 1:
            raise UserError(f"data.fill_target={data.fill_target} must be above 0 and at most 1")
        self._index = index
        self._seed = int(config.seed if seed is None else seed)
        self.rows_per_block = int(data.draw_block_rows)
        self._capacity = (int(data.latents_per_row), int(data.actions_per_row), int(data.events_per_row))
        draw = plan_draw(index, data, sources)
        self.candidates, self.target = draw.candidates, draw.target
        chosen = index[self.candidates]
        self._lengths, self._actions = chosen["length"].copy(), chosen["num_actions"].copy()
        _check_sizes(self._lengths, self._actions, self._capacity, self.candidates)
        self._make_cells(chosen, draw.group)
        self._shrink_until_packable(float(data.fill_target))
        self._deck = functools.lru_cache(maxsize=2)(self._make_deck)
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def block(self, number: int) -> list[list[int]]:
        """The `R` rows of block `number`, each a list of index positions; a pure function of (seed, number)."""
        return [list(row) for row in self._block(number).rows]

    def row(self, number: int) -> list[int]:
        """Index positions of the windows in global row `number`, in slot order."""
        block, row = divmod(number, self.rows_per_block)
        return list(self._block(block).rows[row])

    def undrawn(self, number: int) -> list[int]:
        """Windows of block `number` that found no place; almost always empty, see `_UNDRAWN_SHARE`."""
        return list(self._block(number).undrawn)

    def report(self, blocks: int = BLOCKS_PER_DECK) -> dict[str, Any]:
        """Draws and packs the first `blocks` blocks and measures them.

        Returns:
          `blocks`; `fill` (real latents over `R * F`), `fill_min` (of the worst block) and `planned_fill`;
          `events_per_row`; `undrawn` (windows without a place, all blocks together); and `total_variation` between what
          was packed and the target: one figure per marginal, level, cluster_vl, cluster_action, length.
        """
        position = np.full(len(self._index), -1, np.int64)
        position[self.candidates] = np.arange(len(self.candidates))
        visits = np.zeros(len(self.candidates), np.int64)
        fills, undrawn = [], 0
        for number in range(blocks):
            drawn = position[np.concatenate([np.array(row, np.int64) for row in self.block(number)])]
            np.add.at(visits, drawn, 1)
            fills.append(self._lengths[drawn].sum() / (self.rows_per_block * self._capacity[0]))
            undrawn += len(self.undrawn(number))
        chosen = self._index[self.candidates]
        variation = {
            name: _total_variation(chosen[name], visits, self.target)
            for name in ("level", "cluster_vl", "cluster_action", "length")
        }
        return {
            "blocks": blocks,
            "fill": float(np.mean(fills)),
            "fill_min": float(np.min(fills)),
            "planned_fill": self.fill,
            "events_per_row": float(visits.sum() / (blocks * self.rows_per_block)),
            "undrawn": undrawn,
            "total_variation": variation,
        }

    def _make_cells(self, chosen: np.ndarray, group: np.ndarray) -> None:
        """Parts the candidates by (group, level, vl cluster, action cluster): one rate and visiting order per cell."""
        key = group
        for name in ("level", "cluster_vl", "cluster_action"):
            ids = chosen[name].astype(np.int64) - int(chosen[name].min())
            key = key * (int(ids.max()) + 1) + ids
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        self._cell_first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
        self._cell_size = np.diff(self._cell_first, append=len(ordered))
        cells = ordered[self._cell_first]
        self._members = order.astype(np.int32)  # every process that loads holds them
        self._cell_target = np.bincount(np.repeat(np.arange(len(cells)), self._cell_size), self.target[order])
        # Where a deck's quota of a cell is a fraction, its phase says in which decks it rounds up. Golden-ratio phases
        # over cells sorted by vision-language cluster and rate keep the counts of those clusters even in each deck.
        cluster = cells // (int(chosen["cluster_action"].max()) - int(chosen["cluster_action"].min()) + 1)
        order = np.lexsort((self._cell_target, cluster))
        self._phase = np.empty(len(cells))
        self._phase[order] = np.modf((np.arange(len(cells)) + 0.5) * 0.6180339887498949)[0]

    def _plan(self, fill: float, means: np.ndarray) -> None:
        """Sets how many draws a deck has, so that a block's mean load is `fill` of the scarcest of its capacities;
        `means` are latents, actions and slots of a draw."""
        room = np.array(self._capacity) * self.rows_per_block * fill / means  # events per block that each would allow
        scarcest = int(np.argmin(room))
        self._load = (self._lengths, self._actions, np.ones_like(self._lengths))[scarcest]
        self._quota = self._cell_target * room[scarcest] * BLOCKS_PER_DECK
        self.events_per_row = float(room[scarcest] / self.rows_per_block)
        self.fill = float(room[scarcest] * means[0] / (self.rows_per_block * self._capacity[0]))

    def _shrink_until_packable(self, fill: float) -> None:
        """Lowers the planned fill until trial blocks pack (almost) whole: long events leave gaps that nothing fills."""
        means = np.array([self.target @ self._lengths, self.target @ self._actions, 1.0])
        while True:
            self._plan(fill, means)
            deck = self._make_deck(0)
            drawn = placed = 0
            for number in range(_TRIAL_BLOCKS):
                draws = deck.windows[deck.starts[number] : deck.starts[number + 1]]
                drawn += self._load[draws].sum()
                placed += self._load[draws[: self._pack_prefix(draws)[0]]].sum()
            if placed >= (1 - _UNDRAWN_SHARE) * drawn:
                return
            fill *= min(placed / drawn, 0.9975)

    def _make_deck(self, number: int) -> _Deck:
        before = np.floor(number * self._quota + self._phase).astype(np.int64)
        counts = np.floor((number + 1) * self._quota + self._phase).astype(np.int64) - before
        cell = np.repeat(np.arange(len(counts)), counts)
        turn = np.arange(len(cell)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0 .. count - 1 inside each cell
        jitter = random_stream(self._seed, _JITTER, number).random(len(cell))
        order = np.argsort((turn + jitter) / counts[cell], kind="stable")
        cell, visit = cell[order], (before[cell] + turn)[order]
        size = self._cell_size[cell]
        lap, rank = np.divmod(visit, size)
        key = _mix(
            _mix(np.uint64(self._seed & 0xFFFFFFFFFFFFFFFF) + _mix(cell.astype(np.uint64))) + lap.astype(np.uint64)
        )
        windows = self._members[self._cell_first[cell] + _shuffled(rank, size, key)]
        load = self._load[windows].astype(np.int64)
        middle = np.cumsum(load) - load / 2
        edges = np.linspace(0, load.sum(), BLOCKS_PER_DECK + 1)
        return _Deck(windows, np.searchsorted(middle, edges))

    def _make_block(self, number: int) -> _Block:
        if number < 0:
            raise IndexError(f"block {number}: blocks count from 0")
        deck = self._deck(number // BLOCKS_PER_DECK)
        start, end = deck.starts[number % BLOCKS_PER_DECK :][:2]
        draws = deck.windows[start:end]
        placed, packed = self._pack_prefix(draws)
        # Packing puts the long events into the first rows; a batch must not be made of those alone.
        order = random_stream(self._seed, _ROW_ORDER, number).permutation(self.rows_per_block)
        rows = tuple(tuple(int(self.candidates[draws[slot]]) for slot in sorted(packed[row])) for row in order)
        return _Block(rows, tuple(int(window) for window in self.candidates[draws[placed:]]))

    def _pack_prefix(self, draws: np.ndarray) -> tuple[int, list[list[int]]]:
        """The longest prefix of `draws` that packs, and its rows (positions in `draws`)."""
        lengths, actions = self._lengths[draws].tolist(), self._actions[draws].tolist()
        for placed in range(len(draws), 0, -1):
            packed = pack_events(lengths[:placed], actions[:placed], self.rows_per_block, self._capacity)
            if packed is not None:
                return placed, packed
        return 0, [[] for _ in range(self.rows_per_block)]


def _check_sizes(lengths: np.ndarray, actions: np.ndarray, capacity: tuple[int, int, int], windows: np.ndarray) -> None:
    for name, values, limit, knob in (
        ("latents", lengths, capacity[0], "data.latents_per_row"),
        ("actions", actions, capacity[1], "data.actions_per_row"),
        ("events", np.ones_like(lengths), capacity[2], "data.events_per_row"),
    ):
        worst = int(values.argmax())
        if values[worst] > limit:
            raise UserError(
                f"window {windows[worst]} has {values[worst]} {name}, more than a row holds ({limit}); "
                f"raise {knob} or rebuild the store with shorter windows"
            )


def _total_variation(labels: np.ndarray, visits: np.ndarray, target: np.ndarray) -> float:
    """Half the L1 distance between the visited and the wanted shares of each label."""
    _, group = np.unique(labels, return_inverse=True)
    seen = np.bincount(group, weights=visits) / visits.sum()
    return float(0.5 * np.abs(seen - np.bincount(group, weights=target)).sum())


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: spreads the bits of a uint64; a bijection."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _shuffled(rank: np.ndarray, size: np.ndarray, key: np.ndarray, rounds: int = 24) -> np.ndarray:
    """Where a keyed permutation of `0 .. size - 1` sends `rank`, element by element and without building it.

    A swap-or-not network (Hoang, Morris, Rogaway 2012): each round pairs every rank with its mirror image around a
    keyed point, and a keyed bit of the pair decides whether the two change places.
    """
    here, size = rank.astype(np.uint64), size.astype(np.uint64)
    for turn in range(rounds):
        turn_key = _mix(key ^ np.uint64(0x5851F42D4C957F2D * (turn + 1) & 0xFFFFFFFFFFFFFFFF))
        mirror = (turn_key % size + size - here) % size
        swap = (_mix(turn_key ^ _mix(np.maximum(here, mirror))) & np.uint64(1)).astype(bool)
        here = np.where(swap, mirror, here)
    return here.astype(np.int64)
