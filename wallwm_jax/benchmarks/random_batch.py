"""Batches that obey the batch contract: random packed events (`data/packing.py`), random questions about events
(`data/vlm_batches.py`). For measurements and tests."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.packing import CLEAN, DENOISE, batch_spec
from wallwm_jax.data.vlm_batches import Prompts, VlmRows
from wallwm_jax.models.text.byte_ids import encode_bytes

_WORDS = ("reach", "grasp", "lift", "press", "the", "red", "green", "block", "button", "on", "left", "right", "slowly")


def with_views(config: ConfigDict, views: int) -> ConfigDict:
    """A copy of `config` with as many views as it names; `views` nameless ones where it leaves them to the store.

    Raises:
      UserError: neither says how many, or the camera table has not as many.
    """
    if not config.data.views and not views:
        raise UserError("config.data.views is empty, the store would decide: give --views=N")
    if (len(config.data.views) or views) >= config.model.max_views:
        raise UserError(
            f"--views={views}: model.max_views={config.model.max_views} allows one less, for unknown cameras"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.views = tuple(config.data.views) or tuple(f"view {i}" for i in range(1, views + 1))
    return config


def random_batch(
    config: ConfigDict, seed: int = 0, *, views: int = 2, absent: float = 0.2, full: bool = False
) -> dict[str, np.ndarray]:
    """Random events packed into `config.data.rows` rows; a pure function of its arguments.

    Args:
      config: sizes are read from `config.data` and `config.model`.
      seed: of every random choice.
      views: V.
      absent: probability that an event lacks one of its views, the first excepted.
      full: rows are what `model_flops.RowShape.of` counts: full of events of the greatest length, captions too.

    Returns:
      The packed batch: numpy arrays by name, shapes and dtypes of the batch contract.
    """
    rng = np.random.default_rng(seed)
    data, model = config.data, config.model
    spec = batch_spec(config, data.rows, num_views=views)
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
    b, v, f = batch["latents"].shape[:3]
    a, e, dim = data.actions_per_row, data.events_per_row, model.action_dim
    group, used = model.actions_per_latent, max(2, dim // 3)  # dimensions of one arm; the rest is invalid
    longest = min(f, model.max_latents) - 1
    batch["view_geometry"] = rng.normal(size=batch["view_geometry"].shape).astype(np.float32)
    batch["window_index"][:] = -1
    batch["text_length"][:] = 1
    if "text_ids" in batch:
        batch["text_ids"][:] = encode_bytes("", data.text_length)[0]
    for row in range(b):
        frame = action = 0
        for slot in range(e):
            future = longest if full else int(rng.integers(1, min(model.max_latents, 17)))
            if full:
                steps = min(group * future, a // (f // (1 + future)))
            else:
                steps = int(rng.integers((future - 1) * group + 1, future * group + 1))
            if frame + 1 + future > f or action + steps > a:
                break
            frames, tokens = slice(frame, frame + 1 + future), slice(action, action + steps)
            batch["latent_event"][row, frames] = slot + 1
            batch["latent_role"][row, frames] = np.where(np.arange(1 + future) > 0, DENOISE, CLEAN)
            batch["latent_pos"][row, frames] = np.arange(1 + future)
            batch["action_event"][row, tokens] = slot + 1
            batch["action_pos"][row, tokens] = np.arange(steps)
            batch["action_valid"][row, tokens, :used] = True
            batch["actions"][row, tokens, :used] = rng.uniform(-1, 1, (steps, used))
            batch["state"][row, slot, :used] = rng.uniform(-1, 1, used)
            batch["state_valid"][row, slot, :used] = True
            present = rng.random(v) >= (0.0 if full else absent)
            present[0] = True
            batch["view_id"][row, slot] = np.where(present, rng.permutation(model.max_views - 1)[:v] + 1, 0)
            shape = (v, 1 + future, *batch["latents"].shape[3:])
            batch["latents"][row, :, frames] = rng.normal(size=shape) * present[:, None, None, None, None]
            batch["valid_rect"][row, slot] = np.where(present[:, None], np.array([0, 0, 1, 1], np.float32), 0)
            words = " ".join(rng.choice(_WORDS, data.text_length if full else rng.integers(0, 4)))
            _place_text(batch, row, slot, words, rng)
            batch["window_index"][row, slot] = rng.integers(1 << 20)
            batch["duration_s"][row, slot] = steps / 10
            batch["duration_in_caption"][row, slot] = rng.random() < 0.3
            batch["event_level"][row, slot] = rng.integers(1, 3)
            if "window_number" in batch:
                batch["window_number"][row, slot] = 1 + slot
            frame, action = frames.stop, tokens.stop
    return batch


def random_questions(config: ConfigDict, seed: int = 0, *, views: int = 2, full: bool = False) -> dict[str, np.ndarray]:
    """A `VlmBatch` of random text and pictures; arguments as for `random_batch`, events have all their views.

    Raises:
      UserError: sizes that do not fit together, or no tokenizer.
    """
    rng, vlm, rows = np.random.default_rng(seed), config.data.vlm, config.data.rows
    spec = VlmRows.spec(config, rows, num_views=views)
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
    prompts, images = Prompts(config), batch["images"].shape[1]
    if "latents" in batch:
        alone = config.copy_and_resolve_references().unlock()
        alone.data.update(events_per_row=1)
        events = random_batch(alone, seed, views=views, absent=0.0, full=full)
        batch |= {name: value for name, value in events.items() if name in batch}
    batch["images"] = rng.integers(0, 256, batch["images"].shape, np.uint8)
    for row in range(rows):
        start = prompts.ids("", "", (), images)
        words = prompts.room - len(start) if full else int(rng.integers(prompts.room - len(start) + 1))
        answer = vlm.answer_length if full else int(rng.integers(1, vlm.answer_length))
        trace = vlm.trace_length if full else int(rng.integers(2, vlm.trace_length))
        ids = [*start, *rng.integers(0, 256, words + answer)]
        batch["ids"][row, : len(ids)], batch["length"][row] = ids, len(ids)
        batch["answer_start"][row], batch["answer_length"][row] = len(start) + words, answer
        batch["trace_ids"][row, :trace], batch["trace_length"][row] = rng.integers(0, 256, trace), trace
        caption = " ".join(rng.choice(_WORDS, config.data.text_length if full else 3))
        _place_text(batch, row, 0, caption, rng)
    mask = np.arange(vlm.length) < batch["length"][:, None]
    batch["positions"] = np.moveaxis(prompts.positions(batch["ids"], mask), 0, 1)
    batch["is_next"][:], batch["remaining_s"][:] = True, rng.uniform(0.5, 9.0, rows)
    batch["window_index"][:, 0] = rng.integers(1 << 20, size=rows)
    return batch


def _place_text(batch: dict[str, np.ndarray], row: int, slot: int, words: str, rng: np.random.Generator) -> None:
    """Byte ids of a caption, or a random feature for each of its bytes where captions are features."""
    length = batch["text_features" if "text_features" in batch else "text_ids"].shape[2]
    ids, tokens = encode_bytes(words, length)
    batch["text_length"][row, slot] = tokens
    if "text_ids" in batch:
        batch["text_ids"][row, slot] = ids
    else:
        batch["text_features"][row, slot, :tokens] = rng.normal(size=(tokens, batch["text_features"].shape[3]))
