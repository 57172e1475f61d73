"""New captions for an existing store: only words change, all at once, and records are never written again."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.data import recaption
from wallwm_jax.data.event_store import KINDS, open_store
from wallwm_jax.data.recaption import read_episodes, stored_spans, write_layer
from wallwm_jax.data.store_writer import StoreOptions, atomic_directory, write_store
from wallwm_jax.events.captioners import Caption, with_captions
from wallwm_jax.events.schema import LEVELS, EpisodeError, Span

EPISODES = [synthetic_episode(seed, steps=64 + 7 * seed) for seed in range(6)]  # as the fixture has them
_IDS = ("level_caption_ids", "next_caption_ids", "paraphrase_ids", "previous_caption_ids")


@pytest.fixture
def store_copy(small_store, tmp_path):
    return shutil.copytree(small_store, tmp_path / "copy")


def shouted(spans):
    """The spans with other words, and one level that keeps its own."""
    return with_captions(
        spans,
        {
            (level, index): Caption(f"{span.caption} #{index}", (span.caption.upper(),), 0.25 * (index % 4), "test")
            for level in ("task", "subtask", "action")
            for index, span in enumerate(spans[level])
        },
    )


def words(store, record):
    return {name: [store.caption(int(number)) for number in getattr(record, name)] for name in _IDS}


def test_saying_the_same_again_reads_the_same(store_copy):
    before = {split: open_store(store_copy, split) for split in ("train", "heldout")}
    write_layer(store_copy, stored_spans(store_copy), "nobody")
    for split, store in before.items():
        again = open_store(store_copy, split)
        for window in range(len(store)):
            assert words(again, again.read(window)) == words(store, store.read(window))


def test_a_layer_changes_words_and_nothing_else(store_copy):
    old = open_store(store_copy)
    files = {path: path.read_bytes() for path in store_copy.rglob("*") if path.is_file()}
    summary = write_layer(store_copy, [shouted(spans) for spans in stored_spans(store_copy)], "test")
    new = open_store(store_copy)
    changed = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert changed == {"store.json"}
    assert summary.changed == {
        level: sum(len(episode.spans[level]) for episode in EPISODES) for level in ("task", "subtask", "action")
    } | {"segment": 0}
    assert new.fingerprint != old.fingerprint and new.meta["captions"]["captioner"] == "test"
    for window in range(len(new)):
        record, before = new.read(window), old.read(window)
        spans = EPISODES[record.episode_id].spans
        own = record.event_index if record.kind == "event" else 0
        said = words(new, record)
        assert said["level_caption_ids"][LEVELS.index(record.level)] == f"{spans[record.level][own].caption} #{own}"
        assert said["paraphrase_ids"] == [spans[record.level][own].caption.upper()]
        assert len(said["previous_caption_ids"]) == len(before.previous_caption_ids)
        assert all(text == "" or text.partition(" #")[2] for text in said["next_caption_ids"][:3])
        for name in (field.name for field in dataclasses.fields(record)):
            if name not in _IDS:
                np.testing.assert_equal(getattr(record, name), getattr(before, name))


def test_spans_confidence_and_provenance_are_in_the_episodes(store_copy):
    write_layer(store_copy, [shouted(spans) for spans in stored_spans(store_copy)], "test")
    store = open_store(store_copy)
    window = int(np.flatnonzero(store.index["kind"] == KINDS.index("event"))[1])
    span = store.span(window)
    assert (span["confidence"], span["provenance"]) == (0.25, "test")
    for entry, episode in zip(store.episodes, EPISODES):
        for level in LEVELS:
            kept = [(span.start, span.end, span.parent) for span in episode.spans[level]]
            assert [(span["start"], span["end"], span["parent"]) for span in entry["spans"][level]] == kept
    assert {span["provenance"] for span in store.episodes[0]["spans"]["segment"]} == {""}


def test_a_captioner_that_moves_a_span_is_refused(store_copy):
    spans = stored_spans(store_copy)
    task = spans[2]["subtask"]
    moved = (dataclasses.replace(task[0], end=task[0].end - 1), *task[1:])
    with pytest.raises(UserError, match=r"episode 'synthetic-0002' .* moved, added or left out spans"):
        write_layer(store_copy, [*spans[:2], {**spans[2], "subtask": moved}, *spans[3:]], "test")
    with pytest.raises(UserError, match=r"5 episodes were captioned, .* has 6"):
        write_layer(store_copy, spans[1:], "test")
    assert "captions" not in open_store(store_copy).meta


def test_a_failed_recaption_leaves_the_store_as_it_was(store_copy, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(recaption, "save_spans", fail)
    with pytest.raises(OSError, match="disk full"):
        write_layer(store_copy, [shouted(spans) for spans in stored_spans(store_copy)], "test")
    assert "captions" not in open_store(store_copy).meta and not list((store_copy / "captions").iterdir())


def test_a_damaged_layer_is_named(store_copy):
    summary = write_layer(store_copy, stored_spans(store_copy), "test")
    (summary.folder / "spans.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"spans.npz' is missing or damaged .* caption the store again"):
        open_store(store_copy)


def test_stores_of_earlier_builds_keep_their_paraphrases(store_copy):
    file = store_copy / "episodes.json"
    entries = json.loads(file.read_text())
    for entry in entries:
        for row in entry["spans"].values():
            for span in row:
                for name in ("paraphrases", "confidence", "provenance"):
                    del span[name]
    file.write_text(json.dumps(entries))
    for spans, episode in zip(stored_spans(store_copy), EPISODES):
        for level in ("task", "subtask", "action"):  # of which the store has windows
            assert [span.paraphrases for span in spans[level]] == [span.paraphrases for span in episode.spans[level]]


def test_episodes_come_back_from_their_windows(small_store):
    for found, episode in zip(read_episodes(small_store), EPISODES, strict=True):
        assert (found.episode_id, found.num_steps, found.spans["action"]) == (
            episode.episode_id,
            episode.num_steps,
            tuple(episode.spans["action"]),
        )
        assert found.frames == episode.frames
        np.testing.assert_allclose(found.command_poses[:-1], episode.command_poses[:-1], atol=1e-5)
        within = slice(0, -1)  # where T is odd, the last step lies behind the last frame
        errors = found.poses[within, 0, :3, 3] - episode.poses[within, 0, :3, 3]
        assert np.abs(errors).max() < 0.012  # noise of the commands
        starts = [span.start for span in episode.spans["action"] if span.start % 2 == 0]
        np.testing.assert_allclose(found.poses[starts], episode.poses[starts], atol=1e-6)
        np.testing.assert_allclose(found.grippers[starts], episode.grippers[starts], atol=1e-6)
        assert set(found.cameras) == {"front_pixels"}
        np.testing.assert_allclose(
            found.cameras["front_pixels"].extrinsics, episode.cameras["front_pixels"].extrinsics, atol=1e-6
        )


def test_of_stored_latents_the_nearest_keyframes_stand_in(small_store, monkeypatch):
    read = recaption.EventStore.read

    def keyframes_alone(store, window):
        record = read(store, window)
        kept = np.unique(record.keyframes)
        frames = {view: [pictures[place] for place in kept] for view, pictures in record.frames.items()}
        return dataclasses.replace(record, frames=frames, latents={view: np.zeros(1) for view in frames})

    monkeypatch.setattr(recaption.EventStore, "read", keyframes_alone)
    found = next(read_episodes(small_store))
    episode = EPISODES[0]
    for view, frames in episode.frames.items():
        assert len(found.frames[view]) == episode.num_frames
        assert found.frames[view][0] == frames[0]
        places = [frames.index(picture) for picture in found.frames[view]]
        assert places == sorted(places) and len(set(places)) < len(frames)


def test_a_build_writes_confidence_and_provenance(tmp_path):
    def doubtful(episode):
        spans = with_captions(episode.spans, {("action", 1): Caption("a guess", (), 0.5, "vlm:tiny")})
        return dataclasses.replace(episode, spans=spans)

    with atomic_directory(tmp_path / "store", overwrite=False) as directory:
        write_store(directory, [doubtful(EPISODES[0])], StoreOptions(kinds=("event",), heldout_fraction=0.0))
    span = open_store(tmp_path / "store").episodes[0]["spans"]["action"][1]
    assert (span["caption"], span["confidence"], span["provenance"]) == ("a guess", 0.5, "vlm:tiny")


def test_a_confidence_outside_its_range_is_no_episode():
    with pytest.raises(EpisodeError, match=r"confidence 1.5 at step 0"):
        dataclasses.replace(EPISODES[0], spans={"task": [Span(0, EPISODES[0].num_steps, "x", "x", confidence=1.5)]})
