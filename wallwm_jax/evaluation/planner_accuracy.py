r"""How often a planner names the right next event on held-out episodes, and how well it tells the time.

    python -m wallwm_jax.evaluation.planner_accuracy --workdir=runs/vlm --store=runs/quickstart/store \
        --out=runs/planner.json

Every event of the held-out episodes is asked for at its first frame, with the events before it as they happened; an
episode's last event also at its end, where the answer is that the task is done. A caption counts as exact if it is one
of the event's wordings, and as right about the object if its verb and its first thing with colour agree with one of
them ("press the red button ..."). Beside the planner stand two that see nothing: the level's most frequent training
caption, and what most often followed the last event in training under the same instruction. An order is unseen if no
training episode of the same instruction begins with the same events. A run that was asked inside events, too, says how
long each still takes at its later keyframes. Rates have Wilson 95 % intervals over questions;
those of one episode are not independent, so they are somewhat too narrow. --out keeps all figures, and what was
measured, as JSON; `python -m wallwm_jax.evaluation.report --planner=FILE` shows them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from wallwm_jax.console import UserError, progress, run_command, write_text
from wallwm_jax.data.event_store import BadRecord, EventStore, open_store
from wallwm_jax.data.vlm_batches import Question, Questions
from wallwm_jax.evaluation.statistics import rate_text, success_rate
from wallwm_jax.events.planning_text import Plan
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KEYFRAME_SHARES, KINDS
from wallwm_jax.inference.planner import Planner, PlanRequest, VlmPlanner
from wallwm_jax.paths import require_local

MEASURES = {
    "exact": "exact",
    "object": "right object",
    "exact_unseen_order": "exact, unseen order",
    "object_unseen_order": "right object, unseen order",
}
"""Rates, with their titles."""
ANSWERERS = {"planner": "planner", "majority": "most frequent caption", "after_last": "usual next caption"}
"""Who is asked, with their titles."""

_THING = re.compile(r"^(?P<verb>\w+).*?\bthe (?P<thing>.+?)(?= (?:on|in|at|by|to|and|of|away|onto|into)\b|,|$)")


@dataclass(frozen=True)
class Asked:
    """One question, its right wordings (none where the task is done), and what a planner said."""

    question: Question
    wordings: tuple[str, ...]
    plan: Plan

    @property
    def exact(self) -> bool:
        """Whether the caption is one of the wordings, or the planner rightly says that all is done."""
        if not self.wordings or self.plan.done:
            return self.plan.done and not self.wordings
        return self.plan.caption in self.wordings

    @property
    def right_object(self) -> bool:
        """Whether verb and thing are those of one of the wordings; as `exact` where the task is done."""
        said = verb_and_thing(self.plan.caption)
        return self.exact or (said is not None and said in map(verb_and_thing, self.wordings))


def verb_and_thing(caption: str) -> tuple[str, str] | None:
    """("press", "red button") of "press the red button on the left"; None where the caption has no such form."""
    found = _THING.match(caption)
    return (found["verb"], found["thing"]) if found else None


def collect(
    store: EventStore, config: Any, levels: Sequence[str], limit: int
) -> list[tuple[Question, tuple[str, ...]]]:
    """Questions about the events of a split, with the wordings of their answers, at most `limit`, spread evenly."""
    questions = Questions(store, config)
    asked: list[tuple[Question, tuple[str, ...]]] = []
    for window in _windows(store, levels, limit):
        try:
            record = store.read(window)
            others = [store.caption(number) for number in record.paraphrase_ids]
            asked.append((questions.ask(window), (store.caption(record.caption_id), *others)))
            if questions.ends_task(record):
                asked.append((questions.ask(window, at_end=True), ()))
        except BadRecord as error:
            print(f"warning: left out: {error}")
    return asked


def _windows(store: EventStore, levels: Sequence[str], limit: int) -> list[int]:
    index = store.index
    wanted = (index["kind"] == KINDS.index("event")) & np.isin(index["level"], [LEVELS.index(name) for name in levels])
    windows = np.flatnonzero(wanted)
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(limit, len(windows))).round().astype(int))
    return [int(window) for window in windows[chosen]]


def measure(planner: Planner, store: EventStore, config: Any, *, levels: Sequence[str], limit: int) -> dict[str, Any]:
    """Asks the planner about the events of `store`, a split that it was not trained on.

    Args:
      planner: what is measured.
      store: the split.
      config: of the planner's run; `data.views` and `data.vlm` say what it sees.
      levels: of the events.
      limit: events, at most.

    Returns:
      `questions`; per one of `ANSWERERS` the rates of `MEASURES`, and of the planner `seconds_error` (median of the
      absolute error), `seconds_share` (the same over the true time).
    """
    asked = collect(store, config, levels, limit)
    if not asked:
        raise UserError(f"event store {str(store.path)!r} has no {' or '.join(levels)} events in {store.split!r}")
    views = config.data.views
    plans: list[Plan] = []
    for start in progress(range(0, len(asked), 8), unit="batch", label="plan"):
        plans += planner.plan([request_of(question, views) for question, _ in asked[start : start + 8]])
    majority, after_last, begun = _training_text(store, levels)
    blind: dict[str, Callable[[Question], str]] = {
        "majority": lambda question: majority[question.level],
        "after_last": lambda question: after_last.get(_last(question), majority[question.level]),
    }
    result: dict[str, Any] = {"questions": len(asked)}
    result["planner"] = _rates([Asked(*pair, plan) for pair, plan in zip(asked, plans)], begun)
    result["planner"] |= _time_errors(asked, plans)
    for name, guess in blind.items():
        guesses = [Plan(caption, None, not caption) for caption in (guess(question) for question, _ in asked)]
        result[name] = _rates([Asked(*pair, plan) for pair, plan in zip(asked, guesses)], begun)
    return result


def measure_time_left(
    planner: VlmPlanner, store: EventStore, config: Any, *, levels: Sequence[str], limit: int
) -> dict[str, Any]:
    """Asks how long events still take, of `store` at their later keyframes; arguments as for `measure`.

    Returns:
      `asked`; `error`, the median of the absolute error in seconds; `error_usual`, the same of half the median duration
      that the caption had in training, which sees nothing.
    """
    questions, windows = Questions(store, config), _windows(store, levels, limit)
    hz, spans = float(store.meta["action_hz"]), defaultdict(list)
    for episode in store.episodes:
        for level in levels if episode["split"] == "train" else ():
            for span in episode["spans"][level]:
                spans[span["caption"]].append((span["end"] - span["start"]) / hz)
    usual = float(np.median([seconds for found in spans.values() for seconds in found]))
    told: list[float | None] = []
    asked: list[Question] = []
    for start in progress(range(0, len(windows), 8), unit="batch", label="time left"):
        part = [
            questions.ask(window, moment=moment)
            for window in windows[start : start + 8]
            for moment in range(1, len(KEYFRAME_SHARES))
        ]
        told += planner.time_left([request_of(question, config.data.views) for question in part])
        asked += part
    true = np.array([question.remaining_s for question in asked])
    blind = np.array([np.median(spans.get(question.now, [usual])) / 2 for question in asked])
    said = np.array([guess if seconds is None else seconds for seconds, guess in zip(told, blind)])
    return {
        "asked": len(asked),
        "error": float(np.median(np.abs(said - true))),
        "error_usual": float(np.median(np.abs(blind - true))),
    }


def request_of(question: Question, views: Sequence[str]) -> PlanRequest:
    """A question of the store as a planner is asked."""
    count = len(views)
    previous = dict(zip(views, question.pictures[:count])) if len(question.pictures) > count else None
    frames = dict(zip(views, question.pictures[-count:]))
    return PlanRequest(frames, question.instruction, question.done, question.level, previous, question.now)


def _rates(asked: Sequence[Asked], begun: set[tuple[str, ...]]) -> dict[str, Any]:
    unseen = [one for one in asked if (one.question.level, one.question.instruction, *one.question.done) not in begun]
    rates = {}
    for order, ones in {"": asked, "_unseen_order": unseen}.items():
        rates[f"exact{order}"] = success_rate(sum(one.exact for one in ones), len(ones)).to_json()
        rates[f"object{order}"] = success_rate(sum(one.right_object for one in ones), len(ones)).to_json()
    return rates


def _time_errors(asked: Sequence[tuple[Question, Any]], plans: Sequence[Plan]) -> dict[str, Any]:
    told = [
        (plan.duration_s, question.remaining_s)
        for (question, _), plan in zip(asked, plans)
        if plan.duration_s is not None and question.caption
    ]
    if not told:
        return {"seconds_error": None, "seconds_share": None}
    said, true = np.array(told).T
    return {
        "seconds_error": float(np.median(np.abs(said - true))),
        "seconds_share": float(np.median(np.abs(said - true) / true)),
    }


def _training_text(
    store: EventStore, levels: Sequence[str]
) -> tuple[dict[str, str], dict[tuple[str, ...], str], set[tuple[str, ...]]]:
    """Of the training episodes: the most frequent caption per level, what most often follows each last event ("" where
    nothing does), and with what events they begin."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    following: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    begun: set[tuple[str, ...]] = set()
    for episode in store.episodes:
        for level in levels if episode["split"] == "train" else ():
            key = level, episode["spans"]["task"][0]["caption"]
            captions = [span["caption"] for span in episode["spans"][level]]
            counts[level].update(captions)
            for number, caption in enumerate([*captions, ""]):
                following[*key, captions[number - 1] if number else ""][caption] += 1
                begun.add((*key, *captions[:number]))
    return (
        {level: count.most_common(1)[0][0] for level, count in counts.items()},
        {last: count.most_common(1)[0][0] for last, count in following.items()},
        begun,
    )


def _last(question: Question) -> tuple[str, ...]:
    return question.level, question.instruction, question.done[-1] if question.done else ""


def measure_run(workdir: str | Path, store_path: str | Path, out: str | Path, limit: int) -> dict[str, Any]:
    """Measures the newest checkpoint of a run on the heldout split of a store.

    Args:
      workdir: of a run of stage `vlm_sft` or `vlm_text`.
      store_path: usually the store that it was trained on.
      out: JSON file for what is returned; "" writes none.
      limit: events asked for, at most.

    Returns:
      what was measured (`workdir`, `step`, `store`, `split`, `levels`), as `measure`, and `time_left` as
      `measure_time_left`, None where the run was never asked inside events.

    Raises:
      UserError: a path is missing, or the run does not fit the store.
    """
    for name, value in {"workdir": workdir, "store": store_path}.items():
        if not str(value):
            raise UserError(f"no --{name} given; see --help")
    require_local(out, "out")
    if str(out) and Path(out).expanduser().is_dir():
        raise UserError(f"--out={out} is a directory; give a JSON file")
    planner = VlmPlanner.from_checkpoint(workdir)
    store, config = open_store(store_path, "heldout"), planner.config
    result = {
        "workdir": str(workdir),
        "step": planner.step,
        "store": str(store.path),
        "split": store.split,
        "levels": list(planner.levels),
        **measure(planner, store, config, levels=planner.levels, limit=limit),
        "time_left": measure_time_left(planner, store, config, levels=planner.levels, limit=limit)
        if config.data.vlm.inside_prob
        else None,
    }
    if str(out):
        file = Path(out).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result, indent=1) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """Markdown: the rates of each that answered; below, `time_lines`."""
    head = [f"{result['questions']} questions about {' and '.join(result['levels'])} events", *ANSWERERS.values()]
    rows = [[label, *(rate_text(result[name][key]) for name in ANSWERERS)] for key, label in MEASURES.items()]
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in cells), "", *time_lines(result)])


def time_lines(result: Mapping[str, Any]) -> list[str]:
    """How well the planner told times, in words."""
    lines, left = [], result["time_left"]
    if result["planner"]["seconds_error"] is not None:
        error, share = result["planner"]["seconds_error"], result["planner"]["seconds_share"]
        lines.append(f"Duration of the next event: median error {error:.2f} s, {100 * share:.0f} %.")
    if left:
        lines.append(
            f"Time left, {left['asked']} times inside events: median error {left['error']:.2f} s; half the usual "
            f"duration of the caption {left['error_usual']:.2f} s."
        )
    return lines


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    print(table(measure_run(values.workdir, values.store, values.out, values.events)))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train, stage vlm_sft or vlm_text; its newest checkpoint.")
    flags.DEFINE_string("store", "", "Event store with a heldout split; usually the one trained on.")
    flags.DEFINE_integer("events", 100_000, "Events asked for, at most.", 1)
    flags.DEFINE_string("out", "", "JSON file for the figures; its folder is made if absent.")
    run_command(main)
