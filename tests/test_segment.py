"""Cutting recordings without labels: known boundaries are found, spans are always valid, nothing looks ahead."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wallwm_jax.benchmarks import segment as benchmark
from wallwm_jax.console import UserError
from wallwm_jax.evaluation import figures
from wallwm_jax.events.labelling import Labelled
from wallwm_jax.events.phases import Options, gripper_changes, knots_of
from wallwm_jax.events.schema import Episode, Span
from wallwm_jax.events.segment import boundaries, segment
from wallwm_jax.events.windows import cut_windows

JPEG = {grey: figures.thumbnail(np.full((8, 8, 3), grey, np.uint8), 8) for grey in (40, 200)}
DOWN = np.diag([1.0, -1.0, -1.0])

# A hand over a table, metres: (seconds, where it goes, how far the gripper is closed at the end).
PICK_AND_PLACE = [
    (1.2, (0.5, 0.2, 0.20), 0.0),  # reach
    (0.8, (0.5, 0.2, 0.02), 0.0),  # descend
    (0.6, (0.5, 0.2, 0.02), 1.0),  # grasp
    (0.8, (0.5, 0.2, 0.20), 1.0),  # lift
    (1.2, (0.5, -0.2, 0.20), 1.0),  # carry
    (0.8, (0.5, -0.2, 0.02), 1.0),  # lower
    (0.6, (0.5, -0.2, 0.02), 0.0),  # release
    (1.0, (0.4, -0.1, 0.30), 0.0),  # retract
]
PRESS = [
    (1.2, (0.6, 0.1, 0.15), 0.0),  # reach
    (0.6, (0.6, 0.1, 0.05), 0.0),  # press
    (0.6, (0.6, 0.1, 0.15), 0.0),  # retract, in two goes
    (0.8, (0.4, 0.0, 0.30), 0.0),
]
PULL = [
    (1.0, (0.6, 0.0, 0.15), 0.0),  # reach
    (0.6, (0.6, 0.0, 0.05), 0.0),  # descend
    (0.6, (0.6, 0.0, 0.05), 1.0),  # grasp
    (1.0, (0.4, 0.0, 0.05), 1.0),  # pull
    (0.6, (0.4, 0.0, 0.05), 0.0),  # release
    (1.0, (0.4, 0.1, 0.25), 0.0),  # retract
]


def recording(path, gripper, clock_hz=10.0, frames=None, arms=1):
    """An episode of a hand that points down and follows `path` `[T + 1, 3]` exactly, the command a step ahead."""
    steps = len(path) - 1
    poses = np.tile(np.eye(4), (steps + 1, arms, 1, 1))
    poses[..., :3, :3] = DOWN
    poses[..., :3, 3] = np.asarray(path)[:, None]
    closing = np.repeat(np.asarray(gripper, float)[:, None], arms, axis=1)
    return Episode(
        episode_id="moves",
        source="test",
        embodiment="hand",
        clock_hz=clock_hz,
        video_stride=1,
        size=(8, 8),
        frames={"front": frames or [JPEG[40]] * (steps + 1)},
        poses=poses,
        grippers=closing,
        command_poses=poses[1:],
        command_grippers=closing[1:],
        spans={"task": [Span(0, steps, "do it", "task")]},
    )


def acted(moves, clock_hz=10.0, noise=0.0, seed=0):
    """(recording of `moves`, each starting and stopping smoothly; the step at which each but the first begins)."""
    path, gripper, starts = [np.array([0.4, 0.0, 0.3])], [0.0], []
    for seconds, goal, closed in moves:
        starts.append(len(path) - 1)
        time = np.linspace(0, 1, round(seconds * clock_hz) + 1)[1:, None]
        ease = time**2 * (3 - 2 * time)
        start, grip = path[-1], gripper[-1]
        path += list(start + ease * (np.array(goal) - start))
        gripper += list(grip + time[:, 0] * (closed - grip))
    path = np.array(path) + noise * np.random.default_rng(seed).normal(size=(len(path), 3))
    return recording(path, gripper, clock_hz), starts[1:]


def verbs(episode, level="action"):
    return [span.verb for span in episode.spans[level]]


def test_a_pick_and_place_has_its_eight_actions_in_one_subtask():
    episode, starts = acted(PICK_AND_PLACE)
    found = segment(episode)
    assert verbs(found) == ["reach", "descend", "grasp", "lift", "carry", "lower", "release", "retract"]
    assert np.abs(np.subtract(boundaries(found, "action"), starts)).max() <= 1
    assert verbs(found, "subtask") == ["place"] and found.spans["action"][4].caption == "carry it to the right"
    assert found.spans["task"] == episode.spans["task"] and found.poses is episode.poses


@pytest.mark.parametrize("clock_hz", [10.0, 30.0, 50.0])
def test_subtasks_begin_where_the_hand_stops_before_its_next_approach(clock_hz):
    episode, starts = acted([*PRESS, *PULL, *PICK_AND_PLACE, *PRESS], clock_hz)
    found = segment(episode)
    assert verbs(found, "subtask") == ["press", "pull", "place", "press"]
    true = [starts[3], starts[9], starts[17]]
    assert np.abs(np.subtract(boundaries(found, "subtask"), true)).max() <= 0.15 * clock_hz


def test_noise_of_half_a_millimetre_moves_boundaries_and_adds_none():
    episode, starts = acted(PICK_AND_PLACE, noise=5e-4)
    found = boundaries(segment(episode), "action")
    assert len(found) == len(starts) and np.abs(np.subtract(found, starts)).max() <= 2


def test_a_grasp_that_missed_and_is_tried_again_stays_in_its_subtask():
    missed = [*PICK_AND_PLACE[:3], (0.4, (0.5, 0.2, 0.1), 1.0), (0.4, (0.5, 0.2, 0.1), 0.0)]
    again = [(0.6, (0.5, 0.2, 0.2), 0.0), *PICK_AND_PLACE[1:]]
    found = segment(acted([*missed, *again])[0])
    assert verbs(found, "subtask") == ["place"] and verbs(found).count("grasp") == 2


def test_a_gripper_that_closes_on_the_way_to_a_button_grasps_nothing():
    moves = [(seconds, goal, float(number in (0, 1))) for number, (seconds, goal, _) in enumerate(PRESS)]
    found = segment(acted(moves)[0])
    assert verbs(found) == ["reach", "press", "retract"] and verbs(found, "subtask") == ["press"]


def test_a_minute_of_idling_changes_nothing_of_what_was_done_before():
    episode, starts = acted([*PICK_AND_PLACE, (60.0, (0.4, -0.1, 0.30), 0.0)])
    found = segment(episode)
    assert verbs(found)[:8] == ["reach", "descend", "grasp", "lift", "carry", "lower", "release", "retract"]
    assert np.abs(np.subtract(boundaries(found, "action")[:7], starts[:7])).max() <= 1


def test_motion_without_contact_is_cut_at_stops_and_turns():
    square = [(1.0, (x, y, 0.3), 0.0) for x, y in ((0.6, 0.0), (0.6, 0.2), (0.4, 0.2))]
    episode, starts = acted(square)
    assert np.abs(np.subtract(boundaries(segment(episode), "action"), starts)).max() <= 1


def test_a_picture_that_changes_while_the_hand_rests_begins_a_segment():
    path, frames = np.tile([0.4, 0.0, 0.3], (41, 1)), [JPEG[40]] * 25 + [JPEG[200]] * 16
    found = segment(recording(path, np.zeros(41), frames=frames))
    assert boundaries(found, "segment") == [25] and boundaries(found, "action") == []


def test_labels_are_never_read():
    episode, _ = acted([*PRESS, *PULL])
    halves = {
        level: [Span(0, 3, "a", "a", 0), Span(3, episode.num_steps, "b", "b", second)]
        for level, second in (("subtask", 0), ("action", 1), ("segment", 1))
    }
    labelled = dataclasses.replace(episode, spans={**episode.spans, **halves})
    assert segment(labelled).spans == segment(episode).spans


def with_subtasks(episode, cuts, finer=False):
    """The episode with given subtasks between `cuts`, and actions that halve them where `finer`."""
    edges = list(zip([0, *cuts], [*cuts, episode.num_steps]))
    spans = {**episode.spans, "subtask": [Span(a, b, f"part {n}", "part", 0) for n, (a, b) in enumerate(edges)]}
    if finer:
        halves = [(n, edge) for n, (a, b) in enumerate(edges) for edge in ((a, (a + b) // 2), ((a + b) // 2, b))]
        spans["action"] = [Span(a, b, "half", "half", n) for n, (a, b) in halves]
    return dataclasses.replace(episode, spans=spans)


def test_finer_levels_are_found_inside_the_subtasks_that_are_given():
    episode, starts = acted([*PRESS, *PICK_AND_PLACE])
    cut = starts[3] - 2  # people put the boundary 0.2 s before the hand turns to its next task
    told = with_subtasks(episode, [cut])
    found = segment(told, keep=("task", "subtask"))
    assert found.spans["subtask"] == told.spans["subtask"] and found.spans["task"] == told.spans["task"]
    alone = boundaries(segment(episode), "action")
    moved = [cut if abs(step - starts[3]) <= 1 else step for step in alone]
    assert moved != alone and boundaries(found, "action") == moved
    assert verbs(found)[-8:] == ["reach", "descend", "grasp", "lift", "carry", "lower", "release", "retract"]
    assert [span.parent for span in found.spans["action"]] == [int(span.start >= cut) for span in found.spans["action"]]
    assert set(boundaries(found, "action")) <= set(boundaries(found, "segment"))


def test_a_given_boundary_that_no_motion_shows_is_kept():
    told = with_subtasks(acted(PICK_AND_PLACE)[0], [38, 41])
    found = segment(told, keep=("task", "subtask"))
    assert {38, 41} <= set(boundaries(found, "action")) and [s.parent for s in found.spans["action"]][-1] == 2


def test_segments_are_found_inside_the_actions_that_are_given():
    told = with_subtasks(acted(PICK_AND_PLACE)[0], [30], finer=True)
    found = segment(told, keep=("task", "subtask", "action"))
    assert found.spans["action"] == told.spans["action"]
    assert set(boundaries(told, "action")) < set(boundaries(found, "segment"))
    without = dataclasses.replace(
        told,
        spans={
            "task": told.spans["task"],
            "action": [dataclasses.replace(span, parent=0) for span in told.spans["action"]],
        },
    )
    assert segment(without, keep=("task", "action")).spans["segment"] == found.spans["segment"]


def test_subtasks_are_found_of_the_actions_that_are_given():
    """Their boundaries are the nearest of the actions', whose captions stay; without any there is one subtask."""
    episode, _ = acted([*PRESS, *PICK_AND_PLACE])
    whole = segment(episode)
    assert len(whole.spans["subtask"]) > 1
    moved = [step + 1 for step in boundaries(whole, "action")]  # people were a step late throughout
    edges = itertools.pairwise([0, *moved, episode.num_steps])
    actions = [Span(a, b, f"part {n}", "part", 0) for n, (a, b) in enumerate(edges)]
    told = dataclasses.replace(episode, spans={"task": episode.spans["task"], "action": actions})
    found = segment(told, keep=("task", "action"))
    assert list(found.spans) == ["task", "subtask", "action", "segment"]
    assert boundaries(found, "subtask") == [step + 1 for step in boundaries(whole, "subtask")]
    assert [dataclasses.replace(span, parent=0) for span in found.spans["action"]] == actions
    assert {span.parent for span in found.spans["action"]} == set(range(len(found.spans["subtask"])))
    one = dataclasses.replace(told, spans={**told.spans, "action": [Span(0, episode.num_steps, "all", "all", 0)]})
    assert len(segment(one, keep=("task", "action")).spans["subtask"]) == 1


def test_each_arm_has_its_say():
    episode, _ = acted(PICK_AND_PLACE)
    idle = np.tile(episode.poses[:1], (len(episode.poses), 1, 1, 1))
    both = dataclasses.replace(
        episode,
        poses=np.concatenate([idle, episode.poses], axis=1),
        command_poses=np.concatenate([idle[1:], episode.command_poses], axis=1),
        grippers=np.concatenate([0 * episode.grippers, episode.grippers], axis=1),
        command_grippers=np.concatenate([0 * episode.command_grippers, episode.command_grippers], axis=1),
    )
    found = segment(both)
    assert boundaries(found, "action") == boundaries(segment(episode), "action")
    assert verbs(found)[4] == "carry" and found.spans["action"][4].caption == "carry it to the right with arm 2"


def test_a_streamed_boundary_depends_on_nothing_after_its_lookahead():
    options, (episode, _) = Options(lookahead_s=0.8), acted([*PRESS, *PICK_AND_PLACE])
    whole = segment(episode, options)
    assert len(boundaries(whole, "action")) >= 8
    for seen in (47, 80):
        cut = recording(episode.poses[: seen + 1, 0, :3, 3], episode.grippers[: seen + 1, 0])
        cut = segment(cut, options)
        for level in ("subtask", "action", "segment"):
            sure = [step for step in boundaries(whole, level) if step <= seen - 8]
            assert [step for step in boundaries(cut, level) if step <= seen - 8] == sure


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_spans_are_valid_whatever_the_hand_does(data):
    steps = data.draw(st.integers(1, 60))
    moves = data.draw(
        st.lists(st.tuples(st.floats(-0.05, 0.05), st.sampled_from([0, 1, 2]), st.booleans()), min_size=1)
    )
    step = np.zeros((steps, 3))
    gripper = np.zeros(steps + 1)
    for index, part in enumerate(np.array_split(np.arange(steps), min(len(moves), steps))):
        amount, axis, closed = moves[index]
        step[part, axis] = amount
        gripper[part + 1] = closed
    rough = data.draw(st.sampled_from([0.0, 1e-4, 1e-2])) * np.random.default_rng(steps).normal(size=step.shape)
    path = np.concatenate([np.zeros((1, 3)), np.cumsum(step + rough, axis=0)])
    episode = recording(path, gripper, arms=data.draw(st.sampled_from([1, 2])))
    found = segment(episode)  # Episode checks its spans
    for level in ("subtask", "action", "segment"):
        assert all(span.length >= min(2, steps) and span.verb for span in found.spans[level])
    assert set(boundaries(found, "subtask")) <= set(boundaries(found, "action")) <= set(boundaries(found, "segment"))
    cuts = sorted(data.draw(st.sets(st.integers(1, steps - 1), max_size=5))) if steps > 1 else []
    told = with_subtasks(episode, cuts)
    found = segment(told, keep=("task", "subtask"))
    assert found.spans["subtask"] == told.spans["subtask"]
    assert set(cuts) <= set(boundaries(found, "action")) <= set(boundaries(found, "segment"))
    only = {"task": told.spans["task"], "action": told.spans["subtask"]}
    found = segment(dataclasses.replace(told, spans=only), keep=("task", "action"))
    assert set(boundaries(found, "subtask")) <= set(cuts)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"tolerance_m": 0}, "must be positive"), ({"axis": 3}, "axis 3"), ({"lookahead_s": 0}, "0")]
)
def test_options_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Options(**wrong)


def test_a_lookahead_shorter_than_five_steps_is_refused():
    with pytest.raises(UserError, match=r"at 10 Hz give at least 0\.5"):
        segment(acted(PRESS)[0], Options(lookahead_s=0.4))


def test_joints_of_cubics_are_found_exactly_and_a_straight_line_has_none():
    time = np.linspace(0, 1, 21)[:, None]
    ease = time**2 * (3 - 2 * time)
    path = np.concatenate([ease * [0.3, 0, 0], [[0.3, 0, 0]] + ease[1:] * [0, 0.3, 0]])
    assert knots_of(path, 10.0, Options()) == [20]
    assert knots_of(time * [0.3, 0.2, 0.1], 10.0, Options()) == []


def test_gripper_changes_tell_when_they_begin_and_end():
    closing = np.array([0, 0, 0.2, 0.6, 0.9, 1, 1, 1, 0.4, 0, 0])
    found = [(change.onset, change.half, change.end, change.closes) for change in gripper_changes(closing, 0.3)]
    assert found == [(1, 3, 4, True), (7, 8, 9, False)]
    assert gripper_changes(0.2 * closing, 0.3) == []


# -- the measurement ------------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_field():
    assert benchmark.rates(3, 4, 6) == {"precision": 0.5, "recall": 0.75, "f1": pytest.approx(0.6)}
    assert benchmark.rates(0, 0, 0)["f1"] == 1.0 and benchmark.rates(0, 2, 0)["f1"] == 0.0
    assert benchmark.histogram([0.1, 0.25, 0.7, 99]) == [1, 1, 1, 0, 0, 0, 0, 1]


def test_a_score_counts_over_episodes_and_baselines_see_no_more_than_they_may():
    episode, starts = acted([*PRESS, *PICK_AND_PLACE])
    cuts = [0, *starts[:2], *starts[3:], episode.num_steps]  # the press's retreat is one action in two goes
    names = ["reach", "press", "retract", "reach", "descend", "grasp", "lift", "carry", "lower", "release", "retract"]
    actions = [Span(a, b, name, name, int(a >= starts[3])) for name, a, b in zip(names, cuts, cuts[1:])]
    subtasks = [Span(a, b, "it", "it", 0) for a, b in ((0, starts[3]), (starts[3], episode.num_steps))]
    true = dataclasses.replace(episode, spans={**episode.spans, "subtask": subtasks, "action": actions})
    found = benchmark.score([true, true])
    assert found["action"]["spans"] == 22 and found["subtask"]["spans"] == 4
    assert found["action"]["tolerance_s"] == pytest.approx(0.2) and found["subtask"]["tolerance_s"] == 0.3
    assert found["action"]["found"]["f1"] == 1.0 and found["subtask"]["found"]["f1"] == 1.0
    assert found["action"]["windows"]["f1"] < 0.6
    assert found["action"]["gripper"]["recall"] == pytest.approx(0.4)  # of grasp and release, four of ten
    assert found["action"]["found"]["over_segmentation"] == 0.0
    assert sum(found["action"]["lengths_true"]) == sum(found["action"]["found"]["lengths"]) == 22


@pytest.mark.extended
def test_held_out_families_are_cut_better_than_by_either_baseline():
    pytest.importorskip("ocbench")
    found = benchmark.measure(episodes=3, families=benchmark.HELD_OUT, streamed=1)
    assert found["action_f1"] > 0.75 and found["subtask_f1"] > 0.6
    for baseline in found["baselines"].values():
        assert found["action_f1"] > baseline["action_f1"] + 0.2
        assert found["subtask_f1"] > baseline["subtask_f1"]
    assert "held out, mean" in benchmark.table(found)


def test_events_are_found_on_the_levels_that_the_source_does_not_name():
    bare, _ = acted(PICK_AND_PLACE)
    told = segment(bare)
    for which, cut in {"auto": 1, "always": 2, "never": 0}.items():
        labelled = Labelled([bare, told], which)
        first, second = labelled
        assert labelled.count == cut
        assert ("action" in first.spans) == (cut > 0)
        assert (second.spans["action"][0].provenance == "templates") == (which == "always")
    found = next(Labelled([bare], "auto"))
    assert boundaries(found, "action") == boundaries(told, "action")
    assert found.provenance == ("subtask, action, segment found in its motion, task given",)


def test_subtasks_alone_get_actions_and_segments_worded_by_templates():
    told = with_subtasks(acted(PICK_AND_PLACE)[0], [20])
    (episode,) = labelled = Labelled([told], "auto")
    assert labelled.count == 1 and episode.spans["subtask"] == told.spans["subtask"]
    assert episode.provenance == ("action, segment found in its motion, task, subtask given",)
    assert {span.provenance for level in ("action", "segment") for span in episode.spans[level]} == {"templates"}
    assert [(a.caption, a.verb, a.parent) for a in episode.spans["action"][1:3]] == [
        ("lower the open gripper by about 20 cm", "descend", 0),
        ("grasp the object", "grasp", 1),
    ]
    assert len(cut_windows(episode, ["event"], levels=["subtask", "action"])) == 2 + len(episode.spans["action"])
    (again,) = Labelled([told], "always")
    assert again.provenance == ("subtask, action, segment found in its motion, task given",)
    assert len(again.spans["subtask"]) == 1


def test_actions_alone_get_subtasks_and_segments_worded_by_templates():
    told = segment(acted(PICK_AND_PLACE)[0])
    actions = [dataclasses.replace(span, caption=f"step {n}", parent=0) for n, span in enumerate(told.spans["action"])]
    alone = dataclasses.replace(told, spans={"task": told.spans["task"], "action": actions})
    (episode,) = Labelled([alone], "auto")
    assert episode.provenance == ("subtask, segment found in its motion, task, action given",)
    assert [span.caption for span in episode.spans["action"]] == [span.caption for span in actions]
    assert boundaries(episode, "subtask") == boundaries(told, "subtask")
    assert {span.provenance for level in ("subtask", "segment") for span in episode.spans[level]} == {"templates"}
