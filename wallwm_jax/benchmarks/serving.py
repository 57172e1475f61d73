"""Latency of the policy server as a robot feels it, by a client on loopback: from packing a request to unpacking its
reply.

One robot asks for one event at a time, a full bucket each, and where the run has unified mode for one chunk after
another under one instruction, or under latents that look anew at each chunk. Cold is the one first call of a program,
with its compilation (unless JAX_COMPILATION_CACHE_DIR has it), warm are those that follow. The seconds of a call over
its actions are those per action. `video` is the first executed observation of an event or chunk that is watched, sent
at once: it waits until the video is predicted. `feedback` are those that follow; every fourth encodes a latent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from wallwm_jax.benchmarks.timing import Result, Seconds, machine, machine_line
from wallwm_jax.console import UserError, phase
from wallwm_jax.inference.policy import Policy

_PARTS = ("queue", "encode", "latents", "model", "pack")


def measure(steps: int = 20, workdir: str = "", mode: str = "", latents: str = "") -> Result:
    """Times each bucket, and chunks, through a real server and client in this process.

    Args:
      steps: warm requests per program and kind.
      workdir: a run of stage joint, action or chunk.
      mode: the only decoding mode to time; "" times all that the run has.
      latents: a run of stage staircase that tells the chunks in place of words; "" leaves it to these.

    Raises:
      UserError: no run given, it has no such mode, latents that do not fit it, or the extra `serve` is not installed.
    """
    if not workdir:
        raise UserError("serving needs --workdir=RUN, a run of stage joint, action or chunk")
    if latents and mode == "event":
        raise UserError("--latents is for unified mode, but --mode=event times none")
    try:
        from wallwm_jax.serving.client import Client
        from wallwm_jax.serving.opening import open_latents
        from wallwm_jax.serving.server import PolicyServer, running
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'wallwm_jax[serve]'") from error
    policy = Policy.from_checkpoint(workdir)
    if mode and mode not in policy.modes:
        raise UserError(f"{workdir!r} was not trained on windows with history, so it has no --mode=unified")
    source, told = (open_latents(latents, policy), ["latents"]) if latents else (None, [])
    engine, unified, rows = policy.event_mode, policy.unified_mode, []
    per_latent = int(engine.store["actions_per_latent"])
    with (
        running(PolicyServer(policy, latents=source, warm=False)) as server,
        contextlib.closing(Client("127.0.0.1", server.port)) as robot,
    ):
        for bucket in engine.buckets if mode != "unified" else ():
            with phase(f"bucket of {bucket} latents: 1 + {steps} requests, the same watched"):
                asked = {"duration_s": per_latent * (bucket - 1) / float(engine.store["action_hz"])}
                calls = _calls(robot.infer, policy, asked, per_latent * (bucket - 1), steps)
                rows.append({"mode": "event", "told_by": "words", "latents": bucket} | calls)
        if unified and mode != "event":
            with phase(f"chunks of {unified.chunk} actions: 1 + {steps} requests, the same watched"):
                calls = _calls(robot.infer, policy, {"mode": "unified"}, unified.chunk, steps)
                told_by, length = "latents" if told else "words", 1 + unified.history + -(-unified.chunk // per_latent)
                rows.append({"mode": "unified", "told_by": told_by, "latents": length} | calls)
    return {
        "machine": machine(),
        "parameters": policy.num_parameters,
        "parameters_from": workdir,
        "latents_from": latents,
        "views": len(engine.views),
        "image_size": list(engine.store["size"]),
        "included": ["pack", "send", "wait", "encode pictures", *told, "model", "pack", "receive", "unpack"],
        "calls": steps,
        "programs": rows,
    }


def table(result: Result) -> str:
    """The figures as lines for people."""
    lines = [
        machine_line(result["machine"]),
        f"model        {result['parameters']:,} parameters ({result['parameters_from']}), {result['views']} views",
        f"timed        a client on loopback, one robot: {', '.join(result['included'])}",
        f"             {result['calls']} warm requests; cold is the first one, with compilation",
        f"{'':<43}{'ms per call:':>26}{'ms per action:':>26}{'p50 ms of the':>40}",
        f"{'mode':<8}{'told by':<9}{'latents':>7}{'actions':>9}{'':>10}"
        + 2 * f"{'cold':>10}{'p50':>8}{'p95':>8}"
        + f"{', '.join(_PARTS):>40}",
    ]
    for row in result["programs"]:
        for kind in ("request", "video", "feedback"):
            found = row[kind]
            line = f"{row['mode']:<8}{row['told_by']:<9}{row['latents']:>7}{row['actions']:>9}{kind:>10}"
            line += _times(found.get("cold_seconds"), found["seconds"], digits=1)
            each = found.get("per_action")
            line += _times(each["cold_seconds"], each["seconds"], digits=2) if each else f"{'':>26}"
            parts = ", ".join(f"{found['parts_ms'][part]:.1f}" if part in found["parts_ms"] else "-" for part in _PARTS)
            lines.append(f"{line}{parts:>40}")
    return "\n".join(lines)


def _times(cold: float | None, warm: Result, *, digits: int) -> str:
    """Columns of milliseconds: cold, p50, p95."""
    first = "" if cold is None else f"{1e3 * cold:.{digits}f}"
    return f"{first:>10}{1e3 * warm['median']:>8.{digits}f}{1e3 * warm['p95']:>8.{digits}f}"


def _calls(
    infer: Callable[[dict[str, Any]], dict[str, Any]], policy: Policy, asked: dict[str, Any], actions: int, steps: int
) -> Result:
    """Requests for `actions` commands with the fields `asked`, then their feedback."""
    mode, rng = policy.event_mode, np.random.default_rng(0)
    height, width = mode.store["size"]
    images = {view: rng.integers(0, 256, (height, width, 3), np.uint8) for view in mode.views}
    state = np.array([[0.4, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0, 0.0]])
    asked = {"images": images, "state": state, "prompt": "reach"} | asked
    row: Result = {"actions": actions}
    stride = int(mode.store["video_stride"])
    kinds: dict[str, list[tuple[float, dict[str, float]]]] = {"request": [], "video": [], "feedback": []}
    for _ in range(1 + steps):
        kinds["request"].append(_timed(infer, asked))
    for _ in range(1 + steps):
        infer(asked | {"watch": True})
        kinds["video"].append(_timed(infer, {"executed": {"images": images, "step": stride}}))
    for step in range(2 * stride, actions + 1, stride):
        kinds["feedback"].append(_timed(infer, {"executed": {"images": images, "step": step}}))
    for kind, calls in kinds.items():
        row[kind] = _summary(calls) if kind == "feedback" else {"cold_seconds": calls[0][0], **_summary(calls[1:])}
    cold, warm = row["request"]["cold_seconds"], row["request"]["seconds"]
    row["request"]["per_action"] = {
        "cold_seconds": cold / actions,
        "seconds": {name: warm[name] / actions for name in ("median", "p95")},
    }
    return row


def _timed(
    infer: Callable[[dict[str, Any]], dict[str, Any]], message: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    begun = time.perf_counter()
    reply = infer(message)
    return time.perf_counter() - begun, reply["server_timing"]


def _summary(calls: list[tuple[float, dict[str, float]]]) -> Result:
    parts = {part: [timing[f"{part}_ms"] for _, timing in calls if f"{part}_ms" in timing] for part in _PARTS}
    return {
        "seconds": Seconds.of([seconds for seconds, _ in calls]).to_json(),
        "parts_ms": {part: float(np.median(values)) for part, values in parts.items() if values},
    }
