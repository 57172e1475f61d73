"""Packed rows: bins that are full and within capacity, and the arrays of a row as the batch contract says."""

import shutil
from collections import Counter

import numpy as np
import pytest

from configs import base
from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store, write_index
from wallwm_jax.data.packing import (
    META_FIELDS,
    batch_spec,
    draw_caption,
    drop_probability,
    pack_events,
    pack_row,
)
from wallwm_jax.events.caption import has_duration_clause, with_parent
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.models.codecs import get_codec
from wallwm_jax.models.text.byte_ids import EOS_ID, decode_bytes

VIEWS = ("front_pixels", "ur5e/wrist")
CODEC = get_codec("haar8")


def ocbench_lengths(rng, count, subtask_share):
    """Latents and actions of events as OCBench has them: subtasks of 25 to 100 steps, actions of 4 to 20."""
    subtask = rng.random(count) < subtask_share
    steps = np.where(subtask, rng.integers(25, 101, count), rng.integers(4, 21, count)) // 2 * 2
    return (1 + np.maximum(1, -(-steps // 8))).tolist(), steps.tolist()


def configured(**data):
    config = base.get_config().copy_and_resolve_references().unlock()
    config.data.update(data)
    return config


def plain(**data):
    """Own captions only."""
    quiet = dict(caption_drop=0.0, paraphrase_prob=0.0, parent_caption_prob=0.0, duration_clause_prob=0.0)
    return configured(**{**quiet, **data})


@pytest.fixture(scope="module")
def store(small_store):
    return open_store(small_store)


def windows_of(store, level, count):
    return np.flatnonzero((store.index["kind"] == 0) & (store.index["level"] == LEVELS.index(level)))[:count].tolist()


@pytest.mark.parametrize(
    ("latents", "subtask_share", "bar"),
    [(34, 0.0, 0.985), (34, 0.5, 0.99), (34, 1.0, 0.985), (17, 0.0, 0.985), (17, 0.5, 0.985)],
)
def test_64_rows_can_be_filled_beyond_97_percent(latents, subtask_share, bar):
    rng = np.random.default_rng(0)
    for _ in range(5):
        lengths, actions = ocbench_lengths(rng, 2000, subtask_share)
        count = int(np.searchsorted(np.cumsum(lengths), bar * 64 * latents, side="right"))
        packed = pack_events(lengths[:count], actions[:count], 64, (latents, 256, 16))
        assert packed is not None
        assert sorted(event for row in packed for event in row) == list(range(count))
        loads = [sum(lengths[event] for event in row) for row in packed]
        assert max(loads) <= latents
        assert min(loads) >= latents - 12  # no row is left nearly empty while others are full


def test_each_of_the_three_capacities_holds():
    assert pack_events([4, 4, 4], [10, 10, 10], 1, (12, 30, 3)) == [[0, 1, 2]]
    assert pack_events([4, 4, 4], [10, 10, 10], 1, (11, 30, 3)) is None
    assert pack_events([4, 4, 4], [10, 10, 10], 1, (12, 29, 3)) is None
    assert pack_events([4, 4, 4], [10, 10, 10], 1, (12, 30, 2)) is None


def test_exact_fits_are_found_where_best_fit_decreasing_fails():
    # Best-fit-decreasing puts 6 and 4 together first and then cannot place the last 3.
    packed = pack_events([6, 4, 4, 3, 3], [1] * 5, 2, (10, 99, 9))
    assert sorted(sorted(row) for row in packed) == [[0, 1], [2, 3, 4]]


def test_room_left_over_is_spread_over_the_rows():
    packed = pack_events([2] * 12, [1] * 12, 4, (8, 99, 9))
    assert [len(row) for row in packed] == [3, 3, 3, 3]


def test_spec_is_the_batch_contract():
    config = base.get_config()
    spec = batch_spec(config, 8, num_views=3)
    assert spec["latents"] == ((8, 3, 34, 8, 8, 768), np.float32)
    assert spec["actions"] == ((8, 256, 32), np.float32)
    assert spec["text_ids"] == ((8, 16, 96), np.int32)
    assert spec["view_geometry"] == ((8, 3, 34, 21), np.float32)
    assert spec["action_valid"] == ((8, 256, 32), np.bool_)
    with pytest.raises(UserError, match=r"set data\.views"):
        batch_spec(config, 8)


def test_a_row_holds_its_windows_end_to_end(store):
    windows = windows_of(store, "subtask", 1) + windows_of(store, "action", 3)
    row = pack_row(store, plain(), windows, 0, VIEWS)
    spec = batch_spec(plain(), 1, num_views=2)
    assert set(row) == set(spec) | set(META_FIELDS)
    for name, (shape, dtype) in spec.items():
        assert (row[name].shape, row[name].dtype) == (shape[1:], dtype), name
    entries = store.index[windows]
    expected = np.repeat([1, 2, 3, 4], entries["length"])
    np.testing.assert_array_equal(row["latent_event"], np.pad(expected, (0, 34 - len(expected))))
    positions = np.concatenate([np.arange(length) for length in entries["length"]])
    np.testing.assert_array_equal(row["latent_pos"][: len(positions)], positions)
    np.testing.assert_array_equal(row["latent_role"][: len(positions)], np.where(positions == 0, 1, 2))
    assert not row["latent_role"][len(positions) :].any()
    np.testing.assert_array_equal(
        row["action_event"][: entries["num_actions"].sum()], np.repeat([1, 2, 3, 4], entries["num_actions"])
    )
    np.testing.assert_array_equal(row["window_index"][:5], [*windows, -1])
    np.testing.assert_allclose(row["duration_s"][:5], [*entries["duration_s"], 0])
    np.testing.assert_array_equal(row["event_level"][:4], [1, 2, 2, 2])
    np.testing.assert_array_equal(row["view_id"][:5], [[1, 2]] * 4 + [[0, 0]])
    np.testing.assert_array_equal(row["valid_rect"][3:5, 1], [[0, 0, 1, 1], [0, 0, 0, 0]])


def test_values_of_a_row_are_the_normalised_records(store):
    windows = windows_of(store, "action", 2)
    row = pack_row(store, plain(), windows, 0, VIEWS)
    second = store.read(windows[1])
    start, steps = int(store.index["length"][windows[0]]), second.num_actions
    latents = CODEC.encode(second.video("ur5e/wrist"))
    inside = slice(start, start + second.num_latents)
    np.testing.assert_allclose(
        store.stats.denormalize_latents(row["latents"][1, inside]), latents, rtol=2e-6, atol=2e-6
    )
    np.testing.assert_array_equal(row["view_geometry"][:, inside], second.geometry)
    assert not row["latents"][:, inside.stop :].any()
    begin = int(store.index["num_actions"][windows[0]])
    actions = row["actions"][begin : begin + steps]
    np.testing.assert_allclose(store.stats.denormalize_actions(actions)[:, :10], second.actions[:, :10], atol=1e-6)
    np.testing.assert_array_equal(row["action_valid"][begin : begin + steps], np.tile(np.arange(32) < 10, (steps, 1)))
    assert not actions[:, 10:].any()
    np.testing.assert_allclose(
        row["state"][1, :10], store.stats.normalize_state(second.state)[:10].astype(np.float32), atol=1e-6
    )
    ids, length = row["text_ids"][1], row["text_length"][1]
    assert decode_bytes(ids) == store.caption(second.caption_id)
    assert ids[length - 1] == EOS_ID and not ids[length:].any()


def test_a_view_can_be_left_out_or_put_first(store):
    windows = windows_of(store, "action", 2)
    both = pack_row(store, plain(), windows, 0, VIEWS)
    wrist = pack_row(store, plain(), windows, 0, VIEWS[1:])
    np.testing.assert_array_equal(wrist["latents"][0], both["latents"][1])
    np.testing.assert_array_equal(wrist["view_geometry"][0], both["view_geometry"][1])
    assert wrist["view_id"][0].tolist() == [2]


def test_captions_are_worded_with_the_configured_shares(store):
    config, window = configured(), windows_of(store, "action", 1)[0]
    record = store.read(window)
    own, parent = store.caption(record.caption_id), store.caption(record.parent_caption_id)
    rng = np.random.default_rng(0)
    drawn = [draw_caption(store, record, config.data, rng) for _ in range(4000)]
    texts = [caption.text for caption in drawn if caption.text]
    assert sum(not caption.text for caption in drawn) / 4000 == pytest.approx(0.1, abs=0.02)
    assert sum(caption.has_duration for caption in drawn) / len(texts) == pytest.approx(0.3, abs=0.03)
    assert all(caption.has_duration == has_duration_clause(caption.text) for caption in drawn)
    assert sum(text.startswith(f"{parent}: ") for text in texts) / len(texts) == pytest.approx(0.3, abs=0.03)
    wordings = Counter(text.removeprefix(f"{parent}: ").split(", takes ")[0] for text in texts)
    assert set(wordings) == {own, *(store.caption(number) for number in record.paraphrase_ids)}
    assert wordings[own] / len(texts) == pytest.approx(0.5, abs=0.03)


def test_clauses_that_do_not_fit_are_left_out_whole(store):
    record = store.read(windows_of(store, "action", 1)[0])
    own = store.caption(record.caption_id)
    config = plain(text_length=len(own) + 1, duration_clause_prob=1.0, parent_caption_prob=1.0)
    caption = draw_caption(store, record, config.data, np.random.default_rng(0))
    assert (caption.text, caption.has_duration) == (own, False)
    config = plain(text_length=len(own) + 14, duration_clause_prob=1.0, parent_caption_prob=1.0)
    caption = draw_caption(store, record, config.data, np.random.default_rng(0))
    assert caption.has_duration and caption.text.startswith(own + ", takes ")


def test_a_parent_stands_before_the_caption():
    assert with_parent("open the drawer", "grasp the handle") == "open the drawer: grasp the handle"
    assert with_parent("", "open the drawer") == "open the drawer"


def test_captions_follow_from_seed_row_and_slot(store):
    windows = windows_of(store, "action", 4)
    rows = [pack_row(store, configured(), windows, row, VIEWS[:1])["text_ids"] for row in (7, 7, 8)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_a_bad_record_becomes_padding_in_place(small_store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(small_store, copy)
    windows = windows_of(open_store(copy), "action", 3)
    good = pack_row(open_store(copy), plain(), windows, 0, VIEWS)
    _damage_record(copy, windows[1])
    row = pack_row(open_store(copy), plain(), windows, 0, VIEWS)
    assert row["bad_index"][:4].tolist() == [-1, windows[1], -1, -1]
    assert row["window_index"][:3].tolist() == [windows[0], -1, windows[2]]
    np.testing.assert_array_equal(row["latent_event"], np.where(good["latent_event"] == 2, 0, good["latent_event"]))
    np.testing.assert_array_equal(row["action_event"], np.where(good["action_event"] == 2, 0, good["action_event"]))
    third = good["latent_event"] == 3
    np.testing.assert_array_equal(row["latents"][:, third], good["latents"][:, third])
    assert not row["latents"][:, good["latent_event"] == 2].any()
    assert row["text_length"][1] == 1 and row["duration_s"][1] == 0


def _damage_record(path, window):
    """Makes one record fail its check, by giving the index another checksum for it."""
    index = np.array(open_store(path).index)
    index["checksum"][window] ^= 1
    write_index(path / "index-train.npy", index)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(40, 0.1), (129, 0.1), (150, 0.2006), (175, 0.5069), (200, 0.8084), (220, 0.9), (400, 0.9)],
)
def test_captions_of_long_events_are_dropped_more_often(length, expected):
    """WALL-WM eq. 20 with its published constants."""
    assert drop_probability(length, 0.1, 0.9, 129, 220) == pytest.approx(expected, abs=1e-3)


def told(store, window, **data):
    """The caption that every draw gives."""
    record, config = store.read(window), plain(**data)
    texts = {draw_caption(store, record, config.data, np.random.default_rng(seed)).text for seed in range(20)}
    assert len(texts) == 1
    return record, texts.pop()


def test_an_event_may_be_told_the_instruction(store):
    record, text = told(store, windows_of(store, "action", 2)[1], caption="instruction", parent_caption_prob=1.0)
    assert text == store.caption(record.level_caption_ids[0]) != store.caption(record.caption_id)


def test_the_instruction_is_never_told_the_duration_of_a_part_of_the_task(store):
    event, tile = windows_of(store, "action", 1)[0], int(np.flatnonzero(store.index["kind"] == 1)[1])
    for window, caption, timed in [
        (event, "own", True),
        (event, "instruction", False),
        (tile, "own", False),
    ]:
        text = told(store, window, caption=caption, duration_clause_prob=1.0, text_length=1000)[1]
        assert has_duration_clause(text) == timed, (window, caption)


def test_a_tile_may_be_told_the_events_that_go_on_in_it(store):
    """Tiles of 16 steps, told the subtasks or actions of which they show half, or which are half of them."""
    tile = int(np.flatnonzero(store.index["kind"] == 1)[1])
    for level in ("subtask", "action"):
        record, text = told(
            store, tile, caption="events", levels={"subtask": 0.0, "action": 0.0, level: 1.0}, text_length=1000
        )
        spans = store.episodes[record.episode_id]["spans"][level]
        inside = []
        for span in spans:
            seen = {step for step in range(span["start"], span["end"]) if 16 <= step < 32}
            if 2 * len(seen) >= min(16, span["end"] - span["start"]):
                inside.append(span["caption"])
        assert text == ", then ".join(inside)
    assert len(inside) > 1
    short = told(store, tile, caption="events", levels={"subtask": 0.0}, text_length=len(", then ".join(inside)))[1]
    assert short == ", then ".join(inside[:-1])
    event = windows_of(store, "action", 1)[0]
    record, text = told(store, event, caption="events")
    assert text == store.caption(record.caption_id)
