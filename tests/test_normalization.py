"""Statistics of a stream against numpy on the whole, and normalisation there and back."""

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.data.normalization import (
    DimensionStats,
    Stats,
    StatsAccumulator,
    StreamingMoments,
    StreamingQuantiles,
    floor_deviation,
)

DIMS = 32
VALID = np.arange(DIMS) < 20


def batches(rng, count=40):
    scale = np.geomspace(1e-3, 10.0, DIMS)
    return [rng.normal(5.0, 1.0, (rng.integers(1, 60), DIMS)) * scale for _ in range(count)]


def stats_of(rows, valid=VALID):
    accumulator = StatsAccumulator(DIMS)
    for batch in rows:
        accumulator.add(batch, valid)
    dimensions = accumulator.result()
    ones = np.ones(4, np.float32)
    return Stats(dimensions, dimensions, 0 * ones, ones, {"windows": len(rows)})


def test_moments_equal_numpy_on_the_whole():
    rows = batches(np.random.default_rng(0))
    moments = StreamingMoments(DIMS)
    for batch in rows:
        moments.add(batch)
    whole = np.concatenate(rows)
    assert moments.count.tolist() == [len(whole)] * DIMS
    np.testing.assert_allclose(moments.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, whole.std(0), rtol=1e-10)


def test_moments_do_not_cancel_far_from_zero():
    moments = StreamingMoments(1)
    for value in (1e8 + 1, 1e8 + 2, 1e8 + 3):
        moments.add(np.array([[value]]))
    assert moments.std[0] == pytest.approx(np.sqrt(2 / 3), rel=1e-9)


def test_invalid_dimensions_do_not_count():
    moments, quantiles = StreamingMoments(2), StreamingQuantiles(2)
    for statistic in (moments, quantiles):
        statistic.add(np.array([[1.0, 100.0], [3.0, 100.0]]), np.array([True, False]))
        statistic.add(np.array([[5.0, 7.0]]), np.array([True, True]))
    assert moments.count.tolist() == [3, 1]
    assert moments.mean.tolist() == [3.0, 7.0]
    assert moments.std[1] == 0.0
    assert quantiles.quantiles((0.0, 1.0)).tolist() == [[1.0, 7.0], [5.0, 7.0]]


def test_quantiles_are_exact_while_the_rows_fit():
    rows = batches(np.random.default_rng(1))
    quantiles = StreamingQuantiles(DIMS)
    for batch in rows:
        quantiles.add(batch)
    whole = np.concatenate(rows).astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(quantiles.quantiles((0.01, 0.99)), np.quantile(whole, [0.01, 0.99], axis=0))


def test_quantiles_of_a_long_stream_are_close_and_repeatable():
    def run():
        rng = np.random.default_rng(2)
        quantiles = StreamingQuantiles(1, capacity=5_000)
        for _ in range(100):
            quantiles.add(rng.uniform(0, 1, (1_000, 1)))
        return quantiles.quantiles((0.01, 0.5, 0.99))[:, 0]

    first = run()
    # Three deviations of a rank in 5,000 rows: 3 * sqrt(p (1 - p) / 5000).
    assert np.all(np.abs(first - [0.01, 0.5, 0.99]) < [0.0043, 0.022, 0.0043])
    assert np.array_equal(first, run())


def test_actions_there_and_back():
    rows = batches(np.random.default_rng(3))
    stats = stats_of(rows, np.ones(DIMS, bool))
    actions = np.concatenate(rows).astype(np.float32)
    normal = stats.normalize_actions(actions)
    assert normal.dtype == np.float32
    wide = stats.action.q99 - stats.action.q01 >= 1e-3
    inside = (np.abs(normal[:, wide]) <= 1).mean()
    assert inside == pytest.approx(0.98, abs=0.005)
    np.testing.assert_allclose(stats.denormalize_actions(normal), actions, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.denormalize_state(stats.normalize_state(actions)), actions, rtol=1e-5, atol=1e-6)


def test_quantiles_land_on_minus_one_and_one():
    edges = DimensionStats(*(np.full(DIMS, value) for value in (-2.0, 6.0, 0.0, 1.0)), np.full(DIMS, 9))
    stats = Stats(edges, edges, np.zeros(1), np.ones(1), {})
    values = np.array([-2.0, 2.0, 6.0, 10.0])[:, None] * np.ones(DIMS)
    assert stats.normalize_actions(values)[:, 0].tolist() == [-1.0, 0.0, 1.0, 2.0]  # no clipping


def test_tiny_ranges_are_centred_and_not_amplified():
    rows = np.full((1000, DIMS), 0.5)
    rows[:, 0] += np.random.default_rng(4).normal(0, 1e-5, 1000)
    stats = stats_of([rows])
    normal = stats.normalize_actions(rows)
    assert np.abs(normal[:, :20]).max() < 1e-4
    assert np.all(stats.normalize_actions(np.zeros(DIMS))[20:] == 0.0)  # never valid: zeros stay zeros


def test_saved_statistics_are_the_same_numbers(tmp_path):
    stats = stats_of(batches(np.random.default_rng(5)))
    stats.save(tmp_path / "stats.json")
    loaded = Stats.load(tmp_path / "stats.json")
    for name in ("q01", "q99", "mean", "std", "count"):
        assert np.array_equal(getattr(loaded.action, name), getattr(stats.action, name))
    assert loaded.counts == {"windows": 40}
    (tmp_path / "stats.json").write_text("{")
    with pytest.raises(UserError, match="missing or damaged"):
        Stats.load(tmp_path / "stats.json")


def test_latents_are_standardised_and_dead_channels_stay_quiet():
    std = floor_deviation(np.array([8.0, 1.0, 0.0]))
    np.testing.assert_allclose(std, [8.0, 1.0, 0.008])
    nothing = DimensionStats(*(np.zeros(DIMS) for _ in range(5)))
    stats = Stats(nothing, nothing, np.array([16.0, 0.0, 0.0], np.float32), std, {})
    latents = np.array([[24.0, -1.0, 0.0]], np.float32)
    assert stats.normalize_latents(latents).tolist() == [[1.0, -1.0, 0.0]]
    assert stats.denormalize_latents(stats.normalize_latents(latents)).tolist() == latents.tolist()
    np.testing.assert_allclose(stats.channel_weights(), std / std.mean())
    with pytest.raises(UserError, match="constant"):
        floor_deviation(np.zeros(3))
