r"""What a config draws of a store: shares before and after, passes over the windows, and what is never seen.

    python -m wallwm_jax.evaluation.coverage --store=runs/store --config=configs/ocbench_quickstart.py

    python -m wallwm_jax.evaluation.coverage --store=runs/store --steps=20000 --picture=coverage.png \
        --config.data.balance=raking --config.data.mixture="(('ocbench/chamber', 0.5), ('', 0.5))"

For each dataset, level, length and cluster: its share of the windows that can be drawn, its share of the drawn windows
and of the drawn latents, how often each of its windows comes in so many steps, and how many of them not at all.
Clusters are printed where they come least often, `--json` has all of them. The effective sample size is that of one
draw. The residual is the largest difference between the share of a cluster and the one that its power asks for:
clipping, sparse tables, shares of datasets and lengths and, with data.balance=product, clusterings that depend on each
other keep it from 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from wallwm_jax.config import define_config_flag
from wallwm_jax.console import run_command
from wallwm_jax.data.balance import balance_report, effective_sample_size, tally
from wallwm_jax.data.clusters import load_clusters
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.events.schema import LEVELS

_SHOWN = 5  # clusters of a clustering, those that come least often
_CLUSTERINGS = {"cluster_vl": "seen and said", "cluster_action": "motion"}


def coverage(store: EventStore, config: ConfigDict, steps: int) -> dict[str, Any]:
    """What `steps` steps of a training with this config draw.

    Returns:
      `steps`, `rows`, `windows` (that can be drawn), `left_out` (of the same split), `drawn`, `effective_sample_size`,
      `passes` (mean draws of a window), `never` (windows that are not drawn), `balance` (of `balance_report`), and
      `parts`: dataset, level, length, cluster_vl and cluster_action → one dictionary per value with `name`, `windows`,
      `before` and `after` (shares of windows), `latents` (share of the drawn latents), `passes` and `never`.

    Raises:
      UserError: what `Sampler` raises.
    """
    sampler = Sampler(store.index, config, sources=store.meta["sources"])
    chosen, target, data = store.index[sampler.candidates], sampler.target, config.data
    rows = steps * data.rows
    passes = target * sampler.events_per_row * rows
    # Windows of a cell are visited in turns: of a cell whose windows come 0.3 times each, 30 % are drawn.
    never = np.maximum(0.0, 1.0 - passes)
    latents = target * chosen["length"] / (target @ chosen["length"])
    parts = {}
    for part, (labels, name) in _parts(store, chosen).items():
        values, group, _ = tally(labels)
        windows, *sums = (np.bincount(group, weights) for weights in (None, target, latents, passes, never))
        parts[part] = [
            {
                "name": name(int(value)),
                "windows": int(count),
                "before": float(count / len(chosen)),
                "after": float(share),
                "latents": float(share_of_latents),
                "passes": float(visits / count),
                "never": round(float(unseen)),
            }
            for value, count, share, share_of_latents, visits, unseen in zip(values, windows, *sums)
        ]
    return {
        "steps": steps,
        "rows": rows,
        "windows": len(chosen),
        "left_out": len(store) - len(chosen),
        "drawn": round(float(passes.sum())),
        "effective_sample_size": effective_sample_size(target),
        "passes": float(passes.mean()),
        "never": round(float(never.sum())),
        "balance": balance_report(chosen, target, data.vl_power, data.action_power),
        "parts": parts,
    }


def _parts(store: EventStore, chosen: np.ndarray) -> dict[str, tuple[np.ndarray, Any]]:
    """Part → label of each window, and the name of a label."""
    parts: dict[str, tuple[np.ndarray, Any]] = {
        "dataset": (chosen["source"], lambda value: store.meta["sources"][value]),
        "level": (chosen["level"], lambda value: LEVELS[value]),
        "length": (chosen["length"], lambda value: f"{value} latents"),
    }
    if (chosen["cluster_vl"] < 0).all():
        return parts
    found = load_clusters(store.path)
    for part, table in (("cluster_vl", found.vision_language), ("cluster_action", found.action)):
        parts[part] = (chosen[part], lambda value, table=table: _cluster_name(value, table))
    return parts


def _cluster_name(value: int, table: Sequence[Mapping[str, Any]]) -> str:
    if value < 0:
        return "without a cluster"
    return f"{value} {table[value]['level']}: {'; '.join(table[value]['captions'][:1])}"


def table(found: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{found['windows']} windows can be drawn, {found['left_out']} of the split are left out; "
        f"effective sample size {found['effective_sample_size']:.0f}",
        f"{found['steps']} steps, {found['rows']} rows: {found['drawn']} draws, "
        f"{found['passes']:.2f} passes in the mean, {found['never']} windows never",
    ]
    for part, entries in found["parts"].items():
        title, shown = part, entries
        if part in _CLUSTERINGS:
            shown = sorted(entries, key=lambda entry: entry["passes"])[:_SHOWN]
            title = f"{_CLUSTERINGS[part]}: {len(shown)} of {len(entries)}"
        lines += ["", f"{title:<48}{'windows':>9}{'before':>9}{'drawn':>9}{'latents':>9}{'passes':>9}{'never':>8}"]
        lines += [
            f"  {entry['name'][:45]:<46}{entry['windows']:>9}{entry['before']:>9.1%}{entry['after']:>9.1%}"
            f"{entry['latents']:>9.1%}{entry['passes']:>9.2f}{entry['never']:>8}"
            for entry in shown
        ]
    lines += ["", f"{'balance':<48}{'clusters':>9}{'Gini':>18}{'entropy':>18}{'residual':>10}"]
    for entry in found["balance"]:
        for part, name in _CLUSTERINGS.items():
            shares = entry[part]
            gini, entropy = (" → ".join(f"{value:.3f}" for value in shares[key]) for key in ("gini", "entropy"))
            title = f"{entry['kind']}/{entry['level']}, {name}"
            lines.append(f"  {title:<46}{shares['clusters']:>9}{gini:>18}{entropy:>18}{shares['residual']:>10.4f}")
    return "\n".join(lines)


def picture(found: Mapping[str, Any]) -> bytes:
    """The shares of each part before and as drawn, as PNG; clusters from the largest to the smallest."""
    import matplotlib
    from matplotlib.figure import Figure

    from wallwm_jax.evaluation.figures import BLUE, MUTED, STYLE, to_png

    parts = found["parts"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.4 * len(parts)), layout="constrained")
        for panel, (part, entries) in zip(np.atleast_1d(figure.subplots(len(parts), 1)), parts.items()):
            clusters = part in _CLUSTERINGS
            order = sorted(entries, key=lambda entry: -entry["before"]) if clusters else entries
            place = np.arange(len(order))
            for shift, key, color, label in ((-0.2, "before", MUTED, "in the data"), (0.2, "after", BLUE, "as drawn")):
                panel.bar(place + shift, [100 * entry[key] for entry in order], 0.4, color=color, label=label)
            panel.set(title=_CLUSTERINGS.get(part, part), ylabel="% of windows", xlim=(-0.7, len(order) - 0.3))
            panel.grid(axis="x", visible=False)
            if clusters:
                panel.set_xlabel("cluster, largest first")
            else:
                panel.set_xticks(place, [_wrapped(entry["name"]) for entry in order], fontsize=7)
            panel.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2)
        return to_png(figure)


def _wrapped(name: str) -> str:
    return name.removesuffix(" latents").replace("/", "/\n").replace("-lite-", "-lite-\n")


def main(_: Sequence[str]) -> None:
    """Prints the report."""
    values = flags.FLAGS
    config = values.config
    found = coverage(
        open_store(values.store or config.data.store, config.data.split), config, values.steps or config.train.steps
    )
    if values.picture:
        Path(values.picture).expanduser().write_bytes(picture(found))
    print(json.dumps(found, indent=1) if values.json else table(found))


if __name__ == "__main__":
    define_config_flag("configs/base.py")
    flags.DEFINE_string("store", "", "The event store; without, that of the config")
    flags.DEFINE_integer("steps", 0, "Training steps; without, those of the config", 0)
    flags.DEFINE_bool("json", False, "Print everything as JSON")
    flags.DEFINE_string("picture", "", "Also draw the shares into this PNG")
    run_command(main)
