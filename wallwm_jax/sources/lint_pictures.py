"""What a few pictures say about the cameras of a set: frozen, the same twice, swapped, flipped.

A flip shows in where things move. Over a few pictures of a fixed camera, the middle (u, v) of what differs from the
still scene follows the hand's position p about linearly, `(u, v) = A p + b`. Of an upright camera that looks down at a
table, v falls as the hand rises, and the rows of A satisfy `(A_u x A_v)_z < 0`: their cross product is the way the
camera looks. Each mirroring changes the sign of one of the two or both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import cv2
import numpy as np

from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.embodiment import FLIPS, Camera
from wallwm_jax.sources.findings import Finding, Sample
from wallwm_jax.sources.recorded import fit_picture

EPISODES, PICTURES = 8, 8  # how many episodes are seen, and pictures of each and of each camera
_SIZE = 48
_CHANGED = 20.0  # grey levels
_SIGNIFICANT = 4.0  # standard errors
_TILTED = 0.25  # sine of the angle below (or above) the horizon from which a camera looks down (or up)


def picture_findings(sample: Sample) -> Iterator[Finding]:
    """Findings about the cameras of a sample of episodes."""
    few = np.unique(np.linspace(0, len(sample.recordings) - 1, EPISODES).astype(int)).tolist()
    seen: dict[str, list[np.ndarray]] = {}
    for view, camera in sample.embodiment.cameras.items():
        seen[view] = []
        for number in few:
            try:
                seen[view].append(_grey(sample, number, camera))
            except BadRecording as error:
                yield Finding("damage", f"episode {sample.numbers[number]}", str(error), "repair it")
                seen[view].append(np.zeros((0, _SIZE, _SIZE)))
    yield from _frozen_or_same(sample, seen)
    changed = {view: _changed(pictures) for view, pictures in seen.items()}
    yield from _swapped(sample, changed)
    for view, camera in sample.embodiment.cameras.items():
        if camera.mount == "fixed":
            yield from _flipped(sample, few, view, seen[view])
            yield from _mixed(sample, few, view, seen[view])


def _grey(sample: Sample, number: int, camera: Camera) -> np.ndarray:
    """Grey pictures `[P, 48, 48]` of one episode, evenly spread, as the description turns them."""
    recording = sample.recordings[number]
    rows = _rows(len(recording.times))
    pictures = recording.pictures(camera.column, rows)
    return np.stack(
        [
            cv2.cvtColor(fit_picture(picture, camera, _SIZE), cv2.COLOR_RGB2GRAY).astype(np.float64)
            for picture in pictures
        ]
    )


def _rows(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, PICTURES).astype(int)).tolist()


def _changed(pictures: list[np.ndarray]) -> float:
    """Median over episodes of the share of pixels that differ from the still scene."""
    shares = [float((np.abs(p - np.median(p, axis=0)) > _CHANGED).mean()) for p in pictures if len(p) > 2]
    return float(np.median(shares)) if shares else 0.0


def _frozen_or_same(sample: Sample, seen: dict[str, list[np.ndarray]]) -> Iterator[Finding]:
    for view, pictures in seen.items():
        still = [len(p) > 1 and float(np.abs(np.diff(p, axis=0)).mean()) < 0.5 for p in pictures]
        if sum(still) > len(still) / 2:
            yield Finding(
                "camera",
                f"{view} ({sample.embodiment.cameras[view].column})",
                f"its pictures do not change in {sum(still)} of {len(still)} episodes, though the arm moves",
                "the camera was frozen, or this is another column",
            )
    for one, other in itertools.combinations(seen, 2):
        pairs = [(a, b) for a, b in zip(seen[one], seen[other]) if a.shape == b.shape and len(a)]
        if pairs and max(float(np.abs(a - b).mean()) for a, b in pairs) < 2:
            yield Finding(
                "camera",
                f"{one} and {other}",
                "they show the same pictures",
                "one of them names the wrong column, or was written twice",
            )


def _swapped(sample: Sample, changed: dict[str, float]) -> Iterator[Finding]:
    """A camera on the wrist sees everything move, a fixed one only the arm."""
    cameras = sample.embodiment.cameras
    fixed = [view for view in cameras if cameras[view].mount == "fixed"]
    wrist = [view for view in cameras if cameras[view].mount == "wrist"]
    if not fixed or not wrist:
        return
    most, least = max(fixed, key=changed.__getitem__), min(wrist, key=changed.__getitem__)
    if changed[most] > 1.5 * changed[least] and changed[most] > 0.1:
        yield Finding(
            "camera order",
            f"{most} ({cameras[most].column}) and {least} ({cameras[least].column})",
            f"{changed[most]:.0%} of the pixels of {most!r}, which is fixed, change; {changed[least]:.0%} of those of "
            f"{least!r}, which is on the wrist",
            "exchange their columns, or correct mount",
        )


def _flipped(sample: Sample, few: list[int], view: str, pictures: list[np.ndarray]) -> Iterator[Finding]:
    where, at = [], []
    for number, episode in zip(few, pictures):
        if len(episode) < 4:
            continue
        motion = sample.motions[number]
        position = motion.poses[_rows(len(motion.poses)), :, :3, 3].mean(1)
        weight = np.maximum(np.abs(episode - np.median(episode, axis=0)) - _CHANGED, 0.0)
        mass = weight.sum((1, 2))
        visible = mass > 0.05 * max(mass.max(), 1e-9)
        if visible.sum() < 4:
            continue
        axis = np.arange(_SIZE)
        middle = np.stack([weight.sum(1) @ axis, weight.sum(2) @ axis], axis=1)[visible] / mass[visible, None]
        where.append(position[visible] - position[visible].mean(0))
        at.append(middle - middle.mean(0))
    if sum(map(len, where)) < 16:
        return
    moved, pixels = np.concatenate(where), np.concatenate(at)
    if np.linalg.svd(moved, compute_uv=False)[-1] < 1e-2 * len(moved) ** 0.5:
        return  # the hand stays in a plane, so A is not determined
    solved, *_ = np.linalg.lstsq(moved, pixels, rcond=None)
    left = pixels - moved @ solved
    freedom = max(len(pixels) - 3 - len(where), 1)
    deviation = np.sqrt((left**2).sum(0) / freedom)[None] * np.sqrt(np.diag(np.linalg.inv(moved.T @ moved)))[:, None]
    explained = 1 - (left**2).sum(0) / np.maximum((pixels**2).sum(0), 1e-9)
    a_u, a_v = solved.T
    rises, strength = a_v[2], abs(a_v[2]) / max(deviation[2, 1], 1e-9)
    looks = np.cross(a_u, a_v) / max(float(np.linalg.norm(np.cross(a_u, a_v))), 1e-9)
    upright_known = strength > _SIGNIFICANT and abs(rises) > 0.5 * np.abs(a_v[:2]).max() and explained[1] > 0.3
    looks_up = looks[2] > _TILTED and explained.min() > 0.3
    upside_down = upright_known and rises > 0
    if not upside_down and not looks_up:
        return
    flip = {(True, True): "vertical", (True, False): "both", (False, True): "horizontal"}[upside_down, looks_up]
    present = set(FLIPS[sample.embodiment.cameras[view].flip]) ^ set(FLIPS[flip])
    remedy = f'flip = "{next(name for name, axes in FLIPS.items() if set(axes) == present)}"'
    if abs(looks[2]) < _TILTED:
        remedy += " (or its mirror image: the pictures do not tell)"
    yield Finding(
        "camera flip",
        f"{view} ({sample.embodiment.cameras[view].column})",
        f"as the hand rises by 10 cm, what moves goes {rises * 0.1 / _SIZE:+.0%} of the picture's height down "
        f"({strength:.0f} standard errors); the linear fit (R2 {explained[0]:.2f}, {explained[1]:.2f}) has the camera "
        f"looking {'up' if looks[2] > 0 else 'down'} ({looks[2]:+.2f})",
        f"look at a picture; {remedy} makes it an upright view from above",
    )


def _mixed(sample: Sample, few: list[int], view: str, pictures: list[np.ndarray]) -> Iterator[Finding]:
    """Are some episodes flipped that others are not?"""
    scenes = np.stack([np.median(p, axis=0) if len(p) else np.full((_SIZE, _SIZE), np.nan) for p in pictures])
    if np.isfinite(scenes[:, 0, 0]).sum() < 3:
        return
    usual = np.nanmedian(scenes, axis=0)
    odd = []
    for number, scene in zip(few, scenes):
        if not np.isfinite(scene).all() or scene.std() < 1 or usual.std() < 1:
            continue
        like = {
            flip: float(np.corrcoef(np.flip(scene, axes).ravel(), usual.ravel())[0, 1]) for flip, axes in FLIPS.items()
        }
        best = max(like, key=like.__getitem__)
        if best != "none" and like[best] > max(like["none"] + 0.2, 0.7):
            odd.append((sample.numbers[number], best, like))
    if odd:
        number, best, like = odd[0]
        yield Finding(
            "camera flip",
            f"{view}, episodes {', '.join(str(entry[0]) for entry in odd)}",
            f"flipped ({best}), episode {number} looks like the others (correlation {like[best]:.2f}), as it is it "
            f"does not ({like['none']:.2f})",
            "these episodes were recorded with the camera turned: turn their videos, or leave them out",
        )
