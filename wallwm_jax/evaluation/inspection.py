"""One page of an event store: what is in it, who said it, how long it is, where it was cut, how it clusters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

from wallwm_jax.console import UserError, write_text
from wallwm_jax.data.clusters import FILE_NAME, load_clusters
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.recaption import read_episodes
from wallwm_jax.evaluation import figures
from wallwm_jax.evaluation.timelines import boundaries, data_uri, level_bars
from wallwm_jax.events.schema import LEVELS, Episode
from wallwm_jax.events.segment import match_boundaries, tolerance_s
from wallwm_jax.events.windows import KINDS

_EPISODES = 4  # that are shown
_MOMENTS = 12  # pictures along an episode
_CLUSTERS = 6  # largest and smallest that are listed
_DOUBTFUL = 20  # captions of least confidence that are listed


def inspect_store(path: str | Path, out: str | Path, *, truth: str = "", episodes: int | None = None) -> str:
    """Writes the page `out`, pictures inside, and beside it the same figures for programs, `.json`.

    Args:
      path: the store.
      out: the page.
      truth: a store of the same episodes (same source and name) with true events; "" for none.
      episodes: how many to show, one of each source in turn.

    Returns:
      What the page says first, for the terminal.

    Raises:
      UserError: no store there, or a truth that has none of its episodes.
    """
    store = open_store(path)
    known = _true_entries(truth, store) if truth else {}
    chosen = _choose(store, known, _EPISODES if episodes is None else episodes)
    content: dict[str, Any] = {
        "store": str(path),
        "facts": _facts(store),
        "levels": _levels(store),
        "captioners": _captioners(store),
        "doubtful": _doubtful(store),
        "scores": _scores(store, known),
    }
    page = Path(out).expanduser()
    if page.is_dir() or page.suffix != ".html":
        raise UserError(f"--out={str(out)!r} is the page to write: give the name of an .html file")
    page.parent.mkdir(parents=True, exist_ok=True)
    windows = _windows(store)
    shown = [
        _show(store, episode, store.episodes[number], known.get(number), windows)
        for number, episode in zip(chosen, read_episodes(path, chosen))
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wallwm_jax.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    seconds = {level: _seconds(store, level) for level in LEVELS if _seconds(store, level)}
    html = environment.get_template("inspection.html.j2").render(
        **content, lengths=data_uri(figures.lengths(seconds), "png"), episodes=shown, clusters=_clusters(store)
    )
    write_text(page, html)
    write_text(page.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    lines = [f"{page}: " + ", ".join(f"{fact['value']} {fact['name']}" for fact in content["facts"])]
    for row in content["scores"]:
        rates = f"precision {row['precision']:.2f}, recall {row['recall']:.2f}"
        lines.append(f"  {row['level']:<8} boundary F1 {row['f1']:.2f} ({rates}), {row['spans']:.2f} spans a true one")
    return "\n".join(lines)


def _facts(store: EventStore) -> list[dict[str, str]]:
    events = sum(len(spans) for entry in store.episodes for spans in entry["spans"].values())
    seconds = sum(entry["num_steps"] for entry in store.episodes) / store.meta["clock_hz"]
    return [
        {"name": "episodes", "value": f"{len(store.episodes):,}"},
        {"name": "minutes", "value": f"{seconds / 60:,.1f}"},
        {"name": "events on all levels", "value": f"{events:,}"},
        {"name": "windows", "value": f"{sum(split['windows'] for split in store.meta['splits'].values()):,}"},
        {"name": "wordings", "value": f"{len(store.captions):,}"},
    ]


def _spans(store: EventStore, level: str) -> list[dict[str, Any]]:
    return [span for entry in store.episodes for span in entry["spans"].get(level, ())]


def _seconds(store: EventStore, level: str) -> list[float]:
    return [(span["end"] - span["start"]) / store.meta["clock_hz"] for span in _spans(store, level)]


def _levels(store: EventStore) -> list[dict[str, Any]]:
    rows = []
    for level in LEVELS:
        spans, seconds = _spans(store, level), _seconds(store, level)
        if spans:
            verbs = Counter(span["verb"] for span in spans)
            rows.append(
                {
                    "level": level,
                    "spans": len(spans),
                    "per_episode": len(spans) / len(store.episodes),
                    "seconds": [round(float(value), 2) for value in np.quantile(seconds, (0.05, 0.5, 0.95))],
                    "captions": len({span["caption"] for span in spans}),
                    "paraphrases": float(np.mean([len(span.get("paraphrases", ())) for span in spans])),
                    "verbs": [f"{verb} {count}" for verb, count in verbs.most_common(8)],
                }
            )
    return rows


def _captioners(store: EventStore) -> list[dict[str, Any]]:
    """Captions by who wrote them, and how sure they are where that is said."""
    found: dict[tuple[str, str], list[Any]] = {}
    for level in LEVELS:
        for span in _spans(store, level):
            found.setdefault((level, span.get("provenance") or "the source"), []).append(span.get("confidence"))
    rows = []
    for (level, provenance), told in found.items():
        sure = [value for value in told if value is not None]
        quantiles = np.quantile(sure, (0.05, 0.5, 0.95)).round(2).tolist() if sure else None
        rows.append({"level": level, "provenance": provenance, "captions": len(told), "confidence": quantiles})
    return rows


def _doubtful(store: EventStore) -> list[dict[str, Any]]:
    """The captions of least confidence."""
    rows = [
        {"episode": entry["name"], "level": level, "index": index, **span}
        for entry in store.episodes
        for level, spans in entry["spans"].items()
        for index, span in enumerate(spans)
        if span.get("confidence") is not None and span["confidence"] < 1
    ]
    return sorted(rows, key=lambda row: row["confidence"])[:_DOUBTFUL]


def _true_entries(truth: str, store: EventStore) -> dict[int, dict[str, Any]]:
    """Episode id → the same episode in the store of true events."""
    named = {(entry["source"], entry["name"]): entry for entry in open_store(truth).episodes}
    pairs = [(entry, named.get((entry["source"], entry["name"]))) for entry in store.episodes]
    found = {entry["id"]: true for entry, true in pairs if true and true["num_steps"] == entry["num_steps"]}
    if not found:
        raise UserError(f"event store {truth!r} has none of the episodes of {str(store.path)!r} at the same length")
    return found


def _scores(store: EventStore, known: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Boundaries against the true ones, per level, all episodes together."""
    rows, clock_hz = [], store.meta["clock_hz"]
    for level in LEVELS[1:]:
        pairs = [
            (store.episodes[number]["spans"].get(level, ()), entry["spans"][level])
            for number, entry in known.items()
            if level in entry["spans"]
        ]
        if not any(here for here, _ in pairs):
            continue
        within = tolerance_s([(span["end"] - span["start"]) / clock_hz for _, there in pairs for span in there])
        hits = sum(
            len(match_boundaries(boundaries(here), boundaries(there), within * clock_hz)) for here, there in pairs
        )
        found, true = (sum(max(0, len(pair[side]) - 1) for pair in pairs) for side in (0, 1))
        spans, true_spans = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        if found + true:
            rows.append(
                {
                    "level": level,
                    "f1": 2 * hits / (found + true),
                    "precision": hits / max(found, 1),
                    "recall": hits / max(true, 1),
                    "spans": spans / true_spans,
                }
            )
    return rows


def _choose(store: EventStore, known: Mapping[int, Any], count: int) -> list[int]:
    """Episodes to show: of each source in turn, those with true events first."""
    turns: Counter[str] = Counter()
    ranked = []
    for entry in sorted(store.episodes, key=lambda entry: (entry["id"] not in known, entry["id"])):
        ranked.append((turns[entry["source"]], entry["id"]))
        turns[entry["source"]] += 1
    return sorted(number for _, number in sorted(ranked)[:count])


def _windows(store: EventStore) -> dict[tuple[int, str, int], tuple[int, int]]:
    """(episode, level, index) → clusters of the event, seen and said, and motion; of both splits."""
    found = {}
    for split in store.meta["splits"]:
        index = open_store(store.path, split).index
        for row in index[index["kind"] == KINDS.index("event")]:
            place = int(row["episode"]), LEVELS[row["level"]], int(row["event_index"])
            found[place] = int(row["cluster_vl"]), int(row["cluster_action"])
    return found


def _show(
    store: EventStore,
    episode: Episode,
    entry: Mapping[str, Any],
    truth: Mapping[str, Any] | None,
    windows: Mapping[tuple[int, str, int], tuple[int, int]],
) -> dict[str, Any]:
    """One episode for the template."""
    clock = store.meta["clock_hz"]
    moments = np.linspace(0, episode.num_frames - 1, _MOMENTS).round().astype(int)
    view = next(iter(episode.frames))
    seconds = np.arange(episode.num_steps + 1) / clock
    speed = np.linalg.norm(np.gradient(episode.poses[:, :, :3, 3], axis=0), axis=-1) * clock
    curves = {
        "speed of the hand, m/s": speed.max(1),
        "height of the hand, m": episode.poses[:, 0, 2, 3],
        "gripper, 1 is closed": episode.grippers[:, 0],
    }
    edges = {
        level: [step / clock for step in boundaries(entry["spans"][level])]
        for level in LEVELS[1:]
        if level in entry["spans"]
    }
    rows = []
    for number, subtask in enumerate(entry["spans"].get("subtask", ())):
        rows.append(_row("subtask", number, subtask, clock, windows.get((entry["id"], "subtask", number))))
        for index, action in enumerate(entry["spans"].get("action", ())):
            if action["parent"] == number:
                rows.append(_row("action", index, action, clock, windows.get((entry["id"], "action", index))))
    return {
        "title": f"{entry['name']}: “{entry['spans']['task'][0]['caption']}”",
        "split": entry["split"],
        "view": view,
        "timeline": {
            "thumbs": [data_uri(figures.thumbnail(_picture(episode, view, int(place))), "jpeg") for place in moments],
            "levels": level_bars(entry, clock, truth),
            "seconds": episode.num_steps / clock,
        },
        "motion": data_uri(figures.motion(seconds, curves, edges), "png"),
        "rows": rows,
        "repairs": entry["provenance"],
    }


def _picture(episode: Episode, view: str, position: int) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(episode.frames[view][position], np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise UserError(f"frame {position} of view {view!r} of episode {episode.episode_id!r} is no JPEG picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _row(
    level: str, number: int, span: Mapping[str, Any], clock: float, clusters: tuple[int, int] | None
) -> dict[str, Any]:
    confidence = span.get("confidence")
    return {
        "level": level,
        "number": number,
        "time": f"{span['start'] / clock:.1f} - {span['end'] / clock:.1f}",
        "verb": span["verb"],
        "caption": span["caption"],
        "paraphrases": list(span.get("paraphrases", ())),
        "confidence": "" if confidence is None else f"{confidence:.2f}",
        "provenance": span.get("provenance", ""),
        "clusters": [str(one) if one >= 0 else "-" for one in clusters or (-1, -1)],
    }


def _clusters(store: EventStore) -> list[dict[str, Any]]:
    """The largest and smallest clusters of each level of events: what is seen and said, and how the hand moves."""
    if not (store.path / FILE_NAME).is_file():
        return []
    clusters = load_clusters(store.path)
    tables = []
    for name, column, found in (
        ("seen and said", "cluster_vl", clusters.vision_language),
        ("motion", "cluster_action", clusters.action),
    ):
        for level in store.meta["levels"]:
            own = [row for row in found if (row["kind"], row["level"]) == ("event", level)]
            own.sort(key=lambda row: -row["train"])
            if len(own) > 1:
                chosen: Sequence[Any] = own if len(own) <= 2 * _CLUSTERS else [*own[:_CLUSTERS], *own[-_CLUSTERS:]]
                shares = np.array([row["train"] for row in own]) / max(1, sum(row["train"] for row in own))
                title = (
                    f"{level} events by {'what is seen and said' if column == 'cluster_vl' else 'how the hand moves'}"
                )
                tables.append(
                    {
                        "name": f"{level}, {name}: {len(own)} clusters",
                        "picture": data_uri(figures.shares(title, shares), "png"),
                        "rows": chosen,
                        "left_out": len(own) - len(chosen),
                    }
                )
    return tables
