"""A packed batch of random events that obeys the batch contract, and the tiny config that tests build models from."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from configs import base
from wallwm_jax.models.text.byte_ids import encode_bytes

_WORDS = ("reach", "grasp", "lift", "press", "the", "red", "green", "block", "button", "on", "left", "right", "slowly")


def tiny_config(**data: object) -> ConfigDict:
    """The base config with every size cut down; `data` overrides entries of `config.data`."""
    config = base.get_config().copy_and_resolve_references()
    with config.unlocked():
        sizes = dict(rows=2, latents_per_row=12, actions_per_row=80, events_per_row=5, text_length=12)
        config.data.update(sizes | data)
        config.model.update(
            dict(
                latent_shape=(4, 4),
                latent_channels=6,
                width=32,
                depth=2,
                heads=2,
                ffn=64,
                freq_dim=32,
                max_views=4,
                action_width=24,
                action_heads=2,
                action_ffn=48,
                max_latents=6,
            )
        )
        config.model.text.update(dict(width=16, depth=1, heads=2))
    return config.lock()


def random_batch(config: ConfigDict, seed: int = 0, *, views: int = 2, absent: float = 0.2) -> dict[str, np.ndarray]:
    """Random events packed into `config.data.rows` rows; a pure function of its arguments.

    Args:
      config: sizes are read from `config.data` and `config.model`.
      seed: of every random choice.
      views: V.
      absent: probability that an event lacks one of its views, the first excepted.

    Returns:
      The packed batch: numpy arrays by name, shapes and dtypes of the batch contract.
    """
    rng = np.random.default_rng(seed)
    data, model = config.data, config.model
    b, v, f = data.rows, views, data.latents_per_row
    a, e, length = data.actions_per_row, data.events_per_row, data.text_length
    h, w = model.latent_shape
    dim, group = model.action_dim, model.actions_per_latent
    used = max(2, dim // 3)  # dimensions of one arm; the rest is invalid
    batch = dict(
        latents=np.zeros((b, v, f, h, w, model.latent_channels), np.float32),
        latent_event=np.zeros((b, f), np.int32),
        latent_role=np.zeros((b, f), np.int32),
        latent_pos=np.zeros((b, f), np.int32),
        actions=np.zeros((b, a, dim), np.float32),
        action_event=np.zeros((b, a), np.int32),
        action_pos=np.zeros((b, a), np.int32),
        action_valid=np.zeros((b, a, dim), bool),
        state=np.zeros((b, e, dim), np.float32),
        state_valid=np.zeros((b, e, dim), bool),
        text_length=np.ones((b, e), np.int32),
        view_id=np.zeros((b, e, v), np.int32),
        valid_rect=np.zeros((b, e, v, 4), np.float32),
        view_geometry=rng.normal(size=(b, v, f, 21)).astype(np.float32),
        window_index=np.full((b, e), -1, np.int32),
        duration_s=np.zeros((b, e), np.float32),
        duration_in_caption=np.zeros((b, e), bool),
        event_level=np.zeros((b, e), np.int32),
    )
    batch["text_ids"] = np.tile(encode_bytes("", length)[0], (b, e, 1))
    for row in range(b):
        frame = action = 0
        for slot in range(e):
            future = int(rng.integers(1, min(model.max_latents, 17)))
            steps = int(rng.integers((future - 1) * group + 1, future * group + 1))
            if frame + 1 + future > f or action + steps > a:
                break
            frames, tokens = slice(frame, frame + 1 + future), slice(action, action + steps)
            batch["latent_event"][row, frames] = slot + 1
            batch["latent_role"][row, frames] = np.minimum(np.arange(1 + future), 1) + 1
            batch["latent_pos"][row, frames] = np.arange(1 + future)
            batch["action_event"][row, tokens] = slot + 1
            batch["action_pos"][row, tokens] = np.arange(steps)
            batch["action_valid"][row, tokens, :used] = True
            batch["actions"][row, tokens, :used] = rng.uniform(-1, 1, (steps, used))
            batch["state"][row, slot, :used] = rng.uniform(-1, 1, used)
            batch["state_valid"][row, slot, :used] = True
            present = rng.random(v) >= absent
            present[0] = True
            batch["view_id"][row, slot] = np.where(present, rng.permutation(model.max_views - 1)[:v] + 1, 0)
            shape = (v, 1 + future, h, w, model.latent_channels)
            batch["latents"][row, :, frames] = rng.normal(size=shape) * present[:, None, None, None, None]
            batch["valid_rect"][row, slot] = np.where(present[:, None], np.array([0, 0, 1, 1], np.float32), 0)
            words = " ".join(rng.choice(_WORDS, rng.integers(0, 4)))
            batch["text_ids"][row, slot], batch["text_length"][row, slot] = encode_bytes(words, length)
            batch["window_index"][row, slot] = rng.integers(1 << 20)
            batch["duration_s"][row, slot] = steps / 10
            batch["duration_in_caption"][row, slot] = rng.random() < 0.3
            batch["event_level"][row, slot] = rng.integers(1, 3)
            frame, action = frames.stop, tokens.stop
    return batch
