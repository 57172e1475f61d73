"""The public train step that preflight's figures are held against: MaxDiffusion's of Wan 2.1 14B, on its own shapes.

Compiled and projected as `benchmarks/preflight.py` does, from snapshot 7cfb8801 (its own `train_step`, AdamW, bfloat16
parameters and moments, its own shardings) with jax 0.10.2 and libtpu 0.0.42.1 in November 2026. At 720p the projection
at eta 0.42 is calibrated on its published 36.0 s a step; of its layouts at 480p the faster one is listed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ml_collections import ConfigDict

from wallwm_jax.benchmarks.preflight import ETAS, Report, needed_flops
from wallwm_jax.benchmarks.random_batch import with_views
from wallwm_jax.console import UserError
from wallwm_jax.parallel.chips import CHIPS
from wallwm_jax.parallel.presets import mesh_preset

_SAME_WORK = 0.02


@dataclass(frozen=True)
class Peer:
    """What the peer's step does on one v5p chip, and its projected MFU at each of `preflight.ETAS`."""

    what: str
    executed_flops: float
    model_flops: float
    received: float
    mfu: tuple[float, float, float]

    @property
    def outside_kernels(self) -> float:
        """Seconds: a step takes these plus its kernels' at the peak over eta, so the first and last MFU give both."""
        first, *_, last = (self.model_flops / (mfu * CHIPS["v5p"].flops) for mfu in self.mfu)
        return first - (first - last) / (1 / ETAS[0] - 1 / ETAS[-1]) / ETAS[0]

    @property
    def mfu_at_best(self) -> list[float]:
        """Its MFU if it waited for nothing that it receives: it was compiled without flags, and waits for all of it."""
        chip = CHIPS["v5p"]
        seconds = (self.model_flops / (mfu * chip.flops) - self.received / (2 * chip.link) for mfu in self.mfu)
        return [self.model_flops / (shorter * chip.flops) for shorter in seconds]


PEERS = {
    "720p": Peer(
        "720 x 1280 x 81 on v5p:2x2x1, context 4, offloading remat",
        executed_flops=7137e12,
        model_flops=4893e12,
        received=263e9,
        mfu=(0.296, 0.383, 0.530),
    ),
    "480p": Peer(
        "480 x 832 x 81 on v5p:4x4x4, data 4 x fsdp 16, full remat",
        executed_flops=8055e12,
        model_flops=5035e12,
        received=108e9,
        mfu=(0.297, 0.373, 0.493),
    ),
}


@dataclass(frozen=True)
class Compared:
    """A report beside one of `PEERS`."""

    report: Report
    peer: str

    @property
    def fits(self) -> bool:
        """As the report says."""
        return self.report.fits

    @property
    def ratios(self) -> dict[str, Any]:
        """The report's figures over the peer's: work, time and traffic are better below 1, "mfu" at each eta above."""
        ours, its = self.report, PEERS[self.peer]
        outside = ours.product_seconds + ours.other_seconds + ours.exchange_seconds
        return {
            "executed_flops": ours.executed_flops / its.executed_flops,
            "seconds_outside_kernels": outside / its.outside_kernels,
            "received": sum(moved["received"] for moved in ours.collectives.values()) / its.received,
            "mfu": [mine.mfu / mfu for mine, mfu in zip(ours.projections, its.mfu, strict=True)],
            "mfu_at_best": [mine.mfu / mfu for mine, mfu in zip(ours.projections, its.mfu_at_best, strict=True)],
        }

    def to_json(self) -> dict[str, Any]:
        """The report's figures; as "peer" the ratios and, as "its", the peer's own."""
        return self.report.to_json() | {"peer": {"name": self.peer, **self.ratios, "its": asdict(PEERS[self.peer])}}

    def table(self) -> str:
        """Both for people."""
        ratios = self.ratios
        return (
            f"{self.report.table()}\n"
            f"peer         MaxDiffusion, {PEERS[self.peer].what}\n"
            f"             {ratios['executed_flops']:.2f} times its executed work, {ratios['received']:.2f} its bytes "
            f"received, {ratios['seconds_outside_kernels']:.2f} its time outside kernels\n"
            f"             {', '.join(f'{mfu:.2f}' for mfu in ratios['mfu'])} times its MFU, kernels at "
            f"{', '.join(f'{eta:.2f}' for eta in ETAS)} of the peak\n"
            f"             {', '.join(f'{mfu:.2f}' for mfu in ratios['mfu_at_best'])} times, if it waited for nothing "
            "that it receives"
        )


def check_same_work(config: ConfigDict, topology: str, views: int, peer: str) -> None:
    """Refuses what is no comparison, before anything is compiled.

    Args:
      config, topology, views: see `preflight.inspect`.
      peer: one of `PEERS`.

    Raises:
      UserError: an unknown or another generation of chips, or other work per chip and step than the peer's model needs.
    """
    chips = math.prod(mesh_preset(topology).values())
    needed, wanted = needed_flops(with_views(config, views), chips), PEERS[peer].model_flops
    if not topology.startswith("v5p:") or abs(needed / wanted - 1) > _SAME_WORK:
        raise UserError(
            f"--peer={peer} was compiled for v5p and needs {wanted / 1e12:.0f} TFLOP per chip and step; this config "
            f"needs {needed / 1e12:.0f} on {topology}: give it the same shapes, see docs/preflight.md"
        )
