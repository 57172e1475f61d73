r"""What the latents of a staircase tell, on held-out events: to the small language model, and to the frozen towers.

    python -m wallwm_jax.evaluation.latents --workdir=runs/staircase --store=runs/quickstart/store

Every held-out event is asked for at its first frame, and its latents are read in three ways:

- trace: cross-entropy of the reasoning trace by the small model behind them, a token;
- match: distance of what the video tower reads from them to what it reads from the caption; the mean reading has 1;
- action, video: the towers' flow-matching losses on the event, with the same noise for all that may condition them.

Conditions are the event's own latents, its caption, the latents and the caption of another event (with another
caption), and the null text. The headline is the gap closed: of the action loss by which the caption is better than a
floor, the share that latents bring, (floor - latents) / (floor - caption). The floor is the null text, and the other
caption beside it: a model that trained without dropped captions has never seen the null text. Intervals are 95 %, by a
bootstrap over episodes; a gap whose own interval reaches zero cannot be closed, and its share means nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from wallwm_jax.console import UserError, progress, run_command, write_text
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.packing import META_FIELDS
from wallwm_jax.data.vlm_batches import VlmRows
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS
from wallwm_jax.models import world_action_model
from wallwm_jax.models.world_action_model import TextContext
from wallwm_jax.training import objectives
from wallwm_jax.training.checkpoint import load_params
from wallwm_jax.training.language_objectives import (
    latents_of,
    match_loss,
    readings,
    tower_losses,
    trace_loss,
    world_params,
)
from wallwm_jax.training.stages import get_stage

Params = Mapping[str, Any]
Batch = dict[str, Any]

CONDITIONS = ("latents", "caption", "other_latents", "other_caption", "null")
FLOORS = ("null", "other_caption")
_RESAMPLES = 2000


def measure(
    params: Params, config: ConfigDict, store: EventStore, *, events: int = 1000, draws: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Measures a run of stage `staircase` on the events of `store`, a split that it was not trained on.

    Args:
      params: of the run, with the frozen groups.
      config: of the run, with its views.
      store: the split.
      events: at most, spread evenly.
      draws: of action noise per event, evenly over the noise levels.
      seed: of the noise, and of which event is the other.

    Returns:
      `events`; `trace`, `match`, `action`, `video`: condition → {mean, low, high}; `gap`, `gap_closed`: stream →
      condition → floor → {mean, low, high}; and `figures`, the headlines by name.

    Raises:
      UserError: the run is of another stage, or the split has no two events of different captions.
    """
    if "staircase" not in params:
        raise UserError(f"the run was trained in stage {config.train.stage!r}; latents need a run of stage 'staircase'")
    config, rows, windows = _prepared(config, store, events, draws)
    made = [rows.asked(window) for window in progress(windows, total=len(windows), unit="event", label="read")]
    made = [row for row in made if row["window_index"][0] >= 0]
    batches = [_alone(row) for row in made]
    texts = [store.caption(store.read(int(row["window_index"][0])).caption_id) for row in made]
    others = _others(texts, seed)

    tell, judge, trace = (
        jax.jit(functools.partial(function, config=config)) for function in (_tell, _judge, trace_loss)
    )
    told = [tell(params, batch=batch) for batch in progress(batches, unit="event", label="latents")]
    _, _, null = tell(params, batch=_alone(rows.asked(-1)))  # the text of padding
    found: dict[str, dict[str, list[Any]]] = {name: {c: [] for c in CONDITIONS} for name in ("action", "video")}
    traces: dict[str, list[float]] = {"latents": [], "other_latents": [], "nothing": []}
    read: dict[str, list[Any]] = {condition: [] for condition in CONDITIONS}
    for number, batch in enumerate(progress(batches, unit="event", label="losses")):
        (mine, prefix, caption), (theirs, other_prefix, other_caption) = told[number], told[others[number]]
        key = jax.random.fold_in(jax.random.key(seed), number)
        for condition, text in zip(CONDITIONS, (mine, caption, theirs, other_caption, null)):
            losses, reading = jax.device_get(judge(params, batch=batch, text=text, key=key))
            found["action"][condition].append(losses["latent_action"])
            found["video"][condition].append(losses["latent_video"])
            read[condition].append(reading[:, 0])
        for condition, soft in (("latents", prefix), ("other_latents", other_prefix), ("nothing", None)):
            traces[condition].append(float(trace(params["small"], batch=batch, prefix=soft)))
    episodes = store.index["episode"][[int(row["window_index"][0]) for row in made]]
    return _result(found, traces, {name: np.stack(value, 1) for name, value in read.items()}, Resampled(episodes, seed))


class Resampled:
    """Statistics of events with intervals by a bootstrap over their episodes."""

    def __init__(self, episodes: np.ndarray, seed: int) -> None:
        """`episodes [N]` of the events."""
        rng, names = np.random.default_rng(seed), np.unique(episodes)
        places = {name: np.flatnonzero(episodes == name) for name in names}
        drawn = rng.choice(names, (_RESAMPLES, len(names)))
        self._all, self._resamples = np.arange(len(episodes)), [np.concatenate([places[e] for e in d]) for d in drawn]

    def __call__(self, statistic: Callable[[np.ndarray], float]) -> dict[str, float]:
        """{mean, low, high} of `statistic` of positions of events."""
        spread = [statistic(positions) for positions in self._resamples]
        low, high = np.quantile(spread, (0.025, 0.975))
        return {"mean": float(statistic(self._all)), "low": float(low), "high": float(high)}


def _result(
    found: Mapping[str, Mapping[str, Sequence[float]]],
    traces: Mapping[str, Sequence[float]],
    read: Mapping[str, np.ndarray],
    resampled: Resampled,
) -> dict[str, Any]:
    """What `measure` returns; losses per event, readings `[layers, N, P, D]`."""
    result: dict[str, Any] = {"events": len(traces["latents"])}
    valid = jnp.ones(result["events"], bool)

    def mean(values: Sequence[float]) -> dict[str, float]:
        each = np.asarray(values)
        return resampled(lambda at: each[at].mean())

    result["trace"] = {name: mean(values) for name, values in traces.items()}
    result["match"] = {
        name: {"mean": float(match_loss(jnp.asarray(read[name]), jnp.asarray(read["caption"]), valid))}
        for name in CONDITIONS
        if name != "caption"
    }
    gap: dict[str, Any] = {}
    closed: dict[str, Any] = {}
    for stream, losses in found.items():
        result[stream] = {name: mean(values) for name, values in losses.items()}
        each = {name: np.asarray(values) for name, values in losses.items()}
        gap[stream] = {floor: mean(each[floor] - each["caption"]) for floor in FLOORS}
        closed[stream] = {
            name: {floor: resampled(functools.partial(_closed, each, name, floor)) for floor in FLOORS}
            for name in ("latents", "other_latents")
        }
    result |= {"gap": gap, "gap_closed": closed}
    result["figures"] = {
        "trace loss": result["trace"]["latents"]["mean"],
        "match error": result["match"]["latents"]["mean"],
        "action loss": result["action"]["latents"]["mean"],
        "share of the gap from the null text": closed["action"]["latents"]["null"]["mean"],
        "share of the gap from another caption": closed["action"]["latents"]["other_caption"]["mean"],
        "the same, other event's latents": closed["action"]["other_latents"]["other_caption"]["mean"],
    }
    return result


def _closed(each: Mapping[str, np.ndarray], name: str, floor: str, at: np.ndarray) -> float:
    gap = each[floor][at].mean() - each["caption"][at].mean()
    return float((each[floor][at].mean() - each[name][at].mean()) / gap) if gap else float("nan")


def _prepared(config: ConfigDict, store: EventStore, events: int, draws: int) -> tuple[ConfigDict, VlmRows, list[int]]:
    """The config that asks for events at their first frames, with their windows; its rows; which windows."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.update(vl_power=0.0, action_power=0.0)  # the draw is not used
        config.objective.update(latent_action_weight=1.0, action_draws=draws)
    levels = [level for level, share in config.data.levels.items() if share]
    index, numbers = store.index, [LEVELS.index(level) for level in levels]
    windows = np.flatnonzero((index["kind"] == KINDS.index("event")) & np.isin(index["level"], numbers))
    if not len(windows):
        raise UserError(f"split {store.split!r} of {str(store.path)!r} has no {' or '.join(levels)} events")
    VlmRows.check(store, config)
    chosen = windows[np.unique(np.linspace(0, len(windows) - 1, min(events, len(windows))).round().astype(int))]
    return config.lock(), VlmRows(store, config), chosen.tolist()


def _alone(row: Mapping[str, np.ndarray]) -> Batch:
    return {name: value[None] for name, value in row.items() if name not in META_FIELDS}


def _others(texts: Sequence[str], seed: int) -> list[int]:
    """For each event the number of another, at random, with another caption."""
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    others = []
    for place, number in enumerate(order):
        later = [other for other in order[place + 1 :] + order[:place] if texts[other] != texts[number]]
        if not later:
            raise UserError("all events of the split have one caption; nothing can be told apart")
        others.append((number, later[0]))
    return [other for _, other in sorted(others)]


def _tell(params: Params, config: ConfigDict, batch: Batch) -> tuple[TextContext, jax.Array, TextContext]:
    """Latents of an event in a caption's place and shape, as a soft prefix, and its caption."""
    latents, prefix = latents_of(params, config, batch)
    caption = world_action_model.encode_text(world_params(params, config), config.model, batch)
    room = caption.features.shape[2] - latents.features.shape[2]
    padded = jnp.pad(latents.features, ((0, 0), (0, 0), (0, max(room, 0)), (0, 0)))
    caption = TextContext(caption.features.astype(jnp.float32), caption.length)
    return TextContext(padded, latents.length), prefix, caption


def _judge(
    params: Params, config: ConfigDict, batch: Batch, text: TextContext, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The towers' losses under a text, and what the video tower reads of it."""
    world, weight = world_params(params, config), jnp.ones(config.model.latent_channels)
    drawn = objectives.draw(key, batch, config, get_stage("staircase"))
    return tower_losses(world, config, batch, drawn, text, weight), readings(world, config, text)


def _print(result: Mapping[str, Any]) -> None:
    names = [*CONDITIONS, "nothing"]
    print(f"{result['events']} held-out events" + "".join(f"{name.replace('_', ' '):>24}" for name in names))
    for measure_ in ("trace", "match", "action", "video"):
        cells = [_cell(result[measure_].get(name)) for name in names]
        print(f"{measure_:<20}" + "".join(f"{cell:>24}" for cell in cells))
    for stream in ("action", "video"):
        for floor in FLOORS:
            print(f"{stream}: gap from the {floor.replace('_', ' ')} {_cell(result['gap'][stream][floor])}")
            for name, shares in result["gap_closed"][stream].items():
                print(f"    closed by {name.replace('_', ' ')}: {_cell(shares[floor])}")


def _cell(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['mean']:.3f}" + (f" [{entry['low']:.3f}, {entry['high']:.3f}]" if "low" in entry else "")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    for name in ("workdir", "store"):
        if not values[name].value:
            raise UserError(f"no --{name} given; see --help")
    loaded = load_params(values.workdir)
    config = ConfigDict(loaded.config)
    config.data.views = tuple(loaded.assets["store"]["views"])
    store = open_store(values.store, "heldout")
    result = measure(loaded.params, config.lock(), store, events=values.events, draws=values.draws, seed=values.seed)
    text = json.dumps(result, indent=1)
    if values.out:
        write_text(Path(values.out), text)
    print(text) if values.json else _print(result)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train, stage staircase; its newest checkpoint.")
    flags.DEFINE_string("store", "", "Event store with a heldout split; usually the one trained on.")
    flags.DEFINE_integer("events", 1000, "Events, at most.", 2)
    flags.DEFINE_integer("draws", 8, "Draws of action noise per event.", 1)
    flags.DEFINE_integer("seed", 0, "Of the noise, and of which event is the other.")
    flags.DEFINE_string("out", "", "File for the result as JSON.")
    flags.DEFINE_bool("json", False, "Print the result as JSON.")
    run_command(main)
