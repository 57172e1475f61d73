"""Embodiment descriptions: what the columns of a recorded set mean, in a small TOML file.

    robot = "franka_panda"                       # the name in the store
    control_hz = 15                              # rows per second
    video_stride = 2                             # rows per stored frame, where --video_fps does not say otherwise
    task = "language_instruction"                # RLDS: the column of the instruction

    [cameras.front]                              # views of the store, in this order
    column = "observation.images.front"
    mount = "fixed"                              # or "wrist": moves with the arm
    flip = "none"                                # what brings pictures upright: horizontal, vertical, both
    fit = "crop"                                 # to the square frame: crop its middle, pad it, or stretch

    [[arms]]                                     # one table per arm
    [arms.state]                                 # measured, in the robot's base frame
    position = "observation.state[0:3]"          # a column, key[i] or key[i:j]; RLDS writes observation/state[0:3]
    position_unit = "m"                          # cm, mm, or metres per unit as a number
    rotation = "observation.state[3:6]"          # leave out where the arm does not turn
    rotation_as = "euler_xyz"                    # lower case: fixed axes, upper case: moving axes; or quat_xyzw,
                                                 # quat_wxyz, rotvec, matrix (row by row), columns6d
    rotation_unit = "rad"                        # deg, or radians per unit as a number
    gripper = "observation.state[6]"             # leave out where there is none
    gripper_open = 0.08                          # its value when open and when closed: this gives sign and range
    gripper_closed = 0.0
    [arms.action]                                # commanded at the same row; the keys above, and
    mode = "absolute"                            # poses; "delta" from the measured pose; "next_state" has no columns:
                                                 # the command is the pose measured one row later
    frame = "base"                               # axes of a delta: "base", or "tool"

A set that holds joint positions alone (ALOHA, SO-100) names a model of the robot in place of position and rotation; the
end effector's poses follow from it (needs MuJoCo, extra `sim`):

    [[arms]]
    [arms.kinematics]
    model = "so100.xml"                          # MJCF or URDF, its path from this file's folder
    joints = ["Rotation", "Pitch", "Elbow", "Wrist_Pitch", "Wrist_Roll"]    # of the model, in the columns' order
    site = "gripper"                             # the end effector: a site of the model, or body = "..."
    base = "base_link"                           # the body in whose frame poses are; default the model's world
    [arms.state]
    joints = "observation.state[0:5]"
    joint_unit = "deg"                           # or rad; radians per unit (slides: metres), for all or for each; a
                                                 # negative one turns a joint round
    joint_zero = [0, 90, 90, 0, 0]               # values in the data where the model's joints are at 0; default 0
    gripper = "observation.state[5]"             # as above
    [arms.action]
    joints = "action[0:5]"                       # unit and zero are the state's unless given; mode "absolute", "delta"
                                                 # from the measured joints, or "next_state" without joints

Descriptions of `wallwm_jax/sources/embodiments/` are known by their names, others by the paths of their files.
`python -m wallwm_jax.sources.lint` holds a description against the data.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from wallwm_jax.console import UserError
from wallwm_jax.events.actions import MAX_ARMS, rotation_from_columns
from wallwm_jax.sources.columns import BadRecording, Column
from wallwm_jax.sources.kinematics import Kinematics

FOLDER = Path(__file__).parent / "embodiments"
MODES = ("absolute", "delta", "next_state")
FLIPS: dict[str, tuple[int, ...]] = {"none": (), "horizontal": (1,), "vertical": (0,), "both": (0, 1)}

_UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "rad": 1.0, "deg": np.pi / 180}
_WIDTHS = {"quat_xyzw": 4, "quat_wxyz": 4, "rotvec": 3, "matrix": 9, "columns6d": 6}
_EULER = re.compile(r"euler_([xyz]{1,3}|[XYZ]{1,3})")
_CHOICES = {
    "mount": ("fixed", "wrist"),
    "flip": tuple(FLIPS),
    "fit": ("crop", "pad", "stretch"),
    "mode": MODES,
    "frame": ("base", "tool"),
}


@dataclass(frozen=True)
class Camera:
    """One view: the column of its pictures, how it is mounted, what brings it upright and into the square frame."""

    column: str
    mount: str = "fixed"
    flip: str = "none"
    fit: str = "crop"


@dataclass(frozen=True)
class PoseColumns:
    """Columns of one end-effector pose and its gripper; units are metres and radians per unit of the data.

    The pose is in `position` and `rotation`, or follows from `joints` through `kinematics`.
    """

    position: Column | None = None
    position_unit: float = 1.0
    rotation: Column | None = None
    rotation_as: str = "rotvec"
    rotation_unit: float = 1.0
    gripper: Column | None = None
    gripper_open: float = 0.0
    gripper_closed: float = 1.0
    joints: Column | None = None
    joint_unit: tuple[float, ...] = (1.0,)
    joint_zero: tuple[float, ...] = (0.0,)
    kinematics: Kinematics | None = None

    @property
    def place(self) -> Column | None:
        """The column that says where the end effector is, for messages."""
        return self.joints or self.position

    def positions(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """`[N, 3]` metres; of `joints`, through the model."""
        if self.kinematics is not None:
            return self.kinematics.poses(self.angles(columns))[:, :3, 3]
        assert self.position is not None
        return self.position.of(columns, 3) * self.position_unit

    def angles(self, columns: Mapping[str, np.ndarray], *, shifts: bool = False) -> np.ndarray:
        """`[N, J]` joint positions as the model has them, radians or metres; `shifts` have no zero."""
        assert self.joints is not None and self.kinematics is not None
        raw = self.joints.of(columns, len(self.kinematics.joints))
        return (raw - (0.0 if shifts else np.array(self.joint_zero))) * np.array(self.joint_unit)

    def rotations(self, columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """`[N, 3, 3]`; None where the description names no rotation."""
        return (
            None if self.rotation is None else as_matrices(columns, self.rotation, self.rotation_as, self.rotation_unit)
        )

    def closing(self, columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """`[N]` closing fraction, 0 open to 1 closed, clipped; None where the description names no gripper."""
        if self.gripper is None:
            return None
        raw = self.gripper.of(columns, 1)[:, 0]
        return np.clip((raw - self.gripper_open) / (self.gripper_closed - self.gripper_open), 0.0, 1.0)

    @property
    def keys(self) -> set[str]:
        """The columns that are read."""
        return {
            column.key for column in (self.position, self.rotation, self.gripper, self.joints) if column is not None
        }


@dataclass(frozen=True)
class ActionColumns(PoseColumns):
    """Columns of the command of a row, and what its numbers are relative to."""

    mode: str = "absolute"
    frame: str = "base"


@dataclass(frozen=True)
class Arm:
    """Measured pose and command of one arm."""

    state: PoseColumns
    action: ActionColumns


@dataclass(frozen=True)
class Motion:
    """What the arms did, row by row; the command of row k is where the arm shall be at row k + 1.

    Attributes:
      poses, command_poses: `[N, G, 4, 4]` base frame, metres.
      grippers, command_grippers: `[N, G]` closing fraction.
    """

    poses: np.ndarray
    grippers: np.ndarray
    command_poses: np.ndarray
    command_grippers: np.ndarray


@dataclass(frozen=True)
class Embodiment:
    """A checked description; see the text above for the keys of its file."""

    robot: str
    control_hz: float
    cameras: Mapping[str, Camera]
    arms: tuple[Arm, ...]
    video_stride: int = 2
    task: str = "language_instruction"
    path: str = field(default="", compare=False)

    @property
    def columns(self) -> set[str]:
        """Keys of all columns that hold numbers."""
        return set().union(*(arm.state.keys | arm.action.keys for arm in self.arms))

    def motion(self, columns: Mapping[str, np.ndarray]) -> Motion:
        """Poses, grippers and commands of one recording's rows.

        Args:
          columns: key → `[N, ...]`; at least `self.columns`.

        Raises:
          BadRecording: a column is missing, too narrow or not finite, or holds no rotations.
        """
        arms = [_arm_motion(arm, columns) for arm in self.arms]
        return Motion(*(np.stack(parts, axis=1) for parts in zip(*arms)))


def load_embodiment(name: str) -> Embodiment:
    """Reads a description by its name or path.

    Raises:
      UserError: there is no such description, or something in it is unknown, missing or impossible.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    if not name:
        raise UserError(
            f"--embodiment says what the columns mean: one of {', '.join(known)}, or the path of a TOML file"
        )
    path = known.get(name, Path(name).expanduser())
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"no embodiment {name!r} ({error}); there are {', '.join(known)}, or give a TOML file"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"embodiment {str(path)!r} is no TOML: {error}") from None
    try:
        return _embodiment(raw, str(path))
    except UserError as error:
        raise UserError(f"embodiment {str(path)!r}: {error}") from None


def as_matrices(columns: Mapping[str, np.ndarray], column: Column, kind: str, unit: float) -> np.ndarray:
    """`[N, 3, 3]` rotations of a column that holds them as `kind`; raises `BadRecording` where it does not."""
    values = column.of(columns, rotation_width(kind))
    if kind == "columns6d":
        return rotation_from_columns(values)
    if kind == "matrix":
        return rotation_from_columns(values.reshape(-1, 3, 3)[..., :2].swapaxes(-1, -2).reshape(-1, 6))
    if kind == "rotvec":
        return Rotation.from_rotvec(values * unit).as_matrix()
    if kind.startswith("euler_"):
        return Rotation.from_euler(kind.removeprefix("euler_"), values * unit).as_matrix()
    norms = np.linalg.norm(values, axis=1)
    if len(values) and (norms.min() < 0.5 or norms.max() > 2.0):
        row = int(np.argmax(np.abs(np.log(np.maximum(norms, 1e-9)))))
        raise BadRecording(str(column), f"is no quaternion at row {row}: its length is {norms[row]:.3g}")
    return Rotation.from_quat(values, scalar_first=kind == "quat_wxyz").as_matrix()


def rotation_width(kind: str) -> int:
    """Numbers per rotation of one kind; raises `UserError` for an unknown kind."""
    euler = _EULER.fullmatch(kind)
    if euler is None and kind not in _WIDTHS:
        raise UserError(f"unknown rotation_as {kind!r}; use {', '.join(_WIDTHS)}, or euler_ and axes such as euler_xyz")
    return len(euler[1]) if euler else _WIDTHS[kind]


def _arm_motion(arm: Arm, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """poses `[N, 4, 4]`, grippers `[N]`, commands likewise, of one arm."""
    if arm.state.kinematics is not None:
        measured = arm.state.angles(columns)
        poses = arm.state.kinematics.poses(measured)
        position, rotation = poses[:, :3, 3], poses[:, :3, :3]
    else:
        position, turned = arm.state.positions(columns), arm.state.rotations(columns)
        rotation = np.broadcast_to(np.eye(3), (len(position), 3, 3)) if turned is None else turned
    closing = arm.state.closing(columns)
    closing = np.zeros(len(position)) if closing is None else closing
    following = np.minimum(np.arange(len(position)) + 1, len(position) - 1)
    action = arm.action
    if action.mode == "next_state":
        position_command, rotation_command = position[following], rotation[following]
    elif action.kinematics is not None:
        delta = action.mode == "delta"
        poses = action.kinematics.poses(action.angles(columns, shifts=delta) + (measured if delta else 0.0))
        position_command, rotation_command = poses[:, :3, 3], poses[:, :3, :3]
    else:
        position_command, turn = action.positions(columns), action.rotations(columns)
        rotation_command = rotation if turn is None else turn
        if action.mode == "delta":
            in_tool = action.frame == "tool"
            shift = np.einsum("nij,nj->ni", rotation, position_command) if in_tool else position_command
            position_command = position + shift
            if turn is not None:
                rotation_command = rotation @ turn if in_tool else turn @ rotation
    command = action.closing(columns)
    return (
        _poses(position, rotation),
        closing,
        _poses(position_command, rotation_command),
        closing[following] if command is None else command,
    )


def _poses(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    poses = np.tile(np.eye(4), (len(position), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotation, position
    return poses


def _embodiment(raw: dict[str, Any], path: str) -> Embodiment:
    table = dict(raw)
    cameras = _list_of(table, "cameras", dict)
    arms = _list_of(table, "arms", list)
    if len(arms) > MAX_ARMS:
        raise UserError(f"{len(arms)} arms; at most {MAX_ARMS} fit into an action")
    described = _fill(
        Embodiment,
        table,
        "the file",
        cameras={view: _fill(Camera, entry, f"[cameras.{view}]") for view, entry in cameras.items()},
        arms=tuple(_arm(entry, f"arm {number}", Path(path).parent) for number, entry in enumerate(arms)),
        path=path,
    )
    if not described.control_hz > 0 or described.video_stride < 1:
        raise UserError(f"control_hz {described.control_hz} and video_stride {described.video_stride} must be positive")
    return described


def _list_of(table: dict[str, Any], key: str, kind: type) -> Any:
    entries = table.pop(key, None)
    members = entries.values() if isinstance(entries, dict) else entries
    if not isinstance(entries, kind) or not members or not all(isinstance(member, dict) for member in members):
        raise UserError(f"needs at least one {'[cameras.NAME]' if key == 'cameras' else '[[arms]]'} table")
    return entries


def _arm(raw: dict[str, Any], where: str, folder: Path) -> Arm:
    unknown = sorted(set(raw) - {"state", "action", "kinematics"})
    if unknown or not all(isinstance(raw.get(part), dict) for part in ("state", "action")):
        raise UserError(
            f"{where}: {f'unknown {unknown[0]!r}; ' if unknown else ''}needs [arms.state] and [arms.action]"
        )
    model = _kinematics(raw["kinematics"], f"{where}, [arms.kinematics]", folder) if "kinematics" in raw else None
    of_state = {key: raw["state"][key] for key in ("joint_unit", "joint_zero") if model and key in raw["state"]}
    state = _fill(PoseColumns, raw["state"], f"{where}, [arms.state]", kinematics=model)
    action = _fill(ActionColumns, {**of_state, **raw["action"]}, f"{where}, [arms.action]", kinematics=model)
    if state.place is None:
        wanted = "position, the columns of the end effector's place in metres (of joints alone: [arms.kinematics])"
        raise UserError(f"{where}, [arms.state]: lacks {'joints' if model else wanted}")
    if action.mode == "next_state" and action.place:
        name = "joints" if action.joints else "position"
        raise UserError(
            f"{where}, [arms.action]: mode next_state reads no {name}; leave it out, or choose another mode"
        )
    if action.mode != "next_state" and action.place is None:
        name = "joints" if model else "position"
        raise UserError(f'{where}, [arms.action]: lacks {name}; a set without commands has mode = "next_state"')
    return Arm(state, action)


def _kinematics(raw: Any, where: str, folder: Path) -> Kinematics:
    known = [entry.name for entry in fields(Kinematics)]
    if not isinstance(raw, dict) or set(raw) - set(known):
        raise UserError(f"{where}: known keys are {', '.join(known)}")
    joints = raw.get("joints")
    if not isinstance(joints, list) or not joints or not all(isinstance(name, str) for name in joints):
        raise UserError(f"{where}: joints is {joints!r}, expected a list of the model's joints")
    if len(set(joints)) < len(joints):
        raise UserError(f"{where}: joints names {max(joints, key=joints.count)!r} twice; each column has its own")
    texts = {key: raw.get(key, "") for key in ("model", "site", "body", "base")}
    if not all(isinstance(text, str) for text in texts.values()) or not texts["model"]:
        raise UserError(f"{where}: needs model, the path of an MJCF or URDF file")
    if bool(texts["site"]) == bool(texts["body"]):
        raise UserError(f"{where}: name the end effector by site or by body")
    texts["model"] = str((folder / Path(texts["model"]).expanduser()).absolute())
    model = Kinematics(joints=tuple(joints), **texts)
    model.check()
    return model


def _fill(kind: type, raw: dict[str, Any], where: str, **given: Any) -> Any:
    """An instance of a dataclass from a TOML table; unknown, missing and impossible keys are named."""
    known = {entry.name: entry for entry in fields(kind) if entry.name not in given}
    for key in raw:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
    lacking = [key for key, entry in known.items() if key not in raw and entry.default is MISSING]
    if lacking:
        raise UserError(f"{where}: lacks {', '.join(lacking)}")
    values = {key: _value(key, value, f"{where}: {key}") for key, value in raw.items()}
    filled = kind(**values, **given)
    if isinstance(filled, PoseColumns):
        _check_joints(filled, raw, where)
        if filled.rotation is not None:
            width = rotation_width(filled.rotation_as)
            column = filled.rotation
            if column.last is not None and column.last - column.first != width:
                raise UserError(f"{where}: rotation_as {filled.rotation_as!r} has {width} numbers, not {column}")
        if filled.gripper is not None and not {"gripper_open", "gripper_closed"} <= set(raw):
            raise UserError(f"{where}: gripper needs gripper_open and gripper_closed, its values in the data")
        if filled.gripper_open == filled.gripper_closed:
            raise UserError(f"{where}: gripper_open and gripper_closed are both {filled.gripper_open}")
    return filled


def _check_joints(pose: PoseColumns, raw: dict[str, Any], where: str) -> None:
    """Raises `UserError` where joints and poses are mixed, or their numbers differ."""
    if pose.kinematics is None:
        if given := [key for key in raw if key.startswith("joint")]:
            raise UserError(f"{where}: {given[0]} needs [arms.kinematics], a model of the robot")
        return
    if given := [key for key in raw if key.startswith(("position", "rotation"))]:
        raise UserError(f"{where}: {given[0]} beside [arms.kinematics]; poses follow from joints, or are in columns")
    if raw.get("frame") == "tool":
        raise UserError(f'{where}: frame = "tool" beside [arms.kinematics]; shifts of joints have no axes')
    names, column = pose.kinematics.joints, pose.joints
    if column is not None and column.last is not None and column.last - column.first != len(names):
        raise UserError(f"{where}: [arms.kinematics] has {len(names)} joints, not {column}")
    for key in ("joint_unit", "joint_zero"):
        if len(getattr(pose, key)) not in (1, len(names)):
            raise UserError(f"{where}: {key} has {len(getattr(pose, key))} numbers for {len(names)} joints")


def _value(key: str, value: Any, where: str) -> Any:
    """One TOML value as its dataclass wants it."""
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise UserError(f"{where} is {value!r}; choose of {', '.join(_CHOICES[key])}")
        return value
    if key in ("joint_unit", "joint_zero"):
        each = [
            _UNITS.get(one) if isinstance(one, str) and key == "joint_unit" else one
            for one in (value if isinstance(value, list) else [value])
        ]
        if not each or not all(type(one) in (int, float) for one in each) or (key == "joint_unit" and 0 in each):
            raise UserError(f"{where} is {value!r}; give rad, deg, a number, or a list with one for each joint")
        return tuple(each)
    if key in ("position", "rotation", "gripper", "joints"):
        if not isinstance(value, str):
            raise UserError(f"{where} is {value!r}, not the name of a column")
        return Column.parse(value)
    if key in ("position_unit", "rotation_unit") and isinstance(value, str):
        units = ("m", "cm", "mm") if key == "position_unit" else ("rad", "deg")
        if value not in units:
            raise UserError(f"{where} is {value!r}; choose of {', '.join(units)}, or give a number")
        return _UNITS[value]
    wanted = (
        str if key in ("robot", "task", "column", "rotation_as") else int if key == "video_stride" else (int, float)
    )
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise UserError(f"{where} is {value!r}, expected {'text' if wanted is str else 'a number'}")
    return value
