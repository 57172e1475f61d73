"""The linter finds the field's classic faults where they are planted, and nothing in a good set."""

import copy
import subprocess
import sys
from pathlib import Path

import lerobot_files
import numpy as np
import pytest
from recorded_motion import DESCRIPTION, FPS, FRONT, WRIST, recordings
from scipy.spatial.transform import Rotation

from wallwm_jax.sources.embodiment import load_embodiment
from wallwm_jax.sources.lerobot.dataset import LeRobotSet
from wallwm_jax.sources.lint import lint

EPISODES = 4
VIEWS = (FRONT, WRIST)
GOOD = recordings(EPISODES, numbered=False)


def as_shifts(raw, rows=1, frame="base"):
    """Replaces commanded positions by shifts to the pose `rows` rows later."""
    position = raw.state[:, :3]
    shift = position[np.minimum(np.arange(len(position)) + rows, len(position) - 1)] - position
    if frame == "tool":
        shift = np.einsum("nji,nj->ni", Rotation.from_euler("xyz", raw.state[:, 3:6]).as_matrix(), shift)
    raw.action[:, :3] = shift
    raw.action[:, 3:6] = 0.0
    turn = Rotation.from_euler("xyz", raw.state[:, 3:6])
    raw.action[:-1, 3:6] = (turn[1:] * turn[:-1].inv()).as_euler("xyz")


def change(attribute, update):
    def plant(raw):
        values = getattr(raw, attribute)
        update(values)

    return plant


def scale(values, columns, factor):
    values[:, columns] *= factor


def both(*plants):
    def plant(raw):
        for each in plants:
            each(raw)

    return plant


def mirror(view, axes):
    def plant(raw):
        raw.pictures[view] = np.flip(raw.pictures[view], axes)

    return plant


def swap(raw):
    raw.pictures[FRONT], raw.pictures[WRIST] = raw.pictures[WRIST], raw.pictures[FRONT]


def hold_state(raw):
    raw.state[1::2] = raw.state[: len(raw.state) // 2 * 2 : 2][: len(raw.state[1::2])]


def wrap(turn):
    if len(turn) == 41:
        turn[20] += 2 * np.pi


def spike(raw):
    raw.state[:, 2] = 0.2
    if len(raw.times) == 41:
        raw.state[5, 2] = 0.9  # one row of the set


def outlier(attribute, column, value, still=0.0):
    """A dimension that stays where it is, but for one row of the set."""

    def plant(raw):
        values = getattr(raw, attribute)
        values[:, column] = still + 1e-6 * np.sin(np.arange(len(values)))
        if len(values) == 41:
            values[5, column] = value

    return plant


DELTA = ('mode = "absolute"', 'mode = "delta"')
TURN_SCALE = slice(3, 6)

# name: (what is done to each recording, what is changed in the description, check, words of evidence or remedy)
FAULTS = {
    "poses read as shifts": (lambda raw: None, [DELTA], "double delta", 'mode = "absolute"'),
    "shifts read as poses": (as_shifts, [], "double delta", 'mode = "delta", frame = "base"'),
    "tool axes": (lambda raw: as_shifts(raw, frame="tool"), [DELTA], "frame", 'frame = "tool"'),
    "shifts of three rows": (lambda raw: as_shifts(raw, rows=3), [DELTA], "stride", "motion of the next 3 rows"),
    "rows left out": (
        both(as_shifts, change("action", lambda action: scale(action, slice(0, 3), 0.25))),
        [DELTA],
        "stride",
        "the motion is 4 times",
    ),
    "degrees": (
        change("state", lambda state: scale(state, TURN_SCALE, 180 / np.pi)),
        [],
        "unit",
        'rotation_unit = "deg"',
    ),
    "degrees per step": (
        both(as_shifts, change("action", lambda action: scale(action, TURN_SCALE, 180 / np.pi))),
        [DELTA],
        "unit",
        'rotation_unit = "deg"',
    ),
    "radians": (
        lambda raw: None,
        [('rotation_as = "euler_xyz"', 'rotation_as = "euler_xyz"\nrotation_unit = "deg"')],
        "unit",
        '"rad"',
    ),
    "millimetres": (change("state", lambda state: scale(state, slice(0, 3), 1000)), [], "unit", '"mm"'),
    "tiny range": (spike, [], "range", "scaled by quantiles it would be"),
    "tiny range of shifts": (both(as_shifts, outlier("action", 2, 0.05)), [DELTA], "range", "the extreme is 0.05 m"),
    "no shifts along an axis": (
        both(as_shifts, change("action", lambda action: scale(action, slice(2, 3), 0.0))),
        [DELTA],
        "range",
        "span 0 m",
    ),
    "tiny range of turns": (both(as_shifts, outlier("action", 4, 0.3)), [DELTA], "range", "the extreme is 0.3 rad"),
    "differences of angles that wrap": (
        both(as_shifts, change("action", lambda action: wrap(action[:, 5]))),
        [DELTA],
        "range",
        "that wrap at half a turn",
    ),
    "tiny range of measured rotations": (
        both(outlier("state", 3, 0.6), outlier("state", 4, 0.0), outlier("state", 5, 0.0)),
        [],
        "range",
        "rad from their middle",
    ),
    "tiny range of commanded rotations": (
        both(outlier("action", 3, 0.6), outlier("action", 4, 0.0), outlier("action", 5, 0.0)),
        [],
        "range",
        "rad from their middle",
    ),
    "another Euler order": (
        lambda raw: None,
        [
            (
                'rotation = "action[3:6]"\nrotation_as = "euler_xyz"',
                'rotation = "action[3:6]"\nrotation_as = "euler_zyx"',
            )
        ],
        "rotation",
        'rotation_as = "euler_xyz"',
    ),
    "gripper commands reversed": (
        change("action", lambda action: np.subtract(0.08, action[:, 6], out=action[:, 6])),
        [],
        "gripper sign",
        "the measured gripper opens",
    ),
    "gripper reversed": (
        lambda raw: None,
        [("gripper_open = 0.08\ngripper_closed = 0.0", "gripper_open = 0.0\ngripper_closed = 0.08")],
        "gripper sign",
        "4 of 4 episodes begin with a closed gripper",
    ),
    "gripper range": (lambda raw: None, [("gripper_open = 0.08", "gripper_open = 1.0")], "gripper range", "0..0.08"),
    "cameras exchanged": (swap, [], "camera order", "exchange their columns"),
    "mirrored": (mirror(FRONT, 2), [], "camera flip", 'flip = "horizontal"'),
    "upside down": (mirror(FRONT, 1), [], "camera flip", 'flip = "vertical"'),
    "turned round": (mirror(FRONT, (1, 2)), [], "camera flip", 'flip = "both"'),
    "one stream twice": (
        lambda raw: raw.pictures.update({WRIST: raw.pictures[FRONT]}),
        [],
        "camera",
        "the same pictures",
    ),
    "frozen camera": (
        lambda raw: raw.pictures.update({FRONT: np.repeat(raw.pictures[FRONT][:1], len(raw.times), 0)}),
        [],
        "camera",
        "do not change in 4 of 4",
    ),
    "repeated rows": (hold_state, [], "stride", "repeat the pose of the row before"),
    "described at another rate": (lambda raw: None, [("control_hz = 10", "control_hz = 20")], "fps", "control_hz 20"),
}


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    return lerobot_files.write_set(tmp_path_factory.mktemp("lint") / "good", GOOD)


def described(tmp_path: Path, changes) -> Path:
    text = DESCRIPTION
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "arm.toml"
    path.write_text(text)
    return path


def test_nothing_is_found_in_a_good_set(good_set, tmp_path):
    assert [str(finding) for finding in lint(LeRobotSet(good_set), load_embodiment(str(described(tmp_path, []))))] == []


@pytest.mark.parametrize("frame", ["base", "tool"])
def test_nothing_is_found_in_a_good_set_of_shifts(good_set, tmp_path, frame):
    raws = copy.deepcopy(GOOD)
    for raw in raws:
        as_shifts(raw, frame=frame)
        if frame == "tool":
            raw.action[:, 3:6] = 0.0
            turn = Rotation.from_euler("xyz", raw.state[:, 3:6])
            raw.action[:-1, 3:6] = (turn[:-1].inv() * turn[1:]).as_euler("xyz")
    path = lerobot_files.write_set(tmp_path / "set", raws, videos_of=good_set)
    changes = [DELTA, ('position = "action[0:3]"', f'frame = "{frame}"\nposition = "action[0:3]"')]
    findings = lint(LeRobotSet(path), load_embodiment(str(described(tmp_path, changes))))
    assert [str(finding) for finding in findings] == []


def test_a_hand_that_always_points_down_is_no_finding(good_set, tmp_path):
    raws = copy.deepcopy(GOOD)
    for raw in raws:
        raw.state[:, 3:6] = raw.action[:, 3:6] = (np.pi, 0.0, 0.0)
    path = lerobot_files.write_set(tmp_path / "set", raws, videos_of=good_set)
    findings = lint(LeRobotSet(path), load_embodiment(str(described(tmp_path, []))))
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_with_evidence_and_remedy(good_set, tmp_path, fault):
    plant, changes, check, words = FAULTS[fault]
    raws = copy.deepcopy(GOOD)
    for raw in raws:
        plant(raw)
    seen = all(
        np.array_equal(raw.pictures[view], good.pictures[view]) for raw, good in zip(raws, GOOD) for view in VIEWS
    )
    path = lerobot_files.write_set(tmp_path / "set", raws, videos_of=good_set if seen else None)
    findings = lint(LeRobotSet(path), load_embodiment(str(described(tmp_path, changes))))
    found = [finding for finding in findings if finding.check == check and words in finding.evidence + finding.remedy]
    assert found, "\n".join(map(str, findings))


def test_episodes_that_were_recorded_with_a_turned_camera_are_named(tmp_path):
    raws = recordings(5, numbered=False)
    mirror(FRONT, (1, 2))(raws[3])
    path = lerobot_files.write_set(tmp_path / "set", raws)
    findings = lint(LeRobotSet(path), load_embodiment(str(described(tmp_path, []))))
    assert any(f.check == "camera flip" and f.where == "front, episodes 3" for f in findings), findings


def test_rates_of_rows_timestamps_and_video_are_compared(tmp_path):
    path = lerobot_files.write_set(tmp_path / "set", recordings(2), fps=2 * FPS)
    (finding, *_) = lint(LeRobotSet(path), load_embodiment(str(described(tmp_path, []))))
    assert (finding.check, finding.where) == ("fps", str(path))
    assert finding.evidence.startswith("control_hz 10, fps of the set 20, timestamps 10, video of front 20")


def test_damaged_episodes_are_findings_too(tmp_path):
    raws = recordings(3)
    raws[1].state[4, 2] = np.nan
    path = lerobot_files.write_set(tmp_path / "set", raws)
    (finding,) = lint(LeRobotSet(path), load_embodiment(str(described(tmp_path, []))))
    assert (finding.check, finding.where) == ("damage", "episode 1") and "is nan at row 4" in finding.evidence


def test_the_command_prints_findings_and_says_so_by_its_exit_code(good_set, tmp_path):
    command = [sys.executable, "-m", "wallwm_jax.sources.lint", f"--source=lerobot:{good_set}"]
    command.append(f"--embodiment={described(tmp_path, [DELTA])}")
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and 'remedy:   these are poses already: mode = "absolute"' in run.stdout
