"""Embodiment descriptions: columns become poses as the file says, and a file that says nonsense is explained."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_motion import DESCRIPTION
from scipy.spatial.transform import Rotation
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.sources.clock import Clock, nearest_rows, resample, resample_episode
from wallwm_jax.sources.columns import BadRecording, Column
from wallwm_jax.sources.embodiment import FOLDER, Motion, load_embodiment
from wallwm_jax.sources.labels import Label, spans
from wallwm_jax.sources.opening import SourceOptions, open_source

ROWS = 6
RNG = np.random.default_rng(0)
TURNS = Rotation.random(ROWS, random_state=1)
PLACES = RNG.uniform(-1, 1, (ROWS, 3))


def described(tmp_path, *changes):
    text = DESCRIPTION
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "arm.toml"
    path.write_text(text)
    return load_embodiment(str(path))


def columns(turns=None, width=0.0, shift=None):
    turns = TURNS.as_euler("xyz") if turns is None else turns
    state = np.column_stack([PLACES, turns, np.full(ROWS, width)])
    action = np.zeros((ROWS, 7)) if shift is None else shift
    return {"observation.state": state, "action": action}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("euler_xyz", TURNS.as_euler("xyz")),
        ("euler_ZYX", TURNS.as_euler("ZYX")),
        ("rotvec", TURNS.as_rotvec()),
        ("quat_xyzw", TURNS.as_quat()),
        ("quat_wxyz", TURNS.as_quat(scalar_first=True)),
        ("matrix", TURNS.as_matrix().reshape(ROWS, 9)),
        ("columns6d", TURNS.as_matrix()[..., :2].swapaxes(1, 2).reshape(ROWS, 6)),
    ],
)
def test_every_kind_of_rotation_gives_the_same_poses(tmp_path, kind, values):
    width = values.shape[1]
    embodiment = described(
        tmp_path,
        (
            'rotation = "observation.state[3:6]"\nrotation_as = "euler_xyz"',
            f'rotation = "turn"\nrotation_as = "{kind}"',
        ),
    )
    poses = embodiment.motion({**columns(), "turn": values}).poses
    assert poses.shape == (ROWS, 1, 4, 4) and width in (3, 4, 6, 9)
    assert np.abs(poses[:, 0, :3, :3] - TURNS.as_matrix()).max() < 1e-12
    assert np.abs(poses[:, 0, :3, 3] - PLACES).max() < 1e-12


def test_units_and_gripper_values_are_the_datas_own(tmp_path):
    embodiment = described(
        tmp_path,
        ('position = "observation.state[0:3]"', 'position = "observation.state[0:3]"\nposition_unit = "mm"'),
        ('rotation = "observation.state[3:6]"', 'rotation = "observation.state[3:6]"\nrotation_unit = "deg"'),
    )
    raw = columns(np.degrees(TURNS.as_euler("xyz")), width=0.02)
    raw["observation.state"][:, :3] *= 1000
    motion = embodiment.motion(raw)
    assert np.abs(motion.poses[:, 0, :3, 3] - PLACES).max() < 1e-12
    assert np.abs(motion.poses[:, 0, :3, :3] - TURNS.as_matrix()).max() < 1e-12
    assert np.allclose(motion.grippers, 0.75) and np.allclose(motion.command_grippers, 1.0)


@pytest.mark.parametrize("frame", ["base", "tool"])
def test_shifts_are_added_to_the_measured_pose_in_their_own_axes(tmp_path, frame):
    embodiment = described(tmp_path, ('mode = "absolute"', f'mode = "delta"\nframe = "{frame}"'))
    shift = np.tile([0.1, 0.0, 0.0, 0.0, 0.0, np.pi / 2, 0.0], (ROWS, 1))
    commands = embodiment.motion(columns(shift=shift)).command_poses[:, 0]
    turn, matrices = Rotation.from_euler("z", 90, degrees=True).as_matrix(), TURNS.as_matrix()
    along = matrices[:, :, 0] if frame == "tool" else np.tile([1.0, 0.0, 0.0], (ROWS, 1))
    assert np.abs(commands[:, :3, 3] - PLACES - 0.1 * along).max() < 1e-12
    expected = matrices @ turn if frame == "tool" else turn @ matrices
    assert np.abs(commands[:, :3, :3] - expected).max() < 1e-12


def test_without_commands_the_next_pose_is_the_command(tmp_path):
    text = DESCRIPTION[: DESCRIPTION.index("[arms.action]")] + '[arms.action]\nmode = "next_state"\n'
    (tmp_path / "arm.toml").write_text(text)
    motion = load_embodiment(str(tmp_path / "arm.toml")).motion(columns())
    assert np.array_equal(motion.command_poses[:-1], motion.poses[1:])
    assert np.array_equal(motion.command_grippers[:-1], motion.grippers[1:])


def test_two_arms_stand_side_by_side(tmp_path):
    second = DESCRIPTION[DESCRIPTION.index("[[arms]]") :].replace("observation.state", "left")
    (tmp_path / "arm.toml").write_text(DESCRIPTION + second)
    motion = load_embodiment(str(tmp_path / "arm.toml")).motion({**columns(), "left": -columns()["observation.state"]})
    assert motion.poses.shape == (ROWS, 2, 4, 4)
    assert np.array_equal(motion.poses[:, 1, :3, 3], -motion.poses[:, 0, :3, 3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("control_hz = 10", "", r"the file: lacks control_hz"),
        ("control_hz = 10", "control_hz = -1", r"must be positive"),
        ("control_hz = 10", "control_hz = true", r"control_hz is True, expected a number"),
        ("control_hz = 10", "control_hz = 10\nfps = 3", r"unknown key 'fps'; known are robot, control_hz"),
        ("[[arms]]", "", r"needs at least one \[\[arms\]\] table"),
        ('position = "observation.state[0:3]"', "", r"arm 0, \[arms.state\]: lacks position"),
        ('position = "action[0:3]"', "", r'lacks position; a set without commands has mode = "next_state"'),
        ('"action[0:3]"', '"action[3:3]"', r"'action\[3:3\]' names no dimensions"),
        ('"action[0:3]"', '"action[0"', r"'action\[0' names no column"),
        ('mode = "absolute"', 'mode = "relative"', r"mode is 'relative'; choose of absolute, delta, next_state"),
        ('rotation_as = "euler_xyz"', 'rotation_as = "euler_abc"', r"unknown rotation_as 'euler_abc'"),
        ('"action[3:6]"', '"action[3:7]"', r"rotation_as 'euler_xyz' has 3 numbers, not action\[3:7\]"),
        ("gripper_open = 0.08", "gripper_open = 0.0", r"gripper_open and gripper_closed are both 0.0"),
        ("gripper_open = 0.08\n", "", r"gripper needs gripper_open and gripper_closed"),
        ('mount = "wrist"', 'mount = "hand"', r"\[cameras.wrist\]: mount is 'hand'; choose of fixed, wrist"),
        ('robot = "test_arm"', "robot =", r"is no TOML"),
    ],
)
def test_a_description_that_cannot_be_is_explained(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        described(tmp_path, (old, new))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no embodiment 'spot' .*there are bridge, droid, libero"):
        load_embodiment("spot")
    with pytest.raises(UserError, match=r"--embodiment says what the columns mean: one of bridge, droid, libero"):
        load_embodiment("")


def test_every_description_that_comes_along_is_valid():
    names = [path.stem for path in FOLDER.glob("*.toml")]
    assert len(names) >= 3 and all(load_embodiment(name).robot for name in names)


def test_a_column_that_is_not_what_it_should_be_is_named():
    with pytest.raises(BadRecording, match=r"a\[0:3\]: 2 of 2 dimensions, expected 3"):
        Column.parse("a[0:3]").of({"a": np.zeros((4, 2))}, 3)
    with pytest.raises(BadRecording, match=r"a\[1:3\]: is inf at row 2, dimension 2"):
        Column.parse("a[1:3]").of({"a": np.where(np.arange(12).reshape(4, 3) == 8, np.inf, 0)}, 2)
    with pytest.raises(BadRecording, match=r"b: is missing; there are a"):
        Column.parse("b").of({"a": np.zeros((4, 2))}, 1)
    with pytest.raises(BadRecording, match=r"is no quaternion at row 1: its length is 0"):
        turns = TURNS.as_quat() * (np.arange(ROWS) != 1)[:, None]
        from wallwm_jax.sources.embodiment import as_matrices

        as_matrices({"q": turns}, Column.parse("q"), "quat_xyzw", 1.0)


# The clock


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(2, 40), hz=st.floats(0.5, 60), clock_hz=st.floats(0.5, 60), seed=st.integers(0, 9))
def test_resampled_motion_lies_on_the_recorded_one(rows, hz, clock_hz, seed):
    times = np.arange(rows) / hz
    slope = np.random.default_rng(seed).uniform(-1, 1, 3)
    poses = np.tile(np.eye(4), (rows, 1, 1, 1))
    poses[:, 0, :3, 3] = times[:, None] * slope
    commands = poses.copy()
    commands[:, 0, :3, 3] = (times + 1 / hz)[:, None] * slope
    motion = Motion(poses, np.zeros((rows, 1)), commands, np.zeros((rows, 1)))
    clock = Clock(clock_hz, 2)
    if times[-1] * clock_hz + 0.2 < 1:
        with pytest.raises(BadRecording, match="not one control step"):
            resample(motion, times, clock)
        return
    result, _ = resample(motion, times, clock)
    steps = len(result.command_poses)
    assert len(result.poses) == steps + 1 and steps == int(np.floor(times[-1] * clock_hz + 0.2))
    wanted = np.minimum(np.arange(steps + 1) / clock_hz, times[-1])
    tolerance = 0.11 / clock_hz * np.abs(slope).max() + 1e-9
    assert np.abs(result.poses[:, 0, :3, 3] - wanted[:, None] * slope).max() <= tolerance
    due = np.clip(wanted[1:], times[1], None)  # nothing was commanded before the first command
    assert np.abs(result.command_poses[:, 0, :3, 3] - due[:, None] * slope).max() <= tolerance
    nearest = nearest_rows(times, np.arange(steps + 1), clock)
    assert np.abs(times[nearest] - wanted).max() <= 0.5 / hz + 1e-9


def test_an_episode_on_another_clock_keeps_its_motion_its_pictures_and_its_events():
    episode = synthetic_episode(3, steps=61)
    assert resample_episode(episode, Clock(10.0, 2)) is episode
    slow = resample_episode(episode, Clock(5.0, 2))  # every second step, every second frame
    assert (slow.clock_hz, slow.video_stride, slow.num_steps) == (5.0, 2, 30)
    assert np.abs(slow.poses - episode.poses[:61:2]).max() < 1e-6
    assert np.abs(slow.command_poses - episode.command_poses[1:60:2]).max() < 1e-6  # due at the same moments
    assert np.array_equal(slow.command_grippers, episode.command_grippers[1:60:2])
    for view, frames in episode.frames.items():
        assert slow.frames[view] == frames[::2]
        assert np.array_equal(slow.cameras[view].extrinsics, episode.cameras[view].extrinsics[::2])
    for level in ("task", "subtask"):  # whose events are longer than two steps
        assert [(span.end, span.caption, span.parent) for span in slow.spans[level][:-1]] == [
            (round(span.end / 2), span.caption, span.parent) for span in episode.spans[level][:-1]
        ]
    assert slow.provenance[0] == "resampled from 10 to 5 Hz"


def test_events_too_short_for_a_slow_clock_are_left_out_with_what_is_in_them():
    episode = synthetic_episode(3, steps=61)
    slow = resample_episode(episode, Clock(0.5, 1))  # a step is 20 old ones; the type checks nesting and gaps
    lost = sum(len(tiles) - len(slow.spans[level]) for level, tiles in episode.spans.items())
    assert slow.num_steps == 3 and len(slow.spans["segment"]) <= 3
    assert slow.provenance[-1] == f"{lost} events left out: shorter than a control step" and lost > 3


def test_a_simulator_brings_its_episodes_to_the_clock_asked_for(monkeypatch):
    from wallwm_jax.sources.simulator import ocbench_demos

    monkeypatch.setattr(ocbench_demos, "demonstrations", lambda *_, **__: [synthetic_episode(3)])
    episodes, _ = open_source("ocbench:chamber", SourceOptions(video_fps=2.5))
    assert [(episode.clock_hz, episode.video_stride) for episode in episodes] == [(5.0, 2)]
    with pytest.raises(UserError, match=r"--video_fps=6: ocbench draws 5 frames per second; give at most that, or 0"):
        open_source("ocbench:chamber", SourceOptions(video_fps=6))


def test_an_episode_too_short_for_the_clock_is_dropped_counted_and_named(monkeypatch):
    from wallwm_jax.sources.simulator.ocbench_demos import Demonstrations, FamilyCount

    whole, brief = (
        synthetic_episode(seed, steps=steps, source="ocbench/chamber-cpu-lite-easy-task1-v0")
        for seed, steps in ((3, 64), (4, 12))
    )
    recovery = dataclasses.replace(
        brief,
        episode_id="chamber/0/0/recovery-0",
        source="ocbench-recovery/chamber-cpu-lite-easy-task1-v0",
        derived_from=whole.episode_id,
    )

    def demonstrations(*_, **__):
        counts = {"chamber": FamilyCount(attempted=3, kept=2), "switch": FamilyCount(attempted=1, kept=1)}
        return Demonstrations(iter([brief, whole, recovery]), counts)

    monkeypatch.setattr("wallwm_jax.sources.simulator.ocbench_demos.demonstrations", demonstrations)
    episodes, counts = open_source("ocbench:chamber,switch", SourceOptions(video_fps=0.3))
    assert [episode.episode_id for episode in episodes] == [whole.episode_id]
    chamber, switch = counts()["chamber"], counts()["switch"]
    assert (chamber.kept, chamber.dropped) == (1, 3) and (switch.kept, switch.dropped, switch.reasons) == (1, 0, ())
    told = "timestamp: lasts 1.200 s, not one control step at 0.6 Hz"
    assert chamber.reasons == (f"{brief.episode_id}: {told}", f"chamber/0/0/recovery-0: {told}")


# Labels


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_labels_of_any_recording_become_nested_gap_free_spans(data):
    hz = data.draw(st.sampled_from([5.0, 10.0, 30.0]))
    steps = data.draw(st.integers(1, 60))
    labels = {"task": [Label(0.0, "tidy up")]}
    for level in ("subtask", "action", "segment"):
        starts = data.draw(st.lists(st.floats(0, 2 * steps / hz), max_size=8, unique=True))
        labels[level] = [Label(start, f"{level} {n}") for n, start in enumerate(sorted(starts))]
    levels, repairs = spans(labels, steps, hz)
    finer = None
    for level, tiles in levels.items():
        assert [tile.start for tile in tiles] == [0, *(tile.end for tile in tiles[:-1])] and tiles[-1].end == steps
        for tile in tiles:
            if finer is None:
                assert tile.parent is None
            else:
                parent = levels[finer][tile.parent]
                assert parent.start <= tile.start and tile.end <= parent.end
        finer = level
    missing = {level for level in labels if labels[level]} - set(levels)
    assert all(any(repair.startswith(f"{level} labels left out") for repair in repairs) for level in missing)


def test_boundaries_of_two_levels_that_almost_agree_become_one():
    labels = {
        "task": [Label(0.0, "tidy up")],
        "subtask": [Label(0.0, "open the drawer"), Label(2.0, "close the drawer")],
        "action": [Label(0.0, "reach"), Label(1.0, "pull"), Label(2.1, "push")],
    }
    levels, repairs = spans(labels, 40, 10.0)
    assert [(s.start, s.end, s.caption, s.parent) for s in levels["action"]] == [
        (0, 10, "reach", 0),
        (10, 20, "pull", 0),
        (20, 40, "push", 1),
    ]
    assert repairs == ()
