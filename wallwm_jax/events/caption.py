"""Captions of events in plain natural language: templates as tables, sides and directions from image positions.

Knows no simulator and no robot: a source passes `Facts` (what is acted on, where it appears in the image, which way it
moves) and gets the canonical wording first, paraphrases after it. A duration clause may follow any caption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wallwm_jax.console import UserError


@dataclass(frozen=True)
class Thing:
    """Something a caption names: `Thing("block", "blue", "on the left")` reads "the blue block on the left"."""

    name: str
    colour: str = ""
    where: str = ""

    @property
    def short(self) -> str:
        """With article and colour, without its place."""
        return " ".join(word for word in ("the", self.colour, self.name) if word)

    @property
    def full(self) -> str:
        """With article, colour and place."""
        return f"{self.short} {self.where}".strip()


@dataclass(frozen=True)
class Facts:
    """What the captions of one subtask and of its actions may mention; empty text means unknown.

    Attributes:
      thing: what is acted on, for example the block that is carried or the button that is pressed.
      handle: the part that is touched, where it is not the thing itself, for example "drawer handle".
      toward: where it is carried, "to the drawer", "to the back left of the table".
      onto: where it is set down, "into the drawer", "onto the red block".
      direction: which way it moves in the image, "to the right", "away from the camera".
      result: how it is left, "open" or "closed".
      purpose: why, as an infinitive without "to": "unlock the drawer".
      origin: where it comes from, "from the middle peg".
    """

    thing: Thing
    handle: Thing | None = None
    toward: str = ""
    onto: str = ""
    direction: str = ""
    result: str = ""
    purpose: str = ""
    origin: str = ""

    def with_thing(self, thing: Thing) -> Facts:
        """The same facts about another (or moved, or recoloured) thing."""
        return replace(self, thing=thing)


# Templates per verb; a template is used where all its facts are known, and the first usable one is canonical.
# {object} and {it} are the touched part with and without its place, {thing} is the whole thing.
ACTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "reach": (
        "reach for {object}",
        "move the gripper above {object}",
        "go to {object}",
        "bring the hand over to {object}",
    ),
    "descend": ("move down to {it}", "lower the gripper to {it}", "descend onto {it}"),
    "grasp": ("grasp {it}", "close the gripper on {it}", "grip {it}"),
    "lift": ("lift {it}", "raise {it}", "pick {it} up"),
    "carry": ("carry {it} {toward}", "bring {it} {toward}", "move {it} {toward} through the air", "carry {it}"),
    "lower": ("lower {it} {onto}", "set {it} down {onto}", "put {it} down {onto}", "lower {it}"),
    "release": ("release {it}", "let go of {it}", "open the gripper to release {it}"),
    "retract": ("move away from {it}", "back off from {it}", "retract the gripper from {it}"),
    "press": ("press {object}", "push {object} down", "push down on {object}"),
    "pull": (
        "pull {thing} {result} {direction}",
        "pull {it} {direction} until {thing} is {result}",
        "draw {thing} {result} {direction}",
    ),
    "push": (
        "push {thing} {result} {direction}",
        "push {it} {direction} until {thing} is {result}",
        "shove {thing} {result} {direction}",
    ),
    "slide": (
        "slide {thing} {result}, {direction}",
        "slide {it} {direction} until {thing} is {result}",
        "move {thing} {direction} until it is {result}",
    ),
    "wait": ("wait until {it} has settled", "hold still until {it} has settled", "let {it} come to rest"),
}

SUBTASK_TEMPLATES: dict[str, tuple[str, ...]] = {
    "press": (
        "press {object} to {purpose}",
        "{purpose} by pressing {object}",
        "push {object} to {purpose}",
        "press {object}",
        "push {object} down",
        "hit {object}",
    ),
    "open": (
        "open {thing} by moving its handle {direction}",
        "open {thing}, moving it {direction}",
        "take the handle and open {thing}",
        "open {thing}",
    ),
    "close": (
        "close {thing} by moving its handle {direction}",
        "close {thing}, moving it {direction}",
        "take the handle and close {thing}",
        "close {thing}",
    ),
    "place": (
        "move {it} {origin} {toward}",
        "take {it} {origin} and bring it {toward}",
        "pick up {object} and put it {onto}",
        "grab {object} and set it down {onto}",
        "put {it} {onto}",
        "move {it} {toward}",
    ),
}

SEGMENT_TEMPLATES: dict[str, tuple[str, ...]] = {
    **ACTION_TEMPLATES,
    "settle": ("{phase} until the arm has caught up", "wait for the arm to catch up: {phase}"),
    "regrasp": ("try again to {phase}", "once more, {phase}"),
    "recover": ("move back and {phase}", "go back into place and {phase}", "set it right: {phase}"),
}

_TEMPLATES = {"subtask": SUBTASK_TEMPLATES, "action": ACTION_TEMPLATES, "segment": SEGMENT_TEMPLATES}
_FIELD = re.compile(r"{(\w+)}")
_DURATION = re.compile(r", takes \d+(?:\.\d+)? s$")


def describe(level: str, verb: str, facts: Facts, *, phase: str = "") -> tuple[str, ...]:
    """All wordings of one event, the canonical one first, without repeats.

    Args:
      level: "subtask", "action" or "segment".
      verb: a key of that level's template table.
      facts: what may be mentioned.
      phase: for verbs "settle", "regrasp" and "recover", the canonical wording of the action they belong to.

    Raises:
      UserError: no template for this level and verb, or none whose facts are known.
    """
    templates = _TEMPLATES.get(level, {}).get(verb)
    if templates is None:
        known = ", ".join(sorted(_TEMPLATES.get(level, {})))
        raise UserError(f"no caption for verb {verb!r} on level {level!r}; known: {known or 'no such level'}")
    touched = facts.handle or facts.thing
    words = dict(
        object=touched.full,
        it=touched.short,
        thing=facts.thing.short,
        toward=facts.toward,
        onto=facts.onto,
        direction=facts.direction,
        result=facts.result,
        purpose=facts.purpose,
        origin=facts.origin,
        phase=phase,
    )
    wordings = fill(templates, words)
    if not wordings:
        raise UserError(f"{level} {verb!r} of {facts.thing.full!r} lacks the facts that its captions need: {facts}")
    return wordings


def fill(templates: Sequence[str], words: Mapping[str, str]) -> tuple[str, ...]:
    """The templates whose fields all have a word, filled in, in order and without repeats."""
    usable = [t for t in templates if all(words[field] for field in _FIELD.findall(t))]
    return tuple(dict.fromkeys(template.format(**words) for template in usable))


def duration_clause(caption: str, seconds: float) -> str:
    """The caption with its duration, rounded to half a second, at least 0.5: "lift the block, takes 2.5 s"."""
    return f"{caption}, takes {max(round(2 * seconds) / 2, 0.5):.1f} s"


def with_parent(parent: str, caption: str) -> str:
    """The caption prefixed by its parent's: "open the drawer: grasp the handle"; unchanged without a parent."""
    return f"{parent}: {caption}" if parent else caption


def in_order(captions: Sequence[str]) -> str:
    """One caption of events that follow each other: "reach for the handle, then pull it"."""
    return ", then ".join(captions)


def has_duration_clause(caption: str) -> bool:
    """Whether the caption ends in a duration clause."""
    return _DURATION.search(caption) is not None


def side_in_image(u: float) -> str:
    """Place along the image's width, `u` in 0..1 from left to right."""
    return "on the left" if u < 0.42 else "on the right" if u > 0.58 else "in the middle"


def place_in_image(u: float, depth: float) -> str:
    """Named place on a flat surface: `u` as above, `depth` below -1 is the back, above 1 the front, for example
    "back left", "right", "middle", "front"."""
    column = {"on the left": "left", "on the right": "right"}.get(side_in_image(u), "")
    row = "back" if depth < -1 else "front" if depth > 1 else ""
    return f"{row} {column}".strip() or "middle"


def direction_in_image(start: np.ndarray, end: np.ndarray) -> str:
    """How a thing moves in the picture, from pixel `[2]` to pixel `[2]` (x right, y down)."""
    right, down = np.subtract(end, start)
    if abs(right) >= abs(down):
        return "to the right" if right > 0 else "to the left"
    return "towards the camera" if down > 0 else "away from the camera"


def order_in_row(positions: Sequence[float] | np.ndarray) -> list[str]:
    """Names things of one kind by their order along the image's width: left, (middle or second ...), right."""
    names = _ordinals(len(positions), ("left", "right"))
    rank = np.argsort(np.argsort(positions))
    return [names[index] for index in rank]


def place_in_grid(row: int, rows: int, column: int, columns: int) -> str:
    """Place in a grid seen from the front: row 0 is the back, column 0 the left; "in the back row on the left"."""
    if rows % 2 and columns % 2 and (row, column) == (rows // 2, columns // 2):
        return "in the centre"
    row_name = _ordinals(rows, ("back", "front"))[row]
    column_name = _ordinals(columns, ("left", "right"))[column]
    if column_name in ("left", "right"):
        return f"in the {row_name} row on the {column_name}"
    return f"in the {row_name} row, {column_name} column"


def _ordinals(count: int, ends: tuple[str, str]) -> list[str]:
    inner = {1: ["middle"], 2: ["second", "third"], 3: ["second", "middle", "fourth"]}.get(count - 2, [])
    if count == 1:
        return ["middle"]
    return [ends[0], *(inner or [f"number {index}" for index in range(2, count)]), ends[1]]
