"""Who acts in closed loop: event mode on the next event's words, unified mode chunk after chunk.

Both are an `Actor`, which the loop of `closed_loop` asks for the next commands of several episodes at once. Unified
mode takes its conditioning from one of these sources: the task's instruction, encoded once; the words of the event that
the scripted planner names, anew for each chunk; latents of a staircase or features of a VLM, anew for each chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.evaluation.environments import Situation
from wallwm_jax.events.actions import absolute_commands
from wallwm_jax.events.planning_text import Plan
from wallwm_jax.inference.event_mode import EventMode
from wallwm_jax.inference.latent_conditioner import LatentConditioner, check_alignment
from wallwm_jax.inference.planner import Planner, PlanRequest, VlmPlanner
from wallwm_jax.inference.policy import MODES, Policy, request
from wallwm_jax.inference.unified_mode import Conditioning, History, UnifiedMode

ORACLE = "oracle"
INSTRUCTION, EVENT = "instruction", "event"


class Move(NamedTuple):
    """What an actor does next: what it was told to do, and absolute commands `[T, G, 4, 4]` and `[T, G]`."""

    caption: str
    poses: np.ndarray
    grippers: np.ndarray


A = TypeVar("A", bound="Actor")


class Actor(Protocol):
    """Acts for a group of episodes in lock-step.

    Attributes:
      level: of the events that the scripted planner is to name.
      recent: frames before each observation that the actor needs, at the video rate.
      told_by_step: training step of the VLM that tells it what to do; None where none does.
    """

    level: str
    recent: int
    told_by_step: int | None

    @property
    def mode(self) -> EventMode | UnifiedMode:
        """The model in its decoding mode."""

    def begin(self, situations: Mapping[int, Situation]) -> None:
        """Begins an episode in each of these slots."""

    def act(self, situations: Mapping[int, Situation], seeds: Mapping[int, int]) -> dict[int, Move | None]:
        """The next move in each of these slots; None where the actor takes the task for done."""

    def follow(self, moves: Mapping[int, Move], situations: Mapping[int, Situation]) -> None:
        """What came of these moves; some of the episodes may be over."""

    def untrained(self: A, params: Any) -> A:
        """The same actor with random parameters of its model, whose own durations would mean nothing."""


class EventActor:
    """Event mode: the words of the next event and its duration in, commands for the whole event out."""

    recent = 0

    def __init__(
        self, mode: EventMode, *, planner: Planner | None = None, level: str = "subtask", own_duration: bool = False
    ) -> None:
        """`planner` names the events (None: the scripted one); `own_duration` asks the model how long they take."""
        self.level = level
        self.mode, self._planner, self._own_duration = mode, planner, own_duration
        self.told_by_step: int | None = getattr(planner, "step", None)

    def untrained(self, params: Any) -> EventActor:
        """See `Actor`."""
        twin = copy.copy(self)
        twin.mode, twin._own_duration = self.mode.with_params(params), False
        return twin

    def begin(self, situations: Mapping[int, Situation]) -> None:
        """See `Actor`."""
        self._named = {slot: _Named() for slot in situations}

    def act(self, situations: Mapping[int, Situation], seeds: Mapping[int, int]) -> dict[int, Move | None]:
        """See `Actor`."""
        plans = dict(zip(situations, self._plans(situations)))
        moves: dict[int, Move | None] = {slot: None for slot, plan in plans.items() if plan.done}
        acting = [slot for slot in plans if slot not in moves]
        lasting = {slot: None if self._own_duration else plans[slot].duration_s or None for slot in acting}
        requests = [request(situations[slot], plans[slot].caption, lasting[slot]) for slot in acting]
        noise = [_noise(situations[slot], seeds[slot]) for slot in acting]
        events = self.mode.plan(requests, seeds=noise) if acting else []
        for slot, event in zip(acting, events):
            moves[slot] = Move(plans[slot].caption, *absolute_commands(event.actions, situations[slot].pose))
        return moves

    def follow(self, moves: Mapping[int, Move], situations: Mapping[int, Situation]) -> None:
        """See `Actor`; each observation stands for itself."""

    def _plans(self, situations: Mapping[int, Situation]) -> list[Plan]:
        """The next event of each episode; remembers what was named."""
        if self._planner is None:
            return [Plan(now.caption, now.duration_s, False) for now in situations.values()]
        named = [self._named[slot] for slot in situations]
        plans = self._planner.plan(
            [
                PlanRequest(now.frames, now.instruction, tuple(before.captions), self.level, before.frames)
                for now, before in zip(situations.values(), named)
            ]
        )
        for now, before, plan in zip(situations.values(), named, plans):
            before.frames = now.frames
            if before.captions[-1:] != [plan.caption]:
                before.captions.append(plan.caption)
        return plans


@dataclass
class _Named:
    """The events that a planner named in an episode so far, an event tried again once; the frames at the last one."""

    captions: list[str] = field(default_factory=list)
    frames: Mapping[str, np.ndarray] | None = None


class ChunkActor:
    """Unified mode: the recent past and a conditioning in, a chunk of fixed length out."""

    def __init__(
        self,
        mode: UnifiedMode,
        text: str | LatentConditioner = INSTRUCTION,
        *,
        level: str = "subtask",
        execute: int = 0,
    ) -> None:
        """Remembers a history per episode.

        Args:
          mode: the model.
          text: `INSTRUCTION`, `EVENT`, or what makes latents; these are told which subtasks have been achieved.
          level: of the events, for `EVENT` and the latents.
          execute: control steps of each chunk that are played before it looks again; 0 plays all of them.

        Raises:
          UserError: `execute` is longer than a chunk, or not a multiple of the video stride.
        """
        if not 0 <= execute <= mode.chunk or execute % mode.stride:
            raise UserError(
                f"--execute={execute}: a chunk has {mode.chunk} control steps, and it looks at every {mode.stride}th; "
                f"give a multiple of {mode.stride} up to {mode.chunk}, or 0 for all"
            )
        self.level, self.recent = level, 1 + mode.past_frames
        self.mode, self._text, self._execute = mode, text, execute or mode.chunk
        self.told_by_step: int | None = None if isinstance(text, str) else getattr(text, "step", None)

    def untrained(self, params: Any) -> ChunkActor:
        """See `Actor`."""
        twin = copy.copy(self)
        twin.mode = self.mode.with_params(params)
        return twin

    def begin(self, situations: Mapping[int, Situation]) -> None:
        """See `Actor`."""
        self._histories = {slot: History(self.mode) for slot in situations}
        self._subtasks = {slot: _Subtask(now.frames) for slot, now in situations.items()}
        for slot, now in situations.items():
            self._histories[slot].observe(now)

    def act(self, situations: Mapping[int, Situation], seeds: Mapping[int, int]) -> dict[int, Move | None]:
        """See `Actor`."""
        requests = [self._histories[slot].request() for slot in situations]
        noise = [_noise(now, seeds[slot]) for slot, now in situations.items()]
        told = [now.caption if self._text == EVENT else now.instruction for now in situations.values()]
        chunks = self.mode.plan_all(requests, self._conditionings(situations, told), seeds=noise)
        played = slice(self._execute)
        return {
            slot: Move(caption, chunk.poses[played], chunk.grippers[played])
            for slot, caption, chunk in zip(situations, told, chunks)
        }

    def follow(self, moves: Mapping[int, Move], situations: Mapping[int, Situation]) -> None:
        """See `Actor`."""
        for slot, move in moves.items():
            now = situations[slot]
            if not now.over:
                self._histories[slot].follow(move.poses, move.grippers, now.film, now)

    def _conditionings(self, situations: Mapping[int, Situation], told: Sequence[str]) -> list[Conditioning]:
        if isinstance(self._text, str):
            return [self.mode.encode_text(text) for text in told]
        questions = []
        for slot, now in situations.items():
            done = tuple(subtask.caption for subtask in now.subtasks if subtask.success)
            before = self._subtasks[slot].frames_before(len(done), now.frames)
            questions.append(PlanRequest(now.frames, now.instruction, done, self.level, before))
        return [self.mode.from_latents(latents) for latents in self._text.latents(questions)]


@dataclass
class _Subtask:
    """The frames at which the running subtask of an episode began, and those at which the one before it did."""

    began: Mapping[str, np.ndarray]
    before: Mapping[str, np.ndarray] | None = None
    number: int = 0

    def frames_before(self, number: int, frames: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray] | None:
        """Where the subtask before began; a new one begins here if `number` of them are done."""
        if number != self.number:
            self.number, self.before, self.began = number, self.began, frames
        return self.before


@dataclass(frozen=True)
class Acting:
    """How a run acts; the flags that `evaluate` and `evaluation.arms` share.

    Attributes:
      mode: "event" or "unified".
      planner: what names the events in event mode: "oracle", the scripted planner, or the workdir of a run with a VLM.
      text: what conditions the chunks of unified mode: "instruction" (which "" is too), "event", the words of the
        scripted planner's next event, or the workdir of a run of stage `staircase` or `vlm_text`.
      level: "subtask" or "action", the level of the events that the planner names.
      own_duration: event mode: let the model say how long an event takes; otherwise the planner gives the typical time.
      execute: unified mode: control steps of each chunk that are played before it looks again; 0 plays all of them.
    """

    mode: str = "event"
    planner: str = ORACLE
    text: str = ""
    level: str = "subtask"
    own_duration: bool = False
    execute: int = 0

    def check(self) -> None:
        """Raises `UserError` where the settings do not go together; nothing is opened."""
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is none of {' and '.join(MODES)}")
        if self.level not in ("subtask", "action"):
            raise UserError(f"level {self.level!r} is neither subtask nor action")
        if self.mode == "event":
            if self.text or self.execute:
                name = "text" if self.text else "execute"
                raise UserError(
                    f"--{name}={getattr(self, name)} is for --mode=unified; event mode plays whole events, which "
                    "--planner names"
                )
        elif self.planner != ORACLE or self.own_duration:
            name = "own_duration" if self.own_duration else f"planner={self.planner}"
            raise UserError(
                f"--{name} is for --mode=event; unified mode plays chunks of one length, conditioned by --text"
            )
        elif self.text not in ("", INSTRUCTION, EVENT) and self.level != "subtask":
            raise UserError(
                f"--text={self.text} with --level={self.level}: latents are asked for with the subtasks that have been "
                "achieved; take --level=subtask"
            )


def open_actor(policy: Policy, acting: Acting) -> Actor:
    """The actor that the settings describe; its batches are those of the policy.

    Raises:
      UserError: settings that do not go together, or a run that is not there or does not fit the policy.
    """
    acting.check()
    engine = policy.event_mode
    if acting.mode == "event":
        return EventActor(
            engine, planner=_planner(acting, engine), level=acting.level, own_duration=acting.own_duration
        )
    unified = policy.unified_mode or UnifiedMode(engine)  # which says why it cannot be
    text: str | LatentConditioner = acting.text or INSTRUCTION
    if text not in (INSTRUCTION, EVENT):
        text = LatentConditioner.from_checkpoint(acting.text, batch_size=engine.batch_size)
        check_alignment(text, unified, acting.text)
        _check_eyes(acting.text, text.levels, text.views, acting.level, engine.views)
    return ChunkActor(unified, text, level=acting.level, execute=acting.execute)


def _planner(acting: Acting, engine: EventMode) -> VlmPlanner | None:
    """The planner that the settings name; None is the scripted one."""
    if acting.planner == ORACLE:
        return None
    planner = VlmPlanner.from_checkpoint(acting.planner, batch_size=engine.batch_size)
    _check_eyes(acting.planner, planner.levels, planner.config.data.views, acting.level, engine.views)
    return planner


def _check_eyes(run: str, levels: Sequence[str], looks_at: Sequence[str], level: str, views: Sequence[str]) -> None:
    """Raises `UserError` where a VLM does not know the level, or looks at views that the policy does not have."""
    if level not in levels:
        raise UserError(f"planner {run!r} names events of {' and '.join(levels)}; --level={level} is none of them")
    if missing := set(looks_at) - set(views):
        raise UserError(
            f"planner {run!r} looks at {' and '.join(sorted(missing))}, but the policy was trained on "
            f"{' and '.join(views)}, and only these are rendered"
        )


def _noise(now: Situation, seed: int) -> int:
    return (seed + now.steps) % 2**32
