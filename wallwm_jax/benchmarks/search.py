"""Search: preflight for several ways to run one config on one slice, the fastest that fits first.

Tried are the share of the slice that parameters are split over (products of torus sides, but never a whole torus of
three), the remat policy, and the rows per chip. Each is a compilation of minutes, so what must fail is left out: where
a number of rows does not fit, more of them do not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from wallwm_jax.benchmarks.preflight import Report, inspect
from wallwm_jax.console import UserError, progress
from wallwm_jax.parallel.chips import chip_of
from wallwm_jax.parallel.presets import mesh_preset

_LEAST_SHARDS = 4
_SHOWN = 5


@dataclass(frozen=True)
class Candidate:
    """One way to run: chips that share the parameters, remat policy, rows per chip."""

    fsdp: int
    remat: str
    rows: int

    def __str__(self) -> str:
        return f"fsdp {self.fsdp}, remat {self.remat}, {self.rows} row{'s' if self.rows > 1 else ''} per chip"


@dataclass(frozen=True)
class Tried:
    """A candidate with its report; or none, and why."""

    candidate: Candidate
    report: Report | None
    why_not: str = ""


def fsdp_sizes(topology: str) -> list[int]:
    """Products of some sides of a slice's torus, of at least four chips; of three sides never all."""
    sides = [int(side) for side in topology.partition(":")[2].partition("*")[0].split("x")]
    largest = max(1, min(len(sides), chip_of(topology).torus_axes - (chip_of(topology).torus_axes > 2)))
    groups = (group for size in range(1, largest + 1) for group in itertools.combinations(sides, size))
    return sorted({math.prod(group) for group in groups if math.prod(group) >= _LEAST_SHARDS})


def search(
    config: ConfigDict, topology: str, views: int, *, fsdp: Sequence[int], remat: Sequence[str], rows: Sequence[int]
) -> list[Tried]:
    """Compiles every candidate that may fit; the fastest that fits first, by MFU at the calibrated rate, then the rest.

    Args:
      config, topology, views: see `preflight.inspect`; mesh, remat and rows of the config are replaced.
      fsdp: sizes of that axis; none takes `fsdp_sizes`. remat: policies. rows: per chip.

    Raises:
      UserError: a size that does not divide the slice, or the topology is unknown.
    """
    slices, *sides = mesh_preset(topology).values()
    chips = math.prod(sides)
    sizes = list(fsdp) or fsdp_sizes(topology)
    wrong = [size for size in sizes if size < 1 or chips % size]
    if wrong:
        raise UserError(f"--search_fsdp={wrong[0]} does not divide the {chips} devices of a slice of {topology}")
    candidates = [Candidate(*choice) for choice in itertools.product(sizes, remat, sorted(rows))]
    tried: list[Tried] = []
    for candidate in progress(candidates, total=len(candidates), unit="program", label="compile"):
        if any(_less(other.candidate, candidate) and not _fits(other) for other in tried):
            tried.append(Tried(candidate, None, "fewer rows do not fit"))
            continue
        try:
            tried.append(Tried(candidate, inspect(_with(config, candidate, slices, chips), topology, views)))
        except Exception as error:  # the compiler gives up where the memory of a chip is far exceeded
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tried.append(Tried(candidate, None, "the compiler finds no room for it"))
    return sorted(tried, key=lambda one: (not _fits(one), -one.report.projections[0].mfu if one.report else 0.0))


def table(tried: Sequence[Tried]) -> str:
    """The best few, and what does not fit."""
    fitting = [one for one in tried if _fits(one)]
    lines = ["MFU      step       free   " + "what"] if fitting else ["nothing fits"]
    for one in fitting[:_SHOWN]:
        assert one.report is not None
        best = one.report.projections[0]
        free = f"{100 * one.report.free_share:.0f} %"
        lines.append(f"{100 * best.mfu:4.1f} %  {best.seconds:7.3f} s  {free:>6}   {one.candidate}")
    for one in tried:
        if not _fits(one):
            free = f"{100 * one.report.free_share:.0f} % free" if one.report else one.why_not
            lines.append(f"does not fit ({free}): {one.candidate}")
    return "\n".join(lines)


def _with(config: ConfigDict, candidate: Candidate, slices: int, chips: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh_preset = ""
        config.mesh.update(slice=slices, data=chips // candidate.fsdp, fsdp=candidate.fsdp, context=1, tensor=1)
        config.model.remat = candidate.remat
        config.data.rows = candidate.rows * slices * chips
    return config.lock()


def _less(first: Candidate, second: Candidate) -> bool:
    return (first.fsdp, first.remat) == (second.fsdp, second.remat) and first.rows < second.rows


def _fits(one: Tried) -> bool:
    return one.report is not None and one.report.fits
