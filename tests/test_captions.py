"""Captions: canonical wording first, paraphrases without gaps, sides and directions from image positions."""

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.events import caption as captions
from wallwm_jax.events.caption import Facts, Thing

BUTTON = Facts(Thing("button", "red", "on the left"), purpose="unlock the drawer")
BLOCK = Facts(Thing("block", "blue", "on the right"), toward="to the drawer", onto="into the drawer")
DRAWER = Facts(
    Thing("drawer"), handle=Thing("drawer handle", where="on the left"), direction="to the right", result="open"
)


@pytest.mark.parametrize(
    ("level", "verb", "facts", "expected"),
    [
        ("action", "press", BUTTON, "press the red button on the left"),
        ("subtask", "press", BUTTON, "press the red button on the left to unlock the drawer"),
        ("action", "lift", BLOCK, "lift the blue block"),
        ("action", "carry", BLOCK, "carry the blue block to the drawer"),
        ("subtask", "place", BLOCK, "pick up the blue block on the right and put it into the drawer"),
        ("action", "reach", DRAWER, "reach for the drawer handle on the left"),
        ("action", "pull", DRAWER, "pull the drawer open to the right"),
    ],
)
def test_canonical_wording(level, verb, facts, expected):
    assert captions.describe(level, verb, facts)[0] == expected


def test_paraphrases_are_several_distinct_and_complete():
    for level, table in captions._TEMPLATES.items():
        for verb in table:
            facts = Facts(Thing("a"), Thing("b"), *(["x"] * 6))
            texts = captions.describe(level, verb, facts, phase="do it")
            assert len(texts) == len(set(texts)) >= 2, (level, verb)
            assert not any("{" in text or "  " in text for text in texts)


def test_templates_whose_facts_are_unknown_are_left_out():
    no_purpose = Facts(BUTTON.thing)
    assert captions.describe("subtask", "press", no_purpose)[0] == "press the red button on the left"
    with pytest.raises(UserError, match="lacks the facts"):
        captions.describe("action", "pull", Facts(Thing("drawer")))
    with pytest.raises(UserError, match=r"no caption for verb 'juggle'.*known: carry, descend"):
        captions.describe("action", "juggle", BLOCK)


def test_duration_clause_is_rounded_to_half_seconds_and_recognised():
    assert captions.duration_clause("lift the block", 2.4) == "lift the block, takes 2.5 s"
    assert captions.duration_clause("lift the block", 0.1) == "lift the block, takes 0.5 s"
    assert captions.has_duration_clause("lift the block, takes 12.0 s")
    assert not captions.has_duration_clause("lift the block that takes 2 s to find")


def test_sides_and_directions_are_those_of_the_image():
    assert [captions.side_in_image(u) for u in (0.1, 0.5, 0.9)] == ["on the left", "in the middle", "on the right"]
    assert captions.direction_in_image(np.array([0.2, 0.5]), np.array([0.6, 0.4])) == "to the right"
    assert captions.direction_in_image(np.array([0.2, 0.5]), np.array([0.1, 0.9])) == "towards the camera"
    assert captions.order_in_row([0.7, 0.2]) == ["right", "left"]
    assert captions.order_in_row([0.5, 0.9, 0.1]) == ["middle", "right", "left"]
    assert captions.place_in_image(0.1, -2.0) == "back left"
    assert captions.place_in_image(0.5, 0.0) == "middle"
    assert captions.place_in_grid(0, 3, 2, 3) == "in the back row on the right"
    assert captions.place_in_grid(1, 3, 1, 3) == "in the centre"
    assert captions.place_in_grid(1, 4, 2, 4) == "in the second row, third column"
