"""Event mode's latency, one request at a time: the first call of each bucket, which compiles, and those that follow.

With a run or a store a request goes the whole way that a robot's does: pictures are encoded, the event is denoised and
its actions are un-normalised. A config alone has no codec and no statistics: its denoising program is timed alone.
Without a run the parameters are random, which costs the same time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.benchmarks.random_batch import with_views
from wallwm_jax.benchmarks.timing import Result, Seconds, machine, machine_line
from wallwm_jax.console import UserError, phase
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.pipeline import check_store
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.inference.event_mode import EventMode, EventRequest, build_programs, program_inputs
from wallwm_jax.inference.policy import Policy
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.training.train_state import count

Call = Callable[[int], None]

_WHOLE = "encoding the pictures, denoising, un-normalising the actions"
_ALONE = "denoising alone: no pictures are encoded, no captions"


def measure(
    config: ConfigDict | None = None, steps: int = 20, store: str = "", views: int = 0, workdir: str = ""
) -> Result:
    """Times each bucket of `config.sampling.buckets`.

    Args:
      config: with random parameters, on `store` or alone; None with `workdir`.
      steps: warm calls per bucket.
      store: event store that the config fits; "" times the programs alone.
      views: of a config alone, where `config.data.views` leaves them to the store.
      workdir: a run of stage joint, action or chunk; excludes the others.

    Raises:
      UserError: neither or both of config and run are given, or they do not fit together.
    """
    mode = _event_mode(config, store, views, workdir)
    if mode:
        config, params, names, call = mode.config, mode.params, mode.views, _whole(mode)
    else:
        assert config is not None  # else there were a run
        config = with_views(config, views)
        params, names = _random_params(config), config.data.views
        call = _alone(config, params)
    sampling, buckets = config.sampling, []
    for bucket in sorted(sampling.buckets):
        with phase(f"bucket of {bucket} latents: 1 + {steps} calls"):
            buckets.append(_time(call, bucket, config.model.actions_per_latent * (bucket - 1), steps))
    return {
        "machine": machine(),
        "parameters": count(params),
        "parameters_from": workdir or "random",
        "includes": _WHOLE if mode else _ALONE,
        "views": len(names),
        "sampler": sampling.sampler,
        "steps": int(sampling.steps),
        "video_steps": int(sampling.video_steps if sampling.sampler == "anchored" else sampling.steps),
        "action_draws": int(sampling.action_draws),
        "guidance": float(sampling.guidance),
        "calls": steps,
        "buckets": buckets,
    }


def table(result: Result) -> str:
    """The figures as lines for people."""
    return "\n".join(
        [
            machine_line(result["machine"]),
            f"model        {result['parameters']:,} parameters ({result['parameters_from']}), {result['views']} views, "
            "one event at a time",
            f"sampler      {result['sampler']}: {result['video_steps']} video steps, {result['steps']} action steps of "
            f"{result['action_draws']} draws, guidance {result['guidance']:g}",
            f"timed        {result['includes']}; {result['calls']} warm calls",
            f"{'latents':>7}{'actions':>9}{'cold s':>9}{'p50 ms':>10}{'p95 ms':>10}{'ms per action':>15}",
            *(
                f"{row['latents']:>7}{row['actions']:>9}{row['cold_seconds']:>9.2f}"
                f"{1e3 * row['seconds']['median']:>10.1f}{1e3 * row['seconds']['p95']:>10.1f}"
                f"{1e3 * row['seconds_per_action']:>15.2f}"
                for row in result["buckets"]
            ),
            "cold: the first call, with compilation",
        ]
    )


def _event_mode(config: ConfigDict | None, store: str, views: int, workdir: str) -> EventMode | None:
    """Of the run, or of the config on its store; None for a config alone."""
    if (config is None) == (not workdir) or (workdir and (store or views)):
        raise UserError("inference takes --workdir=RUN alone, or --config=... with --store=DIR or --views=N")
    if workdir:
        return Policy.from_checkpoint(workdir).event_mode
    if config is None or not store:
        return None
    opened = open_store(store, config.data.split)
    check_store(opened, config)
    return EventMode(_random_params(config), config, opened.meta, opened.stats)


def _time(call: Call, bucket: int, actions: int, steps: int) -> Result:
    seconds = []
    for _ in range(1 + steps):
        begun = time.perf_counter()
        call(bucket)
        seconds.append(time.perf_counter() - begun)
    warm = Seconds.of(seconds[1:])
    return {
        "latents": bucket,
        "actions": actions,
        "cold_seconds": seconds[0],
        "seconds": warm.to_json(),
        "seconds_per_action": warm.median / actions,
    }


def _whole(mode: EventMode) -> Call:
    """A request of random pictures that takes all actions of a bucket."""
    rng, (height, width) = np.random.default_rng(0), mode.store["size"]
    frames = {view: rng.integers(0, 256, (height, width, 3), np.uint8) for view in mode.views}
    state, valid = np.zeros(ACTION_DIM, np.float32), np.ones(ACTION_DIM, bool)

    def call(bucket: int) -> None:
        seconds = mode.config.model.actions_per_latent * (bucket - 1) / mode.store["action_hz"]
        (plan,) = mode.plan([EventRequest(frames, state, valid, "", seconds)])
        assert plan.bucket == bucket

    return call


def _alone(config: ConfigDict, params: Any) -> Call:
    """The denoising program on a random first latent."""
    views, rng = len(config.data.views), np.random.default_rng(0)
    inputs = {name: np.zeros(*spec) for name, spec in program_inputs(config, 1, views).items()}
    inputs["first"] = rng.normal(size=inputs["first"].shape).astype(np.float32)
    inputs["view_id"][:] = np.arange(1, views + 1)
    inputs["state_valid"][:] = True
    inputs["text_length"][:] = config.data.text_length
    programs = build_programs(config)

    def call(bucket: int) -> None:
        inputs["futures"][:], inputs["steps"][:] = bucket - 1, config.model.actions_per_latent * (bucket - 1)
        jax.block_until_ready(programs.sample(params, inputs, bucket=bucket))

    return call


def _random_params(config: ConfigDict) -> Any:
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}  # it runs once
    init = jax.jit(functools.partial(wam.init, config.model), compiler_options=quick)
    with phase("random parameters"):
        return jax.block_until_ready(init(jax.random.key(0)))
