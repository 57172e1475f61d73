"""FLOPs of the language pathway by formula, as `model_flops` counts those of the towers.

Two per multiply-add, matrix products and attention only, and what the delta rule needs token by token; a causal query
counts the keys before it. Training is three forwards of what trains, two of a frozen part that a gradient passes, one
of what is only read. The text encoder of captions is left out, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from wallwm_jax.models import language_pathway, model_flops
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.vision_tower import VisionConfig


@dataclass(frozen=True)
class RowShape:
    """What one row of questions holds.

    Attributes:
      images: pictures. prompt, answer, trace: tokens of each; a trace's with its start. text: features of the caption.
      window: the event's window, where rows hold it.
    """

    images: int
    prompt: int
    answer: int
    trace: int
    text: int
    window: model_flops.RowShape | None = None

    @classmethod
    def of(cls, config: ConfigDict, views: int) -> RowShape:
        """A row of `config.data.vlm` full to the brim, with the longest event."""
        vlm, text = config.data.vlm, language_pathway.projector_config(config).queries
        window = None
        if _runs_towers(config):
            window = model_flops.RowShape.of(config, views)
            window = _window(config, window.views, window.latents // window.events, window.actions // window.events)
        prompt = vlm.length - vlm.answer_length
        return cls(views * (1 + vlm.previous_images), prompt, vlm.answer_length, vlm.trace_length, text, window)


def forward_flops(config: ConfigDict, row: RowShape) -> dict[str, float]:
    """FLOPs of one row's forward by part.

    "prompt": pictures and prompt through the VLM; "features": and the answer; "vlm": and its logits. "small": the small
    model on the trace; "told": behind the latents. "projector", "branch". "match": what the tower reads of the latents;
    "caption": of the caption.
    """
    sizes, small = language_pathway.vlm_config(config), language_pathway.small_config(config)
    whole = row.prompt + row.answer
    pictures = row.images * _vision(sizes.vision, config.data.vlm.image_size)
    features = pictures + _language(sizes.language, whole)
    logits = 2.0 * sizes.language.width * sizes.language.vocabulary
    trace, latents = max(row.trace - 1, 0), len(config.vlm.entry_depths)
    words = 2.0 * trace * small.width * small.vocabulary
    return {
        "prompt": pictures + _language(sizes.language, row.prompt),
        "features": features,
        "vlm": features + row.answer * logits,
        "small": _language(small, trace) + words,
        "told": _language(small, trace + latents) + words,
        "projector": _projector(config, whole, row),
        "branch": _branch(config, row),
        "match": _reading(config, latents),
        "caption": _reading(config, row.text),
    }


def training_flops(config: ConfigDict, row: RowShape, stage: str) -> float:
    """Model FLOPs of one row in a train step of `stage`, of the VLM stages."""
    parts, weights = forward_flops(config, row), config.objective
    if stage == "vlm_sft":
        return 3.0 * (parts["vlm"] + parts["small"])
    if stage == "vlm_text":
        return parts["features"] + 3.0 * parts["projector"]
    total = parts["prompt"] + 3.0 * parts["branch"]
    if weights.trace_weight:
        total += 2.0 * parts["told"]
    if weights.match_weight:
        total += 2.0 * parts["match"] + parts["caption"]
    if row.window is not None:
        # A joint step's are three forwards of the towers; here no parameter of theirs has a gradient.
        total += 2.0 / 3.0 * model_flops.training_flops(config, row.window, "joint")
    return total


def batch_flops(config: ConfigDict, batch: Mapping[str, np.ndarray]) -> float:
    """Model FLOPs of a train step of `config.train.stage` on this batch: each question as it is."""
    total = 0.0
    for row in np.flatnonzero(batch["window_index"][:, 0] >= 0):
        window = None
        if "latents" in batch and batch["is_next"][row]:
            latents, actions = (int(np.count_nonzero(batch[name][row])) for name in ("latent_event", "action_event"))
            window = _window(config, int(np.count_nonzero(batch["view_id"][row, 0])), latents, actions)
        text = language_pathway.projector_config(config).queries
        prompt, answer, trace = (int(batch[name][row]) for name in ("answer_start", "answer_length", "trace_length"))
        shape = RowShape(batch["images"].shape[1], prompt, answer, trace, text, window)
        total += training_flops(config, shape, config.train.stage)
    return total


def _runs_towers(config: ConfigDict) -> bool:
    weights = config.objective
    return config.train.stage == "staircase" and bool(weights.latent_action_weight or weights.latent_video_weight)


def _window(config: ConfigDict, views: int, latents: int, actions: int) -> model_flops.RowShape:
    """One event, told by as many features as there are latents."""
    return model_flops.RowShape(views, latents, 1, actions, len(config.vlm.entry_depths))


def _language(sizes: LanguageConfig, tokens: int) -> float:
    linear, full = _layer(sizes, False, tokens / 2), _layer(sizes, True, tokens / 2)
    return 2.0 * tokens * (sizes.linear_depth * linear + sizes.full_depth * full)


def _layer(sizes: LanguageConfig, is_full: bool, keys: float) -> float:
    """Multiply-adds of one token in one layer; a full attention reads `keys`."""
    d, ffn = sizes.width, 3 * sizes.width * sizes.ffn
    if is_full:
        inner = sizes.heads * sizes.head_dim
        return ffn + d * (3 * inner + 2 * sizes.kv_heads * sizes.head_dim) + 2 * keys * inner
    heads, value = sizes.linear_value_heads, sizes.linear_value_dim
    state = 3 * heads * sizes.linear_key_dim * value  # read at the key, corrected, read at the query
    return ffn + d * (sizes.linear_channels + 2 * heads * value + 2 * heads) + state


def _vision(sizes: VisionConfig, side: int) -> float:
    """Of one picture."""
    d, patches = sizes.width, (side // sizes.patch) ** 2
    hidden = d * sizes.merge**2
    block = 4 * d * d + 2 * d * sizes.ffn + 2 * patches * d
    merger = patches // sizes.merge**2 * (hidden * hidden + hidden * sizes.out_width)
    return 2.0 * (patches * (sizes.patch_values * d + sizes.depth * block) + merger)


def _projector(config: ConfigDict, tokens: int, row: RowShape) -> float:
    sizes = language_pathway.projector_config(config)
    w, queries = sizes.width, sizes.queries
    keys = tokens + queries
    block = keys * 2 * w * w + queries * (2 * w * w + 2 * keys * w + 8 * w * w)
    heads = row.answer * sizes.in_width * sizes.vocabulary
    return 2.0 * (tokens * sizes.in_width * w + sizes.depth * block + queries * (w * w + w) + heads)


def _branch(config: ConfigDict, row: RowShape) -> float:
    sizes, stairs = language_pathway.vlm_config(config).language, language_pathway.staircase_config(config)
    layers = 0.0
    for number, first in enumerate(stairs.entry_depths):
        for layer in range(first, sizes.depth):
            layers += _layer(sizes, (layer + 1) % sizes.interval == 0, row.prompt + number)
    relays = len(set(stairs.entry_depths)) - 1
    ends = len(stairs.entry_depths) * sizes.width * (stairs.out_width + stairs.prefix_width)
    return 2.0 * (layers + relays * sizes.width**2 + ends)


def _reading(config: ConfigDict, features: int) -> float:
    """Cross-attention of all blocks to a text of so many features."""
    d, model = config.model.width, config.model
    tokens = features * (model.text.width * d + d * d)
    probes = language_pathway.PROBES * (2 * d * d + 2 * features * d)
    return 2.0 * (tokens + model.depth * (features * 2 * d * d + probes))
