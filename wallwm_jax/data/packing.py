"""Packed rows: which events share a row (bin packing), what a batch looks like, and the arrays of one row.

A row holds several events end to end; `latent_event`, `action_event` and the event slots say what belongs to which.
Events never attend to each other, so a row is a bin and nothing more (WALL-WM, arXiv 2606.01955, page 23).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import GEOMETRY_DIM, BadRecord, EventStore, WindowRecord
from wallwm_jax.events.caption import duration_clause, in_order, with_parent
from wallwm_jax.models.text.byte_ids import encode_bytes

CLEAN, DENOISE = 1, 2  # latent_role; 0 is padding
META_FIELDS = ("row", "bad_index")  # travel with a batch on the host, never to a device
_CAPTIONS = 3  # stream of random numbers; the sampler has 1 and 2
_SEARCH_NODES = 2000  # combinations tried for one row

Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


def random_stream(seed: int, stream: int, first: int, second: int = 0) -> np.random.Generator:
    """A Philox generator whose numbers are a pure function of the four integers."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, first, second], np.uint64)))


def pack_events(
    lengths: Sequence[int], actions: Sequence[int], rows: int, capacity: tuple[int, int, int]
) -> list[list[int]] | None:
    """Lays all events into `rows` rows without exceeding any capacity; deterministic.

    Minimum bin slack (Gupta and Ho 1999): each row takes the combination of the remaining lengths, longest first, that
    leaves the fewest latents free. Lengths are small integers, so almost every row comes out exactly full, where
    best-fit-decreasing leaves a gap of one latent in rows of equal events. What room is left would all be in the last
    rows; short events then move there until rows are about equally full.

    Args:
      lengths: latents of each event.
      actions: action tokens of each event.
      rows: R.
      capacity: latents, action tokens and events that one row holds (F, A, E).

    Returns:
      `rows` lists of positions in `lengths` (some may be empty), or None where not all events found a place.
    """
    shelves: dict[int, list[int]] = {}
    for event in sorted(range(len(lengths)), key=lambda event: (actions[event], -event)):
        shelves.setdefault(lengths[event], []).append(event)
    packed: list[list[int]] = []
    for _ in range(rows):
        sizes = sorted((size for size, shelf in shelves.items() if shelf), reverse=True)
        row: list[int] = []
        for size, count in _fullest(sizes, shelves, actions, capacity):
            row += [shelves[size].pop() for _ in range(count)]
        packed.append(row)
    if any(shelves.values()):
        return None
    _level(packed, lengths, actions, capacity)
    return packed


def _level(
    packed: list[list[int]], lengths: Sequence[int], actions: Sequence[int], capacity: tuple[int, int, int]
) -> None:
    """Moves the shortest event of a fullest row to the emptiest one, as long as that brings the two closer."""
    loads = [sum(lengths[event] for event in row) for row in packed]
    while True:
        taker = min(range(len(packed)), key=loads.__getitem__)
        most = max(loads)
        givers = [row for row in range(len(packed)) if loads[row] == most]
        giver, event = min(
            ((row, event) for row in givers for event in packed[row]),
            key=lambda pair: lengths[pair[1]],
            default=(0, -1),
        )
        tokens = sum(actions[other] for other in packed[taker])
        if (
            event < 0
            or loads[taker] + lengths[event] > most - lengths[event]
            or tokens + actions[event] > capacity[1]
            or len(packed[taker]) == capacity[2]
        ):
            return
        packed[giver].remove(event)
        packed[taker].append(event)
        loads[giver] -= lengths[event]
        loads[taker] += lengths[event]


def _fullest(
    sizes: Sequence[int], shelves: dict[int, list[int]], actions: Sequence[int], capacity: tuple[int, int, int]
) -> list[tuple[int, int]]:
    """(length, count) pairs of the fullest row found: depth-first, most of the longest first, stops at an exact fit."""
    best: list[tuple[int, int]] = []
    least, nodes = capacity[0] + 1, 0

    def search(depth: int, latents: int, tokens: int, slots: int, chosen: list[tuple[int, int]]) -> bool:
        nonlocal best, least, nodes
        nodes += 1
        if latents < least:
            best, least = chosen, latents
        if latents == 0 or nodes > _SEARCH_NODES:
            return True
        if slots == 0 or depth == len(sizes):
            return False
        size = sizes[depth]
        shelf = shelves[size]
        for count in range(min(len(shelf), latents // size, slots), 0, -1):
            spent = sum(actions[event] for event in shelf[-count:])
            if spent <= tokens and search(
                depth + 1, latents - count * size, tokens - spent, slots - count, [*chosen, (size, count)]
            ):
                return True
        # The longest events have the hardest time to find a place later, so a row always starts with one of them.
        return depth > 0 and search(depth + 1, latents, tokens, slots, chosen)

    search(0, *capacity, [])
    return best


def batch_spec(config: ConfigDict, global_rows: int, *, num_views: int | None = None) -> Spec:
    """Name → (shape, dtype) of every array of a packed batch that goes to the devices.

    B rows, V views, F latents, A action tokens, E event slots, L text ids. Absent events have `window_index` -1, the
    null text and `duration_s` 0; absent views have `view_id` 0 and zeros.

        latents        [B,V,F,h,w,C] normalised     latent_event   [B,F] slot + 1, 0 padding
        latent_role    [B,F] 0 padding, 1, 2        latent_pos     [B,F] -M..-1, 0 the observation, then 1..N
        actions        [B,A,Da] normalised          action_event   [B,A] slot + 1, 0 padding
        action_valid   [B,A,Da]                     action_pos     [B,A] below 0 history, 0..T-1
        state          [B,E,Da] normalised          state_valid    [B,E,Da]
        text_ids       [B,E,L]                      text_features  [B,E,L,Dt], instead of text_ids
        text_length    [B,E]                        view_geometry  [B,V,F,21], see `event_store`
        view_id        [B,E,V]                      valid_rect     [B,E,V,4] x0 y0 x1 y1, shares of the frame
        window_index   [B,E]                        event_level    [B,E] index into LEVELS
        duration_s     [B,E] seconds                duration_in_caption [B,E]
        window_number  [B,E] 1, 2, ... along an episode, 0 absent; with `data.window_kind = "history"` only

    Args:
      config: the whole config.
      global_rows: B, rows of all hosts together.
      num_views: V; needed where `config.data.views` is empty, that is, left to the store.

    Raises:
      UserError: the number of views is not known.
    """
    data, model = config.data, config.model
    views = num_views or len(data.views)
    if not views:
        raise UserError("the number of views is unknown: set data.views, or give num_views")
    b, v, f, a, e = global_rows, views, data.latents_per_row, data.actions_per_row, data.events_per_row
    dim = model.action_dim
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "latents": ((b, v, f, *model.latent_shape, model.latent_channels), np.float32),
        "latent_event": ((b, f), np.int32),
        "latent_role": ((b, f), np.int32),
        "latent_pos": ((b, f), np.int32),
        "actions": ((b, a, dim), np.float32),
        "action_event": ((b, a), np.int32),
        "action_pos": ((b, a), np.int32),
        "action_valid": ((b, a, dim), np.bool_),
        "state": ((b, e, dim), np.float32),
        "state_valid": ((b, e, dim), np.bool_),
        **text_spec(config, b, e),
        "view_id": ((b, e, v), np.int32),
        "valid_rect": ((b, e, v, 4), np.float32),
        "view_geometry": ((b, v, f, GEOMETRY_DIM), np.float32),
        "window_index": ((b, e), np.int32),
        "duration_s": ((b, e), np.float32),
        "duration_in_caption": ((b, e), np.bool_),
        "event_level": ((b, e), np.int32),
    }
    if data.window_kind == "history":
        shapes["window_number"] = ((b, e), np.int32)
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def text_spec(config: ConfigDict, rows: int, slots: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Arrays of captions: `text_ids` or, of a frozen encoder, `text_features`; and `text_length`."""
    length, text = config.data.text_length, config.model.text
    kept: tuple[str, tuple[tuple[int, ...], Any]] = ("text_ids", ((rows, slots, length), np.int32))
    if text.kind == "features":
        kept = ("text_features", ((rows, slots, length, text.width), np.float32))
    return {kept[0]: kept[1], "text_length": ((rows, slots), np.int32)}


@dataclass(frozen=True)
class Caption:
    """The text of one event as the model sees it, and whether it tells the duration."""

    text: str
    has_duration: bool = False


def draw_caption(store: EventStore, record: WindowRecord, data: ConfigDict, rng: np.random.Generator) -> Caption:
    """Draws how an event is worded: null text, paraphrase, prefix by its parent's caption, duration clause.

    The probabilities are `config.data`'s. Every draw takes five numbers from `rng`, and more where a window has history
    or is told what goes on in it. A clause or prefix that would take the text past `data.text_length` tokens is
    left out, so that no caption loses its end. The instruction never has a clause on a window that is not the whole
    task. `data.caption` tells all windows the instruction, or windows other than events all that goes on in them; but a
    window with history is always told, with `data.chunk_event_prob`, the event that goes on where it begins.
    """
    drop, reword, which, prefix, clause = rng.random(5)
    length = record.duration_s * float(store.meta["action_hz"])
    if drop < drop_probability(length, data.caption_drop, data.caption_drop_long, *data.caption_drop_lengths):
        return Caption("")
    if record.kind == "history" and rng.random() < data.chunk_event_prob:
        event = store.event_at(record.episode_id, _draw_level(data, rng), record.start)
        if event and _fits(store, event["caption"], data.text_length):
            return Caption(event["caption"])
    text, parent, others = store.caption(record.caption_id), record.parent_caption_id, record.paraphrase_ids
    lasts = record.kind == "event"  # the duration is that of what the text tells, not of a part of the task
    if data.caption == "instruction" and parent >= 0:
        text, parent, others, lasts = store.caption(int(record.level_caption_ids[0])), -1, (), False
    elif data.caption == "events" and record.kind != "event":
        told = [event["caption"] for event in store.events_within(record, _draw_level(data, rng))]
        while len(told) > 1 and not _fits(store, in_order(told), data.text_length):
            told.pop()
        text, others, lasts = in_order(told) or text, (), bool(told)
    if others and reword < data.paraphrase_prob:
        text = store.caption(others[int(which * len(others))])
    longer = duration_clause(text, record.duration_s)
    timed = lasts and clause < data.duration_clause_prob and _fits(store, longer, data.text_length)
    if timed:
        text = longer
    longer = with_parent(store.caption(parent), text)
    if prefix < data.parent_caption_prob and _fits(store, longer, data.text_length):
        text = longer
    return Caption(text, timed)


def _draw_level(data: ConfigDict, rng: np.random.Generator) -> str:
    shares = {level: share for level, share in data.levels.items() if share}
    return str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))


def drop_probability(length: float, floor: float, ceiling: float, short: float, long: float) -> float:
    """Probability of dropping the caption of an event of `length` control steps (WALL-WM eq. 20).

    It rises along half a cosine from `floor` at `short` steps to `ceiling` at `long` steps: a caption says more of a
    long event than its window shows.
    """
    share = min(max((length - short) / (long - short), 0.0), 1.0)
    return floor + (ceiling - floor) * 0.5 * (1.0 - math.cos(math.pi * share))


def _fits(store: EventStore, text: str, length: int) -> bool:
    if store.has_text_features:
        tokens = store.text_tokens(text)
        return tokens is not None and tokens <= length
    return len(text.encode()) < length  # one id ends the text


def place_text(out: dict[str, np.ndarray], slots: Any, store: EventStore, text: str) -> None:
    """Puts a caption into event slots: its byte ids, or the features that the store has of it."""
    if not store.has_text_features:
        out["text_ids"][slots], out["text_length"][slots] = encode_bytes(text, out["text_ids"].shape[-1])
        return
    features = store.text_features(text)[: out["text_features"].shape[-2]]
    out["text_features"][slots, : len(features)] = features
    out["text_length"][slots] = len(features)


def blank_rows(spec: Spec) -> dict[str, np.ndarray]:
    """Zeros in the arrays of a spec, and in `META_FIELDS`: `row` [B] int64 and `bad_index` [B,E] int32."""
    rows, slots = spec["window_index"][0]
    meta: Spec = {"row": ((rows,), np.dtype(np.int64)), "bad_index": ((rows, slots), np.dtype(np.int32))}
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in {**spec, **meta}.items()}


def row_of(batch: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """One row of a batch, without its leading axis; writing into it writes into the batch."""
    return {name: value[number, ...] for name, value in batch.items()}


def pack_row(
    store: EventStore,
    config: ConfigDict,
    windows: Sequence[int],
    row: int,
    views: Sequence[str],
    out: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Reads the windows of one row and lays them out; a pure function of its arguments and the store.

    Args:
      store: where the windows are.
      config: sizes, caption probabilities and seed.
      windows: index positions, in slot order; together they fit the row.
      row: global row number; with `config.seed` and the slot it decides how a caption is worded.
      views: V view names, in order.
      out: zeros to write to, a row of `blank_rows`; by default new ones.

    Returns:
      The arrays of `batch_spec` without their leading axis, and `META_FIELDS`: `row` [] int64 and `bad_index` [E]
      int32, the windows whose record was bad (-1: none). A bad record leaves its place in the row as padding.
    """
    if out is None:
        out = row_of(blank_rows(batch_spec(config, 1, num_views=len(views))), 0)
    out["row"][...] = row
    out["bad_index"][:] = out["window_index"][:] = -1
    place_text(out, np.arange(len(out["window_index"])), store, "")
    latent = action = 0
    for slot, window in enumerate(windows):
        entry = store.index[window]
        latents, actions = slice(latent, latent + entry["length"]), slice(action, action + entry["num_actions"])
        latent, action = latents.stop, actions.stop
        try:
            record = store.read(window)
            place_window(out, slot, store, record, views, latents, actions)
        except BadRecord:
            out["bad_index"][slot] = window
            continue
        caption = draw_caption(store, record, config.data, random_stream(config.seed, _CAPTIONS, row, slot))
        place_text(out, slot, store, caption.text)
        out["duration_in_caption"][slot] = caption.has_duration
        out["duration_s"][slot] = record.duration_s
        out["window_index"][slot] = window
        out["event_level"][slot] = entry["level"]
        if "window_number" in out:
            out["window_number"][slot] = 1 + record.event_index
    return out


def place_window(
    out: dict[str, np.ndarray],
    slot: int,
    store: EventStore,
    record: WindowRecord,
    views: Sequence[str],
    latents: slice,
    actions: slice,
) -> None:
    """Puts what a window shows and does into an event slot of a row: its video at `latents`, its commands at `actions`.

    Raises:
      BadRecord: a frame is not a JPEG picture; nothing was put anywhere then.
    """
    present = {view: number for number, view in enumerate(views) if view in record.frames}
    store.read_latents(record, {view: out["latents"][number, latents] for view, number in present.items()})
    _place_views(out, slot, latents, store, record, present)
    _place_actions(out, slot, actions, store, record)


def _place_views(
    out: dict[str, np.ndarray],
    slot: int,
    where: slice,
    store: EventStore,
    record: WindowRecord,
    present: Mapping[str, int],
) -> None:
    """Says what the latents of an event are: of which views (name → number in the row), when and in what role."""
    stored, table = store.meta["views"], store.meta["cameras"]
    for view, number in present.items():
        out["view_geometry"][number, where] = record.geometry[stored.index(view)]
        out["view_id"][slot, number] = table[view]
        out["valid_rect"][slot, number] = (0, 0, 1, 1)
    out["latent_event"][where] = slot + 1
    position = np.arange(where.stop - where.start) - record.history
    out["latent_pos"][where] = position
    out["latent_role"][where] = np.where(position > 0, DENOISE, CLEAN)


def _place_actions(
    out: dict[str, np.ndarray], slot: int, where: slice, store: EventStore, record: WindowRecord
) -> None:
    valid = record.action_valid
    out["actions"][where] = np.where(valid, store.stats.normalize_actions(record.actions), 0)
    out["action_valid"][where] = valid
    out["action_event"][where] = slot + 1
    out["action_pos"][where] = np.arange(where.stop - where.start) - record.past_actions
    out["state"][slot] = np.where(record.state_valid, store.stats.normalize_state(record.state), 0)
    out["state_valid"][slot] = record.state_valid
