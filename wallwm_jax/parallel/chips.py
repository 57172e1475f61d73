"""What a chip can do: the one table that preflight's projections and a run's MFU stand on.

Figures of the vendor's public system descriptions; `link` is one link of the torus in one direction, `clock` the one
at which the compiler's cycle estimates give the vendor's peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from wallwm_jax.console import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device: bfloat16 FLOP/s, bytes of HBM and bytes/s to it, bytes/s per link and direction, torus axes, Hz,
    bytes/s to other slices."""

    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    torus_axes: int
    clock: float
    dcn: float


CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 0.82e12, 4.5e10, 2, 1.50e9, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2.77e12, 9.0e10, 3, 1.75e9, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 9.0e10, 2, 1.75e9, 1.25e10),
    # one of a chip's two cores: each is a device
    "tpu7x": Chip(1153.5e12, 96 * GIB, 3.69e12, 9.0e10, 3, 1.75e9, 6.25e9),
}


_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}
"""Dense bfloat16 FLOP/s of one JAX device, by `jax.Device.device_kind`; a slice of a GPU has another name."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, such as "TPU v5 lite" or "NVIDIA H200"; None where the kind is unknown."""
    return _PEAKS.get(device_kind)


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x8".

    Raises:
      UserError: an unknown generation.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(f"topology {topology!r}: the generation is one of {', '.join(CHIPS)}, as in v5p:4x4x8")
    return CHIPS[name]
