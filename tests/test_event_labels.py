"""Event labels of LeRobot sets: what each documented way holds is read; what cannot be is left out and named."""

import shutil
from pathlib import Path

import lerobot_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_motion import DESCRIPTION, recordings

from wallwm_jax.sources.clock import choose_clock
from wallwm_jax.sources.embodiment import load_embodiment
from wallwm_jax.sources.labels import spans
from wallwm_jax.sources.lerobot import event_labels
from wallwm_jax.sources.lerobot.dataset import LeRobotSet
from wallwm_jax.sources.recorded import read_episodes

ROWS, HZ = 41, 10
TIMES = np.arange(ROWS) / HZ  # 4 s
TEXTS = {"tasks": {0: "clean up"}, "subtasks": {0: "reach", 1: "grasp", 2: " "}}


def read(said=None, events=None, subtask_index=None, texts=TEXTS, **entry):
    """(level → [(second, caption, end)], notes) of an episode of 41 rows at 10 Hz."""
    columns = {"task_index": [0] * ROWS}
    if events is not None:
        columns["language_events"] = [events.get(row, []) for row in range(ROWS)]
    if subtask_index is not None:
        columns["subtask_index"] = subtask_index
    found = event_labels.labels(pa.table(columns), said, entry, texts, TIMES, "file.parquet")
    assert found.levels["task"][0].caption == "clean up"
    told = {
        level: [(round(label.start_s, 3), label.caption, label.end_s) for label in labels]
        for level, labels in found.levels.items()
        if level != "task"
    }
    return told, list(found.notes)


def said(style, *rows):
    return [{"role": "assistant", "style": style, "timestamp": time, "content": text} for time, text in rows]


COARSE = {"subtask_names": ["reach", "grasp"], "subtask_start_frames": [0, 20], "subtask_end_frames": [20, 41]}
FINE = {
    "subtask_names": ["go", "go down", "close"],
    "subtask_start_frames": [0, 8, 20],
    "subtask_end_frames": [8, 20, 41],
}
COARSE_READ = [(0.0, "reach", 2.0), (2.0, "grasp", None)]
FINE_READ = [(0.0, "go", 0.8), (0.8, "go down", 2.0), (2.0, "close", None)]


def prefixed(prefix, columns):
    return {f"{prefix}{name}": value for name, value in columns.items()}


# meta/episodes


@pytest.mark.parametrize("coarse", ["sparse_", ""])
def test_dense_labels_beside_sparse_ones_of_either_name_are_actions(coarse):
    found, notes = read(**prefixed(coarse, COARSE), **prefixed("dense_", FINE))
    assert found == {"subtask": COARSE_READ, "action": FINE_READ} and notes == []


def test_of_three_names_the_unprefixed_one_is_the_old_copy_of_the_sparse_one():
    entry = (
        prefixed("sparse_", COARSE) | prefixed("dense_", FINE) | prefixed("", {**COARSE, "subtask_names": ["a", "b"]})
    )
    assert read(**entry) == ({"subtask": COARSE_READ, "action": FINE_READ}, [])


def test_dense_labels_alone_are_subtasks_and_the_annotators_filler_is_none():
    assert read(**prefixed("dense_", FINE)) == ({"subtask": FINE_READ}, [])
    filler = {"sparse_subtask_names": ["task"], "sparse_subtask_start_frames": [0], "sparse_subtask_end_frames": [41]}
    found, notes = read(**filler, **prefixed("dense_", FINE))
    assert found == {"subtask": FINE_READ}
    assert notes == ["sparse_subtask_names left out: 'task' alone names no event"]


def test_times_take_the_place_of_frames_and_ends_may_lack():
    times = {"dense_subtask_names": ["a", "b"], "dense_subtask_start_times": [0, 1.5]}
    assert read(**times) == ({"subtask": [(0.0, "a", 1.5), (1.5, "b", None)]}, [])
    assert read(**times, dense_subtask_end_times=[1.0, 4.0])[0] == {"subtask": [(0.0, "a", 1.0), (1.5, "b", 4.0)]}
    wrong = {"dense_subtask_start_frames": [3], "dense_subtask_end_frames": [9]}  # of another number of names
    assert read(**times, **wrong)[0] == {"subtask": [(0.0, "a", 1.5), (1.5, "b", None)]}


def test_an_annotator_of_whole_seconds_loses_no_episode_for_the_rest_of_the_last_one():
    """LeRobot's own writes MM:SS: an episode of 4.0 s may end at 3 s."""
    entry = {"sparse_subtask_names": ["a", "b"], "sparse_subtask_start_frames": [0, 20]}
    found, notes = read(**entry, sparse_subtask_end_frames=[20, 31])
    assert found == {"subtask": [(0.0, "a", 2.0), (2.0, "b", 3.1)]} and notes == []  # it knew better than that
    times = {"sparse_subtask_names": ["a", "b"], "sparse_subtask_start_times": [0, 2]}
    whole = event_labels.labels(
        pa.table({"task_index": [0] * 37}), None, {**times, "sparse_subtask_end_times": [2, 3]}, TEXTS, TIMES[:37], ""
    )
    assert whole.levels["subtask"][-1].end_s is None
    assert whole.notes == ("sparse_subtask_names extended over 0.60 s at the end: they are in whole seconds",)


def test_labels_that_hold_no_row_are_left_out_one_by_one():
    entry = {"subtask_names": ["a", "b", "c", "d"], "subtask_start_frames": [0, 9, 20, 60]}
    found, notes = read(**entry, subtask_end_frames=[9, 9, 41, 70])
    assert found == {"subtask": [(0.0, "a", 0.9), (2.0, "c", None)]}
    assert notes == ["2 of 4 subtask_names left out: they hold no row of the episode"]


@pytest.mark.parametrize(
    "entry",
    [
        {"sparse_subtask_names": ["a", "b"]},
        {"sparse_subtask_names": ["a", "b"], "sparse_subtask_start_frames": [0], "sparse_subtask_end_frames": [9]},
        {"sparse_subtask_names": ["a", "b"], "sparse_subtask_start_frames": ["x", "y"]},
        {"sparse_subtask_names": ["a", "b"], "sparse_subtask_start_times": [[0], [1]]},
        {
            "sparse_subtask_names": ["a", "b"],
            "sparse_subtask_start_frames": [0, 9],
            "sparse_subtask_end_frames": [9],
        },
    ],
)
def test_names_without_places_are_left_out_with_the_columns_that_lack(entry):
    reason = "sparse_subtask_names left out: no sparse_subtask_start_frames or _start_times fit 2 names"
    assert read(**entry) == ({}, [reason])
    assert read(**entry, **prefixed("dense_", FINE)) == ({"subtask": FINE_READ}, [reason])


# language columns


def test_persistent_styles_hold_until_the_next_of_their_style():
    rows = said("motion", (1.0, "down"), (0.0, "forward")) + said("subtask", (0.0, "reach"), (2.0, "grasp"))
    found, notes = read(rows + said("task_aug", (0.0, "tidy")))
    assert found == {
        "subtask": [(0.0, "reach", 2.0), (2.0, "grasp", None)],
        "action": [(0.0, "forward", 1.0), (1.0, "down", None)],
    }
    assert notes == []


def test_a_row_without_content_ends_the_event_before_it():
    found, _ = read(said("subtask", (0.0, "reach"), (1.0, None), (3.0, "grasp")))
    assert found == {"subtask": [(0.0, "reach", 1.0), (3.0, "grasp", None)]}


def test_events_of_language_events_begin_at_their_row():
    events = {0: [{"style": "subtask", "content": "reach"}], 15: [{"style": "subtask", "content": "grasp"}]}
    assert read(events=events) == ({"subtask": [(0.0, "reach", 1.5), (1.5, "grasp", None)]}, [])


def test_styles_that_name_no_event_are_counted():
    """Those that LeRobot documents: plan and memory hold, interjections, questions, traces and speech are said once."""
    rows = said("subtask", (0.0, "reach")) + said("memory", (0.0, "nothing yet"), (2.0, "it is held"))
    rows += said("plan", (0.0, "reach, grasp"))
    events = {
        3: [
            {"style": "interjection", "content": "no, the red one", "tool_calls": None},
            {"style": None, "content": None, "tool_calls": ['{"name": "say"}']},
        ],
        9: [{"style": "vqa", "content": "what?", "tool_calls": None}, {"style": "vqa", "content": "a cup"}],
    }
    found, notes = read(rows, events)
    assert found == {"subtask": [(0.0, "reach", None)]}
    assert notes == [
        "rows of language_persistent left out, they name no event: 2 memory, 1 plan",
        "rows of language_events left out, they name no event: 1 interjection, 1 speech, 2 vqa",
    ]


@pytest.mark.parametrize("timestamp", [None, float("nan"), float("inf"), "soon"])
def test_a_style_with_a_row_of_unknown_time_is_left_out_and_the_others_stay(timestamp):
    rows = said("subtask", (0.0, "reach"), (timestamp, "grasp")) + said("motion", (0.0, "forward"))
    assert read(rows) == (
        {"action": [(0.0, "forward", None)]},
        ["subtask labels of language_persistent left out: a row has no timestamp"],
    )


# rows, and several ways at once


def test_a_subtask_index_that_nothing_names_is_left_out():
    for index, named in ((7, "7"), (2, "2")):  # unknown, and empty
        found, notes = read(subtask_index=[0] * 20 + [index] * 21)
        assert found == {} and notes == [f"subtask labels of subtask_index left out: meta/subtasks names no {named}"]
    found, _ = read(subtask_index=[0] * 20 + [-1] * 11 + [None] * 10)
    assert found == {"subtask": [(0.0, "reach", 2.0)]}


def test_of_several_ways_the_first_is_taken_for_each_level_and_the_others_are_named():
    language = said("subtask", (0.0, "approach"), (1.7, "grip")) + said("motion", (0.0, "forward"))
    found, notes = read(language, subtask_index=[0] * 15 + [1] * 26, **prefixed("sparse_", COARSE))
    assert found == {"subtask": COARSE_READ, "action": [(0.0, "forward", None)]}
    assert notes == [
        "subtask labels of language_persistent left out: those of meta/episodes come first",
        "subtask labels of subtask_index left out: those of meta/episodes come first",
    ]
    found, notes = read(language, subtask_index=[0] * 15 + [1] * 26)
    assert [caption for _, caption, _ in found["subtask"]] == ["approach", "grip"]
    assert notes == ["subtask labels of subtask_index left out: those of language_persistent come first"]


def test_ways_that_agree_need_no_word():
    assert read(subtask_index=[0] * 20 + [1] * 21, **prefixed("sparse_", COARSE)) == ({"subtask": COARSE_READ}, [])


VALUE = st.none() | st.booleans() | st.integers(-5, 50) | st.floats() | st.text(max_size=3)
LIST = VALUE | st.lists(VALUE, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    names=LIST,
    edges=st.dictionaries(st.sampled_from(["start_frames", "end_frames", "start_times", "end_times"]), LIST),
    rows=st.lists(
        st.fixed_dictionaries(
            {"style": st.sampled_from(["subtask", "motion", None, "x"]), "timestamp": VALUE, "content": VALUE}
        )
    )
    | LIST,
    index=st.lists(st.none() | st.integers(-2, 4), min_size=ROWS, max_size=ROWS),
)
def test_no_annotation_is_ever_damage(names, edges, rows, index):
    entry = {"sparse_subtask_names": names, **{f"sparse_subtask_{edge}": values for edge, values in edges.items()}}
    found = event_labels.labels(
        pa.table({"task_index": [0] * ROWS, "subtask_index": pa.array(index, pa.int64())}),
        rows,
        entry,
        TEXTS,
        TIMES,
        "",
    )
    levels, _ = spans(found.levels, ROWS - 1, HZ)
    assert all(row[0].start == 0 and row[-1].end == ROWS - 1 for row in levels.values())


# through a set


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    path = tmp_path_factory.mktemp("embodiment") / "arm.toml"
    path.write_text(DESCRIPTION)
    return load_embodiment(str(path))


@pytest.fixture(scope="module")
def labelled_sets(tmp_path_factory) -> dict[str, Path]:
    folder, raws = tmp_path_factory.mktemp("labelled"), recordings(1)
    videos = lerobot_files.write_set(folder / "rows", raws, labels="rows")
    return {
        "rows": videos,
        "language": lerobot_files.write_set(folder / "language", raws, labels="language", videos_of=videos),
    }


def provenance(path, arm):
    stream = read_episodes(LeRobotSet(path), arm, choose_clock(arm, 0.0), size=16, workers=0)
    (episode,) = stream
    assert stream.count.damaged == []
    return episode


@pytest.mark.parametrize(("way", "column"), [("rows", "subtask_index"), ("language", "language_persistent")])
def test_a_file_without_the_column_of_labels_is_read_without_them(labelled_sets, arm, tmp_path, way, column):
    path = Path(shutil.copytree(labelled_sets[way], tmp_path / "set", symlinks=True))
    (file,) = (path / "data").rglob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns([column]), file)
    episode = provenance(path, arm)
    assert set(episode.spans) == {"task"}
    assert episode.provenance == (f"{column} left out: file-000.parquet has none that can be read",)


@pytest.mark.parametrize("table", [None, {"subtask_index": [None], "subtask": ["reach"]}])
def test_a_set_whose_table_of_subtasks_is_not_whole_is_read_without_them(labelled_sets, arm, tmp_path, table):
    path = Path(shutil.copytree(labelled_sets["rows"], tmp_path / "set"))
    (path / "meta" / "subtasks.parquet").unlink()
    if table:
        pq.write_table(pa.table(table), path / "meta" / "subtasks.parquet")
    episode = provenance(path, arm)
    assert set(episode.spans) == {"task"}
    assert episode.provenance == ("subtask labels of subtask_index left out: meta/subtasks names no 0, 1, 2",)


def test_what_is_left_out_is_in_the_provenance_of_the_episode(labelled_sets, arm):
    episode = provenance(labelled_sets["language"], arm)
    assert len(episode.spans["subtask"]) == 4 and len(episode.spans["action"]) == 5
    assert episode.provenance == ("rows of language_persistent left out, they name no event: 1 memory",)
