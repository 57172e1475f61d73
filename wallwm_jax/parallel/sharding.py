"""Where arrays live on the mesh: logical axis names -> mesh axes, for parameters, batches and activations.

`models/param_axes.py` names the axes of every parameter; `RULES` says which mesh axis splits each name. Weights are
split over `fsdp` and `context` on their input side and over `tensor` on their output side (heads, hidden units); those
that lead from the wide video to the narrow actions over all three on their output side. Of a sequence, `context` splits
the frames or, where it does not divide them, the cells of a frame. A dimension that its mesh axis does not divide stays
whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from wallwm_jax.console import UserError
from wallwm_jax.parallel.mesh import ROW_AXES

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    "batch": ROW_AXES,
    "frames": "context",
    "cells": "context",
    "tokens": "context",
    "embed": ("fsdp", "context"),
    "embed_out": "tensor",
    "heads": "tensor",
    "split_heads": ("fsdp", "context", "tensor"),
    "mlp": "tensor",
    **dict.fromkeys(
        (
            "layers",
            "video",
            "modulation",
            "patch",
            "view",
            "angle",
            "text",
            "frequency",
            "action",
            "frame",
            "ngram",
            "vocabulary",
            "features",
            "quantile",
            "tap",
            "head_dim",
        )
    ),
}


def spec_for(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Mapping[str, MeshAxes] = RULES
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry the logical `names` (None: whole).

    A dimension is left whole where its mesh axes do not divide it, or already split an earlier dimension of the array.

    Raises:
      ValueError: more or fewer names than dimensions, or a name without a rule.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of shape {tuple(shape)}")
    used: set[str] = set()
    entries: list[MeshAxes] = []
    for name, size in zip(names, shape):
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r} has no sharding rule; the rules name {', '.join(rules)}")
        target = rules[name] if name is not None else None
        wanted = (target,) if isinstance(target, str) else (target or ())
        axes = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
        if not axes or size % math.prod(mesh.shape[axis] for axis in axes) or used & set(axes):
            entries.append(None)
        else:
            entries.append(axes if len(axes) > 1 else axes[0])
            used |= set(axes)
    return PartitionSpec(*entries)


def named(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec_for` on its mesh."""
    return NamedSharding(mesh, spec_for(names, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension (rows of a batch) split over slice, data and fsdp; fits every array of a packed batch."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def host_rows(mesh: Mesh, rows: int, process: int | None = None) -> tuple[int, int]:
    """(index, count): a process holds part `index` of the `count` equal, contiguous parts of a batch of `rows` rows.

    Processes whose devices hold the same rows (a mesh whose context or tensor axis crosses hosts) get the same index.

    Args:
      mesh: of the run.
      rows: B, of all processes together.
      process: its index; None is this one.

    Raises:
      UserError: the rows of the process are not one such part.
    """
    process = jax.process_index() if process is None else process
    places: Any = rows_sharding(mesh).devices_indices_map((rows,)).items()
    ranges = sorted({place[0].indices(rows)[:2] for device, place in places if device.process_index == process})
    start, stop = ranges[0][0], ranges[-1][1]
    share = sum(end - begin for begin, end in ranges)
    if share != stop - start or rows % share or start % share:
        raise UserError(
            f"process {process} would hold the rows {ranges} of {rows}, which is not one contiguous part; "
            "reorder the axes of config.mesh so that row axes are the outer ones on each host"
        )
    return start // share, rows // share


def context_size() -> int:
    """Devices that share the sequence of one row, in the mesh that this trace is for; 1 outside any."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape["context"])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the layout of an activation inside jit by logical names; does nothing when no mesh is set.

    Args:
      x: the activation.
      names: one logical axis name, or None, per dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(names, x.shape, mesh))
