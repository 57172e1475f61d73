"""The page of a build: which episodes came in, what was found in them, what was dropped, with pictures to check it by.

`write_build_report` puts `build_report.html` (pictures inside, no network needed) and `build_report.json` into a store.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from wallwm_jax.console import write_text
from wallwm_jax.evaluation.figures import BLUE, MUTED, ORANGE, STYLE, to_png
from wallwm_jax.evaluation.timelines import data_uri
from wallwm_jax.events.clean import DROPPED, NOTED, REPAIRED
from wallwm_jax.events.motion import decode
from wallwm_jax.events.preparing import EXPLANATIONS, Example, Summary

_WIDTH = 8.6  # inches of a full-width figure
_BINS = 61
_LINES = 50  # of findings without pictures
_ACTIONS = (DROPPED, REPAIRED, NOTED)


def write_build_report(directory: Path, summary: Summary, title: str) -> dict[str, Any]:
    """Writes `build_report.html` and `build_report.json` into `directory`; returns what the latter holds.

    Args:
      directory: of the store.
      summary: of the finished preparation.
      title: of the page.
    """
    data = _data(summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wallwm_jax.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("build_report.html.j2").render(title=title, **_content(summary, data))
    write_text(directory / "build_report.json", json.dumps(data, indent=1) + "\n")
    write_text(directory / "build_report.html", page)
    return data


def _data(summary: Summary) -> dict[str, Any]:
    options = summary.options
    limits: dict[str, Any] = {}
    for used, part in ((options.clean, options.limits), (options.sync, options.sync_limits)):
        limits.update(dataclasses.asdict(part) if used else {})
    return {
        "episodes_in": summary.taken.total(),
        "episodes_kept": summary.kept.total(),
        "sources": {
            source: {"in": count, "kept": summary.kept[source], "dropped": count - summary.kept[source]}
            for source, count in sorted(summary.taken.items())
        },
        **{f"{action}_by_rule": summary.counts(action) for action in (DROPPED, REPAIRED, NOTED)},
        "lags": [
            {"source": source, "seconds": seconds, "believed": believed} for source, seconds, believed in summary.lags
        ],
        "limits": limits,
        "findings": [
            {
                "rule": finding.rule,
                "source": finding.source,
                "episode": finding.episode,
                "action": finding.action,
                "where": finding.where,
                "evidence": {name: float(value) for name, value in finding.evidence.items()},
            }
            for finding in summary.findings
        ],
    }


def _content(summary: Summary, data: dict[str, Any]) -> dict[str, Any]:
    """The variables of the template."""
    options, taken, kept = summary.options, data["episodes_in"], data["episodes_kept"]
    done = [word for word, used in (("cleaned", options.clean), ("synchronised", options.sync)) if used]
    found = [rule for rule in EXPLANATIONS if any(rule in data[f"{action}_by_rule"] for action in _ACTIONS)]
    return {
        "lead": f"Episodes were {' and '.join(done) or 'neither cleaned nor synchronised'} before they were cut into "
        "windows. What did not go on is here, each with the rule that stopped it and what the rule saw.",
        "facts": [
            {"name": "episodes in", "value": f"{taken:,}"},
            {"name": "kept", "value": f"{kept:,}"},
            {"name": "dropped", "value": f"{taken - kept:,}"},
            {"name": "findings repaired", "value": f"{sum(data['repaired_by_rule'].values()):,}"},
        ],
        "sources": [
            {"name": name, "taken": row["in"], "dropped": row["dropped"], "kept": row["kept"]}
            for name, row in data["sources"].items()
        ],
        "rules": [
            {
                "name": _words(rule),
                "why": EXPLANATIONS[rule],
                "counts": [data[f"{action}_by_rule"].get(rule, 0) for action in _ACTIONS],
            }
            for rule in found
        ],
        "told": _told(summary),
        "lags": _lags(summary),
        "examples": [
            {
                "name": _words(rule),
                "why": EXPLANATIONS[rule],
                "examples": [_shown(example) for example in summary.examples if example.finding.rule == rule],
            }
            for rule in found
            if any(example.finding.rule == rule for example in summary.examples)
        ],
        "limits": data["limits"],
    }


def _told(summary: Summary) -> list[dict[str, Any]]:
    """What rules without pictures found, equal findings of several episodes together, the most frequent first."""
    shown = {example.finding.rule for example in summary.examples}
    told = Counter((finding.rule, finding.where) for finding in summary.findings if finding.rule not in shown)
    return [{"name": _words(rule), "where": where, "count": count} for (rule, where), count in told.most_common(_LINES)]


def _words(rule: str) -> str:
    return rule.replace("_", " ")


def _shown(example: Example) -> dict[str, Any]:
    finding = example.finding
    numbers = "; ".join(f"{name}: {value:.3g}" for name, value in finding.evidence.items())
    curve = example.change is not None
    return {
        "episode": f"{finding.source}, {finding.episode}",
        "where": f"{finding.where[:1].upper()}{finding.where[1:]}",
        "evidence": numbers,
        "action": finding.action,
        "view": example.view,
        "curve": data_uri(_motion_curves(example), "png") if curve else None,
        "strip": [
            {
                "number": number,
                "picture": _thumbnail(picture),
                "here": number == finding.frame and not curve,
            }
            for number, picture in zip(example.frames, example.pictures)
        ],
    }


def _lags(summary: Summary) -> dict[str, str] | None:
    if not summary.lags:
        return None
    seconds = np.array([lag for _, lag, _ in summary.lags])
    believed = np.array([trusted for *_, trusted in summary.lags])
    limits = summary.options.sync_limits
    caption = f"{len(seconds)} episodes, {int((~believed).sum())} quarantined. "
    if believed.any():
        low, middle, high = np.quantile(seconds[believed], (0.05, 0.5, 0.95))
        caption += f"Of those believed: median {middle:+.3f} s, 5 to 95 % from {low:+.2f} to {high:+.2f} s. "
    caption += f"Positive: the pictures are late. Dotted: the longest lag that is corrected, {limits.max_lag_s:g} s."
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        bins = np.linspace(-limits.search_s, limits.search_s, _BINS).tolist()
        parts, labels = [seconds[believed], seconds[~believed]], ["believed", "quarantined"]
        axes.hist(parts, bins, stacked=True, color=[BLUE, ORANGE], label=labels)
        for edge in (-limits.max_lag_s, limits.max_lag_s):
            axes.axvline(edge, color=MUTED, linestyle=":")
        axes.legend(loc="upper right")
        axes.set_xlabel("seconds that the pictures are behind the actions")
        axes.set_ylabel("episodes")
        axes.grid(axis="x", visible=False)
        return {"picture": data_uri(to_png(figure), "png"), "caption": caption}


def _motion_curves(example: Example) -> bytes:
    """How much the pictures changed and how far the hands went, over the seconds of an episode."""
    assert example.seconds is not None and example.change is not None and example.travel is not None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.7), layout="constrained")
        axes = figure.subplots()
        axes.plot(example.seconds, example.change, color=BLUE, linewidth=1.4, label="pictures, all cameras")
        axes.plot(example.seconds, example.travel, color=ORANGE, linewidth=1.4, label="hands, as recorded")
        axes.set_xlabel("seconds")
        axes.set_ylabel("motion")
        axes.set_yticks([])
        axes.set_xlim(0, example.seconds[-1])
        axes.set_ylim(0, 1.35)
        axes.legend(loc="upper right", ncols=2)
        return to_png(figure)


def _thumbnail(data: bytes) -> str | None:
    """The stored frame itself where it is small, else 128 pixels high; None where it is no picture."""
    picture = decode(data, cv2.IMREAD_COLOR)
    if picture is None:
        return None
    if len(picture) > 128:
        width = round(picture.shape[1] * 128 / len(picture))
        small = cv2.resize(picture, (width, 128), interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", small)[1].tobytes()
    return data_uri(data, "jpeg")
