"""How often windows are drawn: weights of clusters, raking, and shares of levels, datasets and lengths together."""

import numpy as np
import pytest

from configs import base
from wallwm_jax.console import UserError
from wallwm_jax.data.balance import balance_report, gini, normalised_entropy, plan_draw, rake, sampling_weights, tally
from wallwm_jax.data.event_store import INDEX_DTYPE
from wallwm_jax.events.schema import LEVELS


def index_of(cluster_vl, cluster_action, level="action"):
    index = np.zeros(len(cluster_vl), INDEX_DTYPE)
    index["cluster_vl"], index["cluster_action"] = cluster_vl, cluster_action
    index["level"] = LEVELS.index(level)
    return index


def test_weights_are_powers_of_both_cluster_sizes():
    index = index_of([0, 0, 0, 0, 1], [5, 5, 6, 6, 6])
    np.testing.assert_array_equal(sampling_weights(index, 0.0, 0.0, 10.0), np.ones(5))
    raw = np.array([4, 4, 4, 4, 1]) ** -0.5 * np.array([2, 2, 3, 3, 3]) ** -1.0
    np.testing.assert_allclose(sampling_weights(index, 0.5, 1.0, 10.0), raw / raw.mean())


def test_weights_are_clipped_around_their_mean():
    index = index_of([0] * 999 + [1], [0] * 1000)
    weights = sampling_weights(index, 1.0, 0.0, 4.0)
    assert weights[-1] == 4.0  # unclipped: 500
    assert weights[0] == pytest.approx(0.5005, rel=1e-3)
    for clip in (0.5, float("nan")):
        with pytest.raises(UserError, match=f"weight_clip={clip}"):
            sampling_weights(index, 1.0, 0.0, clip)
    for power in (-0.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"vl_power={power}"):
            sampling_weights(index, power, 0.0, 10.0)


def test_cluster_sizes_count_the_windows_of_the_same_level_only():
    index = np.concatenate([index_of([0, 0, 1], [0, 0, 0]), index_of([0, 0, 0], [0, 0, 0], "subtask")])
    weights = sampling_weights(index, 1.0, 0.0, 10.0)
    np.testing.assert_allclose(weights, [0.75, 0.75, 1.5, 1, 1, 1])


def test_gini_and_entropy_of_known_shares():
    assert gini(np.array([1.0, 1.0, 1.0, 1.0])) == 0.0
    assert gini(np.array([0.0, 0.0, 0.0, 1.0])) == 0.75
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25)
    assert normalised_entropy(np.array([0.5, 0.5])) == 1.0
    assert normalised_entropy(np.array([1.0, 0.0])) == 0.0
    assert normalised_entropy(np.array([0.25, 0.75])) == pytest.approx(0.8112781, abs=1e-6)
    assert normalised_entropy(np.array([1.0])) == 1.0


def test_full_power_makes_clusters_equal_at_the_price_of_effective_samples():
    index = index_of([0] * 90 + [1] * 10, [0] * 100)
    (report,) = balance_report(index, sampling_weights(index, 1.0, 0.0, 10.0), 1.0, 0.0)
    assert (report["kind"], report["level"], report["windows"]) == ("event", "action", 100)
    assert report["cluster_vl"]["before"] == [0.9, 0.1]
    np.testing.assert_allclose(report["cluster_vl"]["after"], [0.5, 0.5])
    assert report["cluster_vl"]["residual"] == pytest.approx(0.0, abs=1e-12)
    assert report["cluster_vl"]["gini"] == [pytest.approx(0.4), pytest.approx(0.0)]
    assert report["cluster_vl"]["entropy"][1] == pytest.approx(1.0)
    assert report["effective_sample_size"] == pytest.approx(1 / (90 * (0.5 / 90) ** 2 + 10 * 0.05**2))


def test_raking_reaches_margins_that_are_known_to_hold_together():
    """A table of 2 x 2 with one window each and odds ratio 1: the fitted table is the product of its margins."""
    rows, columns = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    weights, residual = rake(np.ones(4), [(rows, np.array([0.2, 0.8])), (columns, np.array([0.3, 0.7]))])
    np.testing.assert_allclose(weights, [0.06, 0.14, 0.24, 0.56], atol=1e-9)
    assert residual < 1e-6


def test_raking_keeps_the_odds_ratio_of_what_it_started_from():
    rows, columns = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    even = np.array([0.5, 0.5])
    weights, _ = rake(np.array([4.0, 1.0, 1.0, 1.0]), [(rows, even), (columns, even)])
    np.testing.assert_allclose(weights, np.array([2.0, 1.0, 1.0, 2.0]) / 6, atol=1e-6)
    assert weights[0] * weights[3] / (weights[1] * weights[2]) == pytest.approx(4.0)


def test_raking_draws_both_clusterings_as_asked_where_the_product_of_weights_does_not():
    rng = np.random.default_rng(0)
    vl = np.minimum(rng.geometric(0.4, 3000) - 1, 6)
    action = np.where(rng.random(3000) < 0.7, vl, np.minimum(rng.geometric(0.4, 3000) - 1, 6))  # most go with the scene
    index = index_of(vl, action)
    missed = {}
    for balance in ("product", "raking"):
        (report,) = balance_report(index, sampling_weights(index, 0.5, 0.5, 1e9, balance), 0.5, 0.5)
        missed[balance] = max(report[name]["residual"] for name in ("cluster_vl", "cluster_action"))
    sizes = np.bincount(vl)
    np.testing.assert_allclose(report["cluster_vl"]["after"], sizes**0.5 / (sizes**0.5).sum(), atol=1e-6)
    assert missed["raking"] < 1e-6
    assert missed["product"] > 0.05


def test_raking_with_one_power_leaves_the_other_clustering_as_it_is():
    index = index_of([0] * 60 + [1] * 40, [0] * 50 + [1] * 10 + [1] * 40)
    (report,) = balance_report(index, sampling_weights(index, 0.0, 1.0, 1e9, "raking"), 0.0, 1.0)
    np.testing.assert_allclose(report["cluster_vl"]["after"], [0.6, 0.4], atol=1e-6)
    np.testing.assert_allclose(report["cluster_action"]["after"], [0.5, 0.5], atol=1e-6)


def test_an_empty_part_of_a_sparse_table_stays_empty_and_the_residual_says_what_is_missed():
    """Scene 1 occurs with motion 1 alone and has half; motion 1 may have a quarter: one of the two must miss."""
    rows, columns = np.array([0, 0, 1]), np.array([0, 1, 1])
    weights, residual = rake(np.ones(3), [(rows, np.array([0.5, 0.5])), (columns, np.array([0.75, 0.25]))])
    assert weights.sum() == pytest.approx(1.0)
    assert (weights >= 0).all()
    assert residual == pytest.approx(0.25, abs=1e-3)
    diagonal, residual = rake(np.ones(4), 2 * [(np.array([0, 0, 0, 1]), np.array([0.5, 0.5]))])
    np.testing.assert_allclose(diagonal, [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert residual < 1e-6


def test_clipping_is_seen_in_the_residual():
    index = index_of([0] * 999 + [1], [0] * 1000)
    (report,) = balance_report(index, sampling_weights(index, 1.0, 0.0, 4.0, "raking"), 1.0, 0.0)
    assert report["cluster_vl"]["residual"] == pytest.approx(0.5 - 4 / (4 + 999 * 0.5005), abs=1e-3)


SOURCES = ("ocbench/chamber-a", "ocbench/chamber-b", "ocbench/block", "metaworld/reach")


def mixed_index(windows=4000, seed=0):
    """Four datasets in shares of 70, 20, 8 and 2 %; two levels; lengths of 2 to 17 latents, long for subtasks."""
    rng = np.random.default_rng(seed)
    index = np.zeros(windows, INDEX_DTYPE)
    index["source"] = rng.choice(4, windows, p=[0.7, 0.2, 0.08, 0.02])
    index["level"] = rng.choice([LEVELS.index("subtask"), LEVELS.index("action")], windows, p=[0.3, 0.7])
    index["length"] = np.where(index["level"] == 1, rng.integers(4, 18, windows), rng.integers(2, 8, windows))
    index["num_actions"] = 8
    index["cluster_vl"], index["cluster_action"] = index["source"], rng.integers(0, 5, windows)
    return index


def section(**data):
    config = base.get_config().copy_and_resolve_references().unlock()
    for name, value in data.items():
        config.data[name] = value
    return config.data


def test_shares_of_levels_datasets_and_lengths_hold_at_once():
    index = mixed_index()
    data = section(
        levels={"subtask": 0.25, "action": 0.75},
        mixture=(("ocbench/", 0.2), ("ocbench/chamber", 0.5), ("metaworld/", 0.3)),
        lengths=((4, 0.5), (8, 0.3), (17, 0.2)),
    )
    draw = plan_draw(index, data, SOURCES)
    chosen = index[draw.candidates]
    assert draw.target.sum() == pytest.approx(1.0)
    by_level = np.bincount(chosen["level"], draw.target, len(LEVELS))
    np.testing.assert_allclose(by_level[1:3], [0.25, 0.75], atol=1e-5)
    by_source = np.bincount(chosen["source"], draw.target, 4)
    # The longest name that fits counts: block is all that "ocbench/" is left with.
    np.testing.assert_allclose([by_source[:2].sum(), by_source[2], by_source[3]], [0.5, 0.2, 0.3], atol=1e-5)
    by_length = [draw.target[(chosen["length"] > low) & (chosen["length"] <= high)].sum() for low, high in BUCKETS]
    np.testing.assert_allclose(by_length, [0.5, 0.3, 0.2], atol=1e-5)
    # What is drawn without replacement as one cell has one rate.
    keys = np.stack([draw.group, *(chosen[name] for name in ("level", "cluster_vl", "cluster_action"))])
    _, cell = np.unique(keys, axis=1, return_inverse=True)
    spread = [np.ptp(draw.target[cell.ravel() == number]) for number in range(cell.max() + 1)]
    assert max(spread) < 1e-15


BUCKETS = ((0, 4), (4, 8), (8, 17))


def test_a_share_of_zero_leaves_windows_out():
    index = mixed_index()
    draw = plan_draw(index, section(mixture=(("", 1.0), ("metaworld", 0)), lengths=((12, 1), (17, 0))), SOURCES)
    assert set(index["source"][draw.candidates]) == {0, 1, 2}
    assert index["length"][draw.candidates].max() == 12
    assert len(draw.candidates) == ((index["source"] < 3) & (index["length"] <= 12)).sum()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"balance": "both"}, "data.balance='both' is not one of"),
        (
            {"mixture": (("lerobot", 1.0), ("", 1.0))},
            "names 'lerobot', with which no dataset begins; .*'metaworld",
        ),
        ({"mixture": (("ocbench", 1.0),)}, "gives 'metaworld/reach' no share; name it, with 0 to leave it out"),
        ({"mixture": (("", -1.0),)}, "shares must not be negative"),
        ({"mixture": ("ocbench", 1.0)}, "write pairs, as in"),
        ({"lengths": ((9, 1.0),)}, "ends at 9 latents, but a window has 17; add \\(17, 0\\)"),
        ({"lengths": ((9, 1.0), (5, 1.0))}, "must be whole numbers that rise"),
        ({"lengths": ((1, 0.5), (17, 0.5))}, "data.lengths asks for '1 to 1 latents' events, but the store has only"),
        (
            {"levels": {"action": 1.0}, "lengths": ((9, 0.5), (17, 0.5))},
            "'10 to 17 latents' events, but those that",
        ),
        (
            {"lengths": ((3, 0.6), (17, 0.4))},
            "data.levels asks for 50.0% of 'action', but it gets 60.0%: no window",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(data, message):
    with pytest.raises(UserError, match=message):
        plan_draw(mixed_index(), section(**data), SOURCES)


def test_a_config_of_an_earlier_run_draws_as_it_did():
    data = section()
    for name in ("balance", "mixture", "lengths"):
        del data[name]
    old, new = (plan_draw(mixed_index(), each, SOURCES) for each in (data, section()))
    np.testing.assert_array_equal(old.target, new.target)
    assert not new.group.any()


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_a_tally_is_what_sorting_would_find(kind):
    values = np.random.default_rng(0).choice(np.array([-1, 0, 3, 90, 127], kind), 500)
    for found, expected in zip(tally(values), np.unique(values, return_inverse=True, return_counts=True)):
        np.testing.assert_array_equal(found, expected)
