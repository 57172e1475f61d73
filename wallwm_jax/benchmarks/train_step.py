"""The train step on the devices at hand: seconds, events and tokens per second, share of the devices' peak, memory.

The step is the one that trains (`training.train_step`). A batch stays on the devices, so that no input is waited for:
random events that fill every row, or the first batch of a store. Every step is waited for before the next one begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.benchmarks import torch_peer
from wallwm_jax.benchmarks.random_batch import random_batch, random_questions, with_views
from wallwm_jax.benchmarks.timing import Result, Seconds, machine, machine_line
from wallwm_jax.console import UserError, phase
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.packing import META_FIELDS
from wallwm_jax.data.pipeline import make_loader, resolve_views
from wallwm_jax.data.vlm_batches import VlmRows
from wallwm_jax.parallel.chips import GIB, peak_flops
from wallwm_jax.parallel.mesh import make_mesh, row_shards
from wallwm_jax.parallel.presets import mesh_sizes
from wallwm_jax.training.families import family_of
from wallwm_jax.training.stages import get_stage
from wallwm_jax.training.train_state import count
from wallwm_jax.training.train_step import build_train_step

WARM_UP = 2


def measure(config: ConfigDict, steps: int = 20, store: str = "", views: int = 0, peer: bool = False) -> Result:
    """Times `steps` train steps after `WARM_UP` others.

    Args:
      config: as for training; `config.data.rows` is the global batch.
      steps: how many are timed.
      store: event store whose first batch is used; "" makes random events that fill every row.
      views: of random events, where `config.data.views` leaves them to the store.
      peer: time diffusers' twin of the video tower beside it, on events that fill every row (`torch_peer`).

    Raises:
      UserError: config, store and devices do not fit together, or nobody says how many views there are.
    """
    if peer and store:
        raise UserError("--peer runs on random events that fill every row; leave --store out")
    config, batch, channel_weight = prepare(config, store, views)
    beside = _peer(config, steps) if peer else None  # before this process holds the devices
    mesh = make_mesh(mesh_sizes(config))
    if config.data.rows % row_shards(mesh):
        raise UserError(f"data.rows={config.data.rows} does not divide among the mesh's {row_shards(mesh)} row shards")
    built = build_train_step(config, mesh, channel_weight)
    shapes = built.abstract_batch({name: (value.shape, value.dtype) for name, value in batch.items()})

    begun = time.perf_counter()
    with phase(f"compile the step of stage {config.train.stage}"):
        program = built.step.lower(built.abstract_state, shapes).compile()
    compile_seconds = time.perf_counter() - begun
    with phase("initialise"):
        state, rows = jax.block_until_ready((built.init(), jax.device_put(batch, built.rows)))
    parameters = count((state.trainable, state.frozen))
    seconds = []
    with phase(f"{WARM_UP} + {steps} steps"):
        for _ in range(WARM_UP + steps):
            begun = time.perf_counter()
            state, metrics = jax.block_until_ready(program(state, rows))
            seconds.append(time.perf_counter() - begun)
    spread = Seconds.of(seconds[WARM_UP:])

    events, tokens = _size(config, batch)
    model_flops = built.family.flops.batch_flops(config, batch)
    achieved, peak = model_flops / mesh.size / spread.median, peak_flops(mesh.devices.flat[0].device_kind)
    memory: Any = program.memory_analysis()
    in_use = mesh.devices.flat[0].memory_stats() or {}
    return {
        "machine": machine(),
        "stage": config.train.stage,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch": store or "random events that fill every row",
        "rows": int(config.data.rows),
        "views": len(config.data.views),
        "latents": int(np.count_nonzero(batch["latent_event"])) if "latent_event" in batch else 0,
        "events": events,
        "tokens": tokens,
        "parameters": parameters,
        "loss": float(metrics["loss"]),
        "warm_up": WARM_UP,
        "step_seconds": spread.to_json(),
        "compile_seconds": compile_seconds,
        "events_per_s": events / spread.median,
        "tokens_per_s": tokens / spread.median,
        "model_flops": model_flops,
        "flops_per_s_per_device": achieved,
        "peak_flops_per_s_per_device": peak,
        "mfu": achieved / peak if peak else None,
        "program_bytes_per_device": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "peak_bytes_in_use": in_use.get("peak_bytes_in_use"),
        "bytes_limit": in_use.get("bytes_limit"),
        "peer": beside,
    }


def table(result: Result) -> str:
    """The figures as lines for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device"
    used, limit = result["peak_bytes_in_use"], result["bytes_limit"]
    in_use = f", {used / GIB:.2f} of {limit / GIB:.0f} GiB in use at most" if used and limit else ""
    share = f"MFU {100 * result['mfu']:.1f} %" if result["mfu"] is not None else "MFU unknown: no peak of this device"
    peer, beside = result["peer"], []
    if peer:
        spread = Seconds(**peer["step_seconds"])
        times = spread.median / result["step_seconds"]["median"]
        beside = [f"peer         {spread}, {times:.2f} times ours: {peer['what']} on {peer['device']}"]
    return "\n".join(
        [
            machine_line(result["machine"]),
            f"step         {Seconds(**result['step_seconds'])}, median and quartiles of "
            f"{result['step_seconds']['count']} after {result['warm_up']} others; compiled in "
            f"{result['compile_seconds']:.1f} s",
            f"model        stage {result['stage']}, {result['parameters']:,} parameters, {mesh}",
            f"batch        {result['batch']}: {result['rows']} rows, {result['views']} views, {result['latents']} "
            f"latents, {result['events']} events, {result['tokens']} tokens",
            f"rate         {result['events_per_s']:,.1f} events/s, {result['tokens_per_s']:,.0f} tokens/s",
            f"work         {result['model_flops'] / 1e12:.4g} TFLOP a step by formula, "
            f"{result['flops_per_s_per_device'] / 1e12:.4g} TFLOP/s per device; {share}",
            f"memory       {result['program_bytes_per_device'] / GIB:.2f} GiB per device as compiled{in_use}",
            *beside,
        ]
    )


def prepare(config: ConfigDict, store: str, views: int) -> tuple[ConfigDict, dict[str, np.ndarray], np.ndarray | None]:
    """The config with its views, the batch, and the weight of each latent channel; arguments as of `measure`."""
    family = family_of(get_stage(config.train.stage))
    if not store:
        config = with_views(config, views)
        make = random_questions if family.rows is VlmRows else random_batch
        return config, make(config, views=len(config.data.views), full=True), None
    opened = open_store(store, config.data.split)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.views = resolve_views(opened, config)
    with make_loader(opened, config, family.rows) as loader:
        batch = {name: value for name, value in next(loader).items() if name not in META_FIELDS}
    return config, batch, opened.channel_weights()


def _peer(config: ConfigDict, steps: int) -> Result:
    with phase(f"diffusers' twin: {WARM_UP} + {steps} steps"):
        found = torch_peer.run(config, steps, WARM_UP)
    return {**found, "step_seconds": Seconds.of(found.pop("seconds")).to_json()}


def _size(config: ConfigDict, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Real events of a batch, and tokens of their latents in the views that they have; of questions, of text."""
    if "ids" in batch:
        return int(np.count_nonzero(batch["window_index"] >= 0)), int(np.sum(batch["length"]))
    views = np.count_nonzero(batch["view_id"], axis=2)  # [B, E]
    slots = np.arange(1, views.shape[1] + 1)
    latents = np.sum(batch["latent_event"][:, :, None] == slots, axis=1)  # [B, E]
    cells = math.prod(side // patch for side, patch in zip(config.model.latent_shape, config.model.patch))
    return int(np.count_nonzero(batch["window_index"] >= 0)), int(np.sum(latents * views)) * cells
