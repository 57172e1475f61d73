r"""Writes episodes and their events as a set that other tools read. Exact: what the source has, not what a store keeps.

Ten demonstrations as a LeRobot set of version 3.0, with a subtask on every row:

    python -m wallwm_jax.export --source=ocbench:chamber --episodes=10 --size=128 --out=sets/chamber

    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    LeRobotDataset("chamber", root="sets/chamber")[0]["subtask"]

The finer events, "reach", "grasp", instead of subtasks:

    python -m wallwm_jax.export --source=ocbench:chamber --level=action --out=sets/chamber_actions

Episodes come from their source and not from an event store, whose windows lack some of the poses and, where it holds
latents, the video. The captions of a store that was captioned again go along as a table:

    python -m wallwm_jax.caption out --store=runs/store --file=captions.csv
    python -m wallwm_jax.export --source=ocbench:chamber --episodes=10 --captions=captions.csv --out=sets/chamber

Rows are control steps, 10 per second in OCBench; wallwm_jax/sources/lerobot/export.py says what is in them. Neither
LeRobot nor torch is needed (pip install 'wallwm_jax[data]').
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from absl import flags

from wallwm_jax.console import UserError, phase, run_command
from wallwm_jax.events.labelling import WHICH, Labelled
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.sources.opening import SourceOptions, open_source

# Recording processes import this module again, so what is heavy is imported where it is used.
if TYPE_CHECKING:
    from wallwm_jax.events.schema import Episode


def _define_flags() -> None:
    flags.DEFINE_string("source", None, "Where episodes come from, as python -m wallwm_jax.build_events", required=True)
    flags.DEFINE_string("out", None, "Folder to make; it must not exist", required=True)
    flags.DEFINE_enum("to", "lerobot", ["lerobot"], "Layout of the set")
    flags.DEFINE_integer("episodes", None, "To record of each family (default 40); the first so many of a set (all)", 1)
    flags.DEFINE_enum(
        "segment",
        "auto",
        WHICH,
        "Find events: on the levels below those that the source names, on all below the task, or on none",
    )
    flags.DEFINE_string("embodiment", "", "What a set's columns mean: a name, or the path of a TOML file")
    flags.DEFINE_float("video_fps", 0.0, "Frames per second that the source is brought to; 0 keeps its own", 0.0)
    flags.DEFINE_enum("level", "subtask", LEVELS, "Events that subtask_index names")
    flags.DEFINE_string("captions", "", "Table of captions, .csv or .jsonl, made by python -m wallwm_jax.caption out")
    flags.DEFINE_integer("size", 128, "Height and width of the frames, pixels")
    flags.DEFINE_integer("seed", 0, "Everything random follows from it")
    flags.DEFINE_integer("workers", 2, "Processes that record; 0 records in this one", 0)


def main(_argv: list[str]) -> None:
    """The command; see the module docstring."""
    try:
        from wallwm_jax.sources.lerobot.export import write_lerobot
    except ImportError as error:
        raise UserError(f"{error}; writing LeRobot sets needs pip install 'wallwm_jax[data]'") from None

    values = flags.FLAGS
    episodes: Iterable[Episode]
    options = SourceOptions(
        values.episodes,
        values.seed,
        values.size,
        workers=values.workers,
        embodiment=values.embodiment,
        video_fps=values.video_fps,
    )
    episodes, families = open_source(values.source, options)
    episodes = Labelled(episodes, values.segment)
    if values.captions:
        from wallwm_jax.events.captioners.human import HumanCaptioner, read_edits

        table = HumanCaptioner(read_edits(values.captions))
        episodes = (replace(one, spans=table.revise(one.source, one.episode_id, one.spans)) for one in episodes)
    with phase(f"export {values.source}"):
        done = write_lerobot(values.out, episodes, level=values.level)
    if values.captions:
        print(f"{values.captions}: {len(table.changes)} captions are otherwise than the source's")
    print(
        f"{values.out}: {done.episodes} episodes, {done.rows:,} rows, {done.tasks} tasks, {done.subtasks} "
        f"{values.level}s, {done.bytes / 1e6:.1f} MB"
    )
    for family, count in families().items():
        if count.dropped:
            print(f"{family}: {count.dropped} episodes left out")
        for reason in count.reasons:
            print(f"  dropped   {reason}")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
