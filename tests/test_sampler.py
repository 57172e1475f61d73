"""The draw: balanced marginals, dense rows, nothing dropped, and every row a pure function of (seed, row)."""

import numpy as np
import pytest

from configs import base
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import INDEX_DTYPE
from wallwm_jax.data.sampler import BLOCKS_PER_DECK, Sampler, _shuffled
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS


def index_like_ocbench(windows=1500, clusters_vl=15, clusters_action=40, seed=0):
    """Windows with OCBench's lengths (subtasks 25 to 100 steps, actions 4 to 20) and heavy-tailed clusters."""
    rng = np.random.default_rng(seed)
    subtask = rng.random(windows) < 0.2
    steps = np.where(subtask, rng.integers(25, 101, windows), rng.integers(4, 21, windows)) // 2 * 2
    index = np.zeros(windows, INDEX_DTYPE)
    index["kind"] = KINDS.index("event")
    index["level"] = np.where(subtask, LEVELS.index("subtask"), LEVELS.index("action"))
    index["length"] = 1 + np.maximum(1, -(-steps // 8))
    index["num_actions"] = steps
    for name, count in (("cluster_vl", clusters_vl), ("cluster_action", clusters_action)):
        tail = np.minimum((rng.pareto(1.0, windows) * count / 6).astype(int), count - 1)
        index[name] = tail + count * subtask
    return index


def configured(**data):
    config = base.get_config().copy_and_resolve_references().unlock()
    for name, value in data.items():  # `update` would merge the levels into the default ones
        config.data[name] = value
    return config


@pytest.mark.parametrize(("latents", "levels"), [(34, {"subtask": 0.5, "action": 0.5}), (17, {"action": 1.0})])
def test_rows_are_full_and_no_row_exceeds_a_capacity(latents, levels):
    index = index_like_ocbench()
    sampler = Sampler(index, configured(latents_per_row=latents, levels=levels))
    for number in range(8):
        rows = sampler.block(number)
        assert len(rows) == 64
        for row in rows:
            assert index["length"][row].sum() <= latents
            assert index["num_actions"][row].sum() <= 256
            assert len(row) <= 16
    report = sampler.report(blocks=48)
    assert report["fill"] >= 0.975
    assert report["undrawn"] == 0
    assert sampler.fill == pytest.approx(0.98)


def test_drawn_shares_are_the_target_within_one_percent_total_variation():
    index = index_like_ocbench()
    report = Sampler(index, configured()).report()
    assert report["blocks"] == BLOCKS_PER_DECK
    assert max(report["total_variation"].values()) < 0.002


def test_target_follows_the_weight_formula_inside_each_level():
    index = index_like_ocbench(windows=8)
    index["level"] = [1, 1, 1, 1, 2, 2, 2, 2]
    index["cluster_vl"] = [0, 0, 0, 1, 2, 2, 2, 2]
    index["cluster_action"] = 0
    sampler = Sampler(index, configured(levels={"subtask": 0.25, "action": 0.75}, vl_power=1.0, action_power=0.0))
    # One cluster of three windows and one of one share the subtask quarter equally; the action level has one cluster.
    np.testing.assert_allclose(sampler.target, [0.125 / 3] * 3 + [0.125] + [0.75 / 4] * 4, rtol=1e-12)


def test_no_powers_draw_every_window_of_a_level_equally_often():
    index = index_like_ocbench(windows=300)
    sampler = Sampler(index, configured(vl_power=0.0, action_power=0.0, levels={"action": 1.0}))
    assert np.ptp(sampler.target) < 1e-15
    drawn = [window for number in range(BLOCKS_PER_DECK) for row in sampler.block(number) for window in row]
    visits = np.bincount(drawn, minlength=300)
    seen = visits[index["level"] == LEVELS.index("action")]
    assert seen.min() > 400
    assert np.ptp(seen) <= 2  # unfinished passes of the cells, at both ends of the deck


def test_windows_of_a_cell_are_visited_pass_by_pass_across_blocks_and_decks():
    index = index_like_ocbench(windows=40)
    index["level"], index["cluster_vl"], index["cluster_action"] = LEVELS.index("action"), 0, 0
    index["length"], index["num_actions"] = 3, 16
    sampler = Sampler(index, configured(levels={"action": 1.0}, draw_block_rows=8, latents_per_row=12))
    visits = np.zeros(40, int)
    for number in range(2 * BLOCKS_PER_DECK):
        np.add.at(visits, np.concatenate(sampler.block(number)).astype(int), 1)
        # Only the pass that a block cuts in two, and the deck's first, unfinished one, may differ by a visit.
        assert np.ptp(visits) <= 1
    assert visits.sum() == pytest.approx(2 * BLOCKS_PER_DECK * 8 * 4 * 0.98, rel=0.01)


def test_a_pass_has_a_new_order_each_time():
    rank, size = np.arange(12), np.full(12, 12)
    orders = [tuple(_shuffled(rank, size, np.full(12, key, np.uint64))) for key in range(50)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) == 50


def test_a_keyed_permutation_sends_every_rank_everywhere_equally_often():
    keys = np.arange(6000, dtype=np.uint64)
    counts = np.stack([np.bincount(_shuffled(np.full(6000, r), np.full(6000, 5), keys), minlength=5) for r in range(5)])
    assert (counts.sum(0) == 6000).all()
    assert np.abs(counts - 1200).max() < 5 * np.sqrt(1200 * 0.8)


def test_any_block_can_be_asked_for_first():
    index = index_like_ocbench()
    forward = Sampler(index, configured())
    expected = [forward.block(number) for number in range(3)]
    far = forward.block(123_456_789)
    backward = Sampler(index, configured())
    assert backward.block(123_456_789) == far
    assert [backward.block(number) for number in (2, 1, 0)][::-1] == expected
    assert backward.row(64 + 5) == expected[1][5]


def test_another_seed_draws_other_rows():
    index = index_like_ocbench()
    assert Sampler(index, configured(), seed=0).block(0) != Sampler(index, configured(), seed=1).block(0)


def test_a_row_mixes_lengths_and_long_events_are_not_in_the_first_rows_alone():
    index = index_like_ocbench()
    sampler = Sampler(index, configured())
    longest = np.array([[index["length"][row].max() for row in sampler.block(number)] for number in range(32)])
    first, last = longest[:, :32].mean(), longest[:, 32:].mean()
    assert abs(first - last) < 0.5


def test_lengths_that_cannot_be_packed_tightly_lower_the_planned_fill_instead_of_dropping_events():
    index = index_like_ocbench()
    index["length"] = 10  # three of them leave a gap of four in a row of 34
    index["num_actions"] = 72
    sampler = Sampler(index, configured())
    assert sampler.fill == pytest.approx(30 / 34, abs=1e-3)
    report = sampler.report(blocks=32)
    assert report["undrawn"] <= 1e-3 * report["events_per_row"] * 64 * 32
    assert report["fill"] == pytest.approx(30 / 34, abs=1e-3)


def test_fixed_windows_ignore_levels():
    index = index_like_ocbench(windows=100)
    index["kind"], index["level"] = KINDS.index("fixed"), LEVELS.index("task")
    index["length"], index["num_actions"] = 5, 32
    sampler = Sampler(index, configured(window_kind="fixed"))
    assert len(sampler.candidates) == 100


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"length": 35}, {}, "window 0 has 35 latents, more than a row holds \\(34\\); raise data.latents_per_row"),
        ({"num_actions": 300}, {}, "has 300 actions, more than a row holds \\(256\\); raise data.actions_per_row"),
        ({"cluster_vl": -1}, {}, "no cluster ids"),
        ({"level": LEVELS.index("subtask")}, {}, "asks for 'action' events, but the store has only \\['subtask'\\]"),
        ({}, {"window_kind": "fixed"}, "no windows of kind 'fixed', only \\['event'\\]"),
        ({}, {"window_kind": "tile"}, "data.window_kind='tile' is not one of"),
        ({}, {"levels": {"stage": 1.0}}, "need positive shares of levels among"),
        ({}, {"fill_target": 1.5}, "data.fill_target=1.5 must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_at_the_start(change, data, message):
    index = index_like_ocbench(windows=50)
    for name, value in change.items():
        index[name] = value
    with pytest.raises(UserError, match=message):
        Sampler(index, configured(**data))
