"""The device mesh: five named axes, sizes from `config.mesh`, one of which may be -1 ("whatever is left").

    slice    data parallel over slices, with the data-centre network between them
    data     data parallel inside a slice, parameters replicated
    fsdp     data parallel, parameters and optimizer state sharded
    context  the sequence of one row split over chips
    tensor   heads and hidden units split over chips

Axis types are Auto, passed explicitly because JAX's own default has changed between releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from wallwm_jax.console import UserError

AXES = ("slice", "data", "fsdp", "context", "tensor")
ROW_AXES = ("slice", "data", "fsdp")
"""Mesh axes that split the rows of a batch."""


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES`, with the one -1 replaced, so that their product is `num_devices`.

    Raises:
      UserError: an unknown or missing axis, more than one -1, a size below 1, or a product that is not `num_devices`.
    """
    given = {name: int(size) for name, size in sizes.items()}
    if set(given) != set(AXES):
        raise UserError(f"config.mesh names the axes {sorted(given)}; it must name exactly {', '.join(AXES)}")
    wildcards = [name for name in AXES if given[name] == -1]
    if len(wildcards) > 1:
        raise UserError(f"config.mesh has -1 on {' and '.join(wildcards)}; only one axis can take what is left")
    bad = [name for name in AXES if given[name] < 1 and given[name] != -1]
    if bad:
        raise UserError(f"config.mesh.{bad[0]} is {given[bad[0]]}; sizes are positive, or -1 for what is left")
    fixed = math.prod(given[name] for name in AXES if given[name] != -1)
    text = " x ".join(f"{name} {given[name]}" for name in AXES)
    if num_devices % fixed or (not wildcards and fixed != num_devices):
        raise UserError(f"mesh {text} does not fit {num_devices} devices; set one axis to -1 to take what is left")
    return tuple(num_devices // fixed if given[name] == -1 else given[name] for name in AXES)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of this run), laid out so that inner axes are neighbours.

    Args:
      sizes: `config.mesh`, axis name -> size, one of which may be -1.
      devices: real devices, or those of a compile-only topology.

    Raises:
      UserError: see `mesh_shape`; or `slice` is not the number of slices that the devices form.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] != len(slices):
            raise UserError(f"the devices form {len(slices)} slices, but config.mesh.slice is {shape[0]}")
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (shape[0], 1, 1, 1, 1), devices)
    elif devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh) -> int:
    """Number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)
