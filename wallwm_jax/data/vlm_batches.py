"""Rows of the VLM stages: a question about one event of the store, and its answer.

A row is one event window. The pictures show its first frame, where the event before has just ended and this one is
next; the prompt gives the task and the events so far; the answer names the event and its remaining duration. An
episode's last event is at times shown at its end, where the answer is that the task is done; any event at times at a
later keyframe, where the prompt names it and the answer is how long it still takes. Captions are the canonical ones.
Where gradients pass the towers of a world action model, a row also holds the event's window. Everything is a pure
function of (seed, row), as in packed batches, and rows never see each other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import BadRecord, EventStore, WindowRecord
from wallwm_jax.data.packing import (
    Spec,
    batch_spec,
    blank_rows,
    place_text,
    place_window,
    random_stream,
    row_of,
    text_spec,
)
from wallwm_jax.data.pipeline import check_store, resolve_views
from wallwm_jax.data.sampler import Sampler
from wallwm_jax.events import planning_text
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KEYFRAME_SHARES, KINDS
from wallwm_jax.models.vlm.positions import multimodal_positions
from wallwm_jax.models.vlm.tokenizer import Tokenizer, get_tokenizer, prompt

_MOMENT = 4  # stream of random numbers; the sampler has 1 and 2, packing 3
_ANY = 1 << 30  # capacity for lengths that do not matter here


class Prompts:
    """Questions as token ids, in training and in the planner alike.

    Attributes:
      tokenizer: of the model.
      room: tokens that a prompt may have.
    """

    def __init__(self, config: ConfigDict) -> None:
        """Reads `data.vlm` and `vlm`.

        Raises:
          UserError: sizes that do not fit together, or no tokenizer.
        """
        vlm, vision = config.data.vlm, config.vlm.vision
        self.tokenizer: Tokenizer = get_tokenizer(config.vlm.tokenizer)
        side = vision.patch * vision.merge
        if vlm.image_size % side or vlm.image_size < side:
            raise UserError(f"data.vlm.image_size={vlm.image_size} must be a multiple of {side}, a token's side")
        self.grid = (vlm.image_size // side,) * 2
        self.room = vlm.length - vlm.answer_length
        if self.tokenizer.vocabulary > min(config.vlm.language.vocabulary, config.vlm.small.vocabulary):
            raise UserError(
                f"the tokenizer {config.vlm.tokenizer!r} has {self.tokenizer.vocabulary} ids; vlm.language.vocabulary "
                "and vlm.small.vocabulary must be at least that"
            )

    def ids(self, instruction: str, level: str, done: Sequence[str], images: int, now: str = "") -> list[int]:
        """The prompt, `planning_text.request`; as much of the oldest history is left out as does not fit into `room`.

        Raises:
          UserError: it does not fit without any history either.
        """
        for first in range(len(done) + 1):
            text = planning_text.request(instruction, level, done[first:], now)
            ids = prompt(self.tokenizer, text, images, self.grid[0] * self.grid[1])
            if len(ids) <= self.room:
                return ids
        raise UserError(
            f"the prompt of task {instruction!r} with {images} pictures has {len(ids)} tokens, more than the "
            f"{self.room} of data.vlm.length - data.vlm.answer_length; raise data.vlm.length"
        )

    def positions(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Multimodal positions `[3, B, S]` of `ids [B, S]`."""
        return multimodal_positions(ids, self.tokenizer.image_id, self.grid, mask)[0]


@dataclass(frozen=True)
class Question:
    """One event of the store, asked for.

    Attributes:
      instruction: the task.
      level: of the event.
      done: captions of the events before it on its level, in time order.
      caption: of the next event; "" where the task is done, or where an event is under way.
      now: caption of the event that is under way; "" where the question is what comes next.
      remaining: captions of the events after it, where the episode knows them.
      remaining_s: seconds that it takes, or still takes; 0 where the task is done.
      pictures: `[N, H, W, 3]` uint8.
    """

    instruction: str
    level: str
    done: tuple[str, ...]
    caption: str
    now: str
    remaining: tuple[str, ...]
    remaining_s: float
    pictures: np.ndarray


class Questions:
    """Questions about the events of a store."""

    def __init__(self, store: EventStore, config: ConfigDict) -> None:
        """Reads `data.views` and `data.vlm`."""
        self._store, self._vlm = store, config.data.vlm
        self.views = resolve_views(store, config)

    def ask(self, window: int, at_end: bool = False, moment: int = 0) -> Question:
        """The question of window `window`.

        Args:
          window: of an event.
          at_end: ask at the end of an episode's last event instead.
          moment: keyframe that is shown; from 1 on the event is under way, and the question is how long it still takes.

        Raises:
          BadRecord: the record or a picture is damaged.
        """
        store, record = self._store, self._store.read(window)
        done = [store.caption(number) for number in record.previous_caption_ids]
        caption, now, seconds = store.caption(record.caption_id), "", record.duration_s
        pictures = self._pictures(record, int(record.keyframes[0]))
        if at_end and self.ends_task(record):
            before, done, caption, seconds = pictures, [*done, caption], "", 0.0
            pictures = self._pictures(record, -1)
        elif moment:
            before, caption, now, seconds = pictures, "", caption, self._seconds_left(record, moment)
            pictures = self._pictures(record, int(record.keyframes[moment]))
        elif self._vlm.previous_images:
            earlier = self._places.get((record.episode_id, LEVELS.index(record.level), record.event_index - 1))
            earlier_record = record if earlier is None else store.read(earlier)
            before = self._pictures(earlier_record, int(earlier_record.keyframes[0]))
        events = store.episodes[record.episode_id]["spans"][record.level]
        return Question(
            instruction=store.caption(int(record.level_caption_ids[LEVELS.index("task")])),
            level=record.level,
            done=tuple(done),
            caption=caption,
            now=now,
            remaining=tuple(event["caption"] for event in events[record.event_index :]) if caption else (),
            remaining_s=seconds,
            pictures=np.concatenate([before, pictures]) if self._vlm.previous_images else pictures,
        )

    def ends_task(self, record: WindowRecord) -> bool:
        """Whether the window is its level's last in the episode, and its picture of the end is in the store."""
        store, level = self._store, LEVELS.index(record.level)
        if record.latents is not None or record.next_caption_ids[level] >= 0:
            return False
        covered = int(record.frame_steps[-1] - record.frame_steps[0])
        success = store.episodes[record.episode_id]["success"]
        return bool(success) and covered > record.span_end - record.span_start - int(store.meta["video_stride"])

    def _seconds_left(self, record: WindowRecord, moment: int) -> float:
        """From a keyframe to the event's true end, which may lie beyond the window's; at least one control step, where
        the event ends before the stored frame that is nearest to its end."""
        shown = record.frame_steps[int(KEYFRAME_SHARES[moment] * (len(record.frame_steps) - 1))]
        return max(1, record.span_end - int(shown)) / float(self._store.meta["action_hz"])

    def _pictures(self, record: WindowRecord, position: int) -> np.ndarray:
        """`[V, H, W, 3]`: all views of one frame; black where the episode lacks the view."""
        side = self._vlm.image_size
        found = np.zeros((len(self.views), side, side, 3), np.uint8)
        for number, view in enumerate(self.views):
            if view in record.frames:
                found[number] = resized(record.picture(view, position), side)
        return found

    @functools.cached_property
    def _places(self) -> Mapping[tuple[int, int, int], int]:
        """(episode, level, event index) → window, of the events."""
        index = self._store.index
        windows = np.flatnonzero(index["kind"] == KINDS.index("event"))
        places = (index[name][windows].tolist() for name in ("episode", "level", "event_index"))
        return dict(zip(zip(*places), windows.tolist()))


def _check_histories(store: EventStore, episodes: np.ndarray) -> None:
    """An episode that begins within a task, as a recovery does, does not know what was done before."""
    for episode in (store.episodes[number] for number in episodes.tolist()):
        if episode.get("derived_from"):
            raise UserError(
                f"{episode['name']!r} of {str(store.path)!r} begins within a task, so that a planner would learn a "
                "wrong past of it; give its dataset the share 0, as in "
                '--config.data.mixture=\'(("ocbench/", 1.0), ("ocbench-recovery/", 0.0))\''
            )


class VlmRows:
    """Makes rows of a `VlmBatch` by number; see `pipeline.Rows`.

    Attributes:
      sampler: which event a row holds: as in packed batches, with one event a row.
    """

    def __init__(self, store: EventStore, config: ConfigDict) -> None:
        """Raises `UserError` where store and config do not fit."""
        alone = _one_event(config)
        if not holds_windows(config):
            alone.data.update(latents_per_row=_ANY, actions_per_row=_ANY)
        self.sampler = Sampler(store.index, alone, sources=store.meta["sources"])
        _check_histories(store, np.unique(store.index["episode"][self.sampler.candidates]))
        self._store, self._config = store, config
        self._prompts, self._questions = Prompts(config), Questions(store, config)
        self._spec = self.spec(config, 1, num_views=len(self._questions.views))

    @staticmethod
    def spec(config: ConfigDict, global_rows: int, *, num_views: int | None = None) -> Spec:
        """Name → (shape, dtype) of every array of a `VlmBatch`.

        B rows, N pictures, S tokens, T tokens of the trace, L text ids.

            images         [B,N,H,W,3] uint8, views in order; with data.vlm.previous_images the event before, then now
            ids            [B,S] prompt and answer, then padding
            length         [B] how many of them are no padding
            positions      [B,3,S] multimodal positions
            answer_start   [B] where the answer begins in ids
            answer_length  [B] its tokens with the end id; 0 in a row of padding
            trace_ids      [B,T] start id, reasoning trace, end id, padding
            trace_length   [B] how many of them are no padding; 0 in a row of padding
            is_next        [B] whether the answer is a next event
            remaining_s    [B] seconds until that event, or the one under way, has ended; 0 where there is none
            text_ids       [B,1,L] bytes of the next event's caption; the null text where there is none
            text_features  [B,1,L,Dt], instead of text_ids
            text_length    [B,1]
            window_index   [B,1] of the event; -1 in a row of padding

        And where the objective has weights of `latent_action` or `latent_video`, the arrays of `packing.batch_spec`
        with one event slot: the window of the next event, all padding where there is none.

        Args:
          config: the whole config.
          global_rows: B, rows of all hosts together.
          num_views: where `config.data.views` is empty, that is, left to the store.

        Raises:
          UserError: the number of views is not known.
        """
        data, vlm = config.data, config.data.vlm
        views = num_views or len(data.views)
        if not views:
            raise UserError("the number of views is unknown: set data.views, or give num_views")
        rows, side, length = global_rows, vlm.image_size, vlm.length
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "images": ((rows, views * (1 + vlm.previous_images), side, side, 3), np.uint8),
            "ids": ((rows, length), np.int32),
            "length": ((rows,), np.int32),
            "positions": ((rows, 3, length), np.int32),
            "answer_start": ((rows,), np.int32),
            "answer_length": ((rows,), np.int32),
            "trace_ids": ((rows, vlm.trace_length), np.int32),
            "trace_length": ((rows,), np.int32),
            "is_next": ((rows,), np.bool_),
            "remaining_s": ((rows,), np.float32),
            **text_spec(config, rows, 1),
            "window_index": ((rows, 1), np.int32),
        }
        windows = batch_spec(_one_event(config), rows, num_views=views) if holds_windows(config) else {}
        return windows | {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}

    @staticmethod
    def check(store: EventStore, config: ConfigDict) -> None:
        """Raises `UserError` where no prompt, answer or caption of the store could have the place it needs."""
        views, vlm, prompts = resolve_views(store, config), config.data.vlm, Prompts(config)
        text = "features" if store.has_text_features else "bytes"
        if text != config.model.text.kind:
            raise UserError(
                f"event store {str(store.path)!r} has text as {text}, but model.text.kind is "
                f"{config.model.text.kind!r}; set it to the store's value"
            )
        if store.meta.get("text_width", config.model.text.width) != config.model.text.width:
            raise UserError(
                f"event store {str(store.path)!r} has text features {store.meta['text_width']} wide, but "
                f"model.text.width is {config.model.text.width}; set it to the store's value"
            )
        if vlm.answer not in ("event", "trace"):
            raise UserError(f"data.vlm.answer={vlm.answer!r} is neither event nor trace")
        if holds_windows(config):
            check_store(store, config)
        levels = [level for level, share in config.data.levels.items() if share]
        spans = [(level, span) for episode in store.episodes for level in levels for span in episode["spans"][level]]
        images = len(views) * (1 + vlm.previous_images)
        captions = {span["caption"] for _, span in spans}
        now = max(captions, key=len, default="") if vlm.inside_prob else ""
        for instruction in {span["caption"] for episode in store.episodes for span in episode["spans"]["task"]}:
            prompts.ids(instruction, max(levels, key=len, default=""), (), images, now)
        for caption in captions:
            tokens = len(prompts.tokenizer.encode(planning_text.answer(caption, 99.5))) + 1
            if tokens > vlm.answer_length:
                raise UserError(
                    f"the answer {caption!r} has {tokens} tokens, more than data.vlm.answer_length="
                    f"{vlm.answer_length}; raise it"
                )

    def __call__(self, row: int, out: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The arrays of one row without their leading axis, and `packing.META_FIELDS`; see `pipeline.Rows`."""
        end, inside, which = random_stream(self._config.seed, _MOMENT, row).random(3)
        vlm = self._config.data.vlm
        moment = 1 + int(which * (len(KEYFRAME_SHARES) - 1)) if inside < vlm.inside_prob else 0
        window, *_ = [*self.sampler.row(row), -1]
        out = self.asked(window, end < vlm.done_prob, moment, out)
        out["row"][...] = row
        return out

    def asked(
        self, window: int, at_end: bool = False, moment: int = 0, out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of a row with the question `Questions.ask`, its number 0; padding where the window is -1 or its
        record bad."""
        if out is None:
            out = row_of(blank_rows(self._spec), 0)
        out["bad_index"][:] = out["window_index"][:] = -1
        out["length"][...] = out["answer_start"][...] = 1
        for name in ("ids", "trace_ids"):
            out[name][:] = self._prompts.tokenizer.pad_id
        place_text(out, 0, self._store, "")
        if window < 0:
            return out
        try:
            question = self._questions.ask(window, at_end, moment)
            if "latents" in out and question.caption:
                record, places = self._store.read(window), self._store.index[window]
                latents, actions = slice(0, int(places["length"])), slice(0, int(places["num_actions"]))
                place_window(out, 0, self._store, record, self._questions.views, latents, actions)
            self._place(out, question)
            out["window_index"][0] = window
        except BadRecord as error:
            out["bad_index"][0] = error.index
        return out

    def _place(self, out: dict[str, np.ndarray], question: Question) -> None:
        vlm, tokenizer, images = self._config.data.vlm, self._prompts.tokenizer, len(question.pictures)
        prompt_ids = self._prompts.ids(question.instruction, question.level, question.done, images, question.now)
        trace: list[int] = []
        if question.now:
            answer = tokenizer.encode(planning_text.time_left(question.remaining_s))
        else:
            final = planning_text.answer(question.caption, question.remaining_s)
            trace = [tokenizer.start_id, *self._trace(question, final, vlm.trace_length - 2), tokenizer.end_id]
            answer = tokenizer.encode(final)
            if vlm.answer == "trace":
                answer = self._trace(question, final, vlm.answer_length - 1)
        answer = [*answer, tokenizer.end_id]
        ids = [*prompt_ids, *answer]
        out["ids"][: len(ids)], out["length"][...] = ids, len(ids)
        out["positions"][:] = self._prompts.positions(out["ids"][None], np.arange(vlm.length)[None] < len(ids))[:, 0]
        out["answer_start"][...], out["answer_length"][...] = len(prompt_ids), len(answer)
        out["trace_ids"][: len(trace)], out["trace_length"][...] = trace, len(trace)
        out["is_next"][...], out["remaining_s"][...] = bool(question.caption), question.remaining_s
        out["images"][:] = question.pictures
        place_text(out, 0, self._store, question.caption)

    def _trace(self, question: Question, final: str, room: int) -> list[int]:
        """The trace in at most `room` tokens: the oldest of what is done is left out first, then what is far ahead.

        Raises:
          UserError: the answer alone does not fit.
        """
        done, remaining = list(question.done), list(question.remaining)
        while True:
            ids = self._prompts.tokenizer.encode(planning_text.trace(done, remaining, final))
            if len(ids) <= room:
                return ids
            if not done and not remaining:
                raise UserError(
                    f"a reasoning trace of {len(ids)} tokens does not fit into {room}; raise data.vlm.trace_length "
                    "(with data.vlm.answer=trace, data.vlm.answer_length)"
                )
            if done:
                del done[0]
            else:
                del remaining[-1]


def holds_windows(config: ConfigDict) -> bool:
    """Whether rows hold the windows of their events, too: the objective trains through the towers that see them."""
    return bool(config.objective.latent_action_weight or config.objective.latent_video_weight)


def _one_event(config: ConfigDict) -> ConfigDict:
    """An unlocked copy whose rows hold a single event."""
    config = config.copy_and_resolve_references().unlock()
    config.data.update(events_per_row=1, fill_target=1.0)
    return config


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """`[H, W, 3]` uint8 to `[side, side, 3]`, with the filter of the published image processor."""
    if picture.shape[:2] == (side, side):
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
