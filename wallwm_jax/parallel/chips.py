"""What a TPU chip can do, by generation: the table that preflight's projections stand on.

Figures of the vendor's public system descriptions; `link` is one link of the torus in one direction, `cycles` the clock
at which the compiler's cycle estimates give the vendor's peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from wallwm_jax.console import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip: bfloat16 FLOP/s, bytes of HBM and bytes/s to it, bytes/s per link and direction, torus axes, Hz."""

    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    torus_axes: int
    clock: float


CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 0.82e12, 4.5e10, 2, 1.50e9),
    "v5p": Chip(459e12, 95 * GIB, 2.77e12, 9.0e10, 3, 1.75e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 9.0e10, 2, 1.75e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.38e12, 9.0e10, 3, 1.75e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x8".

    Raises:
      UserError: an unknown generation.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(f"topology {topology!r}: the generation is one of {', '.join(CHIPS)}, as in v5p:4x4x8")
    return CHIPS[name]


_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device as `jax.Device.device_kind` names it; None where the table has no such device."""
    return CHIPS[_KINDS[device_kind]].flops if device_kind in _KINDS else None
