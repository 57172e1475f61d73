r"""How far predicted actions are from the recorded ones on held-out events, per level and family, to compare runs.

    python -m wallwm_jax.evaluation.event_errors --workdir=runs/quickstart/train --store=runs/quickstart/store

Whatever windows and captions a run was trained on, it is asked for the same events: at their first frame, told their
true duration, and their caption or, where it was trained on instructions, that of the task (`data.caption`, and other
windows than events, whose own caption is the instruction). The error is the mean absolute one over the event's steps,
in the normalised units of the store that the run was trained on, as in the open loop of `wallwm_jax.evaluate`.

--store may be another store than that of the training, for example one that has as many episodes of rare families as
of common ones. --windows are taken of every family, spread evenly over its episodes. --out gets `figures`, means over
all windows and by level and family, and the errors of single windows, by which `wallwm_jax.sweep` pairs its arms.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from wallwm_jax.config import require_directory, settings
from wallwm_jax.console import UserError, progress, run_command, write_text
from wallwm_jax.data.event_store import EventStore, WindowRecord, open_store
from wallwm_jax.evaluation.open_loop import event_windows, held, readable, recorded_request, spread
from wallwm_jax.evaluation.statistics import normalized_error
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.paths import open_run

FIGURE = "action error"


@dataclass(frozen=True)
class EventError:
    """The error on one event, the window `window` of its store, of an episode by its name."""

    window: int
    episode: str
    family: str
    level: str
    error: float


def measure(mode: EventMode, store: EventStore, *, windows: int = 64, seed: int = 0) -> list[EventError]:
    """The errors of a trained model on events of `store`, of the levels that it was trained on.

    Args:
      mode: the model; its batch size is how many events run at once.
      store: usually a heldout split.
      windows: of every family at most, spread evenly.
      seed: of the sampling noise.

    Raises:
      UserError: the split has no such events, or a record of it is damaged.
    """
    levels = [level for level, share in mode.config.data.levels.items() if share]
    chosen = _of_every_family(store, event_windows(store, levels), windows)
    # Events of one length run in one program: in a batch nobody waits for a long event.
    chosen = chosen[np.argsort(store.index["length"][chosen], kind="stable")]
    batches = [chosen[start : start + mode.batch_size] for start in range(0, len(chosen), mode.batch_size)]
    instructed, found, bad = told_instructions(mode.config.data), [], list[str]()
    for batch in progress(batches, total=len(batches), unit="batch", label="events"):
        records = readable(store, batch, bad)
        if bad:
            raise UserError(f"event store {str(store.path)!r} is damaged: {bad[0]}; build it again")
        requests = [recorded_request(store, record) for record in records]
        if instructed:
            tasks = [store.caption(int(record.level_caption_ids[0])) for record in records]
            requests = [replace(request, caption=task) for request, task in zip(requests, tasks)]
        plans = mode.plan(requests, seeds=[seed + record.index for record in records])
        found += [_error(mode, store, record, plan.actions) for record, plan in zip(records, plans)]
    return found


def told_instructions(data: ConfigDict) -> bool:
    """Whether a model that was trained so reads the instruction of the task, not what goes on in a window."""
    caption = data.get("caption", "own")
    return caption == "instruction" or (caption == "own" and data.window_kind != "event")


def family_of(source: str) -> str:
    """The family of an episode's source: that of OCBench's environments, recoveries too; any other source itself."""
    simulator, _, environment = source.partition("/")
    return environment.split("-", 1)[0] if simulator in ("ocbench", "ocbench-recovery") else source


def summarize(errors: Sequence[EventError]) -> dict[str, Any]:
    """What --out gets.

    Returns:
      `figures`: name → mean error, over all events and, where there are several, of each level and family; `paired`:
      the same names → {"windows", "episodes", "values"}, an entry per event.
    """
    groups: dict[str, list[EventError]] = defaultdict(list)
    groups[FIGURE] = list(errors)
    for kind in ("level", "family"):
        names = sorted({getattr(error, kind) for error in errors}, key=_order)
        for name in names if len(names) > 1 else ():
            groups[f"{FIGURE}, {name}"] = [error for error in errors if getattr(error, kind) == name]
    return {
        "figures": {name: float(np.mean([error.error for error in group])) for name, group in groups.items()},
        "paired": {
            name: {
                "windows": [error.window for error in group],
                "episodes": [error.episode for error in group],
                "values": [error.error for error in group],
            }
            for name, group in groups.items()
        },
    }


def _order(name: str) -> tuple[int, str]:
    return (LEVELS.index(name) if name in LEVELS else len(LEVELS), name)


def _of_every_family(store: EventStore, windows: np.ndarray, most: int) -> np.ndarray:
    families = np.array([family_of(store.episodes[number]["source"]) for number in store.index["episode"][windows]])
    mine = (windows[families == family] for family in np.unique(families))
    return np.sort(np.concatenate([group[spread(len(group), most)] for group in mine]))


def _error(mode: EventMode, store: EventStore, record: WindowRecord, actions: np.ndarray) -> EventError:
    episode, stats = store.episodes[record.episode_id], mode.stats
    predicted, true = (stats.normalize_actions(part) for part in (held(actions, record.num_actions), record.actions))
    error = normalized_error(predicted, true, record.action_valid)
    return EventError(int(record.index), episode["name"], family_of(episode["source"]), record.level, error)


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    from wallwm_jax.inference.policy import Policy

    values = flags.FLAGS
    workdir = open_run(values.workdir)
    store = open_store(
        require_directory(values.store, "store", "pass --store=DIR, made by python -m wallwm_jax.build_events"),
        "heldout",
    )
    policy = Policy.from_checkpoint(workdir, batch_size=values.batch, sampling=settings(values.sampling))
    if policy.unified_mode:
        raise UserError(f"{str(workdir)!r} was trained on windows with history; measure a run that decodes events")
    for key in ("size", "video_stride", "action_hz", "codec"):
        if policy.event_mode.store[key] != store.meta[key]:
            raise UserError(
                f"{str(workdir)!r} was trained on a store whose {key} is {policy.event_mode.store[key]}, --store has "
                f"{store.meta[key]}"
            )
    result = summarize(measure(policy.event_mode, store, windows=values.windows, seed=values.seed))
    if values.out:
        write_text(Path(values.out), json.dumps(result, indent=1))
    for name, value in result["figures"].items():
        print(f"{name:<32} {value:.4f}   {len(result['paired'][name]['values'])} events")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train; its newest checkpoint.")
    flags.DEFINE_string("store", "", "Event store with a heldout split.")
    flags.DEFINE_integer("windows", 64, "Events of every family, at most.", 1)
    flags.DEFINE_integer("batch", 8, "Events that run at once.", 1)
    flags.DEFINE_integer("seed", 0, "Of the sampling noise.")
    flags.DEFINE_multi_string("sampling", [], "Entry of config.sampling to change: name=value. May be repeated.")
    flags.DEFINE_string("out", "", "File for the figures and the errors of single events, as JSON.")
    run_command(main)
