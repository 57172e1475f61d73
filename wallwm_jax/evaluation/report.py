r"""Makes one self-contained page of a run: what the data is, how training went, what the model does.

    python -m wallwm_jax.evaluation.report --evaluation=runs/evaluation --workdir=runs/quickstart --store=runs/store \
        --out=runs/report

Writes report.html (pictures inside, no network needed) and report.json, its figures for programs: what
`evaluation.json` holds, and `packing_efficiency`, `balance`, `phase_seconds`. --phases names a JSON file of seconds per
phase, {"data": 231.0, ...}, to be listed before those of the evaluation.
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
from wallwm_jax.console import UserError, run_command
from wallwm_jax.data.clusters import balance_report, sampling_weights
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.evaluation import figures
from wallwm_jax.evaluation.open_loop import BASELINES, MODEL, MODEL_PREDICTED, PREDICTORS
from wallwm_jax.evaluation.timelines import data_uri, frames_along, level_bars
from wallwm_jax.events.windows import KINDS
from wallwm_jax.training.telemetry import METRICS_FILE

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
    evaluation: str | Path, workdir: str | Path, store_path: str | Path, out: str | Path, phases: Mapping[str, float]
) -> Path:
    """Writes `report.html` and `report.json` into `out`; returns the path of the page.

    Args:
      evaluation: directory of `wallwm_jax.evaluate`.
      workdir: of the training run.
      store_path: its event store.
      out: made if absent.
      phases: seconds per phase before the evaluation; the evaluation's own phases are added.

    Raises:
      UserError: a part is missing or unreadable.
    """
    directory = require_directory(str(evaluation), "evaluation", "make it with python -m wallwm_jax.evaluate")
    workdir = require_directory(str(workdir), "workdir", "pass the workdir of wallwm_jax.train")
    result = _read_json(directory / "evaluation.json", "make it with python -m wallwm_jax.evaluate")
    store = open_store(store_path, "train")
    config = ConfigDict(result["config"])
    seconds = {**phases, **{f"evaluation: {name}": value for name, value in result["phase_seconds"].items()}}
    packing = Sampler(store.index, config).report(_PACKING_BLOCKS)
    balance = _balance(store, config)
    metrics = _metrics(workdir / METRICS_FILE)
    data = {
        **{key: value for key, value in result.items() if key not in ("strips", "phase_seconds")},
        "phase_seconds": seconds,
        "packing_efficiency": packing["fill"],
        "packing": packing,
        "balance": balance,
        "training": _training_summary(metrics),
    }
    page = _environment().get_template("report.html.j2").render(_content(result, directory, store, data, metrics))
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "report.html").write_text(page)
    return out / "report.html"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("wallwm_jax.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _content(
    result: dict[str, Any], directory: Path, store: EventStore, data: dict[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """The variables of the template."""
    success = {policy: result["success"][policy] for policy in POLICIES if policy in result["success"]}
    open_loop, losses = result["open_loop"], _losses(metrics)
    errors = {_LABELS[name]: _error(open_loop, name) for name in PREDICTORS}
    rollout = result.get("rollout")
    duration = open_loop["duration"]
    pictures = {
        "intervals": _png(
            figures.intervals({p: {m: row[m] for m in ("subtask", "episode")} for p, row in success.items()})
        )
        if success
        else None,
        "rollout": _picture(directory / rollout["file"]) if rollout else None,
        "open_loop": _png(figures.errors("Action error on held-out events", errors, "normalised L1, lower is better")),
        "strips": [{**strip, "picture": _picture(directory / strip["file"])} for strip in result["strips"]],
        "duration": _png(
            figures.scatter(
                "Duration of held-out events",
                np.array(duration["true_s"]),
                np.array(duration["predicted_s"]),
                "seconds",
            )
        ),
        "clusters": _cluster_pictures(data["balance"]),
        "losses": _png(figures.loss_curves(*losses)) if losses[0] else None,
    }
    return {
        "title": "wallwm_jax: from events to actions",
        "lead": _lead(result, store),
        "facts": _facts(result, store, data),
        "success": [{"policy": policy, **row} for policy, row in success.items()],
        "breakdown": _breakdown(success),
        "rollout_caption": _rollout_caption(rollout),
        "open_loop": {
            "windows": open_loop["windows"],
            "rows": [
                {"name": name, "label": _LABELS[name], "error": _error(open_loop, name), **open_loop["physical"][name]}
                for name in PREDICTORS
            ],
            "groups": [
                {"name": name, "windows": row["windows"], "errors": [row[p] for p in (MODEL, *BASELINES)]}
                for name, row in [*open_loop["by_level"].items(), *open_loop["by_verb"].items()]
            ],
        },
        "video": open_loop["final_frame_psnr"],
        "duration": duration,
        "timeline": _timeline(store),
        "balance": _balance_table(data["balance"]),
        "training_caption": _training_caption(data["training"]),
        "phases": data["phase_seconds"],
        "pictures": pictures,
    }


def _lead(result: dict[str, Any], store: EventStore) -> str:
    families = sorted({source.removeprefix("ocbench/").split("-", 1)[0] for source in store.meta["sources"]})
    episodes = sum(episode["split"] == store.split for episode in store.episodes)
    views = len(result["config"]["data"]["views"] or store.meta["views"])
    return (
        f"A world action model of {result['parameters'] / 1e6:.1f} M parameters, trained for {result['step']} steps on "
        f"the events of {episodes} demonstrations ({', '.join(families)}): the caption, the video of {views} "
        f"camera{'s' if views > 1 else ''} and the actions of one event at a time."
    )


def _facts(result: dict[str, Any], store: EventStore, data: dict[str, Any]) -> list[dict[str, str]]:
    open_loop = result["open_loop"]
    ratio = open_loop[MODEL] / min(open_loop["baselines"].values())
    facts = [
        {"name": "training windows", "value": f"{len(store):,}"},
        {"name": "of packed latents are real", "value": f"{100 * data['packing_efficiency']:.1f} %"},
        {"name": "action error, share of the better baseline", "value": f"{ratio:.2f}"},
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
    """Balance of the event windows, before and after weighting as the config says."""
    index = store.index[store.index["kind"] == KINDS.index("event")]
    weights = sampling_weights(index, config.data.vl_power, config.data.action_power, config.data.weight_clip)
    return balance_report(index, weights)


def _cluster_pictures(balance: Sequence[Mapping[str, Any]]) -> list[str]:
    pictures = []
    for entry in balance:
        for key, name in (("cluster_vl", "what is seen and said"), ("cluster_action", "how the hand moves")):
            shares = entry[key]
            if shares["clusters"] > 1:
                title = f"{entry['level']} events by {name}"
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
                    "name": f"{entry['level']}, {name}",
                    "cells": [
                        shares["clusters"],
                        " → ".join(f"{value:.2f}" for value in shares["gini"]),
                        " → ".join(f"{value:.3f}" for value in shares["entropy"]),
                        f"{entry['windows']} → {entry['effective_sample_size']:.0f}",
                    ],
                }
            )
    return {"columns": ["clusters", "Gini", "normalised entropy", "effective sample size"], "rows": rows}


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of the training log; a half-written last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _losses(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float]]]:
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


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is missing or damaged ({error}); {remedy}") from None


def _picture(path: Path) -> str:
    try:
        return data_uri(path.read_bytes(), path.suffix.removeprefix("."))
    except OSError as error:
        raise UserError(f"picture {str(path)!r} is missing ({error}); run wallwm_jax.evaluate again") from None


def _png(data: bytes) -> str:
    return data_uri(data, "png")


def _define_flags() -> None:
    flags.DEFINE_string("evaluation", "", "Directory that wallwm_jax.evaluate wrote.")
    flags.DEFINE_string("workdir", "", "Workdir of the training run.")
    flags.DEFINE_string("store", "", "Event store that it was trained on.")
    flags.DEFINE_string("out", "", "Directory for report.html and report.json; made if absent.")
    flags.DEFINE_string("phases", "", "JSON file of seconds per phase of what came before the evaluation.")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    if not values.out:
        raise UserError("no --out given; pass a directory for report.html and report.json")
    phases = _read_json(Path(values.phases), "pass --phases=FILE as JSON") if values.phases else {}
    page = build_report(values.evaluation, values.workdir, values.store, values.out, phases)
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
