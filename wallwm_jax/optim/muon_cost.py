"""What a distributed Muon step costs a chip, from its static plan; the compiled program says the same (tests)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from wallwm_jax.optim.muon import MuonSharding, plan_of
from wallwm_jax.optim.ownership import Group, Plan


@dataclass(frozen=True)
class MuonCost:
    """Cost of one step for the busiest chip.

    Attributes:
      matrices: number that are orthogonalised; parameters: their elements.
      owners: chips that share them out.
      profiles: "2 of 5120x5120" and the like → chips that own so much.
      flops_per_chip: of the busiest chip's products; ideal_flops_per_chip: if all had the same.
      bytes_received_per_chip: by all exchanges.
      exchange_bytes_per_chip: what the owned matrices take, and so a third to a fifth of the step's temporaries.
      collectives: kind → number.
    """

    matrices: int
    parameters: int
    owners: int
    profiles: dict[str, int]
    flops_per_chip: float
    ideal_flops_per_chip: float
    bytes_received_per_chip: float
    exchange_bytes_per_chip: float
    collectives: dict[str, int]

    @property
    def balance(self) -> float:
        """Ideal work over that of the busiest chip, at most 1."""
        return self.ideal_flops_per_chip / self.flops_per_chip if self.flops_per_chip else 1.0

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def table(self) -> str:
        """Some lines for people."""
        balanced = f"{100 * self.balance:.0f} % of them balanced"
        lines = [
            f"Muon         {self.matrices} matrices, {self.parameters / 1e9:.2f} B parameters, {self.owners} owners",
            f"products     {self.flops_per_chip / 1e12:.3f} TFLOP per chip, {balanced}",
            f"received     {self.bytes_received_per_chip / 1e9:.3f} GB per chip in "
            + (", ".join(f"{count} {kind}" for kind, count in self.collectives.items()) or "no collective"),
        ]
        lines += [f"{chips:>5} chips own {what or 'nothing'}" for what, chips in self.profiles.items()]
        return "\n".join(lines)


def muon_cost_report(
    specs: Any, params: Any, sharding: MuonSharding | None = None, *, dtype: DTypeLike = jnp.bfloat16, steps: int = 5
) -> MuonCost:
    """The cost of `scale_by_muon(specs, sharding=sharding)` on these parameters (arrays or shapes).

    Args:
      specs, sharding: as for `scale_by_muon`.
      dtype: in which matrices travel.
      steps: of the iteration.
    """
    plan = plan_of(specs, params, sharding)
    loads = [plan.flops(profile, steps) for profile in plan.profiles]
    total = sum(group.count * group.shape.flops(steps) for group in plan.groups)
    exchanges = [_exchange(plan, group, jnp.dtype(dtype).itemsize) for group in plan.groups]
    collectives = Counter({"all-to-all": 0, "all-gather": 0})
    profiles: Counter[str] = Counter()
    for i in range(len(plan.profiles)):
        profiles[_describe(plan, i)] += int((plan.profile == i).sum())
    for group in plan.groups if plan.axes else ():
        collectives["all-to-all"] += 2 * len(group.split_axes)
        collectives["all-gather"] += bool(group.copy_axes)
    return MuonCost(
        matrices=sum(group.count * len(group.shape.parts) for group in plan.groups),
        parameters=sum(group.count * group.shape.m * group.shape.n for group in plan.groups),
        owners=plan.owners,
        profiles=dict(profiles),
        flops_per_chip=max(loads, default=0.0),
        ideal_flops_per_chip=total / plan.owners,
        bytes_received_per_chip=sum(exchanges),
        exchange_bytes_per_chip=sum(
            group.slots * group.shape.m * group.shape.n * jnp.dtype(dtype).itemsize for group in plan.groups
        ),
        collectives={kind: count for kind, count in collectives.items() if count},
    )


def _exchange(plan: Plan, group: Group, itemsize: int) -> float:
    """Bytes that a chip receives for one group, there and back."""
    if not plan.axes:
        return 0.0
    whole = group.shape.m * group.shape.n * itemsize
    there = sum(group.slots * whole * (1 - 1 / plan.sizes[axis]) for axis in group.split_axes)
    copies = math.prod(plan.sizes[axis] for axis in group.copy_axes)
    return 2 * there + (copies - 1) * max(group.kept) * whole / group.shards


def _describe(plan: Plan, profile: int) -> str:
    owned: Counter[str] = Counter()
    for count, group in zip(plan.profiles[profile], plan.groups):
        owned[f"{group.shape.m}x{group.shape.n}"] += count
    return ", ".join(f"{count} of {shape}" for shape, count in owned.items() if count)
