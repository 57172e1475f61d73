"""Preflight: the real train step, compiled for a TPU slice that only the compiler knows, and what that says of a run.

Compiled figures are exact: memory, products, kernels, collectives, each counted as often as its loops run. Times are
projections: the compiler's own cycles for everything outside Pallas kernels; kernels at a share `eta` of the chip's
peak, or as fast as HBM where that takes longer; and what the program waits for: on the torus, one axis of it both ways,
between slices, each chip's share of the data-centre network. `eta` 0.42 is calibrated on the one public measurement of
such a step; 0.60 and 1.0 stand beside.
What bounds a step is the slowest of four resources, each used without a pause: products and kernels at the chip's peak,
HBM, torus, data-centre network.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from wallwm_jax.benchmarks.random_batch import with_views
from wallwm_jax.optim.muon_cost import MuonCost
from wallwm_jax.parallel.aot import DCN, Statistics, Traffic, statistics, topology_devices
from wallwm_jax.parallel.chips import GIB, Chip, chip_of
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.parallel.presets import mesh_sizes
from wallwm_jax.training.families import family_of
from wallwm_jax.training.stages import get_stage
from wallwm_jax.training.train_step import build_train_step

ETAS = (0.42, 0.60, 1.0)
FREE_SHARE = 0.10
"""Share of a chip's memory that has to stay free."""


@dataclass(frozen=True)
class Projection:
    """Seconds of a step at one share of the peak in kernels, and the share of the chip's peak that model FLOPs take."""

    eta: float
    seconds: float
    mfu: float


@dataclass(frozen=True)
class Report:
    """What preflight found for one (config, topology), per chip and step.

    Attributes:
      topology, chips, mesh, stage, remat, rows, row: what was compiled; `row` as in `RowShape`.
      parameters, optimizer, temporaries, total, hbm: bytes of memory. `parameters` with average and frozen parts.
      activations: bytes, temporaries less one gradient of all that is trained. What the optimizer takes comes after
        these and uses their room again, so they are at most so much.
      peak: bytes alive at once, without the holes that the allocator leaves: the optimistic twin of `total`. counted:
        the careful one, temporaries added up as `memory_analysis` does, of which some share their room.
      replicated: share of the parameters' bytes that every chip holds whole.
      model_flops: by formula; executed_flops: of products and kernels, as compiled.
      product_seconds, other_seconds, kernel_seconds, exchange_seconds: parts of the projection at eta 0.42.
      compute_seconds, hbm_seconds, ici_seconds, dcn_seconds: of a step that one resource alone would take: FLOPs at the
        chip's peak, `hbm_bytes` read and written, all that is received on the torus, all that comes from other slices.
      collectives: "kind over axes" → the fields of `aot.Traffic`.
      muon: what Muon's part costs, see `optim.muon_cost`; None where nothing is Muon's.
      projections: at each of `ETAS`. compile_seconds: of this report.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    stage: str
    remat: str
    rows: int
    row: dict[str, Any]
    parameters: float
    optimizer: float
    temporaries: float
    activations: float
    total: float
    counted: float
    peak: float
    hbm: float
    replicated: float
    model_flops: float
    executed_flops: float
    product_seconds: float
    other_seconds: float
    kernel_seconds: float
    exchange_seconds: float
    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    hbm_bytes: float
    collectives: dict[str, dict[str, float]]
    muon: MuonCost | None
    projections: tuple[Projection, ...]
    compile_seconds: float

    @property
    def free_share(self) -> float:
        """Of the chip's memory."""
        return 1.0 - self.total / self.hbm

    @property
    def fits(self) -> bool:
        """Whether `FREE_SHARE` of the memory stays free."""
        return self.free_share >= FREE_SHARE

    @property
    def bound_by(self) -> str:
        """The resource that alone would take longest: "compute", "memory" (HBM), "ici" (torus) or "dcn"."""
        resources = {
            "compute": self.compute_seconds,
            "memory": self.hbm_seconds,
            "ici": self.ici_seconds,
            "dcn": self.dcn_seconds,
        }
        return max(resources, key=lambda name: resources[name])

    def to_json(self) -> dict[str, Any]:
        """All figures; `projected_mfu` and `step_seconds` at eta 0.42, `projected_mfu_bound` at 1.0."""
        return asdict(self) | {
            "fits": self.fits,
            "hbm_free_fraction": self.free_share,
            "bound_by": self.bound_by,
            "projected_mfu": self.projections[0].mfu,
            "projected_mfu_bound": self.projections[-1].mfu,
            "step_seconds": self.projections[0].seconds,
        }

    def table(self) -> str:
        """The report for people."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one chip"
        row = ", ".join(f"{size} {name}" for name, size in self.row.items() if isinstance(size, int))
        verdict = "fits" if self.fits else f"DOES NOT FIT: less than {100 * FREE_SHARE:.0f} % free"
        lines = [
            f"{self.topology}, {self.chips} chips, {mesh}; stage {self.stage}, remat {self.remat}",
            f"batch        {self.rows} rows of {row}",
            f"memory       {self.total / GIB:8.2f} of {self.hbm / GIB:.0f} GiB, {100 * self.free_share:.0f} % free: "
            f"{verdict}",
            f"             {self.parameters / GIB:8.2f} parameters and average, {self.optimizer / GIB:.2f} optimizer, "
            f"{self.temporaries / GIB:.2f} temporaries; {100 * self.replicated:.1f} % of parameters on every chip",
            f"             {self.peak / GIB:8.2f} alive at once, {self.counted / GIB:.2f} counted one by one; "
            f"activations take at most {self.activations / GIB:.2f}",
            f"work         {self.executed_flops / 1e12:8.1f} TFLOP executed, {self.model_flops / 1e12:.1f} needed; "
            f"{self.hbm_bytes / 1e9:.1f} GB of HBM read and written",
            *(
                f"{name:<34} {moved['count']:>6.0f} times {moved['received'] / 1e9:9.2f} GB received, "
                f"{moved['exposed'] / 1e9:.2f} waited for"
                + (f", {moved['overlapped']} times beside other work" if moved["overlapped"] else "")
                + (f", {moved['sparse']} by SparseCores" if moved["sparse"] else "")
                for name, moved in self.collectives.items()
            ),
            f"time         products {self.product_seconds:.3f} s, other {self.other_seconds:.3f}, kernels "
            f"{self.kernel_seconds:.3f}, exchanges {self.exchange_seconds:.3f}",
            f"at the least {self.compute_seconds:8.3f} s of compute, {self.hbm_seconds:.3f} of HBM, "
            f"{self.ici_seconds:.3f} of ICI, {self.dcn_seconds:.3f} of DCN: bound by {self.bound_by}",
            *(
                f"             {p.seconds:8.3f} s a step, MFU {100 * p.mfu:.1f} %, kernels at {p.eta:.2f} of the peak"
                for p in self.projections
            ),
            *(self.muon.table().splitlines() if self.muon is not None else ()),
            f"compiled in  {self.compile_seconds:8.0f} s",
        ]
        return "\n".join(lines)


def inspect(config: ConfigDict, topology: str, views: int = 0) -> Report:
    """Compiles the train step of `config` for `topology`.

    Args:
      config: as for training; `config.data.rows` is the global batch.
      topology: see `aot.topology_devices`.
      views: where `config.data.views` leaves them to the store.

    Raises:
      UserError: the topology is unknown, mesh and rows do not fit it, or nobody says how many views there are.
    """
    config = with_views(config, views)
    chip, devices = chip_of(topology), topology_devices(topology)
    mesh = make_mesh(mesh_sizes(config), devices)
    built = build_train_step(config, mesh)
    begun = time.monotonic()
    batch = built.abstract_batch(built.family.rows.spec(config, config.data.rows))
    found = statistics(built.step.lower(built.abstract_state, batch).compile())
    seconds = time.monotonic() - begun
    row = built.family.flops.RowShape.of(config, len(config.data.views))
    model = needed_flops(config, len(devices))
    state = built.abstract_state
    trainable = _local_bytes((state.trainable, state.ema, state.frozen))
    return Report(
        topology=topology,
        chips=len(devices),
        mesh=dict(mesh.shape),
        stage=config.train.stage,
        remat=config.model.remat,
        rows=config.data.rows,
        row=asdict(row),
        parameters=trainable,
        optimizer=_local_bytes(state.opt_state),
        temporaries=found.temporaries,
        activations=max(0.0, found.temporaries - _local_bytes(state.trainable)),
        total=found.memory,
        counted=found.arguments + found.counted + found.outputs,
        peak=found.arguments + found.peak + found.outputs,
        hbm=chip.hbm,
        replicated=_replicated(state.trainable),
        model_flops=model,
        executed_flops=found.flops + found.kernel_flops,
        hbm_bytes=found.hbm,
        collectives={
            f"{kind} over {'slice' if kind.startswith(DCN) else _axes(mesh.shape, size)}": vars(moved)
            | {"arrays": dict(moved.arrays), "overlapped": moved.overlapped.total()}
            for (kind, size), moved in sorted(found.traffic.items())
        },
        muon=built.muon_cost,
        compile_seconds=seconds,
        **project(found, chip, model),
    )


def needed_flops(config: ConfigDict, chips: int) -> float:
    """Model FLOPs of a train step per chip, by formula; `config` names its views."""
    flops = family_of(get_stage(config.train.stage)).flops
    row = flops.RowShape.of(config, len(config.data.views))
    return float(flops.training_flops(config, row, config.train.stage) * config.data.rows / chips)


def project(found: Statistics, chip: Chip, model_flops: float) -> dict[str, Any]:
    """The fields of `Report` that are seconds, of a compiled program that does `model_flops` of needed work."""
    products = found.product_cycles / chip.clock
    other = (found.cycles - found.product_cycles) / chip.clock + found.unpriced / chip.hbm_bandwidth
    exchange = sum(_waited(kind, moved, chip) for (kind, _), moved in found.traffic.items())
    received = {
        dcn: sum(moved.received for (kind, _), moved in found.traffic.items() if kind.startswith(DCN) == dcn)
        for dcn in (False, True)
    }
    projections = []
    for eta in ETAS:
        step = products + other + exchange + found.kernel_seconds(eta * chip.flops, chip.hbm_bandwidth)
        projections.append(Projection(eta, step, model_flops / (step * chip.flops)))
    return {
        "product_seconds": products,
        "other_seconds": other,
        "kernel_seconds": found.kernel_seconds(ETAS[0] * chip.flops, chip.hbm_bandwidth),
        "exchange_seconds": exchange,
        "compute_seconds": (found.flops + found.kernel_flops) / chip.flops,
        "hbm_seconds": found.hbm / chip.hbm_bandwidth,
        "ici_seconds": received[False] / (2 * chip.link),
        "dcn_seconds": received[True] / chip.dcn,
        "projections": tuple(projections),
    }


def _waited(kind: str, moved: Traffic, chip: Chip) -> float:
    """Seconds that the program waits for collectives of one kind: for all that nothing overlaps, and for what takes
    longer than the products that it was put into, or, one by one, than what stands between its start and its end, where
    kernels count at the peak."""
    bandwidth = chip.dcn if kind.startswith(DCN) else 2 * chip.link
    longer = sum(
        max(0.0, received / bandwidth - cycles / chip.clock - flops / chip.flops) * times
        for (received, cycles, flops), times in moved.overlapped.items()
    )
    overlapped = sum(received * times for (received, _, _), times in moved.overlapped.items())
    hidden = (moved.received - moved.exposed - overlapped) / bandwidth
    inside = max(0.0, hidden - moved.beside / chip.clock) if moved.beside else 0.0
    return moved.exposed / bandwidth + inside + longer


def _local_bytes(tree: Any) -> float:
    """Bytes on one chip."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def _replicated(tree: Any) -> float:
    """Share of the bytes of arrays that every chip holds whole."""
    leaves = jax.tree.leaves(tree)
    whole = sum(leaf.size for leaf in leaves if leaf.sharding.shard_shape(leaf.shape) == tuple(leaf.shape))
    return whole / max(1, sum(leaf.size for leaf in leaves))


def _axes(sizes: Any, chips: int) -> str:
    """The axes of a slice's mesh whose groups have so many chips: the fewest neighbours, all choices where several have
    as many."""
    named = [(axis, size) for axis, size in dict(sizes).items() if size > 1 and axis != "slice"]
    for length in range(1, len(named) + 1):
        groups = [named[start : start + length] for start in range(len(named) - length + 1)]
        found = [group for group in groups if math.prod(size for _, size in group) == chips]
        if found:
            return " or ".join(" x ".join(axis for axis, _ in group) for group in found)
    return f"{chips} chips"
