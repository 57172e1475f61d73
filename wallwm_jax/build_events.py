r"""Builds an event store: records or reads episodes, cuts them into windows, writes and clusters them.

Twenty scripted demonstrations of each of two OCBench families, at 64 pixels:

    python -m wallwm_jax.build_events --source=ocbench:chamber,block --episodes=20 --out=runs/store

Only events, with the finest level too, and a quarter of the episodes held out for evaluation:

    python -m wallwm_jax.build_events --source=ocbench:switch --episodes=40 --out=runs/switch \
        --windows=event --levels=subtask,action,segment --heldout_fraction=0.25

A long-tailed mix, in shares of one total of episodes, all of them for training:

    python -m wallwm_jax.build_events --source=ocbench:chamber=80,switch=15,block=4,hanoi=1 --episodes=300 \
        --heldout_fraction=0 --out=runs/tail/train

With the frozen parts of a published model instead of wavelets and bytes: latents of Wan's autoencoder and features of
its text encoder, computed here once, in batches on the local devices (weights: python -m wallwm_jax.convert --help):

    python -m wallwm_jax.build_events --source=ocbench:chamber --episodes=20 --size=192 --out=runs/wan \
        --codec=wan22 --codec_weights=weights/wan22_vae --text_encoder=umt5 --text_weights=weights/umt5

A LeRobot set (version 2 or 3) or an RLDS set, with a description of its columns (wallwm_jax/sources/embodiment.py) and
brought to 5 frames and 10 commands per second; check it first (python -m wallwm_jax.sources.lint --help). Levels
below those that it names are found in its motion (--segment). Recordings of real robots have late pictures, frozen
cameras, jumps and pauses: --clean drops or repairs what breaks a rule, --sync moves pictures and actions together,
--prune_static=SECONDS shortens pauses inside event windows. The page build_report.html in every store counts what was
dropped, repaired and left out by which rule and shows examples, build_report.json has every finding:

    python -m wallwm_jax.build_events --source=lerobot:sets/kitchen --embodiment=arm.toml --video_fps=5 \
        --clean --sync --out=runs/kitchen

Several sources in one store, of any formats, on one clock and with views of the same names; of each, damaged episodes
are counted on their own. A training draws them in the shares of its config, here half and half
(--config.data.mixture='(("lerobot/kitchen", 1), ("rlds/lab", 1))'), however many episodes they have:

    python -m wallwm_jax.build_events --source=lerobot:sets/kitchen --embodiment=arm.toml \
        --source=rlds:sets/lab --embodiment=lab.toml --video_fps=5 --out=runs/both

Recoveries of OCBench's experts: at a contact the hand is pushed aside, the gripper opens or closes too early, or the
block is moved; how the expert goes on from there is an episode of source ocbench-recovery/..., in the split of the
demonstration that it was made from. Three windows of twenty are recoveries in a training with
--config.data.mixture='(("ocbench/", 0.85), ("ocbench-recovery/", 0.15))'; that of a planner (vlm_sft) gives them 0:

    python -m wallwm_jax.build_events --source=ocbench:chamber,block --recoveries=2 --out=runs/recoveries

What a store holds, to look at: one page with timelines, captions and who wrote them, lengths and clusters. With the
store of the same episodes whose events are known, boundaries are drawn and counted beside the true ones:

    python -m wallwm_jax.build_events --inspect=runs/store --out=runs/store.html [--truth=runs/labelled]

The same command and seed give the same store. It appears at --out only when it is complete; an existing one is kept
unless --overwrite is given. Open it with `wallwm_jax.data.event_store.open_store`, or, where only the records matter,
with `tfds.data_source("events", data_dir="runs/store/tfds", split="train")`.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from absl import flags

from wallwm_jax.console import UserError, phase, run_command
from wallwm_jax.events.labelling import WHICH, Labelled
from wallwm_jax.sources.opening import NAMES, FamilyCount, SourceOptions, open_sources

# Recording processes import this module again, so what is heavy is imported where it is used.
if TYPE_CHECKING:
    from wallwm_jax.data.store_writer import StoreOptions, StoreSummary
    from wallwm_jax.events.preparing import PrepareOptions, Summary


@dataclass
class Build:
    """What `build` did.

    Attributes:
      summary: of the writer.
      families: episodes per family or set of the source.
      size_on_disk: bytes of the store.
      seconds: per phase.
      cpu_seconds: processor time of this process and its workers.
      peak_bytes: the most memory of this process, and of the largest of its workers, since they began.
      prepared: what came in, what was dropped or repaired, and why.
      labelled: episodes whose events were found here.
    """

    summary: StoreSummary
    families: dict[str, FamilyCount]
    size_on_disk: int
    prepared: Summary
    seconds: dict[str, float] = field(default_factory=dict)
    labelled: int = 0
    cpu_seconds: float = 0.0
    peak_bytes: tuple[int, int] = (0, 0)


def build(
    sources: str | Sequence[str],
    out: str,
    options: StoreOptions,
    recording: SourceOptions | None = None,
    *,
    embodiments: Sequence[str] = (),
    preparation: PrepareOptions | None = None,
    segment: str = "auto",
    overwrite: bool = False,
) -> Build:
    """Builds and clusters a store; see the flags of the command for the arguments.

    Raises:
      UserError: unknown source, codec, window kind or level; sources that do not fit together; `out` exists; what a
        source needs is not installed, or too many of its episodes are damaged.
    """
    from wallwm_jax.data.clusters import cluster_store
    from wallwm_jax.data.store_writer import atomic_directory, write_store
    from wallwm_jax.evaluation.build_report import write_build_report
    from wallwm_jax.events.preparing import PrepareOptions, prepare

    seconds: dict[str, float] = {}
    cpu = _used()[0]
    sources = [sources] if isinstance(sources, str) else list(sources)
    named = ", ".join(sources)
    with atomic_directory(out, overwrite=overwrite) as directory:
        stream, families = open_sources(sources, recording or SourceOptions(seed=options.seed), embodiments)
        prepared = prepare(stream, preparation or PrepareOptions())
        labelled = Labelled(prepared, segment)
        with phase(f"record {named} into windows", seconds):
            summary = write_store(directory, labelled, options)
        with phase("cluster windows", seconds):
            cluster_store(directory, seed=options.seed)
        for name, count in families().items():  # of these no episode could be made, so `prepare` never saw them
            prepared.summary.add_lost(name, count.dropped, count.reasons)
        write_build_report(directory, prepared.summary, f"Event store of {named}")
        size_on_disk = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    spent, peak = _used()
    return Build(summary, families(), size_on_disk, prepared.summary, seconds, labelled.count, spent - cpu, peak)


def _used() -> tuple[float, tuple[int, int]]:
    """Processor seconds so far, and peak bytes, of this process and of those that it started and that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, workers = (1024 * one.ru_maxrss for one in both)
    return sum(one.ru_utime + one.ru_stime for one in both), (own, workers)


def report(build: Build, out: str) -> str:
    """The summary that the command prints: episodes per family, windows per kind and level, bytes, seconds."""
    summary = build.summary
    splits: Counter[str] = Counter()
    for (_, split), count in summary.episodes.items():
        splits[split] += count
    windows = sum(summary.windows.values())
    lines = [f"event store {out}"]
    lines += [
        f"  episodes  {family:<16} {count.kept:>6} kept {count.dropped:>6} dropped"
        for family, count in build.families.items()
    ]
    for family, told in build.families.items():
        for kind, tried in sorted(told.recoveries.items()):
            each = tried.seconds / (tried.kept + tried.failed + tried.void)
            outcomes = f"{tried.kept:>6} kept {tried.failed:>6} failed {tried.void:>6} void, {each:.1f} s each"
            lines.append(f"  recovery  {f'{family}/{kind}':<16} {outcomes}")
    lines += [f"  dropped   {reason}" for count in build.families.values() for reason in count.reasons]
    for action in ("dropped", "repaired", "noted"):
        lines += [f"  {action:<9} {rule:<16} {count:>6}" for rule, count in build.prepared.counts(action).items()]
    if build.labelled:
        lines.append(f"  episodes  {'segmented':<16} {build.labelled:>6} with events found in their motion")
    lines += [f"  episodes  {split:<16} {count:>6}" for split, count in splits.items()]
    if summary.without_window:
        why = "shorter than a video stride, or no event on --levels"
        lines.append(f"  episodes  {'no window':<16} {summary.without_window:>6} left out: {why}")
    lines += [f"  windows   {f'{kind}/{level}':<16} {count:>6}" for (kind, level), count in summary.windows.items()]
    lines.append(f"  bytes     {build.size_on_disk:>23,} ({build.size_on_disk / windows:,.0f} per window)")
    lines += [f"  seconds   {name:<48} {spent:>7.1f}" for name, spent in build.seconds.items()]
    pace = 60 * summary.episodes.total() / build.cpu_seconds
    own, workers = (peak / 2**20 for peak in build.peak_bytes)
    lines.append(f"  speed     {pace:>23,.1f} episodes per minute of processor time")
    lines.append(f"  memory    {own:>23,.0f} MiB at most, {workers:,.0f} MiB in the largest worker")
    return "\n".join(lines)


def _define_flags() -> None:
    flags.DEFINE_multi_string(
        "source", [], f"Where episodes come from, again for each source: {' or '.join(NAMES.values())}"
    )
    flags.DEFINE_integer(
        "episodes",
        None,
        "To record of each family (default 40), with shares of all; the first of a set (all); to --inspect (4)",
    )
    flags.DEFINE_multi_string(
        "embodiment", [], "What a set's columns mean, a name or the path of a TOML file; of several sets, once for each"
    )
    flags.DEFINE_float(
        "video_fps", 0.0, "Frames per second, two commands each, that the source is brought to; 0 keeps its own"
    )
    flags.DEFINE_float(
        "damage_limit", 0.1, "Share of a set's episodes that may be damaged, counted and named", 0.0, 1.0
    )
    flags.DEFINE_string("out", None, "Directory of the new store; of --inspect, the page", required=True)
    flags.DEFINE_string("inspect", "", "Build nothing: make a page of this store")
    flags.DEFINE_string("truth", "", "inspect: store of the same episodes with true events")
    flags.DEFINE_string("codec", "haar8", "Video codec of the latents: haar4, haar8, haar16, wan21, wan22")
    flags.DEFINE_string("codec_weights", "", "Folder of the codec's converted weights (wan21, wan22)")
    flags.DEFINE_integer("codec_batch", 8, "Videos that the codec encodes together, over all local devices", 1)
    flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Of the codec; bfloat16 on accelerators")
    flags.DEFINE_enum("text_encoder", "bytes", ["bytes", "umt5"], "bytes is learned by the model, umt5 frozen")
    flags.DEFINE_string("text_weights", "", "Folder of the text encoder's converted weights (umt5)")
    flags.DEFINE_integer("size", 64, "Height and width of the frames, pixels")
    flags.DEFINE_list("views", [], "Cameras to render; none takes all. Rendering is most of a recording's time")
    flags.DEFINE_list(
        "windows",
        ["event", "fixed"],
        "Kinds: event (one per span), fixed (tiles), history (tiles and their past), random (as long as events)",
    )
    flags.DEFINE_list(
        "levels", ["subtask", "action"], "Levels of event and random windows: task, subtask, action, segment"
    )
    flags.DEFINE_integer("fixed_steps", 32, "Control steps of a fixed window, or of the future of one with history")
    flags.DEFINE_integer("history", 1, "Latents of four frames before the observation of a window with history", 0)
    flags.DEFINE_float("heldout_fraction", 0.15, "Share of the episodes kept from training", 0.0, 1.0)
    flags.DEFINE_integer(
        "recoveries", 0, "ocbench: disturbances of each episode; what the expert recovers from becomes an episode", 0
    )
    flags.DEFINE_integer("seed", 0, "Everything random follows from it")
    flags.DEFINE_integer("workers", 2, "Processes that record or read; 0 does it in this one", 0)
    flags.DEFINE_bool("overwrite", False, "Replace an existing store")
    flags.DEFINE_enum(
        "segment",
        "auto",
        WHICH,
        "Find events: on the levels below those that the source names, on all below the task, or on none",
    )
    flags.DEFINE_bool("clean", False, "Drop or repair episodes that break a rule of wallwm_jax.events.clean")
    flags.DEFINE_bool("sync", False, "Estimate how late the pictures are, and correct it where that is clear")
    flags.DEFINE_enum(
        "labels_follow", "actions", ["actions", "frames"], "What --sync moves labels with: frames if seen in the video"
    )
    flags.DEFINE_float("prune_static", 0.0, "Seconds of the longest pause inside an event window; 0 keeps all", 0.0)


def main(_: Sequence[str]) -> None:
    """Builds what the flags ask for and prints the summary."""
    values = flags.FLAGS
    if values.inspect:
        from wallwm_jax.evaluation.inspection import inspect_store

        print(inspect_store(values.inspect, values.out, truth=values.truth, episodes=values.episodes))
        return
    if not values.source:
        raise UserError(
            "say where episodes come from: --source=ocbench:FAMILY[,FAMILY...] for example, or --inspect=STORE"
        )
    from wallwm_jax.data.store_writer import StoreOptions
    from wallwm_jax.events.preparing import PrepareOptions
    from wallwm_jax.events.sync import SyncLimits

    start = time.monotonic()
    options = StoreOptions(
        codec=values.codec,
        codec_weights=values.codec_weights,
        codec_batch=values.codec_batch,
        compute_dtype=values.compute_dtype,
        text_encoder=values.text_encoder,
        text_weights=values.text_weights,
        kinds=tuple(values.windows),
        levels=tuple(values.levels),
        fixed_steps=values.fixed_steps,
        history=values.history,
        prune_static=values.prune_static,
        heldout_fraction=values.heldout_fraction,
        seed=values.seed,
    )
    recording = SourceOptions(
        episodes=values.episodes,
        seed=values.seed,
        size=values.size,
        views=tuple(values.views),
        workers=values.workers,
        video_fps=values.video_fps,
        damage_limit=values.damage_limit,
        recoveries=values.recoveries,
    )
    preparation = PrepareOptions(values.clean, values.sync, sync_limits=SyncLimits(spans_follow=values.labels_follow))
    built = build(
        values.source,
        values.out,
        options,
        recording,
        embodiments=values.embodiment,
        preparation=preparation if values.clean or values.sync else None,
        segment=values.segment,
        overwrite=values.overwrite,
    )
    print(report(built, values.out))
    print(f"  seconds   {'total':<48} {time.monotonic() - start:>7.1f}")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
