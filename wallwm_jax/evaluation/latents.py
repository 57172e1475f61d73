r"""What a VLM tells without words, on held-out events: to the frozen towers, and to what else reads it.

    python -m wallwm_jax.evaluation.latents --workdir=runs/staircase --store=runs/quickstart/store
    python -m wallwm_jax.evaluation.latents --workdir=runs/vlm_text --store=runs/quickstart/store

Every held-out event is asked for at its first frame. What stands in its caption's place, the latents of a run of stage
`staircase` or the features of one of stage `vlm_text`, is read in three ways:

- match: distance of what the video tower reads from it to what it reads from the caption; the mean reading has 1;
- action, video: the towers' flow-matching losses on the event, with the same noise for all that may condition them.

Conditions are the event's own latents or features, its caption, those of another event (with another caption), and the
null text. The headline is the gap closed: of the action loss by which the caption is better than a floor, the share
that latents bring, (floor - latents) / (floor - caption). The floor is the null text, and the other caption beside it:
a model that trained without dropped captions has never seen the null text. Intervals are 95 %, by a bootstrap over
episodes; a gap whose own interval reaches zero cannot be closed, and its share means nothing.

Of a staircase also the trace: cross-entropy of the reasoning trace, a token, by the small model behind the latents.
Of a projector, whose towers are those of the run that it was aligned to (--towers where that has moved):

- align: mean square of features - caption's, a channel in units of its variance; the mean feature has 1;
- present: share of the places rightly told to be text or padding, beside the best constant length; and of the events
  whose length is exact;
- next: cross-entropy of the next event in words, a token, by the projector's head and by the VLM's own; exp of it is
  the perplexity;
- time: median error in seconds of the time that the event takes, beside the median duration in training.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from wallwm_jax.inference.latent_conditioner import fingerprint, same_encoder
from wallwm_jax.models import language_pathway, world_action_model
from wallwm_jax.models.vlm import text_projector, vlm
from wallwm_jax.models.world_action_model import TextContext
from wallwm_jax.training import objectives
from wallwm_jax.training.checkpoint import Loaded, load_params
from wallwm_jax.training.language_objectives import (
    align_loss,
    answer_features,
    answer_loss,
    latents_of,
    match_loss,
    projected,
    readings,
    tower_losses,
    trace_loss,
    vlm_inputs,
    world_params,
)
from wallwm_jax.training.stages import get_stage

Params = Mapping[str, Any]
Batch = dict[str, Any]

OWN = {"staircase": "latents", "vlm_text": "features"}
"""Stage → what its run puts in a caption's place."""
FLOORS = ("null", "other_caption")
_RESAMPLES = 2000


def conditions(own: str) -> tuple[str, ...]:
    """What may condition the towers, where a run's `own` are "latents" or "features"."""
    return own, "caption", f"other_{own}", "other_caption", "null"


def measure(
    params: Params, config: ConfigDict, store: EventStore, *, events: int = 1000, draws: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Measures a run on the events of `store`, a split that it was not trained on.

    Args:
      params: of a run of a stage in `OWN`, with the frozen groups and both towers.
      config: of the run, with its views.
      store: the split.
      events: at most, spread evenly.
      draws: of action noise per event, evenly over the noise levels.
      seed: of the noise, and of which event is the other.

    Returns:
      `events`; `match`, `action`, `video`: condition → {mean, low, high}; `gap`, `gap_closed`: stream → condition →
      floor → {mean, low, high}; of a staircase `trace`, of a projector `align`, `present`, `length`, `next`, `time`:
      reader → the same; and `figures`, the headlines by name.

    Raises:
      UserError: the run is of another stage, or the split has no two events of different captions.
    """
    stage = next((name for name in OWN if name in params), "")
    if not stage:
        raise UserError(
            f"the run was trained in stage {config.train.stage!r}; what stands in a caption's place is of a run of "
            f"stage {' or '.join(map(repr, OWN))}"
        )
    config, rows, windows = _prepared(config, store, events, draws)
    params, named = jax.tree.map(jnp.asarray, dict(params)), conditions(OWN[stage])
    made = [rows.asked(window) for window in progress(windows, total=len(windows), unit="event", label="read")]
    made = [row for row in made if row["window_index"][0] >= 0]
    batches = [_alone(row) for row in made]
    texts = [store.caption(store.read(int(row["window_index"][0])).caption_id) for row in made]
    others = _others(texts, seed)

    tell, judge = (jax.jit(functools.partial(function, config=config)) for function in (_tell, _judge))
    told = [tell(params, batch=batch) for batch in progress(batches, unit="event", label=OWN[stage])]
    null = tell(params, batch=_alone(rows.asked(-1))).caption  # the text of padding
    found: dict[str, dict[str, list[Any]]] = {name: {c: [] for c in named} for name in ("action", "video")}
    read: dict[str, list[Any]] = {condition: [] for condition in named}
    for number, batch in enumerate(progress(batches, unit="event", label="losses")):
        mine, theirs = told[number], told[others[number]]
        key = jax.random.fold_in(jax.random.key(seed), number)
        for condition, text in zip(named, (mine.instead, mine.caption, theirs.instead, theirs.caption, null)):
            losses, reading = jax.device_get(judge(params, batch=batch, text=text, key=key))
            found["action"][condition].append(losses["latent_action"])
            found["video"][condition].append(losses["latent_video"])
            read[condition].append(reading[:, 0])
    episodes = store.index["episode"][[int(row["window_index"][0]) for row in made]]
    resampled = Resampled(episodes, seed)
    result = _result(found, {name: np.stack(value, 1) for name, value in read.items()}, resampled)
    if stage == "staircase":
        beside = _traces(params, config, batches, [one.beside["prefix"] for one in told], others, resampled)
        figures = {"trace loss": beside["trace"]["latents"]["mean"]}
    else:
        beside = _heads(told, batches, _usual_seconds(store, config), resampled)
        figures = {f"{name}, the head's": beside[name]["head"]["mean"] for name in ("present", "next", "time")}
        figures = {"align distance": beside["align"]["head"]["mean"], **figures}
    return result | beside | {"figures": figures | result["figures"]}


class Told(NamedTuple):
    """Of one event: what stands in its caption's place and in its shape, the caption, and what else is measured."""

    instead: TextContext
    caption: TextContext
    beside: dict[str, jax.Array]


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

    def mean(self, values: Any) -> dict[str, float]:
        """The same of the mean of a value per event."""
        each = np.asarray(values, np.float64)
        return self(lambda at: each[at].mean())


def _result(
    found: Mapping[str, Mapping[str, Sequence[float]]], read: Mapping[str, np.ndarray], resampled: Resampled
) -> dict[str, Any]:
    """What `measure` returns of the towers; losses per event, readings `[layers, N, P, D]`."""
    own, _, other, *_ = read
    result: dict[str, Any] = {"events": read[own].shape[1]}
    valid = jnp.ones(result["events"], bool)
    result["match"] = {
        name: {"mean": float(match_loss(jnp.asarray(read[name]), jnp.asarray(read["caption"]), valid))}
        for name in read
        if name != "caption"
    }
    gap: dict[str, Any] = {}
    closed: dict[str, Any] = {}
    for stream, losses in found.items():
        result[stream] = {name: resampled.mean(values) for name, values in losses.items()}
        each = {name: np.asarray(values, np.float64) for name, values in losses.items()}  # gaps are small
        gap[stream] = {floor: resampled.mean(each[floor] - each["caption"]) for floor in FLOORS}
        closed[stream] = {
            name: {floor: resampled(functools.partial(_closed, each, name, floor)) for floor in FLOORS}
            for name in (own, other)
        }
    result |= {"gap": gap, "gap_closed": closed}
    result["figures"] = {
        "match error": result["match"][own]["mean"],
        "action loss": result["action"][own]["mean"],
        "share of the gap from the null text": closed["action"][own]["null"]["mean"],
        "share of the gap from another caption": closed["action"][own]["other_caption"]["mean"],
        f"the same, other event's {own}": closed["action"][other]["other_caption"]["mean"],
    }
    return result


def _traces(
    params: Params,
    config: ConfigDict,
    batches: Sequence[Batch],
    prefixes: Sequence[jax.Array],
    others: Sequence[int],
    resampled: Resampled,
) -> dict[str, Any]:
    """`trace`: the small model's loss behind an event's own latents, behind another's, and behind nothing."""
    trace = jax.jit(functools.partial(trace_loss, config=config))
    losses: dict[str, list[float]] = {"latents": [], "other_latents": [], "nothing": []}
    for number, batch in enumerate(progress(batches, unit="event", label="traces")):
        for reader, soft in zip(losses, (prefixes[number], prefixes[others[number]], None)):
            losses[reader].append(float(trace(params["small"], batch=batch, prefix=soft)))
    return {"trace": {reader: resampled.mean(values) for reader, values in losses.items()}}


def _heads(told: Sequence[Told], batches: Sequence[Batch], usual: float, resampled: Resampled) -> dict[str, Any]:
    """What a projector's outputs are worth, each beside what sees nothing, or the VLM's own head."""
    beside = jax.device_get([one.beside for one in told])
    lengths = np.array([int(one.caption.length[0, 0]) for one in told])
    pairs = [
        (np.asarray(one.instead.features[0, 0, :length]), np.asarray(one.caption.features[0, 0, :length]))
        for one, length in zip(told, lengths)
    ]
    features, target = (jnp.asarray(np.concatenate(part))[None] for part in zip(*pairs))
    present, places = np.stack([one["present"] for one in beside]), np.arange(len(beside[0]["present"]))
    is_text, said = places < lengths[:, None], np.array([int(one.instead.length[0, 0]) for one in told])
    constant = max(range(1, 1 + len(places)), key=lambda length: np.mean((places < length) == is_text))
    tokens = np.array([int(batch["answer_length"][0]) for batch in batches])
    seconds = np.array([float(batch["remaining_s"][0]) for batch in batches])
    lasts = np.exp([float(one["log_s"]) for one in beside])

    def a_token(name: str) -> dict[str, float]:
        losses = np.array([float(one[name]) for one in beside]) * tokens
        return resampled(lambda at: losses[at].sum() / tokens[at].sum())

    def median_error(guess: np.ndarray | float) -> dict[str, float]:
        errors = np.abs(guess - seconds)
        return resampled(lambda at: float(np.median(errors[at])))

    return {
        "align": {"head": {"mean": float(align_loss(features, target, jnp.array([target.shape[1]])))}},
        "present": {
            "head": resampled.mean(np.mean((present > 0) == is_text, 1)),
            "constant": resampled.mean(np.mean((places < constant) == is_text, 1)),
        },
        "length": {
            "head": resampled.mean(said == lengths),
            "constant": resampled.mean(lengths == constant),
        },
        "next": {"head": a_token("next"), "vlm": a_token("vlm_next")},
        "time": {"head": median_error(lasts), "constant": median_error(usual)},
    }


def _usual_seconds(store: EventStore, config: ConfigDict) -> float:
    """Median duration of the training episodes' events, of the levels that the run was asked for."""
    lengths = [
        span["end"] - span["start"]
        for episode in store.episodes
        for level, share in config.data.levels.items()
        if share and episode["split"] == "train"
        for span in episode["spans"][level]
    ]
    return float(np.median(lengths)) / float(store.meta["action_hz"])


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


def _tell(params: Params, config: ConfigDict, batch: Batch) -> Told:
    """What a run says of one event."""
    caption = world_action_model.encode_text(world_params(params, config), config.model, batch)
    caption = TextContext(caption.features.astype(jnp.float32), caption.length)
    if "staircase" in params:
        latents, prefix = latents_of(params, config, batch)
        room = max(caption.features.shape[2] - latents.features.shape[2], 0)
        padded = jnp.pad(latents.features, ((0, 0), (0, 0), (0, room), (0, 0)))
        return Told(TextContext(padded, latents.length), caption, {"prefix": prefix})
    sizes, heads = language_pathway.vlm_config(config), language_pathway.projector_config(config)
    hidden = vlm.forward(params["vlm"], sizes, vlm_inputs(batch))
    features, present = projected(params, config, batch, hidden)
    answers = answer_features(hidden, batch, config.data.vlm.answer_length)
    beside = {
        "present": present[0],
        "next": answer_loss(text_projector.next_logits(params["vlm_text"], heads, answers), batch),
        "vlm_next": answer_loss(vlm.logits(params["vlm"], sizes, answers), batch),
        "log_s": text_projector.remaining_time(params["vlm_text"], heads, answers[:, 0])[0],
    }
    return Told(TextContext(features[:, None], text_projector.text_length(present)[:, None]), caption, beside)


def _judge(
    params: Params, config: ConfigDict, batch: Batch, text: TextContext, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The towers' losses under a text, and what the video tower reads of it."""
    world, weight = world_params(params, config), jnp.ones(config.model.latent_channels)
    drawn = objectives.draw(key, batch, config, get_stage("staircase"))
    return tower_losses(world, config, batch, drawn, text, weight), readings(world, config, text)


def _print(result: Mapping[str, Any]) -> None:
    names = [*result["action"], *(["nothing"] if "trace" in result else [])]
    print(f"{result['events']} held-out events" + "".join(f"{name.replace('_', ' '):>24}" for name in names))
    for measure_ in (*(["trace"] if "trace" in result else []), "match", "action", "video"):
        cells = [_cell(result[measure_].get(name)) for name in names]
        print(f"{measure_:<20}" + "".join(f"{cell:>24}" for cell in cells))
    for stream in ("action", "video"):
        for floor in FLOORS:
            print(f"{stream}: gap from the {floor.replace('_', ' ')} {_cell(result['gap'][stream][floor])}")
            for name, shares in result["gap_closed"][stream].items():
                print(f"    closed by {name.replace('_', ' ')}: {_cell(shares[floor])}")
    for name in ("align", "present", "length", "next", "time") if "align" in result else ():
        print(f"{name:<20}" + ", ".join(f"{reader} {_cell(entry)}" for reader, entry in result[name].items()))


def _cell(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['mean']:.3f}" + (f" [{entry['low']:.3f}, {entry['high']:.3f}]" if "low" in entry else "")


def with_towers(loaded: Loaded, config: ConfigDict, run: str) -> Params:
    """The parameters of a run of stage `vlm_text` with the towers of `run`; `config.model` becomes theirs.

    Raises:
      UserError: no such run, one without both towers, or one with another text encoder than the projector's.
    """
    if not run:
        raise UserError(
            "the run names no towers, train.text_from; give those that are to read its features, --towers=RUN"
        )
    towers = load_params(run)
    model = ConfigDict(towers.config).model
    if missing := {"video", "action"} - set(towers.params):
        raise UserError(
            f"--towers={run} has no parameters of {' and '.join(sorted(missing))}; give a run of stage joint or action"
        )
    same = same_encoder(loaded.params.get("text"), towers.params.get("text"))
    stores = fingerprint(loaded.assets["store"]), fingerprint(towers.assets["store"])
    if not same or model.text != config.model.text or stores[0] != stores[1]:
        raise UserError(
            f"--towers={run} has another text encoder than the one that the projector was aligned to, of "
            f"{config.train.text_from!r}"
        )
    config.model = model
    return {**loaded.params, "video": towers.params["video"], "action": towers.params["action"]}


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
    params: Params = loaded.params
    if values.towers and "vlm_text" not in params:
        raise UserError(
            "--towers is for a run of stage 'vlm_text'; one of stage 'staircase' holds those it was tied to"
        )
    if "vlm_text" in params:
        params = with_towers(loaded, config, values.towers or config.train.text_from)
    result = measure(params, config.lock(), store, events=values.events, draws=values.draws, seed=values.seed)
    text = json.dumps(result, indent=1)
    if values.out:
        write_text(Path(values.out), text)
    print(text) if values.json else _print(result)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train, stage staircase or vlm_text; its newest checkpoint.")
    flags.DEFINE_string("store", "", "Event store with a heldout split; usually the one trained on.")
    flags.DEFINE_string("towers", "", "Stage vlm_text: run of the towers; by default its own train.text_from.")
    flags.DEFINE_integer("events", 1000, "Events, at most.", 2)
    flags.DEFINE_integer("draws", 8, "Draws of action noise per event.", 1)
    flags.DEFINE_integer("seed", 0, "Of the noise, and of which event is the other.")
    flags.DEFINE_string("out", "", "File for the result as JSON.")
    flags.DEFINE_bool("json", False, "Print the result as JSON.")
    run_command(main)
