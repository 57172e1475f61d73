r"""Serves a trained policy to robots: a websocket that the public `openpi-client` talks to unchanged.

    pip install 'wallwm_jax[serve]'
    python -m wallwm_jax.serve --workdir=runs/quickstart/train

It listens on 127.0.0.1:8000 (--host=0.0.0.0 opens it to the network: there is no password), compiles every program
that a request may need, and answers `GET /healthz` with 200 from then on, 503 before. On SIGTERM it answers what it has
begun and exits with 0. A robot then needs:

    from openpi_client.websocket_client_policy import WebsocketClientPolicy   # or wallwm_jax.serving.client.Client
    robot = WebsocketClientPolicy("127.0.0.1", 8000)
    event = robot.infer({"images": {"front_pixels": rgb, ...}, "state": state, "prompt": "press the red button"})

In mode "event" a request is answered by a whole event. A model that was trained on windows with history has mode
"unified", too: the prompt is the instruction, and a request is answered by the next chunk, of fixed length, in view of
the past, which the server keeps for each connection. --mode=unified serves chunks alone and compiles nothing else;
--latents=RUN, a run of stage staircase or vlm_text, lets a VLM tell the model what to do in place of the prompt.

Request:
    images       view name → [H, W, 3] uint8 RGB, every view of the metadata; None for a camera that is not there
    state        [G, 8] floats, one row an arm: position x y z (metres, base frame), unit quaternion w x y z, gripper
                 (0 open, 1 closed)
    prompt       the next event in words, as the training captions say it; or the instruction, which may change
    mode         "event" or "unified", of the metadata's modes; the first of them by default
    watch        true: also predict the video, after the reply is out, so that the watchdog can compare
    reset        true: an episode begins, sampling noise and past start anew, as on a new connection
    duration_s   event: how long it takes; or frames, the same in video frames; without both the model decides
    steps        unified: control steps since the request before, a multiple of feedback_every; or the whole chunk
    done         unified with latents: captions of the events that are over, in time order

Reply:
    actions      [T, 8 G] float32, one row a control step, laid out as state: absolute commands for the event or chunk
    control_hz   steps per second
    event        steps, duration_s, whole (false: it is longer than T), predicted_duration_s and duration_quantiles_s of
                 the model, progress and done_probability
    chunk        in its place in mode "unified": number in the episode, steps, progress, done_probability
    watchdog     score (share of the predicted change that is missing), worst so far, threshold, alarm, latents compared
    server_timing    queue_ms, encode_ms, model_ms, pack_ms, total_ms

While commands are executed the robot may tell what it sees, every `feedback_every` control steps (metadata):

    robot.infer({"executed": {"images": {...}, "step": 4}})     # 4 control steps after the request's observation

and gets event or chunk, and watchdog, alone. Unified mode is trained on such a past. Of what a robot does not tell, the
server holds each camera's last picture and takes the commands for executed; `actions` beside step, [n, 8 G], says what
was commanded instead since the last telling. An event in between ends the past.

Progress of an event is elapsed time over duration, for all durations that the model thinks possible, weighed by how
well each explains the observed latents; done_probability is the weight of those that are over. The watchdog gives
alarms on events where it was calibrated, on the recorded ones of a store, once per checkpoint:

    python -m wallwm_jax.serve --workdir=runs/quickstart/train --store=runs/quickstart/store --calibrate

writes watchdog.json into the workdir. `python -m wallwm_jax.evaluation.watchdog` measures its precision and recall in
the simulator, `python -m wallwm_jax.benchmark serving` the latency.

An error is a text frame that says what is wrong; the connection stays. A message above --max_megabytes closes it.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from absl import flags

from wallwm_jax.config import settings
from wallwm_jax.console import UserError, phase, run_command
from wallwm_jax.paths import open_path, open_run, use_compile_cache

if TYPE_CHECKING:
    from wallwm_jax.inference.latent_conditioner import LatentConditioner
    from wallwm_jax.inference.policy import Policy
    from wallwm_jax.serving.server import PolicyServer


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train of stage joint, action or chunk.")
    flags.DEFINE_integer("step", None, "Which of its checkpoints; the newest by default.", 0)
    flags.DEFINE_enum(
        "mode", "", ["", "event", "unified"], "The only mode to serve; without it all that the model has."
    )
    flags.DEFINE_string("latents", "", "Run of stage staircase or vlm_text, which conditions unified mode.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is every one.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", 0, 65535)
    flags.DEFINE_integer("queue", 16, "Requests that may wait; further ones are told that the server is busy.", 1)
    flags.DEFINE_integer("clients", 64, "Robots that may be connected.", 1)
    flags.DEFINE_float("max_megabytes", 32.0, "Largest request.", 0.001)
    flags.DEFINE_integer("seed", 0, "Of the sampling noise of each connection.", 0)
    flags.DEFINE_multi_string("sampling", [], "Entry of config.sampling to change: name=value. May be repeated.")
    flags.DEFINE_string("calibration", "", "Calibration of the watchdog; watchdog.json of the workdir by default.")
    flags.DEFINE_bool("calibrate", False, "Calibrate the watchdog and exit.")
    flags.DEFINE_string("store", "", "calibrate: event store, of whose heldout split the events are taken.")
    flags.DEFINE_integer("events", 200, "calibrate: how many events, at most.", 1)
    flags.DEFINE_float("false_alarms", 0.05, "calibrate: share of successful events that may set off the alarm.")
    flags.DEFINE_string(
        "codec_weights", "", "Converted weights of the store's codec, if they have moved since its build."
    )
    flags.DEFINE_string("text_weights", "", "Converted weights of its text encoder, if they have moved.")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    workdir = open_run(values.workdir)
    if values.calibrate != bool(values.store):
        raise UserError("--calibrate and --store=DIR go together")
    if values.latents and values.mode == "event":
        raise UserError("--latents is for unified mode, but --mode=event serves none")
    try:
        from wallwm_jax.serving.server import Limits, PolicyServer
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'wallwm_jax[serve]'") from error

    from wallwm_jax.inference.policy import Policy
    from wallwm_jax.serving.watchdog import CALIBRATION_FILE, Calibration

    use_compile_cache(workdir)
    with phase("load"):
        policy = Policy.from_checkpoint(
            workdir,
            step=values.step,
            sampling=settings(values.sampling),
            codec_weights=values.codec_weights,
            text_weights=values.text_weights,
        )
    if values.mode and values.mode not in policy.modes:
        raise UserError(f"{str(workdir)!r} was not trained on windows with history, so it cannot serve --mode=unified")
    path = open_path(values.calibration or workdir / CALIBRATION_FILE)
    if values.calibrate:
        from wallwm_jax.data.event_store import open_store
        from wallwm_jax.evaluation.watchdog import calibrate

        store = open_store(values.store, "heldout")
        found = calibrate(policy, store, events=values.events, false_alarm_rate=values.false_alarms)
        found.save(path)
        print(f"{path}: an alarm where more than {found.threshold:.3f} is missing, from {found.events} events")
        return 0
    calibration = Calibration.load(path, policy.step) if values.calibration or path.exists() else None
    limits = Limits(int(values.max_megabytes * 2**20), values.queue, values.clients)
    modes = (values.mode,) if values.mode else policy.modes
    latents = _latents(values.latents, policy) if values.latents else None
    server = PolicyServer(
        policy,
        calibration,
        modes=modes,
        latents=latents,
        host=values.host,
        port=values.port,
        seed=values.seed,
        limits=limits,
    )
    asyncio.run(_serve(server))
    return 0


def _latents(run: str, policy: Policy) -> LatentConditioner:
    """What a run of stage staircase or vlm_text says in place of words, for this policy."""
    from wallwm_jax.inference.latent_conditioner import LatentConditioner, check_alignment

    if policy.unified_mode is None:
        raise UserError("--latents is for unified mode, which this model does not have: it knows no history")
    with phase("load latents"):
        conditioner = LatentConditioner.from_checkpoint(run, batch_size=1)
    if missing := set(conditioner.views) - set(policy.event_mode.views):
        raise UserError(
            f"the latents of {run!r} look at {' and '.join(sorted(missing))}; robots of this policy send "
            f"{' and '.join(policy.event_mode.views)}"
        )
    check_alignment(conditioner, policy.unified_mode, run)
    return conditioner


async def _serve(server: PolicyServer) -> None:
    """Until SIGTERM or Ctrl-C."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.run(lambda: print(f"listening on {server.host}:{server.port}", flush=True))
    print("stopped", flush=True)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
