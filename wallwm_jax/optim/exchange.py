"""Running a plan: shards to the owners, orthogonalise there, shards back.

Everything happens inside one `shard_map`. Along each mesh axis that splits the matrices goes one tiled all-to-all (a
single change of sharding over several axes would make XLA replicate them); along axes that hold copies every owner
takes its own from the copy it has, and an all-gather shares the results. What a chip computes is a branch of a switch
on its profile, without collectives, so that some may own one large matrix and others two small ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from wallwm_jax.optim.ownership import Group, Leaf, MatrixShape, Plan

Orthogonalize = Callable[[jax.Array], jax.Array]


def run_plan(
    plan: Plan,
    matrices: Mapping[str, jax.Array],
    orthogonalize: Orthogonalize,
    mesh: Mesh | AbstractMesh | None = None,
    layouts: Mapping[str, PartitionSpec] | None = None,
) -> dict[str, jax.Array]:
    """The orthogonal factors of all matrices.

    Args:
      plan: from `ownership.make_plan`.
      matrices: path → parameter-shaped array, in the type in which it is to travel.
      orthogonalize: `[n, m, n']` to factors of the same shape.
      mesh, layouts: where they live; needed where the plan has owners.

    Returns:
      path → array of the shape and sharding of its input, in the type that `orthogonalize` gives.
    """
    body = functools.partial(_run, plan, orthogonalize=orthogonalize)
    if not plan.axes or not matrices:
        return body(dict(matrices))
    assert layouts is not None
    placed = {path: layouts[path] for path in matrices}
    split = jax.shard_map(body, mesh=mesh, in_specs=(placed,), out_specs=placed, check_vma=False)
    return split(dict(matrices))


def _run(plan: Plan, matrices: dict[str, jax.Array], *, orthogonalize: Orthogonalize) -> dict[str, jax.Array]:
    """What one chip does."""
    owned = tuple(_to_owner(plan, group, _stacked(group, matrices)) for group in plan.groups)
    owned = jax.lax.optimization_barrier(owned)  # all there before any is iterated: no phase's memory adds to another's
    branches = [functools.partial(_orthogonalize, plan, profile, orthogonalize) for profile in plan.profiles]
    if len(branches) == 1:
        owned = branches[0](owned)
    else:
        owned = jax.lax.switch(_place(plan.profile, plan.axes), branches, owned)
    owned = jax.lax.optimization_barrier(owned)  # and all iterated before any leaves
    results: dict[str, jax.Array] = {}
    for group, mine in zip(plan.groups, owned):
        stacked, start = _from_owner(plan, group, mine), 0
        for leaf in group.leaves:
            part = stacked[start : start + leaf.stack]
            results[leaf.path] = _unstacked(leaf, part, matrices[leaf.path].shape)
            start += leaf.stack
    return results


def _orthogonalize(
    plan: Plan, profile: tuple[int, ...], orthogonalize: Orthogonalize, owned: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The branch of one profile: its matrices one after the other, each in place; empty slots stay as they are."""

    def one(group: Group, slot: jax.Array | int, mine: jax.Array) -> jax.Array:
        factor = _by_parts(group.shape, jax.lax.dynamic_slice_in_dim(mine, slot, 1), orthogonalize)
        return jax.lax.dynamic_update_slice_in_dim(mine, factor.astype(mine.dtype), slot, 0)

    return tuple(
        jax.lax.fori_loop(0, count, functools.partial(one, group), mine)
        for group, count, mine in zip(plan.groups, profile, owned)
    )


def _by_parts(shape: MatrixShape, batch: jax.Array, orthogonalize: Orthogonalize) -> jax.Array:
    """Orthogonalises `[n, m, n']` part by part where the class is split; equal parts in one batch."""
    if not shape.split:
        return orthogonalize(batch)
    axis = 1 + shape.split_axis
    if len(set(shape.split)) > 1:
        parts = jnp.split(batch, np.cumsum(shape.split)[:-1], axis)
        return jnp.concatenate([orthogonalize(part) for part in parts], axis)
    n, pieces = len(batch), len(shape.split)
    cut = batch.reshape(*batch.shape[:axis], pieces, shape.split[0], *batch.shape[axis + 1 :])
    factors = orthogonalize(jnp.moveaxis(cut, axis, 1).reshape(n * pieces, *shape.parts[0]))
    return jnp.moveaxis(factors.reshape(n, pieces, *shape.parts[0]), 1, axis).reshape(batch.shape)


def _to_owner(plan: Plan, group: Group, stacked: jax.Array) -> jax.Array:
    """Local shards `[count, m', n']` of all matrices to the whole ones that this chip owns, `[slots, m, n]`."""
    if not plan.axes:
        return stacked
    # One buffer: XLA's CPU backend gives parts of a sum or transpose layouts of their own, then refuses to send them.
    shards = jax.lax.optimization_barrier(_of_copy(plan, group, _addressed, stacked))
    for axis in group.split_axes:
        shards = jax.lax.all_to_all(shards, axis, split_axis=0, concat_axis=_side(group, axis), tiled=True)
    return shards


def _from_owner(plan: Plan, group: Group, owned: jax.Array) -> jax.Array:
    """The way back: `[slots, m, n]` to local shards `[count, m', n']`."""
    if not plan.axes:
        return owned
    for axis in reversed(group.split_axes):
        # Blocks by destination, made here: XLA's own way from one axis to another copies twice and pads.
        size, side = plan.sizes[axis], _side(group, axis)
        blocks = owned.reshape(*owned.shape[:side], size, -1, *owned.shape[side + 1 :])
        blocks = jnp.moveaxis(blocks, side, 0)
        blocks = jax.lax.optimization_barrier(blocks.reshape(-1, *blocks.shape[2:]))  # one buffer, as on the way there
        owned = jax.lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True)
    owned = _of_copy(plan, group, _collected, owned)
    if not group.copy_axes:
        return owned
    gathered = jax.lax.all_gather(owned, group.copy_axes)
    return jnp.concatenate([part[:kept] for part, kept in zip(gathered, group.kept)])


def _of_copy(plan: Plan, group: Group, function: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """`function(group, slots of this chip's copy, x)`."""
    branches = [functools.partial(function, group, slots) for slots in group.table]
    return branches[0](x) if len(branches) == 1 else jax.lax.switch(_copy(plan, group), branches, x)


def _addressed(group: Group, table: np.ndarray, stacked: jax.Array) -> jax.Array:
    """`[count, m', n']` to what goes to each slot of each shard, `[shards * slots, m', n']`; zeros to empty ones."""
    columns = []
    for slot in table:
        runs = [
            stacked[slot[start] : slot[start] + length] if slot[start] < group.count
            else jnp.zeros((length, *stacked.shape[1:]), stacked.dtype)
            for start, length in _runs(slot < group.count)
        ]  # fmt: skip
        columns.append(jnp.concatenate(runs))
    return jnp.stack(columns, 1).reshape(-1, *stacked.shape[1:])


def _collected(group: Group, table: np.ndarray, shards: jax.Array) -> jax.Array:
    """The way back: `[shards * slots, m', n']` to a copy's matrices in order, zeros up to the most of any copy."""
    by_slot = shards.reshape(group.shards, group.slots, *shards.shape[1:])
    parts = [
        by_slot[start : start + length, i]
        for i, slot in enumerate(table)
        for start, length in _runs(slot < group.count)
        if slot[start] < group.count
    ]
    missing = max(group.kept) - sum(len(part) for part in parts)
    return jnp.concatenate([*parts, jnp.zeros((missing, *shards.shape[1:]), shards.dtype)])


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of each run of equal flags."""
    starts = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return [(start, end - start) for start, end in itertools.pairwise(starts)]


def _side(group: Group, axis: str) -> int:
    return 1 if axis in group.layout[0] else 2


def _copy(plan: Plan, group: Group) -> jax.Array | int:
    """Which copy of the group this chip belongs to."""
    sizes = [plan.sizes[axis] for axis in group.copy_axes]
    return _place(np.arange(math.prod(sizes)).reshape(sizes), group.copy_axes) if sizes else 0


def _place(table: np.ndarray, axes: tuple[str, ...]) -> jax.Array:
    """Entry of `table [sizes of axes]` for this chip."""
    return jnp.asarray(table)[tuple(jax.lax.axis_index(axis) for axis in axes)]


def _stacked(group: Group, matrices: Mapping[str, jax.Array]) -> jax.Array:
    """All matrices of a group, `[count, m', n']`."""
    parts = []
    for leaf in group.leaves:
        x = jnp.moveaxis(matrices[leaf.path], (leaf.spec.reduction, leaf.spec.output), (-2, -1))
        x = x.reshape(-1, *x.shape[-2:])
        parts.append(jnp.swapaxes(x, 1, 2) if leaf.is_transposed else x)
    return jnp.concatenate(parts)


def _unstacked(leaf: Leaf, part: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[stack, m', n']` to the (local) `shape` of a parameter."""
    part = jnp.swapaxes(part, 1, 2) if leaf.is_transposed else part
    stacked = [size for axis, size in enumerate(shape) if axis not in (leaf.spec.reduction, leaf.spec.output)]
    part = part.reshape(*stacked, *part.shape[1:])
    return jnp.moveaxis(part, (-2, -1), (leaf.spec.reduction, leaf.spec.output))
