"""Mesh presets: how a slice of chips is cut, by its topology, for towers that do not fit one chip.

A v5p or tpu7x slice is a torus of three axes. Parameters are sharded over two of them and replicated over the third:
sharded over a whole three-axis torus, every all-gather and reduce-scatter of a weight becomes an all-reduce of twice
the bytes. On v5e and v6e, whose torus has two axes, they are sharded over one. Hosts of eight H100 shard inside a host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.parallel.chips import CHIPS

GPU_HOST = "h100"


def mesh_sizes(config: ConfigDict) -> Mapping[str, int]:
    """Sizes of the mesh axes of a run: of `config.mesh_preset` where it names a slice, else `config.mesh`."""
    return mesh_preset(config.mesh_preset) if config.mesh_preset else config.mesh


def mesh_preset(name: str) -> dict[str, int]:
    """Sizes of the five mesh axes.

    Args:
      name: "v5p:4x4x8", one slice; "v5e:16x16*4", four of them over the data-centre network; "h100:8*16", 16 hosts.

    Raises:
      UserError: an unknown generation, or a name of another form.
    """
    generation, _, rest = name.partition(":")
    extents, _, number = rest.partition("*")
    sides = [int(side) for side in extents.split("x") if side.isdigit()]
    torus = 1 if generation == GPU_HOST else CHIPS[generation].torus_axes if generation in CHIPS else 0
    copies = int(number) if number.isdigit() else 0 if "*" in rest else 1
    if not torus or len(sides) != torus or min(sides) < 1 or copies < 1:
        raise UserError(
            f"mesh preset {name!r}: write generation and extents, v5p:4x4x8 or v5e:16x16, several slices as "
            f"v5e:16x16*4, hosts of eight GPUs as {GPU_HOST}:8*16; generations are {', '.join(CHIPS)}, {GPU_HOST}"
        )
    devices = math.prod(sides) * (2 if generation == "tpu7x" else 1)  # its chips have two cores, each a device
    if generation == GPU_HOST:
        return {"slice": 1, "data": copies, "fsdp": devices, "context": 1, "tensor": 1}
    data = min(sides) if devices > 8 else 1  # a host's chips are one group
    return {"slice": copies, "data": data, "fsdp": devices // data, "context": 1, "tensor": 1}
