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
--planner=RUN, a run of stage vlm_sft or vlm_text with data.vlm.inside_prob > 0, tells the time of events there.

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
    done         unified with latents or a planner: captions of the events that are over, in time order
    now          unified, where the metadata's event_time names what knows its time: caption of the event under way

Reply:
    actions      [T, 8 G] float32, one row a control step, laid out as state: absolute commands for the event or chunk
    control_hz   steps per second
    event        steps, duration_s, whole (false: it is longer than T), predicted_duration_s and duration_quantiles_s of
                 the model, progress and done_probability
    chunk        in its place in mode "unified": number in the episode, steps, and by the clock progress and
                 done_probability of the chunk, which say nothing of an event
    event        in mode "unified" where the request has now: elapsed_s since the request that first named it, and what
                 is known of: predicted_duration_s, left_s, progress, done_probability, duration_quantiles_s
    watchdog     score (share of the predicted change that is missing), worst so far, threshold, alarm, latents compared
    server_timing    queue_ms, encode_ms, model_ms, pack_ms, total_ms; unified: latents_ms and event_time_ms, where used

While commands are executed the robot may tell what it sees, every `feedback_every` control steps (metadata):

    robot.infer({"executed": {"images": {...}, "step": 4}})     # 4 control steps after the request's observation

and gets event or chunk, and watchdog, alone. Unified mode is trained on such a past. Of what a robot does not tell, the
server holds each camera's last picture and takes the commands for executed; `actions` beside step, [n, 8 G], says what
was commanded instead since the last telling. An event in between ends the past.

Progress of an event is elapsed time over duration, for all durations that the model thinks possible, weighed by how
well each explains the observed latents; done_probability is the weight of those that are over.

In mode "unified" nobody knows by default how long the event under way takes, and a reply has no field event. Two things
can say it, once the robot names the event in now. The duration head of a run of stage chunk is still that of the run
that it began with, which has to have learnt from events, as that of configs/ocbench_chunk.py has; it is told now and
the observation that came with it first, and gives duration_quantiles_s and done_probability. A run of stage joint on
windows with history has a head that learnt the length of chunks; it is not asked. A planner is asked at each chunk,
with now, done and the present pictures, and gives left_s; it has no probabilities of its own. With both, the head's
spread is put around the planner's time. What neither says is left out. The VLM behind --latents decodes no words; its
vlm_sft run can be the planner.

The watchdog gives alarms where it was calibrated, on the recorded events and chunks of a store, once per checkpoint:

    python -m wallwm_jax.serve --workdir=runs/quickstart/train --store=runs/quickstart/store --calibrate

writes watchdog.json into the workdir, with a threshold for each mode that is served (--mode). Chunks are calibrated
under the words of their windows, so those under latents have no alarm. `python -m wallwm_jax.evaluation.watchdog`
measures precision and recall in the simulator, `python -m wallwm_jax.benchmark serving` the latency.

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
    from wallwm_jax.serving.server import PolicyServer


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train of stage joint, action or chunk.")
    flags.DEFINE_integer("step", None, "Which of its checkpoints; the newest by default.", 0)
    flags.DEFINE_enum(
        "mode", "", ["", "event", "unified"], "The only mode to serve; without it all that the model has."
    )
    flags.DEFINE_string("latents", "", "Run of stage staircase or vlm_text, which conditions unified mode.")
    flags.DEFINE_string("planner", "", "Run of stage vlm_sft or vlm_text that tells unified mode the time of events.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is every one.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", 0, 65535)
    flags.DEFINE_integer("queue", 16, "Requests that may wait; further ones are told that the server is busy.", 1)
    flags.DEFINE_integer("clients", 64, "Robots that may be connected.", 1)
    flags.DEFINE_float("max_megabytes", 32.0, "Largest request.", 0.001)
    flags.DEFINE_integer("seed", 0, "Of the sampling noise of each connection.", 0)
    flags.DEFINE_multi_string("sampling", [], "Entry of config.sampling to change: name=value. May be repeated.")
    flags.DEFINE_string("calibration", "", "Calibration of the watchdog; watchdog.json of the workdir by default.")
    flags.DEFINE_bool("calibrate", False, "Calibrate the watchdog and exit.")
    flags.DEFINE_string("store", "", "calibrate: event store, of whose heldout split the windows are taken.")
    flags.DEFINE_integer("events", 200, "calibrate: how many events, or chunks, at most.", 1)
    flags.DEFINE_float("false_alarms", 0.05, "calibrate: share of successful ones that may set off the alarm.")
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
    for name in ("latents", "planner"):
        if values[name].value and values.mode == "event":
            raise UserError(f"--{name} is for unified mode, but --mode=event serves none")
        if values[name].value and values.calibrate:
            raise UserError(f"--{name} is for serving; --calibrate takes the words of the recorded windows")
    try:
        from wallwm_jax.serving.server import Limits, PolicyServer
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'wallwm_jax[serve]'") from error

    from wallwm_jax.inference.policy import Policy
    from wallwm_jax.serving.opening import open_latents, open_planner
    from wallwm_jax.serving.watchdog import CALIBRATION_FILE, load_calibrations, save_calibrations

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
    modes = (values.mode,) if values.mode else policy.modes
    path = open_path(values.calibration or workdir / CALIBRATION_FILE)
    if values.calibrate:
        from wallwm_jax.data.event_store import open_store
        from wallwm_jax.evaluation.watchdog import calibrate

        store = open_store(values.store, "heldout")
        how = {"events": values.events, "false_alarm_rate": values.false_alarms}
        found = {mode: calibrate(policy, store, mode=mode, **how) for mode in modes}
        save_calibrations(path, found)
        for mode, one in found.items():
            said = f"an alarm where more than {one.threshold:.3f} is missing, from {one.events} windows"
            print(f"{path}: mode {mode!r}: {said}")
        return 0
    calibrations = load_calibrations(path, policy.step) if values.calibration or path.exists() else None
    limits = Limits(int(values.max_megabytes * 2**20), values.queue, values.clients)
    server = PolicyServer(
        policy,
        calibrations,
        modes=modes,
        latents=open_latents(values.latents, policy) if values.latents else None,
        planner=open_planner(values.planner, policy) if values.planner else None,
        host=values.host,
        port=values.port,
        seed=values.seed,
        limits=limits,
    )
    asyncio.run(_serve(server))
    return 0


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
