"""Captioners that see no pictures: what templates say of a motion, and captions that people edited."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.events.captioners import Caption, with_captions
from wallwm_jax.events.captioners.human import HumanCaptioner, read_edits, write_edits
from wallwm_jax.events.captioners.templates import MOTION_TEMPLATES, TemplateCaptioner, motion_of
from wallwm_jax.events.schema import LEVELS, Episode, Span

EPISODE = synthetic_episode(0)


def shape(episode):
    return {level: [(s.start, s.end, s.parent) for s in episode.spans[level]] for level in episode.spans}


# Templates

LEGS = [  # where the hand goes (x forward, y left, z up; metres), measured and commanded closing, expected words
    ((0.0, 0.20, 0.0), 0.0, 0.0, "move the open gripper to the left by about 20 cm", "reach"),
    ((0.0, 0.0, -0.1), 0.0, 0.0, "lower the open gripper by about 10 cm", "descend"),
    ((0.0, 0.0, 0.0), 0.6, 1.0, "grasp the object", "grasp"),
    ((0.0, 0.0, 0.2), 0.6, 1.0, "lift the object", "lift"),
    ((0.1, 0.02, 0.0), 0.6, 1.0, "carry the object forward", "carry"),
    ((0.0, 0.0, -0.2), 0.6, 1.0, "lower the object", "lower"),
    ((0.0, 0.0, 0.0), 0.0, 0.0, "release the object", "release"),
    ((0.0, 0.0, 0.07), 0.0, 0.0, "raise the open gripper by about 7 cm", "raise"),
    ((0.0, 0.0, 0.0), 0.0, 0.0, "hold the open gripper still", "wait"),
    ((0.0, 0.0, 0.0), 1.0, 1.0, "close the gripper", "grasp"),
    ((-0.05, 0.0, 0.0), 1.0, 1.0, "move the closed gripper back by about 5 cm", "reach"),
    ((0.0, 0.0, 0.0), 0.0, 0.0, "open the gripper", "release"),
]
STEPS = 10  # of each leg


def arm_episode() -> Episode:
    """An arm without pictures of any use that runs through `LEGS`, then turns by 60 degrees in place."""
    corners = np.cumsum([(0.4, 0.0, 0.3), *(leg[0] for leg in LEGS), (0, 0, 0)], axis=0)
    steps = STEPS * (len(LEGS) + 1)
    at = np.arange(steps + 1) / STEPS
    poses = np.tile(np.eye(4), (steps + 1, 1, 1, 1))
    for axis in range(3):
        poses[:, 0, axis, 3] = np.interp(at, np.arange(len(corners)), corners[:, axis])
    angle = np.radians(60) * np.clip(at - len(LEGS), 0, 1)
    poses[:, 0, 0, 0] = poses[:, 0, 1, 1] = np.cos(angle)
    poses[:, 0, 1, 0], poses[:, 0, 0, 1] = np.sin(angle), -np.sin(angle)
    measured = np.interp(at, np.arange(len(LEGS) + 2), [0.0, *(leg[1] for leg in LEGS), 0.0])
    told = np.repeat([*(leg[2] for leg in LEGS), 0.0], STEPS)
    halves = [(0, 7 * STEPS), (7 * STEPS, steps)]
    spans = {
        "task": [Span(0, steps, "do it", "do")],
        "subtask": [Span(*half, "a half", "do", 0) for half in halves],
        "action": [Span(k, k + STEPS, "unnamed", "move", int(k >= 7 * STEPS)) for k in range(0, steps, STEPS)],
    }
    return Episode(
        episode_id="legs",
        source="test",
        embodiment="arm",
        clock_hz=10.0,
        video_stride=2,
        size=(8, 8),
        frames={"front": [b""] * (steps // 2 + 1)},
        poses=poses,
        grippers=measured[:, None],
        command_poses=poses[1:],
        command_grippers=told[:, None],
        spans=spans,
    )


ARM = arm_episode()


def test_a_motion_gets_the_words_of_what_the_hand_does():
    (said,) = TemplateCaptioner().caption([ARM])
    assert [(s.caption, s.verb) for s in said.spans["action"]] == [
        *((words, verb) for *_, words, verb in LEGS),
        ("turn the open gripper by about 60 degrees", "turn"),
    ]
    assert shape(said) == shape(ARM)
    assert {span.provenance for span in said.spans["action"]} == {"templates"}
    assert [s.caption for s in said.spans["action"] if not s.paraphrases] == ["lower the object"]  # onto what, unknown


def test_a_coarser_span_is_told_by_its_clearest_parts_in_order():
    (said,) = TemplateCaptioner().caption([ARM])
    first = said.spans["subtask"][0]
    assert first.caption == (
        "move the open gripper to the left by about 20 cm, then lift the object, then lower the object"
    )
    assert first.verb == "reach" and 0 < first.confidence < 1
    assert said.spans["task"][0].caption == "do it"  # an instruction is known from elsewhere, or not at all


def test_a_slant_is_less_certain_than_a_straight_line():
    poses = ARM.poses.copy()
    poses[1 : STEPS + 1, 0, 2, 3] += np.linspace(0, 0.15, STEPS)
    (straight,), (slanted,) = (
        TemplateCaptioner().caption([episode]) for episode in (ARM, dataclasses.replace(ARM, poses=poses))
    )
    assert straight.spans["action"][0].confidence == 1.0
    assert slanted.spans["action"][0].confidence == pytest.approx(0.57, abs=0.02)  # 20 cm across, 15 cm up


def test_a_calibrated_camera_that_stands_still_gives_the_directions():
    camera = EPISODE.cameras["front_pixels"]  # looks down: x of the base is the picture's right, y is up in it
    still = dataclasses.replace(camera, extrinsics=np.tile(camera.extrinsics[0], (len(ARM.frames["front"]), 1, 1)))
    seen = dataclasses.replace(ARM, cameras={"front": still})
    assert motion_of(seen, ARM.spans["action"][0]).direction == "away from the camera"
    assert motion_of(seen, ARM.spans["action"][4]).direction == "to the right"


def test_every_motion_has_several_wordings():
    words = dict.fromkeys(("tool", "direction", "distance", "height", "angle", "pace"), "x")
    for verb, templates in MOTION_TEMPLATES.items():
        texts = {template.format(**words) for template in templates}
        assert len(texts) == len(templates) >= 3, verb


# Human edits


def events(episode):
    return [(episode.source, episode.episode_id, episode.spans)]


def nasty():
    """Spans whose words need quoting."""
    texts = {
        ("action", 0): Caption(
            'say "hä?", then 立方体をつかむ', ("a,b", 'c "d"\nnext line', "naïve; 🤖"), 0.5, "vlm:m"
        ),
        ("action", 1): Caption(" first line\nsecond line\r\nthird", ("=1+1",)),
    }
    return dataclasses.replace(EPISODE, spans=with_captions(EPISODE.spans, texts))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_captions_survive_the_way_out_and_in(tmp_path, ending):
    episode, file = nasty(), tmp_path / f"captions.{ending}"
    assert write_edits(file, events(episode)) == sum(map(len, episode.spans.values()))
    captioner = HumanCaptioner(read_edits(file))
    (same,) = captioner.caption([episode])
    assert captioner.changes == [] and same.spans == {level: tuple(row) for level, row in episode.spans.items()}
    blank = [dataclasses.replace(s, caption="x", paraphrases=()) for s in episode.spans["action"]]
    captioner = HumanCaptioner(read_edits(file), "ada")
    (back,) = captioner.caption([dataclasses.replace(episode, spans={**episode.spans, "action": blank})])
    assert [(s.caption, s.paraphrases) for s in back.spans["action"]] == [
        (s.caption, s.paraphrases) for s in episode.spans["action"]
    ]
    assert len(captioner.changes) == len(blank) and shape(back) == shape(episode)
    assert {(s.confidence, s.provenance) for s in back.spans["action"]} == {(1.0, "human:ada")}


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_spreadsheet_may_sort_and_drop_rows_and_columns(tmp_path, delimiter):
    file = tmp_path / "captions.csv"
    write_edits(file, events(EPISODE))
    rows = list(csv.DictReader(file.read_text("utf-8-sig").splitlines()))
    row = next(row for row in rows if (row["level"], row["index"]) == ("subtask", "1")) | {"caption": "tidy up"}
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(
            out,
            ["caption", "end", "start", "index", "level", "episode", "source"],
            extrasaction="ignore",
            delimiter=delimiter,
        )
        table.writeheader()
        table.writerow(row)
    captioner = HumanCaptioner(read_edits(file))
    (edited,) = captioner.caption([EPISODE])
    (change,) = captioner.changes
    before = EPISODE.spans["subtask"][1]
    assert str(change) == f"synthetic-0000 subtask 1: {before.caption!r} -> 'tidy up'"
    assert edited.spans["subtask"][1].paraphrases == before.paraphrases  # a column that is absent changes nothing
    assert [s for s in edited.spans["subtask"] if s.provenance] == [edited.spans["subtask"][1]]


def one_row(**changes):
    span = EPISODE.spans["action"][3]
    row = dict(
        source=EPISODE.source, episode=EPISODE.episode_id, level="action", index=3, start=span.start, end=span.end
    )
    return {**row, "caption": "new words", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"end": 999},
            r"line 1 of the edits: action 3 of episode 'synthetic-0000' .* 999\) there .* write them out again",
        ),
        ({"index": 99}, r"there is no action 99 of episode 'synthetic-0000'"),
        ({"episode": "else"}, r"there is no action 3 of episode 'else'"),
        ({"caption": " "}, "none is empty"),
        ({"start": "soon"}, "whole numbers"),
        ({"paraphrases": "two, three"}, "JSON list of texts"),
        ({"level": None}, "lacks level"),
    ],
)
def test_edits_of_something_else_are_refused(tmp_path, changes, message):
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps(one_row(**changes)) + "\n")
    with pytest.raises(UserError, match=message):
        list(HumanCaptioner(read_edits(file)).caption([EPISODE]))


def test_files_that_are_no_edits_are_named(tmp_path):
    for name, content, message in (
        ("a.csv", "caption,index\nx,1\n", "line 2 .* lacks source, episode, level"),
        ("b.jsonl", json.dumps(one_row()) + "\n{", "line 2 .* is not JSON"),
        ("c.jsonl", 2 * (json.dumps(one_row()) + "\n"), "stands there twice, first in line 1"),
        ("d.csv", "", "have no rows"),
        ("e.xlsx", "", "a .csv or a .jsonl"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_edits(tmp_path / name)
    (tmp_path / "f.csv").write_bytes("caption\nMüll".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_edits(tmp_path / "f.csv")
    with pytest.raises(UserError, match="cannot read"):
        read_edits(tmp_path / "absent.csv")


def test_words_go_only_where_a_span_is():
    with pytest.raises(KeyError, match="spans that are not there"):
        with_captions(EPISODE.spans, {("action", 99): Caption("x")})
    assert set(EPISODE.spans) == set(LEVELS)
