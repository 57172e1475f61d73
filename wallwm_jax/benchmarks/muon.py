"""Muon's update of a video tower, compiled for a TPU slice: work, traffic and memory per chip, ours and optax's."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as optax_scale_by_muon

from wallwm_jax.benchmarks.timing import host, machine_line
from wallwm_jax.console import UserError, phase
from wallwm_jax.models import param_axes, world_action_model
from wallwm_jax.optim.muon import MatrixSpec, MuonSharding, scale_by_muon
from wallwm_jax.optim.muon_cost import muon_cost_report
from wallwm_jax.optim.ownership import flatten, matrix_paths
from wallwm_jax.parallel import sharding
from wallwm_jax.parallel.aot import statistics, topology_devices
from wallwm_jax.parallel.chips import chip_of
from wallwm_jax.parallel.mesh import AXES, make_mesh
from wallwm_jax.parallel.presets import mesh_sizes
from wallwm_jax.training.stages import get_stage

STEP_SECONDS = 3.5
"""Length of a train step that the optimizer's share is stated for."""


@dataclass(frozen=True)
class Row:
    """One line of the table: whose optimizer, on which mesh, with or without the view attention's matrices."""

    mesh: dict[str, int]
    optax: bool = False
    views: bool = False


ROWS = {
    "ours_fsdp": Row(dict(fsdp=-1)),
    "ours_fsdp_views": Row(dict(fsdp=-1), views=True),
    "ours_data_fsdp": Row(dict(data=4, fsdp=-1)),
    "ours_fsdp_tp": Row(dict(fsdp=-1, tensor=4)),
    "optax_fsdp": Row(dict(fsdp=-1), optax=True),
}


def measure(model: str, topology: str, rows: Sequence[str] = ()) -> dict[str, Any]:
    """Row → figures per chip, of the compiled update and of the static plan ("plan").

    Raises:
      UserError: no such config or row, or a topology that the compiler does not know.
    """
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise UserError(f"--rows={unknown[0]}: one of {', '.join(ROWS)}")
    try:
        config = importlib.import_module(f"configs.{model}").get_config()
    except ModuleNotFoundError:
        raise UserError(
            f"--model={model}: there is no configs/{model}.py here; run from the repository's root"
        ) from None
    devices = topology_devices(topology)
    result = {"model": model, "topology": topology, "chips": len(devices), "machine": _machine()}
    for name in rows or ROWS:
        with phase(f"{name}: {_shape(ROWS[name].mesh)}"):
            result[name] = _measure(config, ROWS[name], devices, topology)
    return result


def measure_config(config: ConfigDict, topology: str) -> dict[str, Any]:
    """The same for one row, "muon": all matrices that the stage of `config` trains, on its own mesh.

    Raises:
      UserError: as `measure`; or the config trains with another optimizer.
    """
    if config.optim.name != "muon":
        raise UserError(f"config.optim.name={config.optim.name!r}: there is no Muon in this config")
    devices = topology_devices(topology)
    mesh = make_mesh(mesh_sizes(config), devices)
    shapes, _ = get_stage(config.train.stage).split(world_action_model.abstract_params(config.model))
    matrices = matrix_paths(param_axes.muon_matrices(shapes), shapes)
    leaves = {path: leaf for path, leaf in flatten(shapes) if path in matrices}
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    row = {**_compile(leaves, matrices, mesh, topology), "mesh": sizes}
    return {
        "model": f"stage {config.train.stage}",
        "topology": topology,
        "chips": len(devices),
        "machine": _machine(),
        "muon": row,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    lines = [
        f"{result['model']} on {result['topology']}, {result['chips']} chips; per chip and update:",
        machine_line(result["machine"]),
        f"{'':<18}{'TFLOP':>8}{'ideal':>8}{'GB recv':>9}{'GB temp':>9}{'peak':>8}{'plan':>8}{'share':>8}  collectives",
    ]
    for name, row in result.items():
        if isinstance(row, dict) and name != "machine":
            lines.append(
                f"{name:<18}{row['flops_per_chip'] / 1e12:>8.2f}{row['ideal_flops_per_chip'] / 1e12:>8.2f}"
                f"{row['bytes_received_per_chip'] / 1e9:>9.3f}{row['temp_bytes_per_chip'] / 1e9:>9.2f}"
                f"{row['peak_bytes_per_chip'] / 1e9:>8.3f}{_planned(row):>8}"
                f"{100 * row['share_of_step']:>7.2f}%  {row['collectives']}"
            )
    lines.append("peak: GB of these alive at once, the rest is holes between them; plan: the peak by the static plan")
    lines.append(f"share: compiler's cycles plus what is received over one link, of a step of {STEP_SECONDS} s")
    return "\n".join(lines)


def matrices_of(config: ConfigDict, *, views: bool) -> tuple[Any, Any]:
    """Shapes and specs of the video tower's Muon matrices, path by path."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.view_attention = views
    shapes = {"video": world_action_model.abstract_params(config.model)["video"]}
    found = matrix_paths(param_axes.muon_matrices(shapes), shapes)
    return {path: leaf for path, leaf in flatten(shapes) if path in found}, found


def _measure(config: ConfigDict, row: Row, devices: Sequence[jax.Device], topology: str) -> dict[str, Any]:
    shapes, specs = matrices_of(config, views=row.views)
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **row.mesh}, devices)
    return {**_compile(shapes, specs, mesh, topology, optax_rule=row.optax), "mesh": _shape(row.mesh)}


def _compile(
    shapes: dict[str, Any], specs: dict[str, MatrixSpec], mesh: Mesh, topology: str, *, optax_rule: bool = False
) -> dict[str, Any]:
    """Figures of one update of these matrices, compiled."""
    layouts = {
        path: sharding.spec_for(param_axes.rule_for(path).axes, leaf.shape, mesh) for path, leaf in shapes.items()
    }
    cost = muon_cost_report(specs, shapes, MuonSharding(mesh, layouts))
    rule = _optax(specs) if optax_rule else scale_by_muon(specs, sharding=MuonSharding(mesh, layouts))
    placed = {path: NamedSharding(mesh, layout) for path, layout in layouts.items()}
    grads = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=placed[path]) for path, leaf in shapes.items()
    }
    state = optax.tree_utils.tree_map_params(
        rule,
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(rule.init, grads),
        placed,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
    )
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    begun = time.monotonic()
    update = jax.jit(rule.update, out_shardings=(placed, where), donate_argnums=(0, 1))
    found = statistics(update.lower(grads, state).compile())
    received = float(sum(found.received.values()))
    chip = chip_of(topology)
    compute, exchange = found.cycles / chip.clock, received / chip.link
    return {
        "flops_per_chip": found.flops,
        "ideal_flops_per_chip": cost.ideal_flops_per_chip,
        "bytes_received_per_chip": received,
        "temp_bytes_per_chip": found.temporaries,
        "peak_bytes_per_chip": found.peak,
        "collectives": dict(found.collectives),
        "compute_seconds": compute,
        "exchange_seconds": exchange,
        "share_of_step": (compute + exchange) / STEP_SECONDS,
        "compile_seconds": time.monotonic() - begun,
        "matrices": cost.matrices,
        **({} if optax_rule else {"plan": cost.to_json()}),
    }


def _optax(specs: dict[str, MatrixSpec]) -> optax.GradientTransformation:
    numbers = {path: MuonDimensionNumbers(spec.reduction, spec.output) for path, spec in specs.items()}
    return optax_scale_by_muon(weight_dimension_numbers=numbers)


def _machine() -> dict[str, Any]:
    """Where it was compiled, and by which compiler."""
    return {**host(), "libtpu": importlib.metadata.version("libtpu")}


def _planned(row: dict[str, Any]) -> str:
    return f"{row['plan']['peak_bytes_per_chip'] / 1e9:.3f}" if "plan" in row else ""


def _shape(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size if size > 0 else 'rest'}" for axis, size in mesh.items())
