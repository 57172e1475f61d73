"""FLOPs of the towers' forward pass by formula: what MFU is stated against.

Two per multiply-add, matrix products and attention only. Attention counts the keys of a token's own event, so nothing
that a kernel computes beyond that helps an MFU. Training is three forwards of what trains and one of what is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict


@dataclass(frozen=True)
class RowShape:
    """What one packed row holds, full to the brim.

    Attributes:
      views, latents: V and F. events: equal ones. actions: control steps of all events. text: tokens of a caption.
    """

    views: int
    latents: int
    events: int
    actions: int
    text: int

    @classmethod
    def of(cls, config: ConfigDict, views: int) -> RowShape:
        """A row of `config.data` full of events of the greatest length."""
        event = min(config.data.latents_per_row, config.model.max_latents)
        events = max(1, config.data.latents_per_row // event)
        steps = config.model.actions_per_latent * (event - 1) * events
        return cls(views, event * events, events, min(config.data.actions_per_row, steps), int(config.data.text_length))


def forward_flops(model: ConfigDict, row: RowShape) -> dict[str, float]:
    """FLOPs of one row's forward: "video", and "action" for one draw."""
    (h, w), (p, q) = model.latent_shape, model.patch
    cells = (h // p) * (w // q)
    tokens = row.latents * row.views * cells
    return {"video": _video(model, row, tokens, cells), "action": _action(model, row, tokens, cells)}


def training_flops(config: ConfigDict, row: RowShape, stage: str) -> float:
    """Model FLOPs of one row in a train step of `stage` (`training.stages`)."""
    parts, draws = forward_flops(config.model, row), int(config.objective.action_draws)
    keys = _video_keys(config.model, row)
    if stage == "video":
        return 3.0 * parts["video"]
    action = draws * parts["action"] + keys
    return (3.0 if stage == "joint" else 1.0) * parts["video"] + 3.0 * action


def batch_flops(config: ConfigDict, batch: Mapping[str, np.ndarray]) -> float:
    """Model FLOPs of a train step of `config.train.stage` on this packed batch: each of its events as it is."""
    total = 0.0
    for row, slot in np.argwhere(batch["window_index"] >= 0):
        shape = RowShape(
            views=int(np.count_nonzero(batch["view_id"][row, slot])),
            latents=int(np.count_nonzero(batch["latent_event"][row] == slot + 1)),
            events=1,
            actions=int(np.count_nonzero(batch["action_event"][row] == slot + 1)),
            text=int(batch["text_length"][row, slot]),
        )
        total += training_flops(config, shape, config.train.stage)
    return total


def _video(model: ConfigDict, row: RowShape, tokens: int, cells: int) -> float:
    d, patch = model.width, model.patch[0] * model.patch[1] * model.latent_channels
    captions = row.events * row.text
    text = captions * (model.text.width * d + d * d)
    time = row.latents * (model.freq_dim * d + d * d + 6 * d * d)
    event = row.latents // row.events
    projections = tokens * (4 * d * d + 2 * d * d + 2 * d * model.ffn) + captions * 2 * d * d
    attention = tokens * 2 * d * (event * cells + row.text)
    if model.view_attention:
        projections += tokens * 4 * d * d
        attention += tokens * 2 * d * row.views * cells
    return 2.0 * (2 * tokens * patch * d + text + time + model.depth * (projections + attention))


def _action(model: ConfigDict, row: RowShape, tokens: int, cells: int) -> float:
    """Of one draw, without the keys and values of the video, which the draws share."""
    d, dim = model.action_width, model.action_dim
    stream, event = row.actions + row.events, (row.actions + row.events) / row.events
    border = stream * (2 * dim * d + 2 * d * d)
    time = row.events * 2 * (model.freq_dim * d + d * d + 12 * d * d)
    projections = stream * (4 * d * d + 2 * d * d + 3 * d * model.action_ffn) + row.events * 2 * d * d
    attention = stream * 2 * d * (event + tokens / row.events)
    return 2.0 * (border + time + model.depth * (projections + attention))


def _video_keys(model: ConfigDict, row: RowShape) -> float:
    (h, w), (p, q) = model.latent_shape, model.patch
    tokens = row.latents * row.views * (h // p) * (w // q)
    return 2.0 * model.depth * tokens * 2 * model.width * model.action_width
