r"""Trains a world action model, or the language model beside it, on an event store, in one process or on a pod.

The quickstart's model, about eight minutes on two CPU cores:

    python -m wallwm_jax.train --config=configs/ocbench_quickstart.py --config.data.store=runs/store --workdir=runs/a

After a stop or a kill, the same command with --resume goes on from the last checkpoint; in float32 on CPU the loss
curve is bit for bit that of a run that was never stopped. --overwrite deletes the old run instead. Without either, a
workdir that exists is an error.

    ... --workdir=runs/a --resume

Any knob of configs/base.py can be changed on the command line; one that does not exist is an error:

    ... --config.optim.muon_lr=1e-3 --config.data.rows=8 --config.train.steps=2000

The paper's two stages (WALL-WM Table 1): the video tower alone, then the action tower on the frozen video tower:

    ... --config.train.stage=video  --workdir=runs/video
    ... --config.train.stage=action --workdir=runs/action --config.train.init_from=runs/video

The vision-language model learns what comes next; then its features are aligned with the text of a run from above:

    ... --config=configs/ocbench_vlm.py:vlm_sft  --workdir=runs/vlm
    ... --config=configs/ocbench_vlm.py:vlm_text --workdir=runs/vlm_text \
        --config.train.init_from=runs/vlm --config.train.text_from=runs/a

Two knobs bound a run. `train.steps` is its length: warm-up and the cosine of the learning rate follow it, so it decides
the result. `train.max_seconds` is a safety stop only: it ends a run that turns out too slow, with a checkpoint but with
the learning rate still high; a warning says so early and names the number of steps that would fit.

A checkpoint is written every `train.save_every` steps, every `train.save_minutes` minutes, on SIGTERM or a preemption
notice, and at the end, while training goes on. One that is damaged is renamed, and --resume goes on from the last whole
one; one that cannot be written is named, and the next tried (`train.max_failed_saves`). To look at them:

    python -m wallwm_jax.checkpoints runs/a

Exit codes: 0 the schedule or the time limit has ended; 2 something is wrong, and the message says what; 143 stopped by
SIGTERM or preemption; 75 another process of the run was lost, or a phase hung (`train.hang_aborts`). After 143 and 75
the same command with --resume goes on, with any number of processes.

With --config.train.heldout_every=500 the losses on the store's held-out events are written to heldout.jsonl, of the
averaged parameters on the same rows and noise each time.

The workdir then holds checkpoints/ (parameters, average, optimizer, statistics), metrics.jsonl (one line per step),
tensorboard/, config.json, run_card.json (code, versions, devices of every start) and goodput.json (where the time
went). To look into a run that goes on, `touch WORKDIR/profile`: it traces its next steps to WORKDIR/profiles/;
--config.train.dump_hlo writes the compiled step to WORKDIR/hlo/. On several hosts run the same command on each with
--distributed.

The workdir may be in a bucket, and so may train.init_from and train.text_from; the event store is on a disk or mount:

    ... --workdir=gs://bucket/a --resume

That takes pip install 'wallwm_jax[gcs]' and credentials of Google Cloud. Checkpoints are written to the bucket itself.
What grows (metrics.jsonl, tensorboard/, reports, profiles) is written to a directory of this machine that the run names
at its start, and copied each half minute, before each checkpoint and at the end; put `profile` there.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from wallwm_jax.config import define_config_flag, to_json
from wallwm_jax.console import UserError, phase, run_command
from wallwm_jax.paths import is_remote, use_compile_cache

# The loader's worker processes import this module again; JAX stays out of them because `run` imports it.
if TYPE_CHECKING:
    from wallwm_jax.data.event_store import EventStore
    from wallwm_jax.training.checkpoint import Checkpointer
    from wallwm_jax.training.limits import TimeLimit
    from wallwm_jax.training.telemetry import Telemetry


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates made in all.
      stopped_by: "" at the end of the schedule, else "max_seconds" or "preemption".
      seconds: time per span (`training.goodput`), by name; none when there was nothing left to do.
    """

    step: int
    stopped_by: str
    seconds: dict[str, float]


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> Outcome:
    """Trains `config.train.stage` for `config.train.steps` steps and leaves checkpoints and metrics in `workdir`.

    Args:
      config: a config as `configs/base.py` makes them.
      workdir: where everything goes.
      resume: go on with the run in `workdir`; from the beginning if it has no checkpoint yet.
      overwrite: delete the run in `workdir` first.
      stop: once set, the run saves and ends after the current step.

    Raises:
      UserError: config, store, workdir and devices do not fit together (before anything is compiled), or the loss is
        not finite.
    """
    import jax

    from wallwm_jax.data.device_feed import feed
    from wallwm_jax.data.event_store import open_store
    from wallwm_jax.data.pipeline import make_loader, uncalibrated_views
    from wallwm_jax.parallel.distributed import end_together, this_host
    from wallwm_jax.parallel.mesh import make_mesh, row_shards
    from wallwm_jax.parallel.presets import mesh_sizes
    from wallwm_jax.parallel.sharding import host_rows
    from wallwm_jax.training.checkpoint import CONFIG_FILE, Checkpointer, prepare_workdir
    from wallwm_jax.training.families import family_of
    from wallwm_jax.training.goodput import GOODPUT_FILE, Goodput
    from wallwm_jax.training.heldout import Heldout, open_heldout
    from wallwm_jax.training.limits import TimeLimit, Watchdog, explained_disk_full
    from wallwm_jax.training.mirror import Mirror
    from wallwm_jax.training.profiling import Profiler, dump_program
    from wallwm_jax.training.run_card import RUN_CARD_FILE, add_start
    from wallwm_jax.training.stages import get_stage
    from wallwm_jax.training.starting import check_resumed, fresh_state
    from wallwm_jax.training.telemetry import HELDOUT_FILE, METRICS_FILE, Telemetry, ideal_step_s
    from wallwm_jax.training.train_step import build_train_step

    began = time.monotonic()

    # Paths, config and store.
    host = this_host()
    check_config(config)
    store = open_store(_required_store(config), config.data.split)
    config = _with_views(config, store)
    rows = family_of(get_stage(config.train.stage)).rows
    rows.check(store, config)
    heldout_store = open_heldout(config)
    described = {**store.meta, "views": list(config.data.views), "fingerprint": store.fingerprint}
    assets = {"store": described, "stats": store.stats.to_dict()}

    # Devices.
    mesh = make_mesh(mesh_sizes(config))
    if config.data.rows % row_shards(mesh):
        raise UserError(
            f"data.rows={config.data.rows} does not divide among the {row_shards(mesh)} row shards of the mesh; "
            f"make it a multiple of {row_shards(mesh)}"
        )
    built = build_train_step(config, mesh, store.channel_weights())
    workdir = prepare_workdir(workdir, resume=resume, overwrite=overwrite)
    if host.is_first:
        print(
            f"==> {config.train.stage} on {mesh.size} x {jax.devices()[0].device_kind}, {host.count} host(s): {workdir}"
        )

    with contextlib.ExitStack() as stack:
        earlier = (METRICS_FILE, HELDOUT_FILE, GOODPUT_FILE, RUN_CARD_FILE) if host.is_first else ()
        mirror = stack.enter_context(Mirror(workdir, fetch=earlier))
        files = mirror.local
        if host.is_first and is_remote(workdir):
            print(f"    reports are written to {files} and copied from there")
        goodput = Goodput(files, since=began, writes=host.is_first)
        stack.callback(goodput.close)
        profiler = stack.enter_context(Profiler(files, watches=host.is_first))
        checkpointer = Checkpointer(
            workdir,
            keep=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
            save_every=config.train.save_every,
            save_minutes=config.train.save_minutes,
            look_every=config.train.log_every,
            max_failed=config.train.max_failed_saves,
        )
        stack.callback(goodput.span("checkpoint")(checkpointer.close))
        watchdog = stack.enter_context(Watchdog(config.train.hang_seconds, aborts=config.train.hang_aborts))
        stack.enter_context(end_together(lambda: watchdog.phase))
        stack.enter_context(explained_disk_full())
        saved_config = json.loads(to_json(config))
        first = checkpointer.start_step
        if first:
            check_resumed(saved_config, assets, checkpointer)
        if first >= config.train.steps:
            print(f"    already trained: step {first} of {config.train.steps}")
            return Outcome(first, "", {})
        if host.is_first:
            (files / CONFIG_FILE).write_text(to_json(config) + "\n")

        # State.
        watchdog.enter("initialise")
        with phase(f"restore step {first}" if first else "initialise"), goodput.span("restore" if first else "init"):
            state = checkpointer.restore(built.abstract_state) if first else fresh_state(built, config)
            first = checkpointer.start_step  # an older one, where the newest turned out to be damaged
            checkpointer.keep_frozen(state.frozen)

        # Data: worker processes start now and fill their buffers while the step compiles.
        index, parts = host_rows(mesh, config.data.rows)
        loader = stack.enter_context(
            make_loader(store, config, rows, host_index=index, host_count=parts, start_step=first)
        )
        if host.is_first:
            looks = built.stage.model == "world_action" and config.model.sight_cone.on
            blind = uncalibrated_views(store, config.data.views) if looks else ()
            if blind:
                print(f"    no camera calibration of {', '.join(blind)}: the sight-cone mask leaves them open")
            print(add_start(files, config, mesh, state, store=store.fingerprint, first_step=first))
            if built.muon_cost is not None and mesh.size > 1:
                print(textwrap.indent(built.muon_cost.table(), "    "))

        # Compile, ahead of time: a batch of another shape would be an error, never a second compilation.
        watchdog.enter("compile")
        batch_shapes = built.abstract_batch(rows.spec(config, config.data.rows))
        with phase("compile"), goodput.span("compile"):
            program = built.step.lower(built.abstract_state, batch_shapes).compile()
        if config.train.dump_hlo and host.is_first:
            dump_program(program, files)
        step_fn = profiler.around(program, first)
        heldout = None
        if heldout_store is not None:
            watchdog.enter("held-out events")
            with phase("read held-out events"), goodput.span("evaluation"):
                heldout = Heldout(heldout_store, config, built, host_index=index, host_count=parts)

        # Loop.
        telemetry = Telemetry(
            files,
            goodput,
            first_step=first,
            last_step=config.train.steps,
            log_every=config.train.log_every,
            ideal_step_s=ideal_step_s(config, mesh),
            writes=host.is_first,
        )
        stack.callback(telemetry.close)
        with phase("train"), feed(loader, built.rows) as batches, goodput.span("step"):
            limit = TimeLimit(config)
            telemetry.start()
            for step in range(first, config.train.steps):
                watchdog.enter(f"data of step {step}")
                with goodput.span("data"):
                    batch, _, waited = next(batches)
                watchdog.enter(f"step {step}")
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                telemetry.record(step, metrics, waited)
                done = step + 1
                if heldout is not None and (done % config.train.heldout_every == 0 or done == config.train.steps):
                    telemetry.flush()
                    watchdog.enter(f"evaluation after step {done}")
                    with goodput.span("evaluation"):
                        telemetry.heldout(done, heldout(state))
                    telemetry.start()
                if checkpointer.wants(done):
                    telemetry.flush()
                    watchdog.enter(f"checkpoint of step {done}")
                    with goodput.span("checkpoint"):
                        mirror.upload()  # first the metrics: a checkpoint should have those of its steps
                        checkpointer.save(done, state, assets, saved_config)
                    telemetry.start()
                stopped_by = _reason_to_stop(done, stop, limit, checkpointer, telemetry)
                if stopped_by:
                    break
            telemetry.flush()

        # The last checkpoint.
        watchdog.enter("last checkpoint")
        with goodput.span("checkpoint"):
            mirror.upload()
            checkpointer.save(done, state, assets, saved_config)
            checkpointer.wait()
    if host.is_first:
        print(f"==> {f'stopped by {stopped_by}' if stopped_by else 'done'}: step {done} saved in {workdir}", flush=True)
    return Outcome(done, stopped_by, goodput.spans)


def check_config(config: ConfigDict) -> None:
    """Raises `UserError` on values that cannot train, whatever the store and the devices are."""
    from wallwm_jax.training.stages import get_stage

    stage = get_stage(config.train.stage)
    for section, name in (
        ("train", "steps"),
        ("train", "log_every"),
        ("train", "save_every"),
        ("train", "heldout_batches"),
        ("train", "keep_checkpoints"),
        ("data", "rows"),
        ("objective", "action_draws"),
    ):
        if config[section][name] < 1:
            raise UserError(f"{section}.{name}={config[section][name]} must be at least 1")
    if config.train.keep_every % config.train.save_every:
        raise UserError(
            f"train.keep_every={config.train.keep_every} must be a multiple of train.save_every="
            f"{config.train.save_every}: only what is saved can be kept"
        )
    if config.data.window_kind not in stage.window_kinds:
        raise UserError(
            f"stage {stage.name!r} cannot train on data.window_kind={config.data.window_kind!r}; "
            f"it takes {' or '.join(stage.window_kinds)}"
        )
    short, long = config.data.caption_drop_lengths
    if not 0 < short < long:
        raise UserError(f"data.caption_drop_lengths={(short, long)}: give two rising numbers of control steps")
    if config.objective.action_sigma not in ("independent", "symmetric"):
        raise UserError(
            f"objective.action_sigma={config.objective.action_sigma!r} is neither independent nor symmetric"
        )
    if stage.video_sigma == "anchor" and config.objective.action_sigma == "symmetric":
        raise UserError(
            f"stage {stage.name!r} holds the video at objective.anchor_sigma, so the action sigma cannot follow it; "
            "set --config.objective.action_sigma=independent"
        )
    if stage.model == "language" and not any(config.objective[f"{name}_weight"] for name in stage.losses):
        raise UserError(f"stage {stage.name!r} has nothing to learn: objective.NAME_weight of {stage.losses} are all 0")
    if stage.freezes and not config.train.init_from:
        earlier = "video or joint" if stage.model == "world_action" else "vlm_sft"
        raise UserError(
            f"stage {stage.name!r} freezes {' and '.join(stage.freezes)}: say where they come from with "
            f"--config.train.init_from=WORKDIR of a {earlier} run"
        )
    aligns = "video" in stage.freezes or ("align" in stage.losses and config.model.text.kind == "bytes")
    aligns = aligns and stage.model == "language"
    if aligns != bool(config.train.text_from):
        raise UserError(
            f"stage {stage.name!r} aligns to how a world action model reads text: give --config.train.text_from="
            "WORKDIR of its run"
            if aligns
            else f"train.text_from={config.train.text_from!r} is for stage 'staircase', and for 'vlm_text' on a store "
            "of captions as bytes"
        )


def _required_store(config: ConfigDict) -> str:
    if not config.data.store:
        raise UserError("no event store given; pass --config.data.store=DIR, made by python -m wallwm_jax.build_events")
    return config.data.store


def _with_views(config: ConfigDict, store: EventStore) -> ConfigDict:
    """A copy of the config that names its views, so that checkpoints and batches agree on their order."""
    from wallwm_jax.data.pipeline import resolve_views

    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.views = resolve_views(store, config)
    return config.lock()


def _reason_to_stop(
    done: int, stop: threading.Event | None, limit: TimeLimit, checkpointer: Checkpointer, telemetry: Telemetry
) -> str:
    if (stop is not None and stop.is_set()) or checkpointer.preempted(done):
        return "preemption"
    return "max_seconds" if limit.exceeded(done, telemetry.mean_step_s()) else ""


def _define_flags() -> None:
    define_config_flag()
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("workdir", "", "Directory of the run, or gs://BUCKET/...: checkpoints, metrics, TensorBoard")
    flags.DEFINE_bool("resume", False, "Go on with the run in --workdir, or start it if there is none yet")
    flags.DEFINE_bool("overwrite", False, "Delete the run in --workdir and start anew")
    flags.DEFINE_bool("distributed", False, "Several processes form one run (see wallwm_jax/parallel/distributed.py)")


def main(_: list[str]) -> int:
    """The command."""

    from wallwm_jax.parallel.distributed import initialize, leave
    from wallwm_jax.training.limits import stop_on_sigterm

    values = flags.FLAGS
    if not values.workdir:
        raise UserError("no workdir given; pass --workdir=DIR, where checkpoints and metrics go")
    if values.distributed:
        initialize()
    with contextlib.ExitStack() as stack:
        # With several processes JAX itself listens for SIGTERM and agrees on a step with the others.
        stop = None if values.distributed else stack.enter_context(stop_on_sigterm())
        try:
            use_compile_cache(values.workdir)
            outcome = run(values.config, values.workdir, resume=values.resume, overwrite=values.overwrite, stop=stop)
        except UserError as error:
            if not values.distributed:
                raise
            print(f"error: {error}", file=sys.stderr)
            leave(2)
    return 128 + signal.SIGTERM if outcome.stopped_by == "preemption" else 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
