"""The denoising programs of both decoding modes, compiled for TPU chips that only the compiler knows: memory, work and
projected latency.

One request at a time, its weights split over the context and tensor axes of the config's mesh; the other axes are for
training. Times are projected as preflight does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from wallwm_jax.benchmarks.preflight import ETAS, FREE_SHARE, project
from wallwm_jax.benchmarks.random_batch import with_views
from wallwm_jax.console import UserError
from wallwm_jax.inference import event_mode, unified_mode
from wallwm_jax.models import param_axes
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.parallel import sharding
from wallwm_jax.parallel.aot import Statistics, statistics, topology_devices
from wallwm_jax.parallel.chips import GIB, chip_of
from wallwm_jax.parallel.mesh import AXES, make_mesh


@dataclass(frozen=True)
class ProgramCost:
    """One denoising program, per chip and request: a bucket of event mode, or the chunk of unified mode.

    Attributes:
      latents: that it sees, given ones and futures. actions: future ones.
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
class DecodingCost:
    """All programs of a decoding mode of a config on `chips` chips of a slice."""

    mode: str
    topology: str
    chips: int
    hbm: float
    sampler: str
    programs: tuple[ProgramCost, ...]

    @property
    def fits(self) -> bool:
        """Whether `preflight.FREE_SHARE` of the memory stays free in every program."""
        return all(1.0 - program.total / self.hbm >= FREE_SHARE for program in self.programs)

    def to_json(self) -> dict[str, Any]:
        """All figures; "seconds" in the order of "etas"."""
        return {**asdict(self), "fits": self.fits, "etas": ETAS}

    def table(self) -> str:
        """The figures for people."""
        lines = [
            f"{self.topology}, {self.chips} of its chips; {self.mode}, one request at a time, {self.sampler}",
            f"{'latents':>7}{'actions':>9}{'GiB':>8}{'TFLOP':>9}{'GB recv':>9}{'s':>9}{'ms per action':>15}",
        ]
        lines += [
            f"{one.latents:>7}{one.actions:>9}{one.total / GIB:>8.2f}{one.executed_flops / 1e12:>9.2f}"
            f"{one.received / 1e9:>9.2f}{one.seconds[0]:>9.3f}{1e3 * one.seconds[0] / one.actions:>15.1f}"
            for one in self.programs
        ]
        verdict = "fits" if self.fits else f"DOES NOT FIT: less than {100 * FREE_SHARE:.0f} % free"
        return "\n".join([*lines, f"of {self.hbm / GIB:.0f} GiB: {verdict}; kernels at {ETAS[0]} of the peak"])


def inspect_event_mode(config: ConfigDict, topology: str, views: int = 0) -> DecodingCost:
    """Compiles the denoising program of every bucket of `config.sampling`.

    Args:
      config: its mesh says over how many chips a request is split: context x tensor.
      topology: see `aot.topology_devices`; the first chips of it are taken.
      views: where `config.data.views` leaves them to the store.

    Raises:
      UserError: as `preflight.inspect` and `event_mode.build_programs`.
    """
    config = with_views(config, views)
    chips = _Chips(config, topology)
    spec = event_mode.program_inputs(config, 1, len(config.data.views))
    inputs = chips.place({name: jax.ShapeDtypeStruct(*one) for name, one in spec.items()})
    programs = event_mode.build_programs(config)
    costs = []
    for bucket in sorted(config.sampling.buckets):
        found, seconds = chips.compile(programs.sample, inputs, bucket=bucket)
        costs.append(chips.cost(found, seconds, bucket, config.model.actions_per_latent * (bucket - 1)))
    return chips.report("event mode", costs)


def inspect_unified_mode(
    config: ConfigDict, topology: str, views: int = 0, *, history: int = 1, fixed_steps: int = 32
) -> DecodingCost:
    """Compiles the denoising program of chunks.

    Args:
      config, topology, views: as of `inspect_event_mode`.
      history: latents before the observation. fixed_steps: of a chunk; both as a store is built with.

    Raises:
      UserError: as `preflight.inspect`; or the model has no room for such a window.
    """
    config = with_views(config, views)
    chips, model = _Chips(config, topology), config.model
    futures = -(-fixed_steps // model.actions_per_latent)
    if history + futures > model.max_latents:
        raise UserError(
            f"{history} latents of history and {fixed_steps} steps ({futures} latents) exceed config.model.max_latents="
            f"{model.max_latents}; give a smaller --history or --fixed_steps"
        )
    inputs = unified_mode.program_inputs(config, 1, len(config.data.views), history)
    sample = unified_mode.build_sampler(config, futures)
    found, seconds = chips.compile(sample, *map(chips.place, inputs))
    return chips.report("unified mode", [chips.cost(found, seconds, history + 1 + futures, fixed_steps)])


class _Chips:
    """The chips that share a request, and the parameters on them."""

    def __init__(self, config: ConfigDict, topology: str):
        sizes = {**dict.fromkeys(AXES, 1), "context": config.mesh.context, "tensor": config.mesh.tensor}
        devices = topology_devices(topology)[: math.prod(sizes.values())]
        self.topology, self.number, self.chip = topology, len(devices), chip_of(topology)
        self.mesh, self.sampler = make_mesh(sizes, devices), str(config.sampling.sampler)
        self.params = param_axes.map_params(
            lambda path, rule, leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding.named(rule.axes, leaf.shape, self.mesh)
            ),
            wam.abstract_params(config.model),
        )

    def place(self, spec: Any) -> Any:
        """A tree of shapes as arrays that every chip holds whole."""
        whole = sharding.replicated(self.mesh)
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole), spec)

    def compile(self, program: Any, *inputs: Mapping[str, Any], **static: Any) -> tuple[Statistics, float]:
        """What a jitted program does with parameters and inputs, and seconds of compiling it."""
        begun = time.monotonic()
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            found = statistics(program.lower(self.params, *inputs, **static).compile())
        return found, time.monotonic() - begun

    def cost(self, found: Statistics, compile_seconds: float, latents: int, actions: int) -> ProgramCost:
        return ProgramCost(
            latents=latents,
            actions=actions,
            parameters=found.arguments,
            temporaries=found.temporaries,
            total=found.memory,
            executed_flops=found.flops + found.kernel_flops,
            received=float(sum(found.received.values())),
            seconds=tuple(one.seconds for one in project(found, self.chip, 0.0)["projections"]),
            compile_seconds=compile_seconds,
        )

    def report(self, mode: str, programs: list[ProgramCost]) -> DecodingCost:
        return DecodingCost(mode, self.topology, self.number, self.chip.hbm, self.sampler, tuple(programs))
