"""Sweeps: arms of overrides times seeds, each a run of its own, and what all of them found, with intervals.

A sweep file in `configs/sweeps/` has `get_sweep()`, or `get_sweep(argument)`, and returns a `Sweep`. Runs of one seed
see the same data in the same order and start from the same parameters, so arms are compared seed by seed.

    out/ARM/seed-N/train        the training run         out/ARM/seed-N/log.txt     what its commands printed
                  /evaluation   where the sweep evaluates       /report/report.json  its figures
                  /figures.json where the sweep measures
                  /done.json    the commands that made it
    out/results.json, results.md, results.png            all runs together
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.evaluation import figures
from wallwm_jax.evaluation.statistics import mean_interval, paired_rate_difference, rate_text, success_rate
from wallwm_jax.training.telemetry import read_metrics

FIGURES = "figures.json"
TAIL = 0.05
"""Share of a run's steps that its final loss is the mean of, and that a loss curve is smoothed over."""


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
      config: the config file, with its argument, that every run starts from.
      arms: name → overrides of that arm, {"optim.lr": 1e-3}.
      seeds: each arm is run with each of them.
      overrides: of all runs.
      evaluate: flags of `wallwm_jax.evaluate` to evaluate each run with; None trains only.
      measure: module that measures each run, `python -m MEASURE --workdir= --store= --out=FILE`; the `figures` in that
        file are collected, by name. "" measures nothing.
      measure_store: store that it reads; "" the one trained on.
      paired_with: the arm from whose errors, `paired` in that file, the others' are subtracted, event by event; ""
        pairs none.
      reference: the arm whose final loss the others' speed is measured by; "" leaves that measure out.
    """

    config: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0,)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Sequence[str] | None = None
    measure: str = ""
    measure_store: str = ""
    paired_with: str = ""
    reference: str = ""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise UserError("a sweep needs at least one arm and one seed")
        for name in (self.reference, self.paired_with):
            if name and name not in self.arms:
                raise UserError(f"reference {name!r} is none of the arms {', '.join(self.arms)}")
        if self.paired_with and not self.measure:
            raise UserError("a sweep that pairs its arms needs the module that measures them, measure=...")
        folders = [_folder(arm) for arm in self.arms]
        if len(set(folders)) < len(folders):
            raise UserError(f"arms {', '.join(self.arms)} do not differ in letters and digits; rename one")


@dataclass(frozen=True)
class Run:
    """One arm with one seed, in `out/directory`."""

    arm: str
    seed: int
    directory: str


def load_sweep(path: str) -> Sweep:
    """The sweep of a file, `configs/sweeps/x.py` or `configs/sweeps/x.py:argument`.

    Raises:
      UserError: no such file, no `get_sweep` in it, or a missing, unknown or needless argument.
    """
    name, _, argument = path.partition(":")
    file = Path(name)
    if not file.is_file():
        raise UserError(f"sweep file {name!r} does not exist; those that ship are in configs/sweeps/")
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"sweep file {name!r} has no get_sweep()")
    try:
        inspect.signature(module.get_sweep).bind(*([argument] if argument else []))
    except TypeError as error:
        raise UserError(f"{path}: get_sweep{inspect.signature(module.get_sweep)}: {error}") from error
    sweep: Sweep = module.get_sweep(argument) if argument else module.get_sweep()
    return sweep


def plan(sweep: Sweep) -> list[Run]:
    """All runs, seed by seed, so that a sweep that is stopped has whole comparisons."""
    return [Run(arm, seed, f"{_folder(arm)}/seed-{seed}") for seed in sweep.seeds for arm in sweep.arms]


def commands(sweep: Sweep, run: Run, out: Path, store: str) -> list[list[str]]:
    """The commands of one run, in order, without the interpreter; each can be run again after a stop."""
    directory = out / run.directory
    settings = {**sweep.overrides, **sweep.arms[run.arm], "data.store": store, "seed": run.seed}
    train = str(directory / "train")
    listed = [
        ["wallwm_jax.train", f"--config={sweep.config}", f"--workdir={train}", "--resume"]
        + [f"--config.{knob}={value}" for knob, value in settings.items()]
    ]
    where = [f"--workdir={train}", f"--store={store}"]
    if sweep.measure:
        measured = [where[0], f"--store={sweep.measure_store or store}"]
        listed.append([sweep.measure, *measured, f"--out={directory / FIGURES}"])
    if sweep.evaluate is not None:
        results, report = f"{directory / 'evaluation'}", f"{directory / 'report'}"
        listed.append(["wallwm_jax.evaluate", *where, f"--out={results}", *sweep.evaluate])
        listed.append(["wallwm_jax.evaluation.report", *where, f"--evaluation={results}", f"--out={report}"])
    return listed


@dataclass(frozen=True)
class Results:
    """What the finished runs of a sweep found.

    Attributes:
      arms: name → measure → {"values", "mean", "low", "high"}, a value per seed, None where a loss is never reached,
        and the rest None then; rates have {"rate", "low", "high", "episodes"} over all seeds. Intervals are 95 %:
        Student's over seeds (None of one seed), Wilson's over episodes.
      pairs: name → figure → {"difference", "low", "high"}: by how much an arm's errors are below those of the arm
        `paired_with` on the same events, each the mean over the seeds that both have finished; 95 %, by a bootstrap
        over episodes: of which events were measured, not of how training runs differ.
      paired_with: its name.
      curves: name → smoothed losses, one list per seed.
      finished, planned: numbers of runs.
    """

    arms: dict[str, dict[str, dict[str, Any]]]
    pairs: dict[str, dict[str, dict[str, Any]]]
    curves: dict[str, list[list[float]]]
    finished: int
    planned: int
    paired_with: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything but the curves."""
        return {"finished": self.finished, "planned": self.planned, "arms": self.arms, "pairs": self.pairs}

    def table(self) -> str:
        """Markdown: one line per arm, one column per measure; then, where arms are paired, the same of differences."""
        tables = [_table(f"{self.finished} of {self.planned} runs", self.arms)]
        if self.pairs:
            tables.append(_table(f"below {self.paired_with}'s, event by event", self.pairs))
        return "\n\n".join(tables)

    def picture(self) -> bytes:
        """PNG: smoothed loss curves of the arms, and each measure with its interval."""
        return figures.sweep(self.arms, self.curves)


def collect(sweep: Sweep, out: Path) -> Results:
    """Reads the runs that are finished."""
    runs = plan(sweep)
    finished = [run for run in runs if (out / run.directory / "done.json").is_file()]
    losses = {(run.arm, run.seed): _loss(out / run.directory / "train") for run in finished}
    arms: dict[str, dict[str, dict[str, Any]]] = {}
    curves: dict[str, list[list[float]]] = {}
    for arm in sweep.arms:
        mine = [run for run in finished if run.arm == arm]
        if not mine:
            continue
        row = arms[arm] = {}
        curves[arm] = [list(smoothed(losses[arm, run.seed])) for run in mine]
        row["final loss"] = _over_seeds([_final(losses[arm, run.seed]) for run in mine])
        paired = [run.seed for run in mine if (sweep.reference, run.seed) in losses and arm != sweep.reference]
        if paired:
            less = [_final(losses[sweep.reference, seed]) - _final(losses[arm, seed]) for seed in paired]
            row[f"below {sweep.reference}'s, seed by seed"] = _over_seeds(less)
            steps = [steps_to_reach(losses[arm, seed], losses[sweep.reference, seed]) for seed in paired]
            row[f"steps to {sweep.reference}'s final loss"] = _over_seeds(steps)
        measured = [_read(out / run.directory / FIGURES)["figures"] for run in mine] if sweep.measure else [{}]
        for name in measured[0]:
            row[name] = _over_seeds([found[name] for found in measured])
        files = [out / run.directory / "report" / "report.json" for run in mine]
        reports = [_read(file) for file in files] if sweep.evaluate is not None else []
        if reports:
            row["open-loop error"] = _over_seeds([report["open_loop"]["model"] for report in reports])
            row["times the better baseline"] = _over_seeds(
                [report["open_loop"]["model"] / min(report["open_loop"]["baselines"].values()) for report in reports]
            )
        rates = [report["success"]["trained"]["subtask"] for report in reports if "trained" in report["success"]]
        if rates:
            won = sum(round(rate["rate"] * rate["episodes"]) for rate in rates)
            row["subtasks achieved"] = success_rate(won, sum(rate["episodes"] for rate in rates)).to_json()
    return Results(arms, _pairs(sweep, finished, out), curves, len(finished), len(runs), sweep.paired_with)


def _pairs(sweep: Sweep, finished: Sequence[Run], out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The `pairs` of `Results`."""
    if not sweep.paired_with:
        return {}
    found = {(run.arm, run.seed): _read(out / run.directory / FIGURES)["paired"] for run in finished}
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for arm in sweep.arms:
        seeds = [seed for seed in sweep.seeds if {(arm, seed), (sweep.paired_with, seed)} <= found.keys()]
        if arm == sweep.paired_with or not seeds:
            continue
        sides = [[found[name, seed] for seed in seeds] for name in (sweep.paired_with, arm)]
        measured = [{figure: run[figure]["windows"] for figure in run} for side in sides for run in side]
        if any(events != measured[0] for events in measured):
            raise UserError(f"{arm!r} and {sweep.paired_with!r} were measured on different events; they do not pair")
        pairs[arm] = {
            figure: asdict(paired_rate_difference(*([*_by_episode(side, figure).values()] for side in sides)))
            for figure in sides[0][0]
        }
    return pairs


def _by_episode(runs: Sequence[Mapping[str, Any]], figure: str) -> dict[str, tuple[float, int]]:
    """Episode → (sum, count) of the errors of its events, each the mean over runs on the same events."""
    episodes = runs[0][figure]["episodes"]
    errors = np.mean([run[figure]["values"] for run in runs], axis=0)
    sums: dict[str, tuple[float, int]] = {}
    for episode, error in zip(episodes, errors.tolist(), strict=True):
        total, count = sums.get(episode, (0.0, 0))
        sums[episode] = (total + error, count + 1)
    return sums


def smoothed(losses: np.ndarray) -> np.ndarray:
    """`[steps]` means over the last `TAIL` of all steps up to each; the last one is the run's final loss."""
    width = max(1, round(TAIL * len(losses)))
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def steps_to_reach(losses: np.ndarray, reference: np.ndarray) -> float | None:
    """Steps until the smoothed loss is at most the reference's final one; None if it never is."""
    reached = np.flatnonzero(smoothed(losses) <= _final(reference))
    return float(reached[0] + 1) if len(reached) else None


def _final(losses: np.ndarray) -> float:
    return float(smoothed(losses)[-1])


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean, low, high = mean_interval(known) if len(known) == len(values) else (None, None, None)
    return {"values": list(values), "mean": mean, "low": low, "high": high}


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    lines = [f"| {title} | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(_cell(row.get(name)) for name in measures) + " |" for arm, row in rows.items()]
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    if "episodes" in entry:
        return rate_text(entry)
    if "difference" in entry:
        interval = "" if entry["low"] is None else f" [{entry['low']:+.4f}, {entry['high']:+.4f}]"
        return f"{entry['difference']:+.4f}{interval}"
    if entry["mean"] is None:
        return f"reached by {sum(value is not None for value in entry['values'])} of {len(entry['values'])}"
    interval = "" if entry["low"] is None else f" [{entry['low']:.4g}, {entry['high']:.4g}]"
    return f"{entry['mean']:.4g}{interval}"


def _loss(train: Path) -> np.ndarray:
    return np.array([line["loss"] for line in read_metrics(train)])


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def _folder(arm: str) -> str:
    return re.sub(r"[^0-9A-Za-z.]+", "-", arm).strip("-")
