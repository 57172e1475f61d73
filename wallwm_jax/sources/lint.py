r"""Holds an embodiment description against a recorded set, and names what does not fit, with evidence and remedy.

    python -m wallwm_jax.sources.lint --source=lerobot:sets/kitchen --embodiment=arm.toml
    python -m wallwm_jax.sources.lint --source=rlds:oxe/bridge/1.0.0 --embodiment=bridge --episodes=64

Reads the rows of some episodes, spread over the set, and a few pictures of each camera. It finds rates and strides that
disagree, wrong units (degrees for radians, millimetres for metres), joints beyond their model's limits, dimensions of
positions, shifts and rotations that hardly move but for a few rows, poses for shifts and shifts for poses, shifts in
the axes of the other frame, rotations of another kind, a gripper of wrong sign or range, cameras that are swapped,
flipped or frozen, and damaged episodes. Exit code 1 where it finds something, else 0.

Thresholds are meant for arms on tables; a finding is a reason to look, and its evidence says at what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from scipy.spatial.transform import Rotation

from wallwm_jax.console import progress, run_command
from wallwm_jax.sources.clock import RATE_TOLERANCE, check_times, row_rate
from wallwm_jax.sources.columns import BadRecording, Column
from wallwm_jax.sources.embodiment import (
    ActionColumns,
    Arm,
    Embodiment,
    PoseColumns,
    as_matrices,
    load_embodiment,
    rotation_width,
)
from wallwm_jax.sources.findings import Finding, Sample
from wallwm_jax.sources.labels import spans
from wallwm_jax.sources.lint_pictures import picture_findings
from wallwm_jax.sources.recorded import RecordedSet

TINY_RANGE = 1e-3  # metres, or share of the gripper's way, between the 1 % and 99 % quantiles
_OUTLYING = 10.0  # half ranges from 1 % to 99 % that a shift or turn may be from their middle
_LEAST = {"m": 1e-4, "rad": 1e-3}  # less is no outlier
_REACH_M = 3.0  # no arm on a table moves further
_BEYOND = 0.2  # radians or metres that a joint may be outside the model's limits: they are never quite the arm's
_ALIGNED = 0.7  # cosine from which two motions go the same way
_RIVALS = ("euler_xyz", "euler_XYZ", "euler_zyx", "euler_ZYX", "rotvec", "quat_xyzw", "quat_wxyz")


def lint(dataset: RecordedSet, embodiment: Embodiment, *, episodes: int = 32) -> list[Finding]:
    """Everything that does not fit, in up to `episodes` episodes spread over the set.

    Raises:
      UserError: the set lacks columns or pictures that the description names.
    """
    dataset.check(embodiment)
    sample, findings = _read(dataset, embodiment, episodes)
    if sample.recordings:
        findings += _rates(sample)
        for number in range(len(embodiment.arms)):
            findings += _arm_findings(sample, number)
        findings += picture_findings(sample)
    return findings


def _read(dataset: RecordedSet, embodiment: Embodiment, episodes: int) -> tuple[Sample, list[Finding]]:
    sample, findings = Sample(dataset, embodiment), []
    chosen = np.unique(np.linspace(0, max(len(dataset) - 1, 0), min(episodes, len(dataset))).astype(int)).tolist()
    for number in progress(chosen, total=len(chosen), unit="episode", label="rows"):
        try:
            recording = dataset.recording(number, embodiment)
            motion = embodiment.motion(recording.columns)
            check_times(recording.times)
            spans(recording.labels, len(recording.times) - 1, row_rate(recording.times))
        except BadRecording as error:
            findings.append(Finding("damage", f"episode {number}", str(error), "repair it; a build leaves it out"))
            continue
        sample.numbers.append(number)
        sample.recordings.append(recording)
        sample.motions.append(motion)
    return sample, findings


def _rates(sample: Sample) -> Iterator[Finding]:
    """Rows per second by the description, the set, the timestamps and the videos; and rows that only repeat."""
    dataset, embodiment = sample.dataset, sample.embodiment
    told = {"control_hz": float(embodiment.control_hz)}
    if dataset.fps:
        told["fps of the set"] = dataset.fps
        told["timestamps"] = float(np.median([row_rate(recording.times) for recording in sample.recordings]))
    for view, camera in embodiment.cameras.items():
        rate = dataset.picture_rate(sample.numbers[0], camera.column)
        if rate:
            told[f"video of {view}"] = rate
    if max(told.values()) > min(told.values()) * (1 + RATE_TOLERANCE):
        yield Finding(
            "fps",
            dataset.path,
            ", ".join(f"{name} {rate:.4g}" for name, rate in told.items()) + " per second",
            "find out which is true (how long does a known motion take?), and correct the others: control_hz in the "
            "description, fps in meta/info.json, or write the set again",
        )
    moved = [np.abs(np.diff(motion.poses, axis=0)).max((1, 2, 3)) > 0 for motion in sample.motions]
    alone = sum(int((~step[1:-1] & step[:-2] & step[2:]).sum()) for step in moved)
    total = sum(map(len, moved))
    if alone > 0.2 * total:
        yield Finding(
            "stride",
            "measured poses",
            f"{alone} of {total} rows repeat the pose of the row before, while those around them move",
            "the state was recorded at a lower rate than the rows: write the set at that rate, and set control_hz",
        )


def _arm_findings(sample: Sample, number: int) -> Iterator[Finding]:
    arm = sample.embodiment.arms[number]
    yield from _ranges(sample, arm.state)
    if arm.action.mode == "absolute":
        yield from _ranges(sample, arm.action)
    if arm.action.mode == "delta":
        yield from _shift_ranges(sample, arm.action)
    yield from _turn_ranges(sample, number)
    yield from _units_of_turns(sample, arm)
    if arm.action.place is not None:
        yield from _meaning(sample, number)
    yield from _rotation_kind(sample, arm)
    yield from _gripper(sample, number)


def _ranges(sample: Sample, pose: PoseColumns) -> Iterator[Finding]:
    where = str(pose.place)
    positions = np.concatenate([pose.positions(recording.columns) for recording in sample.recordings])
    low, high = np.quantile(positions, (0.01, 0.99), axis=0)
    spans = ", ".join(f"{axis} {a:.4g}..{b:.4g}" for axis, a, b in zip("xyz", low, high))
    if (high - low).max() > _REACH_M:
        yield Finding(
            "unit",
            where,
            f"1 % to 99 % of positions are {spans} m: {(high - low).max():.3g} m wide",
            'no arm reaches that far; position_unit is likely "mm" or "cm"',
        )
    elif (high - low).max() < 5 * TINY_RANGE:
        yield Finding(
            "unit",
            where,
            f"1 % to 99 % of positions are {spans} m: the arm hardly moves",
            f"{'joint' if pose.joints else 'position'}_unit is too small, or these are other columns (shifts?)",
        )
    else:
        yield from _narrow(where, "xyz", "m", positions, high - low < TINY_RANGE)


def _shift_ranges(sample: Sample, action: ActionColumns) -> Iterator[Finding]:
    """Shifts of which one dimension is next to nothing but for a few rows: scaled by quantiles these are huge."""
    if action.joints is not None:
        assert action.kinematics is not None
        names, unit = action.kinematics.joints, "rad"
        parts = [action.angles(recording.columns, shifts=True) for recording in sample.recordings]
    else:
        names, unit = ("x", "y", "z"), "m"
        parts = [action.positions(recording.columns) for recording in sample.recordings]
    values = np.concatenate(parts)
    narrow = _outlying(values, unit)
    if action.joints is None:  # a joint may stand still
        span = np.ptp(np.quantile(values, (0.01, 0.99), axis=0), axis=0)
        narrow |= span < TINY_RANGE * span.max()
    yield from _narrow(str(action.place), names, unit, values, narrow)


def _turn_ranges(sample: Sample, number: int) -> Iterator[Finding]:
    """Rotations likewise; a hand that never turns about an axis is none, many point down for good."""
    arm = sample.embodiment.arms[number]
    turns: list[tuple[str, np.ndarray]] = []
    if arm.state.rotation or arm.state.joints:
        turns.append(("state", np.concatenate([motion.poses[:, number, :3, :3] for motion in sample.motions])))
    if arm.action.mode == "absolute" and (arm.action.rotation or arm.action.joints):
        turns.append(("action", np.concatenate([motion.command_poses[:, number, :3, :3] for motion in sample.motions])))
    for name, matrices in turns:
        rotations = Rotation.from_matrix(matrices)
        values = (rotations.mean().inv() * rotations).as_rotvec()
        where = f"rotation of the {name}, axes of its mean"
        yield from _narrow(where, "xyz", "rad", values, _outlying(values, "rad"))
    if arm.action.mode == "delta" and arm.action.rotation is not None:
        kind, unit = arm.action.rotation_as, arm.action.rotation_unit
        if rotation_width(kind) == 3:  # as they are: a difference of angles that wraps is a whole turn
            parts = [unit * arm.action.rotation.of(recording.columns, 3) for recording in sample.recordings]
        else:
            turned = [as_matrices(r.columns, arm.action.rotation, kind, unit) for r in sample.recordings]
            parts = [Rotation.from_matrix(part).as_rotvec() for part in turned]
        values = np.concatenate(parts)
        yield from _narrow(str(arm.action.rotation), "012", "rad", values, _outlying(values, "rad"))


def _outlying(values: np.ndarray, unit: str) -> np.ndarray:
    """`[D]` whether the extreme of each dimension is far outside its range from 1 % to 99 %."""
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    extreme = np.abs(values - (low + high) / 2).max(axis=0)
    return (extreme > _LEAST[unit]) & (extreme > _OUTLYING * (high - low) / 2)


def _narrow(where: str, names: Sequence[str], unit: str, values: np.ndarray, narrow: np.ndarray) -> Iterator[Finding]:
    for dimension in np.flatnonzero(narrow).tolist():
        column = values[:, dimension]
        low, high = np.quantile(column, (0.01, 0.99))
        extreme = float(np.abs(column - (low + high) / 2).max())
        remedy = "a dead or almost dead column: name the right one, or take the outliers out of the set"
        if unit == "rad" and abs(extreme - 2 * np.pi) < 0.5:
            remedy = "differences of angles that wrap at half a turn: take them back into -pi..pi when they are made"
        yield Finding(
            "range",
            f"{where}, {names[dimension]}",
            f"1 % to 99 % span {high - low:.2g} {unit}, the extreme is {extreme:.3g} {unit} from their middle: "
            f"scaled by quantiles it would be {2 * extreme / max(high - low, 1e-9):.3g}",
            remedy,
        )


def _units_of_turns(sample: Sample, arm: Arm) -> Iterator[Finding]:
    for name, pose in (("state", arm.state), ("action", arm.action)):
        shifts = name == "action" and arm.action.mode == "delta"
        if pose.joints is not None:
            yield from _units_of_joints(sample, pose, shifts)
        if pose.rotation is None:
            continue
        width = rotation_width(pose.rotation_as)
        raw = np.concatenate([pose.rotation.of(recording.columns, width) for recording in sample.recordings])
        if width == 4:
            norms = np.linalg.norm(raw, axis=1)
            if np.abs(norms - 1).max() > 0.02:
                yield Finding(
                    "rotation",
                    str(pose.rotation),
                    f"lengths {norms.min():.3g}..{norms.max():.3g}, but quaternions have length 1",
                    "these are other columns, or the set was averaged or scaled; correct rotation or rotation_as",
                )
        if pose.rotation_as == "rotvec" or pose.rotation_as.startswith("euler_"):
            yield from _unit_of_angles("rotation_unit", str(pose.rotation), raw, pose.rotation_unit, shifts)


def _units_of_joints(sample: Sample, pose: PoseColumns, shifts: bool) -> Iterator[Finding]:
    assert pose.joints is not None and pose.kinematics is not None
    names, limits = pose.kinematics.joints, pose.kinematics.limits()
    raw = np.concatenate([pose.joints.of(recording.columns, len(names)) for recording in sample.recordings])
    units = set(np.abs(pose.joint_unit))
    found = []
    if len(units) == 1:  # of slides and hinges together nothing is said
        found = list(_unit_of_angles("joint_unit", str(pose.joints), raw, units.pop(), shifts))
    yield from found
    if found or shifts:
        return
    angles = np.concatenate([pose.angles(recording.columns) for recording in sample.recordings])
    low, high = np.quantile(angles, (0.01, 0.99), axis=0)
    for number, name in enumerate(names):
        least, most = limits[number]
        if low[number] < least - _BEYOND or high[number] > most + _BEYOND:
            yield Finding(
                "joint limits",
                f"{pose.joints}, {name}",
                f"1 % to 99 % are {low[number]:.3g}..{high[number]:.3g}, the model ends at {least:.3g}..{most:.3g} rad",
                "the order of the joints, joint_zero or the sign of joint_unit is not the model's",
            )


def _unit_of_angles(key: str, where: str, raw: np.ndarray, unit: float, shifts: bool) -> Iterator[Finding]:
    """Degrees for radians and the reverse, in raw angles `[N, ...]` read as `unit` radians each."""
    largest = float(np.quantile(np.abs(raw), 0.99))
    limit = 0.7 if shifts else 2 * np.pi + 0.1  # a turn in one step, or a whole turn
    said = "per row" if shifts else "at most"
    if largest * unit > limit:
        yield Finding(
            "unit",
            where,
            f"99 % of its numbers are up to {largest:.3g}, read as {largest * unit:.3g} rad {said}; "
            f"as degrees that would be {largest * np.pi / 180:.3g} rad",
            f'degrees for radians: {key} = "deg"' if unit == 1.0 else f"{key} is too large",
        )
    elif np.isclose(unit, np.pi / 180) and not shifts and 0.1 < largest <= np.pi + 0.1:
        yield Finding(
            "unit",
            where,
            f"99 % of its numbers are up to {largest:.3g}: read as degrees the arm hardly turns",
            f'radians for degrees: {key} = "rad"',
        )


def _meaning(sample: Sample, number: int) -> Iterator[Finding]:
    """Are commands poses or shifts, in which axes, of how many rows? Commands of joints likewise."""
    arm = sample.embodiment.arms[number]
    where, declared = str(arm.action.place), arm.action.mode
    unit = "rad" if arm.action.joints else "m"
    if arm.action.joints:
        shifts = declared == "delta"
        given = [arm.action.angles(recording.columns, shifts=shifts)[:-1] for recording in sample.recordings]
        posed = [arm.action.angles(recording.columns)[:-1] for recording in sample.recordings]  # less the joints' zero
        place = [arm.state.angles(recording.columns) for recording in sample.recordings]
        turned = given
    else:
        given = posed = [arm.action.positions(recording.columns)[:-1] for recording in sample.recordings]
        place = [motion.poses[:, number, :3, 3] for motion in sample.motions]
        turned = [
            np.einsum("nij,nj->ni", motion.poses[:-1, number, :3, :3], shift)
            for motion, shift in zip(sample.motions, given)
        ]
    steps = np.concatenate([np.diff(positions, axis=0) for positions in place])
    length = np.linalg.norm(steps, axis=1)
    moving = length > 0.2 * np.quantile(length, 0.9)
    if moving.sum() < 8 or not length.max() > 0:
        return
    base, tool, here = np.concatenate(given), np.concatenate(turned), np.concatenate([p[:-1] for p in place])
    as_pose = _median(np.concatenate(posed) - here - steps, moving)
    as_shift = {"base": _median(base - steps, moving), "tool": _median(tool - steps, moving)}
    cosine = {"base": _cosine(base, steps, moving), "tool": _cosine(tool, steps, moving)}
    best = max(cosine, key=lambda frame: cosine[frame])
    size = float(np.median(length[moving]))
    if declared == "absolute":
        if cosine[best] > _ALIGNED and as_pose > max(5 * size, 0.05):
            yield Finding(
                "double delta",
                where,
                f"read as poses, commands are {as_pose:.3g} {unit} from the pose a row later; read as shifts they "
                f"point along the motion (cosine {cosine[best]:.2f})",
                f'these are shifts: mode = "delta", frame = "{best}" (a further step would make shifts of shifts)',
            )
        return
    if as_pose < 0.3 * as_shift[arm.action.frame]:
        yield Finding(
            "double delta",
            where,
            f"read as poses, commands are {as_pose:.3g} {unit} from the pose a row later; added to the pose they are "
            f"{as_shift[arm.action.frame]:.3g} {unit} from it",
            'these are poses already: mode = "absolute"',
        )
        return
    if best != arm.action.frame and cosine[best] > max(_ALIGNED, cosine[arm.action.frame] + 0.2):
        yield Finding(
            "frame",
            where,
            f"shifts point along the motion in {best} axes (cosine {cosine[best]:.2f}), not in {arm.action.frame} axes "
            f"({cosine[arm.action.frame]:.2f})",
            f'frame = "{best}"',
        )
        return
    yield from _scale(where, unit, given if arm.action.frame == "base" else turned, place, cosine[best])


def _scale(
    where: str, unit: str, shifts: Sequence[np.ndarray], place: Sequence[np.ndarray], cosine: float
) -> Iterator[Finding]:
    """Is a commanded shift as long as the motion that follows it?"""
    residual = {}
    for rows in range(1, 9):
        pairs = [(s[: len(p) - rows], p[rows:] - p[:-rows]) for s, p in zip(shifts, place) if len(p) > rows]
        if not pairs:
            break
        asked, done = (np.concatenate(part) for part in zip(*pairs))
        residual[rows] = float(np.linalg.norm(asked - done, axis=1).mean())
        if rows == 1:
            ratio = float((asked * done).sum() / max((asked * asked).sum(), 1e-12))
    best = min(residual, key=lambda rows: residual[rows])
    if cosine < _ALIGNED or 0.5 < ratio < 1.7:
        return
    if best > 1 and residual[best] < 0.5 * residual[1]:
        yield Finding(
            "stride",
            where,
            f"shifts are {1 / ratio:.2f} times the motion of the next row, and fit the motion of the next {best} rows "
            f"(mean error {residual[best]:.2g} {unit} against {residual[1]:.2g} {unit})",
            f"they were computed at 1/{best} of the rows' rate: keep every {best}th row and divide control_hz, or "
            "compute them again",
        )
    else:
        remedy = f"{'position_unit' if unit == 'm' else 'joint_unit'} is off by about {ratio:.3g}"
        if 1.7 <= ratio < 16.5:
            remedy += (
                f"; or {round(ratio)} rows were made one without adding their shifts up: add them, or keep all rows"
            )
        yield Finding("stride", where, f"the motion is {ratio:.3g} times the shifts that command it", remedy)


def _rotation_kind(sample: Sample, arm: Arm) -> Iterator[Finding]:
    """Do commanded rotations fit the measured ones, or would they as another kind?"""
    state, action = arm.state, arm.action
    if state.rotation is None or action.rotation is None:
        return
    error = _turn_error(sample, arm, state.rotation_as, action.rotation_as)
    if error < 0.35:
        return
    rivals = {}
    for kind in _RIVALS:
        for name, kinds in (("action", (state.rotation_as, kind)), ("state", (kind, action.rotation_as))):
            try:
                rivals[name, kind] = _turn_error(sample, arm, *kinds)
            except BadRecording:  # another number of columns
                continue
    (name, kind), least = min(rivals.items(), key=lambda entry: entry[1])
    remedy = "correct rotation_as or rotation_unit of the state or the action"
    if least < 0.3 * error:
        remedy = f'[arms.{name}] rotation_as = "{kind}" would leave {np.degrees(least):.0f} degrees'
    yield Finding(
        "rotation",
        f"{state.rotation} and {action.rotation}",
        f"commanded rotations are {np.degrees(error):.0f} degrees from those measured a row later (median)",
        remedy,
    )


def _turn_error(sample: Sample, arm: Arm, state_kind: str, action_kind: str) -> float:
    """Median angle between commanded and measured rotations, radians."""
    assert arm.state.rotation is not None and arm.action.rotation is not None
    angles = []
    for recording in sample.recordings:
        measured = as_matrices(recording.columns, arm.state.rotation, state_kind, arm.state.rotation_unit)
        turn = as_matrices(recording.columns, arm.action.rotation, action_kind, arm.action.rotation_unit)
        if arm.action.mode == "delta":
            turn = measured @ turn if arm.action.frame == "tool" else turn @ measured
        angles.append(Rotation.from_matrix(turn[:-1] @ measured[1:].swapaxes(-1, -2)).magnitude())
    return float(np.median(np.concatenate(angles)))


def _gripper(sample: Sample, number: int) -> Iterator[Finding]:
    arm = sample.embodiment.arms[number]
    for pose in (arm.state, arm.action):
        if pose.gripper is not None:
            yield from _gripper_range(sample, pose, pose.gripper)
    if arm.state.gripper is None:
        return
    measured = [motion.grippers[:, number] for motion in sample.motions]
    commanded = [motion.command_grippers[:, number] for motion in sample.motions]
    if arm.action.gripper is not None:
        together = [0.0]
        for lag in range(1, 6):  # rows until the gripper follows
            asked = np.concatenate([values[:-lag] for values in commanded])
            done = np.concatenate([values[lag:] for values in measured])
            if asked.std() > 0.05 and done.std() > 0.05:
                together.append(float(np.corrcoef(asked, done)[0, 1]))
        if max(together, key=abs) < -0.3:
            yield Finding(
                "gripper sign",
                f"{arm.state.gripper} and {arm.action.gripper}",
                f"where the command closes, the measured gripper opens (correlation {max(together, key=abs):.2f})",
                "exchange gripper_open and gripper_closed of one of them; pictures show which",
            )
            return
    closed = [float(values[:3].mean()) > 0.5 for values in measured if np.ptp(values) > 0.3]
    if len(closed) >= 3 and np.mean(closed) > 0.8:
        yield Finding(
            "gripper sign",
            str(arm.state.gripper),
            f"{sum(closed)} of {len(closed)} episodes begin with a closed gripper that opens later",
            "most episodes begin with an open one: exchange gripper_open and gripper_closed of state and action, "
            "unless pictures show that it is closed",
        )


def _gripper_range(sample: Sample, pose: PoseColumns, gripper: Column) -> Iterator[Finding]:
    raw = np.concatenate([gripper.of(recording.columns, 1)[:, 0] for recording in sample.recordings])
    low, high = np.quantile(raw, (0.01, 0.99))
    first, last = sorted((pose.gripper_open, pose.gripper_closed))
    outside = float(np.mean((raw < first - 0.1 * (last - first)) | (raw > last + 0.1 * (last - first))))
    if raw.max() - raw.min() < 1e-9:
        evidence = f"is {raw[0]:.4g} in every row"
    elif outside > 0.05 or high - low < 0.3 * (last - first):
        evidence = f"1 % to 99 % are {low:.4g}..{high:.4g}, the description says {first:g}..{last:g}"
    else:
        return
    yield Finding(
        "gripper range",
        str(gripper),
        evidence,
        f"gripper_open and gripper_closed are its values in the data, likely {low:.4g} and {high:.4g} in some order",
    )


def _median(vectors: np.ndarray, rows: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(vectors[rows], axis=1)))


def _cosine(one: np.ndarray, other: np.ndarray, rows: np.ndarray) -> float:
    """Mean cosine of two motions, each seen without its mean, so that poses are not taken for shifts."""
    a, b = one[rows] - one[rows].mean(0), other[rows] - other[rows].mean(0)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(1) / np.maximum(lengths, 1e-12)))


def report(findings: Sequence[Finding], dataset: RecordedSet, embodiment: Embodiment) -> str:
    """What the command prints."""
    head = f"{dataset.path}: {len(dataset)} episodes, read as {embodiment.robot!r}"
    if not findings:
        return f"{head}: nothing found that does not fit"
    return "\n".join([f"{head}: {len(findings)} things do not fit", *map(str, findings)])


def _define_flags() -> None:
    flags.DEFINE_string("source", None, "lerobot:DIR or rlds:DIR", required=True)
    flags.DEFINE_string("embodiment", "", "A name of wallwm_jax/sources/embodiments, or the path of a TOML file")
    flags.DEFINE_integer("episodes", 32, "Episodes to look at, spread over the set", 1)


def main(_: Sequence[str]) -> int:
    """Prints what does not fit; the exit code says whether there is anything."""
    from wallwm_jax.sources.opening import open_set

    values = flags.FLAGS
    dataset, embodiment = open_set(values.source), load_embodiment(values.embodiment)
    findings = lint(dataset, embodiment, episodes=values.episodes)
    print(report(findings, dataset, embodiment))
    return 1 if findings else 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
