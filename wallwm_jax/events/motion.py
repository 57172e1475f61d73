"""How much the pictures and the arms of an episode move: the signals that synchronising, cleaning and pruning share.

motion = Motion(episode)
motion.changes["wrist"]     # per pair of neighbouring frames: how much that camera's picture changed
motion.travel(lag_s)        # over the same pairs: how far the hands went, `lag_s` earlier
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from wallwm_jax.events.schema import Episode

SIDE = 32  # pixels of the small grey pictures: noise averages out, a hand is still a few pixels wide
LEVER_M = 0.1  # a rotation counts as far as a point this far from the hand's centre moves
GRIPPER_M = 0.05  # opening a gripper fully counts as this much travel
_BLOCK = 8  # pixels of a block of the small picture; stillness asks for the block that changed most


class Motion:
    """The motion of one episode on its clock. Pictures are decoded once, at a small size.

    Attributes:
      episode: that it is of.
      pictures: view → `[N, 32, 32]` float32 grey levels 0..255, NaN where a frame cannot be decoded.
      changes: view → `[N - 1]` mean absolute change of grey levels from one stored frame to the next.
      hands: `[T + 1, G, 13]` metres: position, rotation times `LEVER_M`, closing times `GRIPPER_M`; Euclidean distance
        between two rows of an arm is how far it moved in all.
    """

    def __init__(self, episode: Episode, pictures: Mapping[str, np.ndarray] | None = None) -> None:
        """`pictures`, where the caller has those of the very same frames already."""
        self.episode = episode
        self.pictures = pictures or {view: _small(frames) for view, frames in episode.frames.items()}
        self.changes = {view: np.abs(np.diff(seen, axis=0)).mean((1, 2)) for view, seen in self.pictures.items()}
        self.hands = hand_track(episode.poses, episode.grippers)

    @property
    def frame_s(self) -> float:
        """Seconds from one stored frame to the next."""
        return self.episode.video_stride / self.episode.clock_hz

    @property
    def steps(self) -> np.ndarray:
        """`[T, G]` metres that each arm moves in each control step."""
        return np.linalg.norm(np.diff(self.hands, axis=0), axis=-1)

    def travel(self, lag_s: float = 0.0) -> np.ndarray:
        """`[N - 1]` metres between the moments `lag_s` before neighbouring frames, all arms together.

        NaN where such a moment is outside the recording.
        """
        times = np.arange(self.episode.num_frames) * self.episode.video_stride - lag_s * self.episode.clock_hz
        last = len(self.hands) - 1
        before = np.clip(np.floor(times).astype(int), 0, last - 1)
        share = (times - before)[:, None, None]
        track = (1 - share) * self.hands[before] + share * self.hands[before + 1]
        track[(times < -1e-6) | (times > last + 1e-6)] = np.nan
        return np.linalg.norm(np.diff(track, axis=0), axis=-1).sum(-1)

    def still(self, max_speed: float = 0.01, max_change: float = 1.5) -> np.ndarray:
        """`[N - 1]` bool: between these two frames neither picture, nor arm, nor gripper moves, nor is told to.

        Args:
          max_speed: metres per second of `hands` that count as rest, measured and commanded: encoders tremble.
          max_change: grey levels that the most changed block of any picture may change; sensor noise, averaged over
            the pixels of a block, is a few tenths.
        """
        episode, stride = self.episode, self.episode.video_stride
        count = episode.num_frames - 1
        commands = hand_track(episode.command_poses, episode.command_grippers)
        told = np.linalg.norm(np.diff(commands, axis=0, prepend=commands[:1]), axis=-1)
        moved = np.maximum(self.steps, told).max(-1)[: count * stride].reshape(count, stride).sum(1)
        quiet = moved <= max_speed * self.frame_s
        for seen in self.pictures.values():
            blocks = np.abs(np.diff(seen, axis=0)).reshape(count, SIDE // _BLOCK, _BLOCK, SIDE // _BLOCK, _BLOCK)
            quiet &= blocks.mean((2, 4)).max((1, 2)) <= max_change
        return quiet


def hand_track(poses: np.ndarray, grippers: np.ndarray) -> np.ndarray:
    """Poses `[T, G, 4, 4]` and closing fractions `[T, G]` as points `[T, G, 13]` whose distances are metres."""
    rotation = poses[..., :3, :3].reshape(*poses.shape[:2], 9) * (LEVER_M / np.sqrt(2))
    return np.concatenate([poses[..., :3, 3], rotation, GRIPPER_M * grippers[..., None]], axis=-1)


def decode(data: bytes, flag: int = cv2.IMREAD_GRAYSCALE) -> np.ndarray | None:
    """One JPEG frame, by default grey `[H, W]` uint8; None where it is no picture, or not all of one."""
    whole = b"\xff\xd9" in data[-64:]  # the mark of its end; the decoder itself paints grey what is missing
    return cv2.imdecode(np.frombuffer(data, np.uint8), flag) if whole else None


def _small(frames: Sequence[bytes]) -> np.ndarray:
    small = np.full((len(frames), SIDE, SIDE), np.nan, np.float32)
    first = next((picture for picture in map(decode, frames) if picture is not None), None)
    flag = cv2.IMREAD_GRAYSCALE
    if first is not None:  # a JPEG decodes several times faster at a half, a quarter, an eighth of its size
        reductions = (
            (8, cv2.IMREAD_REDUCED_GRAYSCALE_8),
            (4, cv2.IMREAD_REDUCED_GRAYSCALE_4),
            (2, cv2.IMREAD_REDUCED_GRAYSCALE_2),
        )
        flag = next((flag for part, flag in reductions if min(first.shape) >= 2 * SIDE * part), flag)
    for number, data in enumerate(frames):
        picture = decode(data, flag)
        if picture is not None:
            resized = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            small[number] = cv2.GaussianBlur(resized, (0, 0), 0.8)
    return small
