"""Windows: the stretches of an episode that a model sees, cut on the episode clock.

An **event** window is one span `[start, end)` of a level: the frames from its first step to the first frame of the next
event *inclusive*, and the commands between them. A **fixed** window is one tile of `T` steps, whatever happens in it.
A **random** window is as long as an event, at a random place: an episode has one for each of its event windows, so the
two kinds differ in where they are cut, not in how long or how many they are.
A **history** window is such a tile with the `M` latents before it (scheme B, WALL-WM section 2.6): its observation is
the last frame of latent 0, latent -M one frame alone, and the commands that led to the observation come along. Before
the episode's first frame, that frame is held and there are no commands.

All boundaries lie on stored frames (multiples of `video_stride`). With `n` sampled frames there are
`T = (n - 1) * video_stride` commands. Frames are padded to `1 + 4N`, `N >= 1`, by holding the last one, so that they
fill `1 + N` latents: latent 0 is the first frame alone, latent n the frames `4n - 3 .. 4n`.
Longer events keep their first 65 frames (WALL-WM section 4.1 counts them as "65 latent frames"); their duration stays
true.

Event windows may be **pruned**: of a stretch in which nothing moves, some frames are left out of its inside, each
together with the `video_stride` commands that led to it. Nothing moved, so the frames on either side of the gap show
the same, and the commands, which are poses relative to the window's observation, go on where they were. Between
neighbouring kept frames there are `video_stride` commands as ever, so a latent still has `4 * video_stride` of them
wherever the gaps lie, and no run needs to begin or end on a latent. `kept` is the time warp: which frames of the
episode's clock are left. Spans and durations stay on that clock.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.events.motion import Motion
from wallwm_jax.events.schema import LEVELS, Episode, Span

KINDS = ("event", "fixed", "history", "random")  # the order is the number in the index of a store
MAX_FRAMES = 65  # sampled frames per window; 128 commands at a video stride of 2
GROUP = 4  # frames per latent after the first
KEYFRAME_SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Window:
    """Where one window lies in its episode; it holds no data.

    Attributes:
      kind: one of `KINDS`.
      level: level of the span it was cut from; "task" for other windows than events, which carry the instruction.
      event_index: index of the span in its level; for other windows than events their number in the order of time.
      span_start, span_end: the true stretch in control steps, half-open, neither snapped nor capped.
      start: control step of the first frame, the window's observation; a multiple of `stride`.
      num_frames: sampled frames `n` from the observation on, 2 to 65.
      stride: control steps between sampled frames.
      duration_s: seconds of the true stretch.
      history: `M`, latents before that of the observation.
      kept: of a pruned window, positions of its `n` frames among the stored frames of the episode; None keeps all.
    """

    kind: str
    level: str
    event_index: int
    span_start: int
    span_end: int
    start: int
    num_frames: int
    stride: int
    duration_s: float
    history: int = 0
    kept: tuple[int, ...] | None = None

    @property
    def past_actions(self) -> int:
        """Commands of the history: those of its frames, fewer where the episode begins later."""
        return min(self.history * GROUP * self.stride, self.start)

    @property
    def num_actions(self) -> int:
        """Commands of history and future, `start - past_actions .. start + T - 1`."""
        return self.past_actions + (self.num_frames - 1) * self.stride

    @property
    def num_latents(self) -> int:
        """`M + 1 + N`: history, observation and future, the last latent padded by held frames."""
        return self.history + 1 + max(1, -(-(self.num_frames - 1) // GROUP))

    @property
    def frame_indices(self) -> np.ndarray:
        """`[4M + n]` int: positions of the sampled frames among the stored frames of the episode."""
        past = GROUP * self.history
        return self._stored(np.arange(-past, self.num_frames))

    @property
    def action_steps(self) -> np.ndarray:
        """`[past_actions + T]` int: control steps of the commands, those before the observation first."""
        past = np.arange(self.start - self.past_actions, self.start)
        leading = np.arange(-self.stride, 0)  # the commands that lead to a frame
        return np.concatenate(
            [past, (self.stride * self.frame_indices[-self.num_frames + 1 :, None] + leading).ravel()]
        )

    @property
    def latent_frame_indices(self) -> np.ndarray:
        """`[M + 1 + N]` int: position among the stored frames of the last frame of each latent."""
        latents = np.arange(self.num_latents) - self.history
        return self._stored(np.minimum(GROUP * latents, self.num_frames - 1))

    @property
    def keyframes(self) -> np.ndarray:
        """`[4]` int: positions among the window's own frames at 0, 25, 50 and 75 % of those from the observation on."""
        past = GROUP * self.history
        return np.array([past + int(share * (self.num_frames - 1)) for share in KEYFRAME_SHARES])

    def _stored(self, places: np.ndarray) -> np.ndarray:
        """Frames counted from the observation → positions among the stored frames of the episode."""
        if self.kept is not None:
            return np.array(self.kept)[places]
        return np.maximum(self.start // self.stride + places, 0)


def cut_windows(
    episode: Episode,
    kinds: Sequence[str],
    *,
    levels: Sequence[str] = LEVELS,
    fixed_steps: int = 32,
    history: int = 1,
    longest_pause_s: float = 0.0,
    seed: int = 0,
) -> list[Window]:
    """All windows of an episode: event windows level by level in time order, fixed ones, with history, random ones.

    Args:
      episode: a valid episode.
      kinds: which of `KINDS` to cut.
      levels: levels of the events whose windows, or whose lengths at random places, are cut; a level that the episode
        lacks gives none.
      fixed_steps: `T` of fixed and history windows, in control steps.
      history: `M` of history windows, in latents.
      longest_pause_s: seconds of `Motion.still` in a row that event windows keep, at least one video stride; 0 prunes
        nothing.
      seed: of the places of random windows, which follow from it and the episode's id.

    Returns:
      The windows; none where the episode is shorter than one video stride, or has no span on these levels and no tiles
      are cut.

    Raises:
      UserError: an unknown kind or level, or `fixed_steps` that frames cannot cover.
    """
    unknown = [kind for kind in kinds if kind not in KINDS] + [level for level in levels if level not in LEVELS]
    if unknown:
        raise UserError(f"unknown window kind or level {unknown[0]!r}; kinds are {KINDS}, levels are {LEVELS}")
    windows = []
    if "event" in kinds:
        still = Motion(episode).still() if longest_pause_s else None
        pause = int(longest_pause_s * episode.clock_hz / episode.video_stride + 1e-6)
        windows += _events(episode, levels, still, pause)
    if "fixed" in kinds:
        windows += _tiles(episode, "fixed", fixed_steps, 0)
    if "history" in kinds:
        windows += _tiles(episode, "history", fixed_steps, history)
    if "random" in kinds:
        windows += _random_windows(episode, levels, seed)
    return windows


def _events(episode: Episode, levels: Sequence[str], still: np.ndarray | None, longest_pause: int) -> list[Window]:
    cut = (
        _event_window(episode, level, number, span, still, longest_pause)
        for level in LEVELS
        if level in levels
        for number, span in enumerate(episode.spans.get(level, ()))
    )
    return [window for window in cut if window is not None]


def _event_window(
    episode: Episode, level: str, number: int, span: Span, still: np.ndarray | None, longest_pause: int
) -> Window | None:
    stride = episode.video_stride
    last = (episode.num_frames - 1) * stride
    start = min(_snap(span.start, stride), last - stride)
    end = min(max(_snap(span.end, stride), start + stride), last)
    if start < 0:
        return None
    kept = None
    if still is not None:
        kept = _without_pauses(start // stride, end // stride, still, longest_pause)[:MAX_FRAMES]
    return Window(
        kind="event",
        level=level,
        event_index=number,
        span_start=span.start,
        span_end=span.end,
        start=start,
        num_frames=len(kept) if kept is not None else min((end - start) // stride + 1, MAX_FRAMES),
        stride=stride,
        duration_s=span.length / episode.clock_hz,
        kept=kept,
    )


def _without_pauses(first: int, last: int, still: np.ndarray, longest: int) -> tuple[int, ...]:
    """Frames `first .. last` without the inside of every run of more than `longest` still pairs; both ends stay."""
    kept, run = [first], 0
    for frame in range(first + 1, last + 1):
        run = run + 1 if still[frame - 1] else 0
        if run <= max(longest, 1):
            kept.append(frame)
        elif frame == last or not still[frame]:  # of a long run, its last frame takes the place of the last one kept
            kept[-1] = frame
    return tuple(kept)


def _tiles(episode: Episode, kind: str, steps: int, history: int) -> list[Window]:
    stride = episode.video_stride
    longest = (MAX_FRAMES - 1 - GROUP * history) * stride
    past = f" after {history} latents of history" if kind == "history" else ""
    if history < 0 or steps <= 0 or steps % stride or steps > longest:
        raise UserError(
            f"{kind} windows of {steps} steps{past} do not fit the video: give a multiple of {stride} "
            f"up to {max(longest, 0)}"
        )
    last = (episode.num_frames - 1) * stride
    return [
        Window(
            kind=kind,
            level="task",
            event_index=number,
            span_start=start,
            span_end=min(start + steps, episode.num_steps),
            start=start,
            num_frames=(min(start + steps, last) - start) // stride + 1,
            stride=stride,
            duration_s=(min(start + steps, episode.num_steps) - start) / episode.clock_hz,
            history=history,
        )
        for number, start in enumerate(range(0, last, steps))
    ]


def _random_windows(episode: Episode, levels: Sequence[str], seed: int) -> list[Window]:
    """Windows with the lengths of the events, unpruned, each anywhere in the episode with equal probability."""
    stride = episode.video_stride
    rng = np.random.default_rng([seed, zlib.crc32(episode.episode_id.encode())])
    lengths = [window.num_frames for window in _events(episode, levels, None, 0)]
    places = sorted((int(rng.integers(episode.num_frames - frames + 1)), frames) for frames in lengths)
    return [
        Window(
            kind="random",
            level="task",
            event_index=number,
            span_start=first * stride,
            span_end=(first + frames - 1) * stride,
            start=first * stride,
            num_frames=frames,
            stride=stride,
            duration_s=(frames - 1) * stride / episode.clock_hz,
        )
        for number, (first, frames) in enumerate(places)
    ]


def _snap(step: int, stride: int) -> int:
    """The nearest multiple of `stride`; halves go up, so that neighbours still share their boundary."""
    return (step + stride // 2) // stride * stride
