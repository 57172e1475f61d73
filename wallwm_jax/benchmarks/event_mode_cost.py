"""Event mode's programs, compiled for TPU chips that only the compiler knows: memory, work and projected latency.

One request at a time, its weights split over the context and tensor axes of the config's mesh; the other axes are for
training. Times are projected as preflight does.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from wallwm_jax.benchmarks.preflight import ETAS, FREE_SHARE, project
from wallwm_jax.benchmarks.random_batch import with_views
from wallwm_jax.inference.event_mode import build_programs, program_inputs
from wallwm_jax.models import param_axes
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.parallel import sharding
from wallwm_jax.parallel.aot import statistics, topology_devices
from wallwm_jax.parallel.chips import GIB, chip_of
from wallwm_jax.parallel.mesh import AXES, make_mesh


@dataclass(frozen=True)
class BucketCost:
    """One bucket's denoising program, per chip and request.

    Attributes:
      latents, actions: what the bucket holds.
      parameters, temporaries, total: bytes of memory.
      executed_flops: of products and kernels. received: bytes, by all collectives.
      seconds: projected, at each of `preflight.ETAS`. compile_seconds: of this program.
    """

    latents: int
    actions: int
    parameters: float
    temporaries: float
    total: float
    executed_flops: float
    received: float
    seconds: tuple[float, ...]
    compile_seconds: float


@dataclass(frozen=True)
class EventModeCost:
    """All buckets of a config on `chips` chips of a slice."""

    topology: str
    chips: int
    hbm: float
    sampler: str
    buckets: tuple[BucketCost, ...]

    @property
    def fits(self) -> bool:
        """Whether `preflight.FREE_SHARE` of the memory stays free in every bucket."""
        return all(1.0 - bucket.total / self.hbm >= FREE_SHARE for bucket in self.buckets)

    def to_json(self) -> dict[str, Any]:
        """All figures; "seconds" in the order of "etas"."""
        return {**asdict(self), "fits": self.fits, "etas": ETAS}

    def table(self) -> str:
        """The figures for people."""
        lines = [
            f"{self.topology}, {self.chips} of its chips; one event at a time, {self.sampler}",
            f"{'latents':>7}{'actions':>9}{'GiB':>8}{'TFLOP':>9}{'GB recv':>9}{'s':>9}{'ms per action':>15}",
        ]
        lines += [
            f"{one.latents:>7}{one.actions:>9}{one.total / GIB:>8.2f}{one.executed_flops / 1e12:>9.2f}"
            f"{one.received / 1e9:>9.2f}{one.seconds[0]:>9.3f}{1e3 * one.seconds[0] / one.actions:>15.1f}"
            for one in self.buckets
        ]
        verdict = "fits" if self.fits else f"DOES NOT FIT: less than {100 * FREE_SHARE:.0f} % free"
        return "\n".join([*lines, f"of {self.hbm / GIB:.0f} GiB: {verdict}; kernels at {ETAS[0]} of the peak"])


def inspect(config: ConfigDict, topology: str, views: int = 0) -> EventModeCost:
    """Compiles the denoising program of every bucket of `config.sampling`.

    Args:
      config: its mesh says over how many chips a request is split: context x tensor.
      topology: see `aot.topology_devices`; the first chips of it are taken.
      views: where `config.data.views` leaves them to the store.

    Raises:
      UserError: as `preflight.inspect` and `event_mode.build_programs`.
    """
    config = with_views(config, views)
    sizes = {**dict.fromkeys(AXES, 1), "context": config.mesh.context, "tensor": config.mesh.tensor}
    chip, devices = chip_of(topology), topology_devices(topology)[: math.prod(sizes.values())]
    mesh, sampling = make_mesh(sizes, devices), config.sampling
    whole = sharding.replicated(mesh)
    params = param_axes.map_params(
        lambda path, rule, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.named(rule.axes, leaf.shape, mesh)
        ),
        wam.abstract_params(config.model),
    )
    spec = program_inputs(config, 1, len(config.data.views))
    inputs = {name: jax.ShapeDtypeStruct(*shape, sharding=whole) for name, shape in spec.items()}
    programs, buckets = build_programs(config), []
    for bucket in sorted(sampling.buckets):
        begun = time.monotonic()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = statistics(programs.sample.lower(params, inputs, bucket=bucket).compile())
        buckets.append(
            BucketCost(
                latents=bucket,
                actions=config.model.actions_per_latent * (bucket - 1),
                parameters=found.arguments,
                temporaries=found.temporaries,
                total=found.memory,
                executed_flops=found.flops + found.kernel_flops,
                received=float(sum(found.received.values())),
                seconds=tuple(one.seconds for one in project(found, chip, 0.0)["projections"]),
                compile_seconds=time.monotonic() - begun,
            )
        )
    return EventModeCost(topology, len(devices), chip.hbm, str(sampling.sampler), tuple(buckets))
