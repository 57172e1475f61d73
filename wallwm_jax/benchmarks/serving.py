"""Latency of the policy server as a robot feels it, by a client on loopback: from packing a request to unpacking its
reply.

One robot asks for one event at a time, a full bucket each, and where the run has unified mode for one chunk after
another under one instruction. Cold is the first call, with compilation, warm are those that follow. `video` is the
first executed observation of an event or chunk that is watched, sent at once: it waits until the video is predicted.
`feedback` are those that follow, of which every fourth encodes a latent.
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

_PARTS = ("queue", "encode", "model", "pack")


def measure(steps: int = 20, workdir: str = "") -> Result:
    """Times each bucket, and chunks, through a real server and client in this process.

    Args:
      steps: warm requests per program and kind.
      workdir: a run of stage joint, action or chunk.

    Raises:
      UserError: no run given, or the extra `serve` is not installed.
    """
    if not workdir:
        raise UserError("serving needs --workdir=RUN, a run of stage joint, action or chunk")
    try:
        from wallwm_jax.serving.client import Client
        from wallwm_jax.serving.server import PolicyServer, running
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'wallwm_jax[serve]'") from error
    policy = Policy.from_checkpoint(workdir)
    mode, unified, rows = policy.event_mode, policy.unified_mode, []
    per_latent = int(mode.store["actions_per_latent"])
    with (
        running(PolicyServer(policy, warm=False)) as server,
        contextlib.closing(Client("127.0.0.1", server.port)) as robot,
    ):
        for bucket in mode.buckets:
            with phase(f"bucket of {bucket} latents: 1 + {steps} requests, the same watched"):
                asked = {"duration_s": per_latent * (bucket - 1) / float(mode.store["action_hz"])}
                calls = _calls(robot.infer, policy, asked, per_latent * (bucket - 1), steps)
                rows.append({"mode": "event", "latents": bucket} | calls)
        if unified:
            with phase(f"chunks of {unified.chunk} actions: 1 + {steps} requests, the same watched"):
                calls = _calls(robot.infer, policy, {"mode": "unified"}, unified.chunk, steps)
                rows.append(
                    {"mode": "unified", "latents": 1 + unified.history + -(-unified.chunk // per_latent)} | calls
                )
    return {
        "machine": machine(),
        "parameters": policy.num_parameters,
        "parameters_from": workdir,
        "views": len(mode.views),
        "image_size": list(mode.store["size"]),
        "calls": steps,
        "programs": rows,
    }


def table(result: Result) -> str:
    """The figures as lines for people."""
    lines = [
        machine_line(result["machine"]),
        f"model        {result['parameters']:,} parameters ({result['parameters_from']}), {result['views']} views",
        "timed        a client on loopback, one robot: pack, send, wait, encode pictures, model, receive, unpack",
        f"             {result['calls']} warm requests; cold is the first one, with compilation",
        f"{'mode':<8}{'latents':>8}{'actions':>9}{'':>10}{'cold s':>9}{'p50 ms':>9}{'p95 ms':>9}{'ms per action':>15}"
        f"{'p50 ms of: ' + ', '.join(_PARTS):>44}",
    ]
    for row in result["programs"]:
        for kind in ("request", "video", "feedback"):
            found = row[kind]
            cold = f"{found['cold_seconds']:.2f}" if "cold_seconds" in found else ""
            each = f"{1e3 * found['seconds_per_action']:.2f}" if "seconds_per_action" in found else ""
            parts = ", ".join(f"{found['parts_ms'][part]:.1f}" for part in found["parts_ms"])
            lines.append(
                f"{row['mode']:<8}{row['latents']:>8}{row['actions']:>9}{kind:>10}{cold:>9}"
                f"{1e3 * found['seconds']['median']:>9.1f}{1e3 * found['seconds']['p95']:>9.1f}{each:>15}{parts:>44}"
            )
    return "\n".join(lines)


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
    row["request"]["seconds_per_action"] = row["request"]["seconds"]["median"] / actions
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
