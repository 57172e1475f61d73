"""What a planner is asked and what it answers, as text: templates over the events of an episode.

    task: make all buttons the same colour
    done: press the blue button in the centre; press the grey button in the back row on the left
    next subtask?

The answer is the next event's caption with its remaining duration, "press the grey button in the centre, takes 2.0 s",
or `DONE`. While an event is under way the last line is "now: CAPTION" and "how long?", and the answer "takes 1.5 s". A
reasoning trace says first what is done and what remains, and ends with that answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wallwm_jax.events.caption import duration_clause

DONE = "the task is done"
_NEXT = "next: "
_TAKES = r"takes (?P<seconds>\d+(\.\d+)?) s$"
_TIMED = re.compile(r"(?P<caption>.+), " + _TAKES)


@dataclass(frozen=True)
class Plan:
    """A planner's answer.

    Attributes:
      caption: of the next event; "" where there is none.
      duration_s: seconds that it takes from now on; None where the planner did not say.
      done: whether the task is achieved.
    """

    caption: str
    duration_s: float | None
    done: bool


def request(instruction: str, level: str, done: Sequence[str], now: str = "") -> str:
    """The question: the task, the events of `level` so far in time order, and which level is asked for; or, with the
    caption of the event that is under way, how long that one still takes."""
    asked = f"now: {now}\nhow long?" if now else f"next {level}?"
    return f"task: {instruction}\ndone: {_listed(done)}\n{asked}"


def answer(caption: str, seconds: float) -> str:
    """The answer that `parse` reads; an empty caption says that the task is done."""
    return duration_clause(caption, seconds) if caption else DONE


def time_left(seconds: float) -> str:
    """The answer to how long an event still takes."""
    return duration_clause("", seconds).removeprefix(", ")


def parse_time_left(text: str) -> float | None:
    """Seconds of such an answer; None where it is of another form."""
    timed = re.match(_TAKES, text.strip())
    return float(timed["seconds"]) if timed else None


def trace(done: Sequence[str], remaining: Sequence[str], final: str) -> str:
    """The reasoning trace over the event tree: what is done, what remains, and the answer `final`."""
    return f"done: {_listed(done)}\nremaining: {_listed(remaining)}\n{_NEXT}{final}"


def parse(text: str) -> Plan:
    """Reads an answer, with or without a trace before it; what is not in the answer's form is taken as a caption."""
    final = text.rpartition(_NEXT)[2].strip()
    if final == DONE:
        return Plan("", None, True)
    timed = _TIMED.match(final)
    return Plan(timed["caption"], float(timed["seconds"]), False) if timed else Plan(final, None, False)


def _listed(captions: Sequence[str]) -> str:
    return "; ".join(captions) or "nothing"
