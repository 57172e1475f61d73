"""Sources by name: how many episodes of each family a simulator records."""

import re

import pytest

from wallwm_jax.console import UserError
from wallwm_jax.sources.opening import families_of


def test_families_without_shares_have_as_many_episodes_each():
    assert families_of("chamber,block", 12) == {"chamber": 12, "block": 12}
    assert families_of("chamber,block", None) == {"chamber": 40, "block": 40}


def test_shares_divide_one_total_by_largest_remainders():
    assert families_of("chamber=80,switch=15,block=4,hanoi=1", 300) == {
        "chamber": 240, "switch": 45, "block": 12, "hanoi": 3,
    }  # fmt: skip
    assert families_of("a=1,b=1,c=1", 10) == {"a": 4, "b": 3, "c": 3}
    assert families_of("a=0.5,b=0.3,c=0.2", 4) == {"a": 2, "b": 1, "c": 1}
    assert families_of("a=3,b=1", None) == {"a": 60, "b": 20}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("chamber=80,switch", "give every family a positive share"),
        ("chamber=80,switch=0", "give every family a positive share"),
        ("chamber=80,switch=nan", "give every family a positive share"),
        ("chamber=many,switch=1", "give every family a positive share"),
        ("chamber=80,chamber=20", "names a family twice"),
        ("chamber=99,hanoi=1", "of 20 episodes in all, 'hanoi' would have none; raise --episodes or its share"),
    ],
)
def test_bad_shares_are_errors(argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        families_of(argument, 20)
