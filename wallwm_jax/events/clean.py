"""Cleaning rules: what makes a recording unfit to learn from, one small function each, with the evidence it saw.

A rule looks at the `Motion` of an episode and yields a `Finding` for each fault. Its first docstring line is the
explanation that the report prints. `clean` runs an episode through all `RULES`; one finding that drops it is enough.
NaN in poses or grippers and arrays of wrong length cannot occur here: `Episode` refuses them when it is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial.transform import Rotation

from wallwm_jax.events.motion import Motion, decode, hand_track
from wallwm_jax.events.schema import Episode

DROPPED, REPAIRED, NOTED = "dropped", "repaired", "noted"


@dataclass(frozen=True)
class Limits:
    """Thresholds of the rules.

    Attributes:
      min_seconds: of an episode; shorter is no behaviour but a start that was broken off.
      min_travel_m: metres that hands and grippers move in all; less is an episode in which nothing was done.
      reach_m: metres from the base; farther is no arm but millimetres taken for metres, or another frame.
      jump_m: metres in one control step, and `jump_ratio` times its neighbours: no arm does that, records are missing.
      jump_ratio: see `jump_m`; smooth motion stays below 1.5 even at 10 Hz.
      picture_ratio: times its neighbours that a picture changes at a jump, where time is missing and not a pose wrong.
      max_spikes: single wrong poses that are repaired; more say that the tracking itself is bad.
      same_picture: grey levels; two pictures that differ less are one picture, encoded twice. Sensor noise alone is
        more.
      moving_m: metres between two frames that any camera sees.
      frozen_s, frozen_m: a camera that shows one picture for so long while the hands go so far is frozen.
      max_duplicates: share of the frames of a camera that repeat the one before while the hands move; one may always.
      dark, bright, flat: grey levels; a picture whose mean is below or above, and whose deviation is less than `flat`,
        shows nothing.
      max_blank: share of the frames of a camera that show nothing.
      gripper_slack: closing fraction outside 0..1 that is rounding or calibration, and clipped.
      gripper_follows: closing fraction; commanded to travel more than ten times this, a gripper must travel this far.
      tracking_m: metres between commanded and measured hand, in the median; farther says two frames or wrong columns.
      settle_s: seconds that the arm may take to reach its command.
      rotation_slack: largest deviation of `R^T R` from one that is rounding, and repaired; more is no rotation.
      require_success: drop episodes that their source calls failed. Off: failures have events, too.
    """

    min_seconds: float = 1.0
    min_travel_m: float = 0.02
    reach_m: float = 2.5
    jump_m: float = 0.04
    jump_ratio: float = 2.5
    picture_ratio: float = 3.0
    max_spikes: int = 5
    same_picture: float = 0.02
    moving_m: float = 0.01
    frozen_s: float = 0.7
    frozen_m: float = 0.05
    max_duplicates: float = 0.05
    dark: float = 8.0
    bright: float = 247.0
    flat: float = 6.0
    max_blank: float = 0.0
    gripper_slack: float = 0.1
    gripper_follows: float = 0.03
    tracking_m: float = 0.1
    settle_s: float = 0.5
    rotation_slack: float = 0.02
    require_success: bool = False


@dataclass(frozen=True)
class Finding:
    """One fault of one episode.

    Attributes:
      rule: name of the rule.
      episode, source: of the episode.
      where: camera, frames or steps, in words.
      evidence: what was measured, by name with its unit.
      action: "dropped" (the episode), "repaired" or "noted".
      view, frame: what to look at: a view, None for the first, and a position among the stored frames.
      repair: makes the repaired episode of one with the fault.
    """

    rule: str
    episode: str
    source: str
    where: str
    evidence: Mapping[str, float]
    action: str
    view: str | None = None
    frame: int = 0
    repair: Callable[[Episode], Episode] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.action} by {self.rule}, {self.where}: {numbers}"


@dataclass(frozen=True)
class Cleaned:
    """What became of an episode: `motion` of the episode, repaired where needed, None where it is dropped."""

    motion: Motion | None
    findings: tuple[Finding, ...]


Rule = Callable[[Motion, Limits], Iterator[Finding]]


def clean(episode: Episode, limits: Limits | None = None) -> Cleaned:
    """Runs an episode through all rules. Repairs are made in their order and told in its provenance."""
    limits = limits or Limits()
    motion = Motion(episode)
    findings: list[Finding] = []
    for rule in RULES:
        for finding in list(rule(motion, limits)):
            findings.append(finding)
            if finding.repair is not None:
                said = f"{finding.rule}: {finding.where} repaired"
                repaired = finding.repair(motion.episode)
                motion = Motion(replace(repaired, provenance=(*repaired.provenance, said)), motion.pictures)
    dropped = any(finding.action == DROPPED for finding in findings)
    return Cleaned(None if dropped else motion, tuple(findings))


def explanation(rule: Rule) -> str:
    """What a rule looks for, in a sentence."""
    return (rule.__doc__ or "").strip().splitlines()[0]


# Pictures


def unreadable_frame(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A stored frame is no picture, or has another size than the episode says."""
    episode = motion.episode
    for view, seen in motion.pictures.items():
        bad = np.flatnonzero(np.isnan(seen[:, 0, 0]))
        if len(bad):
            yield _finding(unreadable_frame, motion, DROPPED, bad, view, {"frames": len(bad)})
            continue
        picture = decode(episode.frames[view][0])
        if picture is not None and picture.shape != tuple(episode.size):
            height, width = picture.shape
            evidence = {"height, pixels": height, "width, pixels": width}
            yield _finding(unreadable_frame, motion, DROPPED, np.array([0]), view, evidence)


def blank_frame(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A camera shows nothing: its picture is black, or saturated, all over."""
    for view, seen in motion.pictures.items():
        mean, deviation = seen.mean((1, 2)), seen.std((1, 2))
        blank = np.flatnonzero(((mean < limits.dark) | (mean > limits.bright)) & (deviation < limits.flat))
        if len(blank):
            share = len(blank) / len(seen)
            evidence = {"frames": len(blank), "share": share, "mean grey level": float(mean[blank].mean())}
            yield _finding(blank_frame, motion, DROPPED if share > limits.max_blank else NOTED, blank, view, evidence)


def frozen_camera(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A camera shows one picture while the hands move on."""
    travel = motion.travel()
    for view, change in motion.changes.items():
        for run in _runs(change <= limits.same_picture):
            gone, seconds = float(travel[run].sum()), len(run) * motion.frame_s
            if gone >= limits.frozen_m and seconds >= limits.frozen_s:
                evidence = {"seconds": seconds, "hand travel, m": gone}
                yield _finding(frozen_camera, motion, DROPPED, run + 1, view, evidence)


def duplicated_frame(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A frame repeats the one before although the hands moved: a picture was lost on the way."""
    travel = motion.travel()
    for view, change in motion.changes.items():
        runs = _runs((change <= limits.same_picture) & (travel >= limits.moving_m))
        short = [run for run in runs if len(run) * motion.frame_s < limits.frozen_s]
        if short:
            again = np.concatenate(short)
            share = len(again) / len(change)
            action = DROPPED if len(again) > max(1, limits.max_duplicates * len(change)) else NOTED
            evidence = {"frames": len(again), "share": share, "hand travel, m": float(travel[again].sum())}
            yield _finding(duplicated_frame, motion, action, again + 1, view, evidence)


# Arms


def not_a_rotation(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A pose's rotation is none: stretched, mirrored or empty."""
    for name in ("poses", "command_poses"):
        rotation = getattr(motion.episode, name)[..., :3, :3]
        error = np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max((-2, -1)).max(-1)
        volume = np.linalg.det(rotation)
        bad = np.flatnonzero((volume < 0).any(-1) | (error > limits.rotation_slack))
        if len(bad):
            evidence = {"steps": len(bad), "deviation": float(error.max()), "determinant": float(volume[bad[0]].min())}
            yield _finding(not_a_rotation, motion, DROPPED, bad, None, evidence, of=name)
        elif error.max() > 1e-4:
            steps = np.flatnonzero(error > 1e-4)
            evidence = {"steps": len(steps), "deviation": float(error.max())}
            repair = functools.partial(_orthonormal, name=name)
            yield _finding(not_a_rotation, motion, REPAIRED, steps, None, evidence, of=name, repair=repair)


def out_of_reach(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A hand is farther from the base than any arm reaches: other units, or another frame."""
    for name in ("poses", "command_poses"):
        distance = np.linalg.norm(getattr(motion.episode, name)[..., :3, 3], axis=-1).max(-1)
        far = np.flatnonzero(distance > limits.reach_m)
        if len(far):
            evidence = {"steps": len(far), "distance, m": float(distance.max())}
            yield _finding(out_of_reach, motion, DROPPED, far, None, evidence, of=name)


def pose_spike(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """The measured hand is elsewhere for a single step and back in the next; the step is interpolated."""
    spikes = _spikes(motion, limits)
    if len(spikes):
        action = REPAIRED if len(spikes) <= limits.max_spikes else DROPPED
        repair = functools.partial(_interpolate, steps=spikes) if action == REPAIRED else None
        evidence = {"steps": len(spikes), "away, m": float(_away(_arms(motion))[spikes - 1].max())}
        yield _finding(pose_spike, motion, action, spikes, None, evidence, of="poses", repair=repair)


def pose_jump(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """The measured hand jumps and stays there, and no picture shows it: the tracking or its frame changed."""
    for step, evidence in _jumps(motion, limits, in_picture=False):
        yield _finding(pose_jump, motion, DROPPED, np.array([step]), None, evidence, of="poses")


def time_gap(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """Hand and pictures jump together: records are missing in between."""
    for step, evidence in _jumps(motion, limits, in_picture=True):
        yield _finding(time_gap, motion, DROPPED, np.array([step]), None, evidence, of="poses")


def command_mismatch(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """The arm is far from where it was told to be: commands and poses have different frames, units or columns."""
    episode = motion.episode
    commands, hands = hand_track(episode.command_poses, episode.command_grippers), motion.hands
    delays = range(1, 2 + min(int(limits.settle_s * episode.clock_hz), episode.num_steps - 1))
    apart = [  # without the gripper, which has a rule of its own
        float(np.median(np.linalg.norm((hands[delay:] - commands[: len(hands) - delay])[..., :12], axis=-1)))
        for delay in delays
    ]
    if min(apart) > limits.tracking_m:
        evidence = {"median distance, m": min(apart)}
        yield _finding(command_mismatch, motion, DROPPED, np.arange(episode.num_steps), None, evidence, of="commands")


def gripper_range(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A gripper's closing fraction is outside 0 to 1; a little is clipped, more has other units."""
    for name in ("grippers", "command_grippers"):
        values = getattr(motion.episode, name)
        outside = np.maximum(values - 1, -values).max(-1)
        if outside.max() > 1e-6:
            within = outside.max() <= limits.gripper_slack
            repair = functools.partial(_clip_gripper, name=name) if within else None
            action = REPAIRED if within else DROPPED
            evidence = {"lowest": float(values.min()), "highest": float(values.max())}
            yield _finding(
                gripper_range, motion, action, np.flatnonzero(outside > 1e-6), None, evidence, of=name, repair=repair
            )


def gripper_stuck(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A gripper is told to open or close and its measured value hardly moves: saturated, or not recorded."""
    episode = motion.episode
    told, went = np.ptp(episode.command_grippers, axis=0), np.ptp(episode.grippers, axis=0)
    for arm in np.flatnonzero((told > 10 * limits.gripper_follows) & (went < limits.gripper_follows)):
        evidence = {"arm": int(arm), "commanded": float(told[arm]), "measured": float(went[arm])}
        turn = int(np.abs(np.diff(episode.command_grippers[:, arm])).argmax())
        yield _finding(gripper_stuck, motion, DROPPED, np.array([turn]), None, evidence, of="grippers")


# The whole


def bad_calibration(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """A camera's calibration is not finite, or its pose no rotation; the episode goes on without it."""
    for view, camera in motion.episode.cameras.items():
        poses = np.asarray(camera.extrinsics)
        with np.errstate(invalid="ignore"):
            error = np.abs(np.swapaxes(poses[:, :3, :3], -1, -2) @ poses[:, :3, :3] - np.eye(3)).max((-2, -1))
        finite = np.isfinite(poses).all((-2, -1)) & np.isfinite(camera.intrinsics).all()
        bad = np.flatnonzero(~finite | ~(error <= limits.rotation_slack))
        if len(bad) or not np.isfinite(camera.distortion).all():
            places = bad if len(bad) else np.array([0])
            repair = functools.partial(_without_calibration, view=view)
            yield _finding(bad_calibration, motion, REPAIRED, places, view, {"frames": len(bad)}, repair=repair)


def too_short(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """The episode ended before anything could be done."""
    seconds = motion.episode.num_steps / motion.episode.clock_hz
    if seconds < limits.min_seconds:
        yield _finding(too_short, motion, DROPPED, np.array([0]), None, {"seconds": seconds})


def no_motion(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """Hands and grippers stay where they are."""
    reached = float(np.linalg.norm(np.ptp(motion.hands, axis=0), axis=-1).max())
    if reached < limits.min_travel_m:
        yield _finding(no_motion, motion, DROPPED, np.array([0]), None, {"travel, m": reached})


def failed(motion: Motion, limits: Limits) -> Iterator[Finding]:
    """The source says that the episode did not achieve its task."""
    if limits.require_success and not motion.episode.success:
        yield _finding(failed, motion, DROPPED, np.array([motion.episode.num_steps]), None, {}, of="poses")


RULES: tuple[Rule, ...] = (
    unreadable_frame,
    blank_frame,
    frozen_camera,
    duplicated_frame,
    not_a_rotation,
    out_of_reach,
    pose_spike,
    pose_jump,
    time_gap,
    command_mismatch,
    gripper_range,
    gripper_stuck,
    bad_calibration,
    too_short,
    no_motion,
    failed,
)


def _finding(
    rule: Rule,
    motion: Motion,
    action: str,
    places: np.ndarray,
    view: str | None,
    evidence: Mapping[str, float],
    *,
    of: str = "",
    repair: Callable[[Episode], Episode] | None = None,
) -> Finding:
    """A finding at stored frames `places` or, where `of` names an array, at control steps of it."""
    first, last = int(places[0]), int(places[-1])
    stretch = f"{first}" if first == last else f"{first} to {last}"
    where = f"{of}, step {stretch}" if of else f"frame {stretch}"
    frame = min(first // motion.episode.video_stride, motion.episode.num_frames - 1) if of else first
    return Finding(
        rule=rule.__name__,
        episode=motion.episode.episode_id,
        source=motion.episode.source,
        where=f"camera {view!r}, {where}" if view else where,
        evidence=dict(evidence),
        action=action,
        view=view,
        frame=frame,
        repair=repair,
    )


def _runs(flags: np.ndarray) -> list[np.ndarray]:
    """Positions of each run of true values."""
    places = np.flatnonzero(flags)
    return [run for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(run)]


def _arms(motion: Motion) -> np.ndarray:
    """`[T + 1, G, 12]`: position and rotation alone; a gripper that is only open or closed jumps by nature."""
    return motion.hands[..., :12]


def _arm_steps(motion: Motion) -> np.ndarray:
    """`[T]` metres per control step of the arm that goes farthest."""
    return np.linalg.norm(np.diff(_arms(motion), axis=0), axis=-1).max(-1)


def _away(arms: np.ndarray) -> np.ndarray:
    """`[T - 1]` metres from each inner point to the middle of its neighbours, of the arm that is farthest."""
    return np.linalg.norm(arms[1:-1] - (arms[:-2] + arms[2:]) / 2, axis=-1).max(-1)


def _spikes(motion: Motion, limits: Limits) -> np.ndarray:
    """Control steps whose pose lies far off a way that closes again without it."""
    arms, steps = _arms(motion), _arm_steps(motion)
    away, across = _away(arms), np.linalg.norm(arms[2:] - arms[:-2], axis=-1).max(-1)
    padded = np.pad(away, 4)  # its neighbours are moved by a spike, too: those beyond say what is usual here
    usual = np.max([padded[4 + offset : 4 + offset + len(away)] for offset in (-4, -3, -2, 2, 3, 4)], axis=0)
    closes = across < np.minimum(steps[:-1], steps[1:])
    return 1 + np.flatnonzero((away > limits.jump_m) & (away > limits.jump_ratio * usual) & closes)


def _jumps(motion: Motion, limits: Limits, *, in_picture: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """Control steps in which a hand goes farther than it can, by whether the pictures jump there, too."""
    steps, spikes = _arm_steps(motion), _spikes(motion, limits)
    steps[np.concatenate([spikes - 1, spikes])] = 0.0
    around = np.maximum(np.append(0.0, steps[:-1]), np.append(steps[1:], 0.0))
    for step in np.flatnonzero((steps > limits.jump_m) & (steps > limits.jump_ratio * around)):
        pair = min(int(step) // motion.episode.video_stride, motion.episode.num_frames - 2)
        ratio = max(_sharpness(change, pair) for change in motion.changes.values())
        if (ratio > limits.picture_ratio) == in_picture:
            yield int(step) + 1, {"in one step, m": float(steps[step]), "picture change ratio": ratio}


def _sharpness(change: np.ndarray, pair: int) -> float:
    """How many times more a picture changes at a pair of frames, or beside it, than around."""
    here = change[max(pair - 1, 0) : pair + 2]
    around = np.concatenate([change[max(pair - 4, 0) : max(pair - 1, 0)], change[pair + 2 : pair + 5]])
    return float(here.max() / max(np.median(around), 0.1)) if len(here) and len(around) else 1.0


def _interpolate(episode: Episode, steps: np.ndarray) -> Episode:
    poses, grippers = episode.poses.copy(), episode.grippers.copy()
    for step in steps:
        before, after = poses[step - 1], poses[step + 1]
        turn = Rotation.from_matrix(after[:, :3, :3]) * Rotation.from_matrix(before[:, :3, :3]).inv()
        half = Rotation.from_rotvec(turn.as_rotvec() / 2) * Rotation.from_matrix(before[:, :3, :3])
        poses[step, :, :3, :3] = half.as_matrix()
        poses[step, :, :3, 3] = (before[:, :3, 3] + after[:, :3, 3]) / 2
        grippers[step] = (grippers[step - 1] + grippers[step + 1]) / 2
    return replace(episode, poses=poses, grippers=grippers)


def _orthonormal(episode: Episode, name: str) -> Episode:
    poses = getattr(episode, name).copy()
    left, _, right = np.linalg.svd(poses[..., :3, :3])
    poses[..., :3, :3] = left @ right
    return replace(episode, **{name: poses})


def _clip_gripper(episode: Episode, name: str) -> Episode:
    return replace(episode, **{name: np.clip(getattr(episode, name), 0.0, 1.0)})


def _without_calibration(episode: Episode, view: str) -> Episode:
    return replace(episode, cameras={name: camera for name, camera in episode.cameras.items() if name != view})
