"""Who orthogonalises which matrix: the static plan of a distributed Muon step.

Orthogonalising needs whole matrices, parameters are sharded. So each matrix has one owner among the chips; its shards
travel to the owner and the result back. The plan is a pure function of shapes, specs and shardings: matrices of one
shape, a *class*, and one layout form a *group*, whose shards travel together; owners are balanced by longest processing
time first. Nothing of it is kept in the optimizer state.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from wallwm_jax.optim import newton_schulz

ADAMW = "adamw"
"""In a tree of specs: this parameter, whatever its rank, is AdamW's."""

Axes = tuple[str, ...]


@dataclass(frozen=True)
class MatrixSpec:
    """The matrices in a parameter: axis `reduction` (fan-in) by axis `output` (fan-out); all other axes stack them.

    Attributes:
      reduction, output: axes of the parameter.
      split: sizes along `output` of parts that are matrices of their own, as in a fused query-key-value kernel, or the
        heads of a projection; () takes the whole.
    """

    reduction: int
    output: int
    split: tuple[int, ...] = ()


@dataclass(frozen=True)
class MuonSharding:
    """Where the parameters live.

    Attributes:
      mesh: all chips of the run.
      specs: tree of PartitionSpec, that of a parameter being its momentum's, too.
      owner_axes: mesh axes over which ownership is spread. Along the others, such as the network between slices, every
        chip repeats the work of its group.
    """

    mesh: Mesh | AbstractMesh
    specs: Any
    owner_axes: Sequence[str] = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class MatrixShape:
    """A class: matrices `m x n`, `m <= n`, cut into `split` parts along axis `split_axis` (0 or 1)."""

    m: int
    n: int
    split: tuple[int, ...]
    split_axis: int

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the parts that are orthogonalised."""
        if not self.split:
            return ((self.m, self.n),)
        return tuple((size, self.n) if self.split_axis == 0 else (self.m, size) for size in self.split)

    def flops(self, steps: int) -> float:
        """Of orthogonalising all parts."""
        return sum(newton_schulz.flops(part, steps) for part in self.parts)


@dataclass(frozen=True)
class Leaf:
    """One parameter in a group; its matrices are transposed to the class's shape where `is_transposed`."""

    path: str
    spec: MatrixSpec
    shape: tuple[int, ...]
    is_transposed: bool

    @property
    def stack(self) -> int:
        """Number of its matrices."""
        return math.prod(self.shape) // (self.shape[self.spec.reduction] * self.shape[self.spec.output])


@dataclass(frozen=True)
class Group:
    """Matrices that travel together.

    Attributes:
      shape: their class.
      layout: mesh axes that split m and n.
      leaves: where they come from, in order.
      split_axes: owner axes that split the matrices, in the order of the exchanges.
      copy_axes: owner axes along which they are copies.
      table: `[copies, slots, shards]`, the matrix in each slot of each owner, numbered in this order so that what
        travels is a few runs of neighbours; `count` marks an empty slot.
      count: number of matrices.
    """

    shape: MatrixShape
    layout: tuple[Axes, Axes]
    leaves: tuple[Leaf, ...]
    split_axes: Axes
    copy_axes: Axes
    table: np.ndarray
    count: int

    @property
    def slots(self) -> int:
        """Places for matrices of this group at each owner."""
        return self.table.shape[1]

    @property
    def shards(self) -> int:
        """Chips that share one copy."""
        return self.table.shape[2]

    @property
    def kept(self) -> list[int]:
        """Matrices of the group that the chips of each copy own together."""
        return [int(np.sum(copy < self.count)) for copy in self.table]


@dataclass(frozen=True)
class Plan:
    """The step of every chip.

    Attributes:
      groups: what travels.
      axes: owner axes of more than one chip.
      profiles: number of matrices of each group that an owner holds; chips of the same profile run the same branch.
      profile: `[sizes of axes]` which profile each owner has.
      sizes: mesh axis → chips.
    """

    groups: tuple[Group, ...]
    axes: Axes
    profiles: tuple[tuple[int, ...], ...]
    profile: np.ndarray
    sizes: Mapping[str, int]

    @property
    def owners(self) -> int:
        """Chips that share the matrices out; along the other axes they do the same work again."""
        return self.profile.size

    def flops(self, profile: tuple[int, ...], steps: int) -> float:
        """Of a chip with this profile."""
        return sum(count * group.shape.flops(steps) for count, group in zip(profile, self.groups))


def make_plan(
    shapes: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, MatrixSpec],
    layouts: Mapping[str, PartitionSpec] | None = None,
    sizes: Mapping[str, int] | None = None,
    owner_axes: Sequence[str] = (),
) -> Plan:
    """The plan for parameters given by path.

    Args:
      shapes, specs: of every parameter that Muon takes.
      layouts: how the mesh splits each of them; None: not at all.
      sizes: mesh axis → chips, in the mesh's order.
      owner_axes: see `MuonSharding`.

    Raises:
      ValueError: axes or split that do not fit a parameter, a split stack, or matrices split over an axis that is not
        an owner axis.
    """
    sizes = dict(sizes or {})
    axes = tuple(axis for axis, size in reversed(sizes.items()) if size > 1 and axis in owner_axes)
    members: dict[tuple[MatrixShape, tuple[Axes, Axes]], list[Leaf]] = defaultdict(list)
    for path, spec in specs.items():
        shape, layout, is_transposed = _canonical(path, shapes[path], spec, (layouts or {}).get(path), sizes)
        stray = [axis for side in layout for axis in side if axis not in axes]
        if stray:
            raise ValueError(f"matrices of {path!r} are split over mesh axis {stray[0]!r}, which is no owner axis")
        members[shape, layout].append(Leaf(path, spec, tuple(shapes[path]), is_transposed))
    keys = sorted(members, key=lambda key: (-key[0].flops(1), str(key)))
    counts = [sum(leaf.stack for leaf in members[key]) for key in keys]
    grid = tuple(sizes[axis] for axis in axes)
    owned = _longest_first([key[0].flops(1) for key in keys], counts, math.prod(grid))
    groups = tuple(
        _group(key[0], key[1], tuple(members[key]), axes, own.reshape(grid)) for key, own in zip(keys, owned)
    )
    held = [tuple(own.tolist()) for own in owned.T]
    profiles = tuple(sorted(set(held), reverse=True))
    profile = np.array([profiles.index(one) for one in held], np.int32).reshape(grid)
    return Plan(groups, axes, profiles, profile, sizes)


def _canonical(
    path: str, shape: tuple[int, ...], spec: MatrixSpec, layout: PartitionSpec | None, sizes: Mapping[str, int]
) -> tuple[MatrixShape, tuple[Axes, Axes], bool]:
    """Class and layout of a parameter's matrices, and whether they are transposed to it."""
    if (
        len(shape) < 2
        or spec.reduction == spec.output
        or not all(0 <= axis < len(shape) for axis in (spec.reduction, spec.output))
    ):
        raise ValueError(f"parameter {path!r} of shape {shape} has no matrix axes {spec.reduction} and {spec.output}")
    rows, columns = shape[spec.reduction], shape[spec.output]
    if spec.split and sum(spec.split) != columns:
        raise ValueError(f"the split {spec.split} of {path!r} must add up to its {columns} outputs")
    entries = [_names(entry, sizes) for entry in (*(layout or ()), *[None] * len(shape))][: len(shape)]
    for axis, names in enumerate(entries):
        if names and axis not in (spec.reduction, spec.output):
            raise ValueError(f"axis {axis} of {path!r} stacks matrices and is split over {names[0]!r}; keep it whole")
    sides = (entries[spec.reduction], entries[spec.output])
    is_transposed = (rows, sides[::-1]) > (columns, sides) if not spec.split else rows > columns
    if is_transposed:
        return MatrixShape(columns, rows, spec.split, 0 if spec.split else 1), sides[::-1], True
    return MatrixShape(rows, columns, spec.split, 1), sides, False


def _names(entry: Any, sizes: Mapping[str, int]) -> Axes:
    """Mesh axes of more than one chip in one entry of a PartitionSpec."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    names = tuple(name for name in names if sizes.get(name, 1) > 1)
    if names != tuple(name for name in sizes if name in names):
        raise ValueError(f"a dimension is split over {names}; name the axes in the order of the mesh, {tuple(sizes)}")
    return names


def _longest_first(costs: Sequence[float], counts: Sequence[int], owners: int) -> np.ndarray:
    """Matrices of each group that each owner gets, `[groups, owners]`: the costliest first, to the least loaded."""
    heap = [(0.0, owner) for owner in range(owners)]
    owned = np.zeros((len(counts), owners), np.int64)
    for group, (cost, count) in enumerate(zip(costs, counts)):
        for _ in range(count):
            load, owner = heapq.heappop(heap)
            heapq.heappush(heap, (load + cost, owner))
            owned[group, owner] += 1
    return owned


def _group(
    shape: MatrixShape, layout: tuple[Axes, Axes], leaves: tuple[Leaf, ...], axes: Axes, owned: np.ndarray
) -> Group:
    """The group of which each chip of the grid `axes` gets `owned` matrices."""
    split_axes = tuple(axis for axis in axes if axis in (*layout[0], *layout[1]))
    copy_axes = tuple(axis for axis in axes if axis not in split_axes)
    order = [axes.index(axis) for axis in (*copy_axes, *split_axes)]
    copies = math.prod(owned.shape[axes.index(axis)] for axis in copy_axes)
    held = owned.transpose(order).reshape(copies, 1, -1)
    is_filled = np.arange(max(1, owned.max()))[:, None] < held
    count = int(owned.sum())
    table = np.where(is_filled, np.cumsum(is_filled).reshape(is_filled.shape) - 1, count)
    return Group(shape, layout, leaves, split_axes, copy_axes, table, count)


def matrix_paths(specs: Any, params: Any) -> dict[str, MatrixSpec]:
    """Path → spec of the parameters that are Muon's.

    Args:
      specs: per parameter a `MatrixSpec`, `ADAMW`, or None for vectors and scalars.
      params: arrays or shapes.

    Raises:
      ValueError: a parameter of two axes or more that neither claims, or without a spec.
    """
    by_path = dict(flatten(specs, is_leaf=is_spec))
    found = {}
    for path, leaf in flatten(params):
        spec = by_path.get(path)
        if isinstance(spec, MatrixSpec):
            found[path] = spec
        elif spec != ADAMW and len(leaf.shape) > 1:
            raise ValueError(f"parameter {path!r} of shape {tuple(leaf.shape)} needs a MatrixSpec, or {ADAMW!r}")
    return found


def is_spec(node: object) -> bool:
    """Whether a node of a tree of specs is a leaf: a spec, `ADAMW`, or None."""
    return node is None or isinstance(node, MatrixSpec | str)


def flatten(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    """(path, leaf) pairs; a path is the keys joined by "/"."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in pairs]
