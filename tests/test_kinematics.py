"""Sets that hold joint positions alone: poses follow from a model of the robot, and what does not fit it is named."""

import copy
import sys

import lerobot_files
import numpy as np
import pytest
from jointed_arm import JOINT_DESCRIPTION, MODEL, solve
from recorded_motion import recordings
from scipy.spatial.transform import Rotation

from wallwm_jax.console import UserError
from wallwm_jax.sources.clock import choose_clock
from wallwm_jax.sources.embodiment import load_embodiment
from wallwm_jax.sources.kinematics import Kinematics
from wallwm_jax.sources.lerobot.dataset import LeRobotSet
from wallwm_jax.sources.lint import lint
from wallwm_jax.sources.recorded import read_episodes

pytest.importorskip("mujoco")

PLACES = np.array([[0.4, 0.1, 0.2], [0.3, -0.2, 0.05], [0.6, 0.0, 0.4]])
ROLL = np.array([0.3, -0.5, 1.0])
ANGLES = solve(PLACES, ROLL)
TURNS = Rotation.from_euler("ZYX", np.column_stack([ANGLES[:, 0], ANGLES[:, 1] + ANGLES[:, 2], ROLL])).as_matrix()


def described(tmp_path, *changes):
    (tmp_path / "arm.xml").write_text(MODEL)
    text = JOINT_DESCRIPTION
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "arm.toml").write_text(text)
    return load_embodiment(str(tmp_path / "arm.toml"))


def columns(joints, commands):
    width = np.full((len(joints), 1), 0.04)
    return {"observation.state": np.hstack([joints, width]), "action": np.hstack([commands, width])}


def check_poses(poses, places=PLACES, turns=TURNS):
    assert np.abs(poses[:, 0, :3, 3] - places).max() < 1e-9
    assert np.abs(poses[:, 0, :3, :3] - turns).max() < 1e-9


def test_poses_of_state_and_command_are_where_the_model_has_its_tip(tmp_path):
    commands = np.degrees(ANGLES[[1, 2, 2]])
    motion = described(tmp_path).motion(columns(np.degrees(ANGLES), commands))
    check_poses(motion.poses)
    check_poses(motion.command_poses, PLACES[[1, 2, 2]], TURNS[[1, 2, 2]])
    assert motion.grippers[:, 0].tolist() == [0.5, 0.5, 0.5]


def test_each_joint_may_have_its_own_unit_sign_and_zero(tmp_path):
    unit, zero = np.array([np.pi / 180, -np.pi / 180, 1.0, 0.5]), np.array([90.0, -20.0, 0.0, 1.0])
    own = f'joint_unit = ["deg", {-np.pi / 180}, "rad", 0.5]\njoint_zero = [90, -20, 0, 1]'
    arm = described(tmp_path, ('joint_unit = "deg"', own))
    motion = arm.motion(columns(ANGLES / unit + zero, ANGLES / unit + zero))
    check_poses(motion.poses)
    check_poses(motion.command_poses)  # unit and zero of the state hold for the command


def test_shifts_are_added_to_the_measured_joints_and_the_next_state_needs_no_columns(tmp_path):
    following = [1, 2, 2]
    zero = ('joint_unit = "deg"', 'joint_unit = "deg"\njoint_zero = [10, 0, 0, 0]')
    shifted = described(tmp_path, zero, ('mode = "absolute"', 'mode = "delta"'))
    raw = np.degrees(ANGLES) + np.array([10, 0, 0, 0])
    motion = shifted.motion(columns(raw, np.degrees(ANGLES[following] - ANGLES)))
    check_poses(motion.command_poses, PLACES[following], TURNS[following])
    alone = described(tmp_path, ('mode = "absolute"\njoints = "action[0:4]"', 'mode = "next_state"'))
    motion = alone.motion(columns(np.degrees(ANGLES), np.zeros((3, 4))))
    check_poses(motion.command_poses, PLACES[following], TURNS[following])


def test_the_end_effector_may_be_a_body(tmp_path):
    arm = described(tmp_path, ('site = "tip"', 'body = "fore"'))
    place = arm.motion(columns(np.zeros((1, 4)), np.zeros((1, 4)))).poses[0, 0, :3, 3]
    assert np.allclose(place, [0.5, 0.0, 0.1])


URDF = """
<robot name="arm">
  <link name="base_link"/>
  <joint name="mount" type="fixed">
    <parent link="base_link"/><child link="pedestal"/><origin xyz="0 0.1 0.3" rpy="0 0 1.5707963267948966"/>
  </joint>
  <link name="pedestal"/>
  <joint name="turn" type="revolute">
    <parent link="pedestal"/><child link="arm"/><axis xyz="0 0 1"/><limit lower="-3" upper="3" effort="1" velocity="1"/>
  </joint>
  <link name="arm">
    <inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>
  </link>
  <joint name="flange" type="fixed"><parent link="arm"/><child link="tool0"/><origin xyz="0.5 0 0"/></joint>
  <link name="tool0"/>
</robot>
"""


@pytest.mark.parametrize(("base", "origin", "turned"), [("", [0, 0.1, 0.3], np.pi / 2), ("pedestal", [0, 0, 0], 0.0)])
def test_links_behind_fixed_joints_may_be_the_end_effector_and_the_base(tmp_path, base, origin, turned):
    (tmp_path / "arm.urdf").write_text(URDF)
    angles = np.array([0.0, 0.7])
    poses = Kinematics(str(tmp_path / "arm.urdf"), ("turn",), body="tool0", base=base).poses(angles[:, None])
    heading = angles + turned
    reach = 0.5 * np.column_stack([np.cos(heading), np.sin(heading), np.zeros(2)])
    assert np.abs(poses[:, :3, 3] - (origin + reach)).max() < 1e-9
    assert np.abs(poses[:, :3, :3] - Rotation.from_euler("z", heading[:, None]).as_matrix()).max() < 1e-9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"arm.xml"', '"other.xml"', r"there is no robot model '.*other.xml'"),
        ('"arm.xml"', '"arm.toml"', r"MuJoCo cannot read '.*arm.toml'"),
        ('"pan"', '"hip"', r"has no joint 'hip'; it has pan, shoulder, elbow, roll, loose"),
        ('"pan"', '"loose"', r"joint 'loose' of .* is no hinge and no slide"),
        ('site = "tip"', 'site = "nail"', r"has no site 'nail'; it has tip"),
        ('"elbow"', '"pan"', r"joints names 'pan' twice"),
        ('site = "tip"', 'site = "tip"\nbase = "floor"', r"has no body 'floor'; it has world, turntable"),
        ('mode = "absolute"', 'mode = "delta"\nframe = "tool"', r'frame = "tool" beside \[arms.kinematics\]'),
        ('site = "tip"', "", r"name the end effector by site or by body"),
        ('site = "tip"', 'tool = "tip"', r"\[arms.kinematics\]: known keys are model, joints, site, body, base"),
        ("state[0:4]", "state[0:3]", r"has 4 joints, not observation.state\[0:3\]"),
        ('"deg"', "[1, 2]", r"joint_unit has 2 numbers for 4 joints"),
        ('"deg"', '"m/s"', r"give rad, deg, a number, or a list"),
        ('joints = "observation.state[0:4]"', "", r"\[arms.state\]: lacks joints"),
        ('joints = "action[0:4]"', "", r"lacks joints; a set without commands has mode"),
        ('joints = "action[0:4]"', 'position = "action[0:3]"', r"position beside \[arms.kinematics\]"),
        ("[arms.kinematics]", "[arms.kinetics]", r"unknown 'kinetics'"),
    ],
)
def test_a_model_that_does_not_fit_is_explained(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        described(tmp_path, (old, new))


def test_joints_without_a_model_or_without_mujoco_say_what_is_needed(tmp_path, monkeypatch):
    start, end = (JOINT_DESCRIPTION.index(word) for word in ("[arms.kinematics]", "[arms.state]"))
    with pytest.raises(UserError, match=r"joints needs \[arms.kinematics\]"):
        described(tmp_path, (JOINT_DESCRIPTION[start:end], ""))
    monkeypatch.setitem(sys.modules, "mujoco", None)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"need MuJoCo .*pip install 'wallwm_jax\[sim\]'"):
        described(tmp_path / "bare")


# A whole set: the recordings of the other readers' tests, by an arm that tells its joints


@pytest.fixture(scope="module")
def in_joints(tmp_path_factory):
    """A set of four recordings in degrees, and the poses that they were made of."""
    raws = recordings(4, numbered=False)
    places = [raw.state[:, :3].copy() for raw in raws]
    for raw in raws:
        roll = 0.3 * np.sin(np.arange(len(raw.times)) / 5)
        raw.state = np.column_stack([np.degrees(solve(raw.state[:, :3], roll)), raw.state[:, 6]])
        raw.action = np.column_stack([np.degrees(solve(raw.action[:, :3], roll)), raw.action[:, 6]])
    folder = tmp_path_factory.mktemp("joints")
    return raws, places, lerobot_files.write_set(folder / "set", raws)


def test_a_set_of_joints_becomes_the_same_episodes(in_joints, tmp_path):
    _, places, path = in_joints
    arm = described(tmp_path)
    episodes = list(read_episodes(LeRobotSet(path), arm, choose_clock(arm, 0), size=16, workers=0))
    for episode, place in zip(episodes, places, strict=True):
        assert np.abs(episode.poses[:, 0, :3, 3] - place).max() < 1e-5  # the set is float32


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((), ()),
        (('"deg"', '"rad"'), ("unit", 'joint_unit = "deg"')),
        (('"shoulder", "elbow"', '"elbow", "shoulder"'), ("joint limits", "the order of the joints")),
        (('mode = "absolute"', 'mode = "delta"'), ("double delta", 'mode = "absolute"')),
    ],
)
def test_the_linter_reads_joints(in_joints, tmp_path, change, expected):
    findings = lint(LeRobotSet(in_joints[2]), described(tmp_path, *([change] if change else [])))
    if not expected:
        assert findings == []
    else:
        check, remedy = expected
        assert any(finding.check == check and remedy in finding.remedy for finding in findings), findings


def test_the_linter_finds_poses_read_as_shifts_of_joints_that_have_a_zero(in_joints, tmp_path):
    raws, _, path = in_joints
    turned = copy.deepcopy(raws)
    for raw in turned:
        raw.state[:, 1:3] += 90
        raw.action[:, 1:3] += 90
    zero = ('joint_unit = "deg"', 'joint_unit = "deg"\njoint_zero = [0, 90, 90, 0]')
    dataset = LeRobotSet(lerobot_files.write_set(tmp_path / "zero", turned, videos_of=path))
    assert lint(dataset, described(tmp_path, zero)) == []
    found = lint(dataset, described(tmp_path, zero, ('mode = "absolute"', 'mode = "delta"')))
    assert any(finding.check == "double delta" and 'mode = "absolute"' in finding.remedy for finding in found), found


def test_the_linter_finds_radians_read_as_degrees_and_shifts_read_as_joints(in_joints, tmp_path):
    raws, _, path = in_joints
    turned, shifts = copy.deepcopy(raws), copy.deepcopy(raws)
    for raw in turned:
        raw.state[:, :4], raw.action[:, :4] = np.radians(raw.state[:, :4]), np.radians(raw.action[:, :4])
    for raw in shifts:
        following = np.minimum(np.arange(len(raw.times)) + 1, len(raw.times) - 1)
        raw.action[:, :4] = raw.state[following, :4] - raw.state[:, :4]
    for name, wrong, check, remedy in (
        ("turned", turned, "unit", 'radians for degrees: joint_unit = "rad"'),
        ("shifts", shifts, "double delta", 'these are shifts: mode = "delta"'),
    ):
        found = lint(LeRobotSet(lerobot_files.write_set(tmp_path / name, wrong, videos_of=path)), described(tmp_path))
        assert any(finding.check == check and remedy in finding.remedy for finding in found), found
