"""The byte encoder's n-gram rows: the same letters give the same row wherever they stand, others another one."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models.text.byte_ids import encode_bytes
from wallwm_jax.models.text.bytes import ngram_rows


def rows_of(text, n, rows=4096):
    ids = encode_bytes(text, 64)[0][None]
    return np.asarray(ngram_rows(jnp.asarray(ids), n, rows))[0]


@pytest.mark.parametrize("n", [3, 4, 6])
def test_an_ngram_has_one_row_wherever_it_stands(n):
    text = "press the red button, then lift the red block"
    rows, first, second = rows_of(text, n), text.index("the red"), text.rindex("the red")
    np.testing.assert_array_equal(rows[first + n - 1 : first + 7], rows[second + n - 1 : second + 7])


def test_other_ngrams_seldom_share_a_row():
    grams = ["".join(letters) for letters in itertools.islice(itertools.product("aelrst", repeat=4), 500)]
    rows = [rows_of(gram, 4)[3] for gram in grams]
    expected = 4096 * (1 - (1 - 1 / 4096) ** 500)  # distinct rows of a uniform draw
    assert len(set(rows)) == pytest.approx(expected, rel=0.05)
    assert min(rows) >= 0 and max(rows) < 4096
