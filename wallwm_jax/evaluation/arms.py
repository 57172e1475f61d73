r"""Compares ways to act on the same closed-loop trials: runs, decoding modes, sources of text.

Each --arm is a name and how it acts: `run`, a workdir of wallwm_jax.train, and what `wallwm_jax.evaluate` has as
flags, mode, planner, text, level, own_duration and execute. Event mode with the scripted planner beside a VLM, and
unified mode under four texts:

    python -m wallwm_jax.evaluation.arms --store=runs/arms/store --out=runs/arms/table --episodes=50 \
        --arm="event, oracle:run=runs/arms/event" \
        --arm="event, VLM:run=runs/arms/event,planner=runs/arms/vlm" \
        --arm="unified, instruction:run=runs/arms/chunk,mode=unified" \
        --arm="unified, next event:run=runs/arms/chunk,mode=unified,text=event" \
        --arm="unified, staircase:run=runs/arms/chunk,mode=unified,text=runs/arms/staircase" \
        --arm="unified, features:run=runs/arms/chunk,mode=unified,text=runs/arms/vlm_text"

`configs/ocbench_chunk.py` says how these runs are made. A VLM in event mode is told what it named before; in unified
mode, which subtasks the simulator counts as achieved. All arms run one group of trials before any runs the next, and
the table counts the trials that all of them have finished, so a time budget cuts no arm short. Finished groups are
written: the same command goes on after a stop or when --max_seconds is over, and with more --episodes or arms.

--out then holds arms.md, arms.json and arms.png: subtasks and episodes achieved with Wilson 95 % intervals (subtasks of
one episode are not independent, so theirs are somewhat too narrow); of each two arms the difference in subtasks with
the interval of a paired bootstrap over episodes, and McNemar's exact test of the episodes, not corrected for how many
pairs there are; trials/ARM.json, every trial. A move that has begun is finished: patience is looked at between moves.
`python -m wallwm_jax.evaluation.report --arms=DIR` puts it on a page.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from wallwm_jax.config import settings
from wallwm_jax.console import UserError, phase, progress, run_command, write_text
from wallwm_jax.evaluation.environments import SubtaskResult, Trial

# Simulator processes import this module again, so what is heavy (JAX) is imported where it is used.
if TYPE_CHECKING:
    from wallwm_jax.data.event_store import EventStore
    from wallwm_jax.evaluation.actors import Acting, Actor
    from wallwm_jax.evaluation.closed_loop import EpisodeResult
    from wallwm_jax.evaluation.environments import EnvironmentPool


@dataclass(frozen=True)
class Arm:
    """One way to act: the workdir of a run, and how it acts."""

    name: str
    run: str
    acting: Acting

    @property
    def file(self) -> str:
        """Name of its file of trials."""
        return re.sub(r"[^0-9A-Za-z.]+", "-", self.name).strip("-") + ".json"


@dataclass(frozen=True)
class Options:
    """What all arms share; the flags of the command.

    Attributes:
      episodes: trials.
      families: OCBench families or environment ids to act in; none takes those of the store.
      patience: control steps that a subtask may take, as a multiple of the expert's typical duration.
      max_seconds: after which no group is begun that would take longer.
      batch: episodes that run at once.
      processes: simulator processes.
      seed: of trials and sampling noise.
      sampling: entries of `config.sampling` to change in all runs, as "name=value".
    """

    episodes: int = 50
    families: Sequence[str] = ()
    patience: float = 3.0
    max_seconds: float = 5400.0
    batch: int = 10
    processes: int = 2
    seed: int = 20_000
    sampling: Sequence[str] = ()


def parse_arm(text: str) -> Arm:
    """An arm of "name:run=DIR,key=value,...".

    Raises:
      UserError: it is not of this form, an unknown key, a bad value, or settings that do not go together.
    """
    from wallwm_jax.evaluation.actors import Acting

    name, colon, rest = text.partition(":")
    given = dict(entry.partition("=")[::2] for entry in rest.split(","))
    keys = ["run", *(field.name for field in fields(Acting))]
    if not colon or not re.search(r"\w", name) or not given.get("run"):
        raise UserError(f"--arm={text}: write name:run=DIR,key=value,... with {', '.join(keys)}")
    if unknown := set(given) - set(keys):
        raise UserError(f"--arm={text}: unknown {min(unknown)!r}; write name:key=value,... with {', '.join(keys)}")
    found: dict[str, Any] = {key: value for key, value in given.items() if key != "run"}
    try:
        if "execute" in found:
            found["execute"] = int(found["execute"])
        if "own_duration" in found:
            found["own_duration"] = {"": True, "true": True, "false": False}[found["own_duration"].lower()]
        acting = Acting(**found)
        acting.check()
    except (KeyError, ValueError) as error:
        raise UserError(f"--arm={text}: {error} is not a value here") from error
    except UserError as error:
        raise UserError(f"--arm={text}: {error}") from error
    return Arm(name, given["run"], acting)


def compare_arms(
    arms: Sequence[Arm], store_path: str | Path, out: str | Path, options: Options
) -> tuple[dict[str, Any], bool]:
    """Runs what is missing of the arms' trials, and writes into `out`.

    Returns:
      The content of `arms.json`, as `compare` and `settings`, name → what the arm's trials were made with; and whether
      all is done.

    Raises:
      UserError: a path is missing, runs that do not fit the store or each other, or trials made with other settings.
    """
    begun = time.monotonic()
    with phase("load"):
        from wallwm_jax.data.event_store import open_store
        from wallwm_jax.evaluation.closed_loop import draw_trials, open_pool

        store = open_store(store_path, "heldout")
        trials = draw_trials(store, options.families, options.episodes, options.seed)
        slots = min(options.batch, len(trials))
        actors, made_with, views = _open(arms, store, options, slots)
        directory = Path(out).expanduser()
        records = Records(directory / "trials", made_with)
    with (
        phase("act"),
        open_pool(store, slots, views=views, patience=options.patience, processes=options.processes) as pool,
    ):
        whole = run_arms(actors, pool, trials, records, deadline=begun + options.max_seconds)
    found = compare(records.paired(trials)) | {"settings": {name: arm["settings"] for name, arm in made_with.items()}}
    write_text(directory / "arms.json", json.dumps(found, indent=1) + "\n")
    write_text(directory / "arms.md", table(found) + "\n")
    (directory / "arms.png").write_bytes(picture(found))
    return found, whole


def run_arms(
    arms: Mapping[str, Actor], pool: EnvironmentPool, trials: Sequence[Trial], records: Records, *, deadline: float
) -> bool:
    """Runs what is not in the records yet, a group of trials on all arms before the next; returns whether all is done.

    Args:
      arms: name → actor.
      pool: where the episodes run.
      trials: of all arms, in the order in which they are run.
      records: of finished trials; a group is added when it has ended.
      deadline: `time.monotonic()` by which to be done: nothing is begun that would take longer than its arm's longest
        group so far.
    """
    from wallwm_jax.evaluation.closed_loop import grouped, run_group

    longest: dict[str, float] = {}
    jobs = [
        (name, todo)
        for group in grouped(trials, pool.slots)
        for name in arms
        if (todo := [trial for trial in group if trial not in records.of(name)])
    ]
    for name, todo in progress(jobs, total=len(jobs), unit="group", label="arms"):
        begun = time.monotonic()
        if begun + longest.get(name, 0.0) > deadline:
            return False
        results, _ = run_group(pool, arms[name], todo)
        records.add(name, results)
        longest[name] = max(longest.get(name, 0.0), time.monotonic() - begun)
    return True


class Records:
    """Finished trials of each arm, in a file each, beside the settings they were made with."""

    def __init__(self, directory: Path, arms: Mapping[str, Mapping[str, Any]]) -> None:
        """Opens or begins `directory`.

        Args:
          directory: made if absent.
          arms: name → {"file", "settings"}; settings are plain JSON.

        Raises:
          UserError: two arms of one file, or trials that were made with other settings.
        """
        if len({arm["file"] for arm in arms.values()}) < len(arms):
            raise UserError(f"arms {', '.join(arms)} do not differ in letters and digits; rename one")
        directory.mkdir(parents=True, exist_ok=True)
        self._files = {name: directory / arm["file"] for name, arm in arms.items()}
        self._settings = {name: json.loads(json.dumps(arm["settings"])) for name, arm in arms.items()}
        self._results = {name: self._read(name) for name in arms}

    def of(self, name: str) -> Mapping[Trial, EpisodeResult]:
        """The finished trials of an arm."""
        return self._results[name]

    def add(self, name: str, results: Sequence[EpisodeResult]) -> None:
        """Adds a group, and writes."""
        self._results[name] |= {result.trial: result for result in results}
        content = {"settings": self._settings[name], "trials": [asdict(r) for r in self._results[name].values()]}
        write_text(self._files[name], json.dumps(content, indent=1) + "\n")

    def paired(self, trials: Sequence[Trial]) -> dict[str, list[EpisodeResult]]:
        """Arm → results of those trials that all arms have finished, in one order."""
        common = [trial for trial in trials if all(trial in results for results in self._results.values())]
        return {name: [results[trial] for trial in common] for name, results in self._results.items()}

    def _read(self, name: str) -> dict[Trial, EpisodeResult]:
        from wallwm_jax.evaluation.closed_loop import EpisodeResult

        if not self._files[name].is_file():
            return {}
        content = json.loads(self._files[name].read_text())
        if content["settings"] != self._settings[name]:
            old, new = content["settings"], self._settings[name]
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            raise UserError(
                f"the trials in {str(self._files[name])!r} were made with another {' and '.join(changed)}; give "
                "another --out, or delete them"
            )
        found = {}
        for entry in content["trials"]:
            trial = Trial(**entry["trial"])
            subtasks = tuple(SubtaskResult(**subtask) for subtask in entry["subtasks"])
            found[trial] = EpisodeResult(trial, entry["success"], subtasks, entry["steps"])
        return found


def compare(paired: Mapping[str, Sequence[EpisodeResult]]) -> dict[str, Any]:
    """Compares results on the same trials in one order.

    Returns:
      `episodes`; `arms`, name → as `closed_loop.summarize`; `pairs`, a list of {"first", "second", "subtask":
      difference of the rates with its interval, "episode": McNemar's test}.
    """
    from wallwm_jax.evaluation.closed_loop import summarize
    from wallwm_jax.evaluation.statistics import mcnemar, paired_rate_difference

    counts = {
        name: [(sum(s.success for s in result.subtasks), len(result.subtasks)) for result in results]
        for name, results in paired.items()
    }
    won = {name: [result.success for result in results] for name, results in paired.items()}
    episodes = min((len(results) for results in paired.values()), default=0)
    pairs = [
        {
            "first": first,
            "second": second,
            "subtask": asdict(paired_rate_difference(counts[first], counts[second])),
            "episode": asdict(mcnemar(won[first], won[second])),
        }
        for first, second in itertools.combinations(paired, 2)
        if episodes
    ]
    return {"episodes": episodes, "arms": {n: summarize(results) for n, results in paired.items()}, "pairs": pairs}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: the arms, then each two of them."""
    from wallwm_jax.evaluation.statistics import difference_text, rate_text

    lines = [
        f"| {found['episodes']} paired episodes | subtasks achieved | per episode | episodes achieved |",
        "|---|---|---|---|",
    ]
    for name, row in found["arms"].items():
        lines.append(f"| {name} | {rate_text(row['subtask'])} | {row['progress']:.2f} | {rate_text(row['episode'])} |")
    lines += [
        "",
        "| first against second | subtasks, difference | episodes: only first, only second, p |",
        "|---|---|---|",
    ]
    for pair in found["pairs"]:
        episode = pair["episode"]
        outcome = f"{episode['only_first']}, {episode['only_second']}, p = {episode['p_value']:.2g}"
        lines.append(f"| {pair['first']} - {pair['second']} | {difference_text(pair['subtask'])} | {outcome} |")
    return "\n".join(lines)


def picture(found: Mapping[str, Any]) -> bytes:
    """PNG: the rates of the arms with their intervals."""
    from wallwm_jax.evaluation import figures

    rates = {name: {kind: row[kind] for kind in ("subtask", "episode")} for name, row in found["arms"].items()}
    return figures.intervals(rates, ours=rates)


def _open(
    arms: Sequence[Arm], store: EventStore, options: Options, batch: int
) -> tuple[dict[str, Actor], dict[str, dict[str, Any]], list[str]]:
    """(name → actor, name → what its records are made with, views to render); a run is loaded once for all its arms.

    Raises:
      UserError: a run that is not there, or that was trained on pictures of another size or clock than the store's.
    """
    from wallwm_jax.evaluation.actors import open_actor
    from wallwm_jax.inference.policy import Policy

    policies: dict[str, Policy] = {}
    actors, made_with = {}, {}
    for arm in arms:
        if arm.run not in policies:
            sampling = settings(options.sampling)
            policies[arm.run] = Policy.from_checkpoint(arm.run, batch_size=batch, sampling=sampling, seed=options.seed)
        policy = policies[arm.run]
        for key in ("size", "video_stride", "action_hz"):
            if policy.event_mode.store[key] != store.meta[key]:
                raise UserError(
                    f"{arm.run!r} was trained on a store whose {key} is {policy.event_mode.store[key]}, --store has "
                    f"{store.meta[key]}"
                )
        actors[arm.name] = open_actor(policy, arm.acting)
        common = {
            "store": store.meta["fingerprint"],
            "told_by_step": actors[arm.name].told_by_step,
            "patience": options.patience,
            "sampling": list(options.sampling),
        }
        made_with[arm.name] = {
            "file": arm.file,
            "settings": {"run": arm.run, "step": policy.step, **asdict(arm.acting), **common},
        }
    views = dict.fromkeys(view for policy in policies.values() for view in policy.event_mode.views)
    return actors, made_with, list(views)


def _define_flags() -> None:
    default = Options()
    flags.DEFINE_multi_string("arm", [], "name:run=DIR,key=value,... one way to act; repeat it.")
    flags.DEFINE_string("store", "", "Event store of OCBench that the runs were trained on.")
    flags.DEFINE_string("out", "", "Directory for the results; made if absent.")
    flags.DEFINE_integer("episodes", default.episodes, "Trials that all arms run.", 1)
    flags.DEFINE_list("families", [], "OCBench families or environment ids to act in; none takes those of the store.")
    flags.DEFINE_float("patience", default.patience, "Time for a subtask, in multiples of the expert's typical one.", 1)
    flags.DEFINE_float("max_seconds", default.max_seconds, "Time for everything; the same command goes on after it.", 0)
    flags.DEFINE_integer("batch", default.batch, "Episodes that run at once.", 1)
    flags.DEFINE_integer("processes", default.processes, "Simulator processes.", 1)
    flags.DEFINE_integer("seed", default.seed, "Of trials and sampling noise.")
    flags.DEFINE_multi_string("sampling", [], "Entry of config.sampling to change in all runs: name=value; repeat it.")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    arms = [parse_arm(text) for text in values.arm]
    if not arms or len({arm.name for arm in arms}) < len(arms):
        raise UserError("give each --arm a name of its own" if arms else "no --arm given; see --help")
    for name in ("store", "out"):
        if not values[name].value:
            raise UserError(f"no --{name} given; see --help")
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in fields(Options)}
    found, whole = compare_arms(arms, values.store, values.out, Options(**chosen))
    print(table(found))
    print(f"results: {Path(values.out) / 'arms.md'}" + ("" if whole else "; time is up, run it again to go on"))
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
