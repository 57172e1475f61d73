r"""Makes one self-contained page of a run: what the data is, how training went, what the model does.

    python -m wallwm_jax.evaluation.report --evaluation=runs/evaluation --workdir=runs/quickstart --store=runs/store \
        --out=runs/report

Writes report.html (pictures inside, no network needed) and report.json, its figures for programs: what
`evaluation.json` holds, and `packing_efficiency`, `balance`, `phase_seconds`. --phases names a JSON file of seconds per
phase, {"data": 231.0, ...}, to be listed before those of the evaluation.

--evaluation may be repeated: both decoding modes, or several sources of text, are then compared in one table (and in
`evaluations` of report.json), and the page shows the first of them.

--arms=DIR, the --out of wallwm_jax.evaluation.arms, adds a comparison on the same trials (`arms` of report.json) and
may be repeated; --planner=FILE, the --out of wallwm_jax.evaluation.planner_accuracy, how well a planner names events
(`planner`). Both need no evaluation, and a page of them alone no --workdir and --store:

    python -m wallwm_jax.evaluation.report --arms=runs/arms/table --arms=runs/sweeps/views/acting \
        --planner=runs/arms/planner.json --out=runs/report
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from wallwm_jax.config import require_directory
from wallwm_jax.console import UserError, run_command, write_text
from wallwm_jax.data.balance import balance_report, plan_draw
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.evaluation import figures
from wallwm_jax.evaluation.comparisons import (
    comparison_section,
    decoding_mode,
    planner_section,
    read_comparisons,
    read_planner,
    read_result,
    short_names,
    told_by,
    way_of_acting,
)
from wallwm_jax.evaluation.event_errors import family_of
from wallwm_jax.evaluation.open_loop import BASELINES, MODEL, MODEL_PREDICTED, PREDICTORS
from wallwm_jax.evaluation.timelines import data_uri, frames_along, level_bars
from wallwm_jax.events.windows import KINDS
from wallwm_jax.paths import open_run
from wallwm_jax.training.telemetry import METRICS_FILE, read_heldout, read_metrics

POLICIES = ("trained", "untrained", "expert_replay")
_STREAMS = {"loss_video": "video loss", "loss_action": "action loss", "loss_duration": "duration loss"}
_LABELS = {
    MODEL: "model",
    MODEL_PREDICTED: "model, its own duration",
    "hold_still": "hold still",
    "cluster_mean": "cluster mean",
}
_PACKING_BLOCKS = 16


def build_report(
    evaluations: Sequence[str | Path],
    workdir: str | Path,
    store_path: str | Path,
    out: str | Path,
    phases: Mapping[str, float],
    *,
    arms: Sequence[str | Path] = (),
    planner: str | Path = "",
) -> Path:
    """Writes `report.html` and `report.json` into `out`; returns the path of the page.

    Args:
      evaluations: directories of `wallwm_jax.evaluate`; the page shows the first and compares all.
      workdir: of the training run that was evaluated.
      store_path: its event store.
      out: made if absent.
      phases: seconds per phase before the evaluation; the evaluation's own phases are added.
      arms: directories of `evaluation.arms`.
      planner: JSON file of `evaluation.planner_accuracy`; "" is none.

    Raises:
      UserError: a part is missing or unreadable, or there is none.
    """
    comparisons = read_comparisons(arms)
    accuracy = read_planner(planner) if str(planner) else None
    if evaluations:
        data, content = _evaluated(evaluations, workdir, store_path, phases)
    elif not (comparisons or accuracy):
        raise UserError(
            "no evaluation given; pass --evaluation=DIR, the --out of wallwm_jax.evaluate, or --arms or --planner"
        )
    elif str(workdir) or str(store_path):
        raise UserError("--workdir and --store are of an evaluated run: pass its --evaluation=DIR, or leave them out")
    else:
        data, content = {"phase_seconds": dict(phases)}, {"lead": _lead_without_evaluation(comparisons, accuracy)}
    data |= {"arms": comparisons, "planner": accuracy}
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title="wallwm_jax: from events to actions",
            evaluated=bool(evaluations),
            arms=[comparison_section(found) for found in comparisons],
            planner=planner_section(accuracy) if accuracy else None,
            phases=data["phase_seconds"],
            **content,
        )
    )
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(data, indent=1) + "\n")
    write_text(out / "report.html", page)
    return out / "report.html"


def _evaluated(
    evaluations: Sequence[str | Path], workdir: str | Path, store_path: str | Path, phases: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What report.json holds of an evaluated run, and the variables of the template."""
    remedy = "make it with python -m wallwm_jax.evaluate"
    directories = [require_directory(str(evaluation), "evaluation", remedy) for evaluation in evaluations]
    run = open_run(workdir)
    keys = ("options", "config", "success", "open_loop", "strips", "phase_seconds")
    results = [read_result(directory / "evaluation.json", keys, remedy) for directory in directories]
    result = results[0]
    store = open_store(store_path, "train")
    config = ConfigDict(result["config"])
    seconds = {**phases, **{f"evaluation: {name}": value for name, value in result["phase_seconds"].items()}}
    packing = Sampler(store.index, config, sources=store.meta["sources"]).report(_PACKING_BLOCKS)
    balance = _balance(store, config)
    metrics = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    data = {
        **{key: value for key, value in result.items() if key not in ("strips", "phase_seconds")},
        "phase_seconds": seconds,
        "packing_efficiency": packing["fill"],
        "packing": packing,
        "balance": balance,
        "training": _training_summary(metrics),
        "evaluations": _compared(directories, results),
    }
    curves = figures.loss_curves(losses, _losses(read_heldout(run))) if (losses := _losses(metrics))[0] else b""
    return data, _content(result, directories[0], store, data, curves)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("wallwm_jax.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _content(
    result: dict[str, Any], directory: Path, store: EventStore, data: dict[str, Any], curves: bytes
) -> dict[str, Any]:
    """The variables of the template."""
    success = {policy: result["success"][policy] for policy in POLICIES if policy in result["success"]}
    open_loop = result["open_loop"]
    unified = decoding_mode(result["options"]) == "unified"  # whose chunks have one length, which is given
    predictors = [name for name in PREDICTORS if not (unified and name == MODEL_PREDICTED)]
    errors = {_LABELS[name]: _error(open_loop, name) for name in predictors}
    compared = data["evaluations"] if len(data["evaluations"]) > 1 else []
    rollout = result.get("rollout")
    duration = open_loop["duration"]
    pictures = {
        "intervals": _png(
            figures.intervals({p: {m: row[m] for m in ("subtask", "episode")} for p, row in success.items()})
        )
        if success
        else None,
        "compared": _png(figures.intervals(rates, ours=rates))
        if (rates := {row["name"]: row["success"] for row in compared if row["success"]})
        else None,
        "rollout": _picture(directory / rollout["file"]) if rollout else None,
        "open_loop": _png(
            figures.errors(
                f"Action error on held-out {'chunks' if unified else 'events'}",
                errors,
                "normalised L1, lower is better",
            )
        ),
        "strips": [{**strip, "picture": _picture(directory / strip["file"])} for strip in result["strips"]],
        "duration": _png(
            figures.scatter(
                "Duration of held-out events",
                np.array(duration["true_s"]),
                np.array(duration["predicted_s"]),
                "seconds",
            )
        )
        if not unified
        else None,
        "clusters": _cluster_pictures(data["balance"]),
        "losses": _png(curves) if curves else None,
    }
    return {
        "lead": _lead(result, store),
        "facts": _facts(result, data),
        "unified": unified,
        "acting": _acting(result),
        "compared": compared,
        "same_trials": len({row["trials"] for row in compared if row["trials"]}) <= 1,
        "success": [{"policy": policy, **row} for policy, row in success.items()],
        "breakdown": _breakdown(success),
        "rollout_caption": _rollout_caption(rollout),
        "open_loop": {
            "windows": open_loop["windows"],
            "rows": [
                {"name": name, "label": _LABELS[name], "error": _error(open_loop, name), **open_loop["physical"][name]}
                for name in predictors
            ],
            "groups": [
                {"name": name, "windows": row["windows"], "errors": [row[p] for p in predictors]}
                for name, row in [*open_loop["by_level"].items(), *open_loop["by_verb"].items()]
            ],
        },
        "video": open_loop["final_frame_psnr"],
        "duration": duration,
        "timeline": _timeline(store),
        "balance": _balance_table(data["balance"]),
        "training_caption": _training_caption(data["training"]),
        "pictures": pictures,
    }


def _lead(result: dict[str, Any], store: EventStore) -> str:
    families = sorted({family_of(source) for source in store.meta["sources"]})
    episodes = sum(episode["split"] == store.split for episode in store.episodes)
    views = len(result["config"]["data"]["views"] or store.meta["views"])
    chunks = result["config"]["data"]["window_kind"] == "history"
    return (
        f"A world action model of {result['parameters'] / 1e6:.1f} M parameters, trained for {result['step']} steps on "
        f"the {'chunks' if chunks else 'events'} of {episodes} demonstrations ({', '.join(families)}): the "
        f"{'instruction' if chunks else 'caption'}, the video of {views} camera{'s' if views > 1 else ''} and the "
        f"actions of one {'chunk, after a history,' if chunks else 'event'} at a time."
    )


def _lead_without_evaluation(comparisons: Sequence[Any], accuracy: Any) -> str:
    count = len(comparisons)
    parts = [f"{count} comparison{'s' if count > 1 else ''} of ways to act on the same trials"] if count else []
    parts += ["how well a planner names the next event"] if accuracy else []
    return f"This page holds {' and '.join(parts)}; no evaluation of one run was given."


def _acting(result: Mapping[str, Any]) -> str:
    """How the policy acts, for people."""
    options = result["options"]
    if decoding_mode(options) == "event":
        says, decides = " and how long it takes", ""
        if options.get("own_duration"):
            says, decides = "", "says how long the event takes, "
        return (
            f"In event mode {told_by(options)} names the next event{says}; the model sees the cameras, the arm's state "
            f"and that text, {decides}and moves the arm for the whole event."
        )
    steps = options.get("execute", 0)
    return (
        "In unified mode the model sees the recent past, the cameras and the arm's state, and moves the arm for "
        f"{f'the first {steps} steps of ' if steps else ''}a chunk of fixed length; it is told what to do by "
        f"{told_by(options)}."
    )


def _compared(directories: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per evaluation; `trials` names those that it acted on."""
    rows = []
    for name, result in zip(short_names(directories), results):
        trained = result["success"].get("trained")
        rows.append(
            {
                "name": name,
                "mode": decoding_mode(result["options"]),
                "acting": way_of_acting(result["options"]),
                "model": f"{Path(result['workdir']).name}, step {result['step']}",
                "success": {measure: trained[measure] for measure in ("subtask", "episode")} if trained else {},
                "trials": ", ".join(sorted(f"{t['env_id']}:{t['seed']}" for t in trained["trials"])) if trained else "",
                "open_loop_ratio": _ratio(result["open_loop"]),
            }
        )
    return rows


def _ratio(open_loop: Mapping[str, Any]) -> float:
    """Action error of the model, as a share of the better baseline's."""
    return float(open_loop[MODEL] / min(open_loop["baselines"].values()))


def _facts(result: dict[str, Any], data: dict[str, Any]) -> list[dict[str, str]]:
    facts = [
        {"name": "training windows", "value": f"{sum(entry['windows'] for entry in data['balance']):,}"},
        {"name": "of packed latents are real", "value": f"{100 * data['packing_efficiency']:.1f} %"},
        {"name": "action error, share of the better baseline", "value": f"{_ratio(result['open_loop']):.2f}"},
    ]
    if "trained" in result["success"]:
        facts.append(
            {"name": "subtasks achieved", "value": f"{100 * result['success']['trained']['subtask']['rate']:.0f} %"}
        )
    return facts


def _breakdown(success: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for group in ("by_family", "by_verb"):
        for name in dict.fromkeys(name for row in success.values() for name in row[group]):
            counts = [row[group].get(name, (0, 0)) for row in success.values()]
            rows.append({"name": name, "cells": [f"{won} / {tried}" if tried else "-" for won, tried in counts]})
    return {"policies": list(success), "rows": rows} if rows else {}


def _rollout_caption(rollout: Mapping[str, Any] | None) -> str:
    if rollout is None:
        return ""
    told = "; ".join(
        f"{caption}: {'achieved' if success else 'not achieved'}" for caption, success in rollout["subtasks"]
    )
    end = "The task succeeded." if rollout["success"] else "The task did not succeed."
    return f"{rollout['env_id']}, seed {rollout['seed']}, the best of the filmed episodes. {told}. {end}"


def _error(open_loop: Mapping[str, Any], name: str) -> float:
    return open_loop["baselines"][name] if name in BASELINES else open_loop[name]


def _timeline(store: EventStore) -> dict[str, Any] | None:
    """One episode: its spans on all levels and thumbnails along its way."""
    index = store.index
    events = np.flatnonzero(index["kind"] == KINDS.index("event"))
    if not len(events):
        return None
    number = int(index["episode"][events[0]])
    episode = store.episodes[number]
    subtasks = episode["spans"].get("subtask", [])
    captions = [
        f"{span['caption']}: "
        + ", ".join(child["verb"] for child in episode["spans"].get("action", ()) if child["parent"] == position)
        for position, span in enumerate(subtasks)
    ]
    return {
        "title": f"“{episode['spans']['task'][0]['caption']}” ({episode['name']}), camera {store.meta['views'][0]}.",
        "seconds": episode["num_steps"] / store.meta["clock_hz"],
        "levels": level_bars(episode, store.meta["clock_hz"]),
        "captions": captions,
        "thumbs": [data_uri(figures.thumbnail(frame), "jpeg") for frame in frames_along(store, number)],
    }


def _balance(store: EventStore, config: ConfigDict) -> list[dict[str, Any]]:
    """Balance of the windows that the config's training draws, before and after weighting."""
    draw = plan_draw(store.index, config.data, store.meta["sources"])
    powers = config.data.vl_power, config.data.action_power
    return balance_report(store.index[draw.candidates], draw.target, *powers)


def _windows_of(entry: Mapping[str, Any]) -> str:
    """What an entry of the balance is about."""
    return "chunks" if entry["kind"] == "history" else f"{entry['level']} events"


def _cluster_pictures(balance: Sequence[Mapping[str, Any]]) -> list[str]:
    pictures = []
    for entry in balance:
        for key, name in (("cluster_vl", "what is seen and said"), ("cluster_action", "how the hand moves")):
            shares = entry[key]
            if shares["clusters"] > 1:
                title = f"{_windows_of(entry)} by {name}"
                pictures.append(
                    _png(figures.cluster_shares(title, np.array(shares["before"]), np.array(shares["after"])))
                )
    return pictures


def _balance_table(balance: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for entry in balance:
        for key, name in (("cluster_vl", "seen and said"), ("cluster_action", "motion")):
            shares = entry[key]
            rows.append(
                {
                    "name": f"{_windows_of(entry)}, {name}",
                    "cells": [
                        shares["clusters"],
                        " → ".join(f"{value:.2f}" for value in shares["gini"]),
                        " → ".join(f"{value:.3f}" for value in shares["entropy"]),
                        f"{entry['windows']} → {entry['effective_sample_size']:.0f}",
                    ],
                }
            )
    return {"columns": ["clusters", "Gini", "normalised entropy", "effective sample size"], "rows": rows}


def _losses(metrics: Sequence[Mapping[str, Any]]) -> figures.Curves:
    """Steps, and the loss of each stream at them."""
    streams = [name for name in _STREAMS if any(name in line for line in metrics)]
    lines = [line for line in metrics if all(name in line for name in streams)]
    return [line["step"] for line in lines], {_STREAMS[name]: [line[name] for line in lines] for name in streams}


def _training_summary(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number of steps, median step time and share of it spent waiting for input, last losses."""
    timed = [line for line in metrics if "step_s" in line]
    if not timed:
        return {}
    total = math.fsum(line["step_s"] for line in timed)
    waited = math.fsum(line.get("input_wait_s", 0.0) for line in timed)
    last = timed[-max(1, len(timed) // 20) :]
    return {
        "steps": int(metrics[-1]["step"]) + 1,
        "seconds": total,
        "median_step_s": float(np.median([line["step_s"] for line in timed])),
        "input_wait_share": waited / max(total, 1e-9),
        "events": int(sum(line.get("events", 0) for line in timed)),
        "last_losses": {name: float(np.mean([line[name] for line in last])) for name in _STREAMS if name in last[0]},
    }


def _training_caption(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    return (
        f"{summary['steps']} steps, {summary['events']:,} events in {summary['seconds']:.0f} s; median step "
        f"{1000 * summary['median_step_s']:.0f} ms, {100 * summary['input_wait_share']:.1f} % of the time waiting for "
        "input. Thin: each step; bold: running median."
    )


def _picture(path: Path) -> str:
    try:
        return data_uri(path.read_bytes(), path.suffix.removeprefix("."))
    except OSError as error:
        raise UserError(f"picture {str(path)!r} is missing ({error}); run wallwm_jax.evaluate again") from None


def _png(data: bytes) -> str:
    return data_uri(data, "png")


def _define_flags() -> None:
    flags.DEFINE_multi_string("evaluation", [], "Directory that wallwm_jax.evaluate wrote. May be repeated.")
    flags.DEFINE_multi_string("arms", [], "Directory that wallwm_jax.evaluation.arms wrote. May be repeated.")
    flags.DEFINE_string("planner", "", "JSON file that wallwm_jax.evaluation.planner_accuracy wrote.")
    flags.DEFINE_string("workdir", "", "Workdir of the training run that was evaluated.")
    flags.DEFINE_string("store", "", "Event store that it was trained on.")
    flags.DEFINE_string("out", "", "Directory for report.html and report.json; made if absent.")
    flags.DEFINE_string("phases", "", "JSON file of seconds per phase of what came before the evaluation.")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    if not values.out:
        raise UserError("no --out given; pass a directory for report.html and report.json")
    phases = read_result(Path(values.phases), (), "pass --phases=FILE as JSON") if values.phases else {}
    page = build_report(
        values.evaluation, values.workdir, values.store, values.out, phases, arms=values.arms, planner=values.planner
    )
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
