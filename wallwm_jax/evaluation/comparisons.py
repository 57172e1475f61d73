"""What a report says of comparisons of ways to act and of planners: results of other commands, read and in words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from wallwm_jax.config import require_directory
from wallwm_jax.console import UserError
from wallwm_jax.evaluation import arms, figures, planner_accuracy
from wallwm_jax.evaluation.statistics import difference_text, rate_text
from wallwm_jax.evaluation.timelines import data_uri


def read_result(path: Path, keys: Collection[str], remedy: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
      UserError: it is missing or damaged, or lacks one of `keys`.
    """
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{str(path)!r} is missing or damaged ({error}); {remedy}") from None
    for key in keys:
        if key not in found:
            raise UserError(f"{str(path)!r} has no {key!r}; {remedy}")
    return found


def read_comparisons(directories: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What `arms.json` holds in each --out of `evaluation.arms`, and its `name`.

    Raises:
      UserError: one is missing or damaged.
    """
    remedy = "make it with python -m wallwm_jax.evaluation.arms, which keeps finished trials"
    paths = [require_directory(str(directory), "arms", remedy) for directory in directories]
    found = [read_result(path / "arms.json", ("episodes", "arms", "pairs", "settings"), remedy) for path in paths]
    return [{"name": name} | content for name, content in zip(short_names(paths), found)]


def read_planner(file: str | Path) -> dict[str, Any]:
    """What `evaluation.planner_accuracy` wrote.

    Raises:
      UserError: it is missing or damaged.
    """
    remedy = "make it with python -m wallwm_jax.evaluation.planner_accuracy --out=FILE"
    keys = ("workdir", "step", "levels", "questions", *planner_accuracy.ANSWERERS, "time_left")
    return read_result(Path(file).expanduser(), keys, remedy)


def short_names(directories: Sequence[Path]) -> list[str]:
    """Their last parts, or the whole paths where two have the same."""
    short = [directory.name for directory in directories]
    return short if len(set(short)) == len(short) else [str(directory) for directory in directories]


def comparison_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the template for one of `read_comparisons`."""
    return {
        "name": found["name"],
        "episodes": found["episodes"],
        "picture": data_uri(arms.picture(found), "png"),
        "rows": [
            {
                "name": name,
                "subtask": rate_text(row["subtask"]),
                "progress": row["progress"],
                "episode": rate_text(row["episode"]),
                "acting": way_of_acting(found["settings"][name]),
                "model": "{run}, step {step}".format(**found["settings"][name]),
            }
            for name, row in found["arms"].items()
        ],
        "pairs": [{**pair, "subtask": difference_text(pair["subtask"])} for pair in found["pairs"]],
    }


def planner_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the template for `read_planner`."""
    names, measures = planner_accuracy.ANSWERERS, planner_accuracy.MEASURES
    panels = {key: title.replace(", ", ",\n") for key, title in measures.items()}
    rates = {label: {panels[key]: found[name][key] for key in panels} for name, label in names.items()}
    return {
        "model": f"{found['workdir']}, step {found['step']}",
        "levels": " and ".join(found["levels"]),
        "questions": found["questions"],
        "picture": data_uri(figures.intervals(rates, ours=(names["planner"],), suffix=""), "png"),
        "names": list(names.values()),
        "rows": [
            {"label": label, "cells": [rate_text(found[name][key]) for name in names]}
            for key, label in measures.items()
        ],
        "times": planner_accuracy.time_lines(found),
    }


def decoding_mode(options: Mapping[str, Any]) -> str:
    """The mode of settings of `actors.Acting`; those of evaluations before unified mode did not say."""
    return str(options.get("mode", "event"))


def told_by(options: Mapping[str, Any]) -> str:
    """What told the policy what to do."""
    if decoding_mode(options) == "unified":
        text = options.get("text") or "instruction"
        return {"instruction": "the task's instruction", "event": "a scripted planner, chunk by chunk"}.get(
            text, f"latents of {Path(text).name}"
        )
    planner = options.get("planner", "oracle")
    return "a scripted planner" if planner == "oracle" else f"the vision-language model of {Path(planner).name}"


def way_of_acting(options: Mapping[str, Any]) -> str:
    """The settings of `actors.Acting` in a line."""
    if decoding_mode(options) == "unified":
        played = f", the first {options['execute']} steps of a chunk" if options.get("execute") else ""
        return f"unified: {told_by(options)}{played}"
    durations = "their durations are the model's own" if options.get("own_duration") else "and their durations"
    return f"event: {told_by(options)} names {options.get('level', 'subtask')}s, {durations}"
