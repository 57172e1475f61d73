"""The language pathway beside the world action model, by parameter group:

vlm       the vision-language model: backbone of text, planner
small     a small language model, which reads reasoning traces
vlm_text  from the VLM's features into the video tower's text space, with two heads
staircase a branch of the VLM that gives latents in that space, without words
text      the world action model's text encoder, towards which both are trained; absent with stored features
video     its video tower, whose cross-attention reads text and latents
action    its action tower, which reads the video tower
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from ml_collections import ConfigDict

from wallwm_jax.models import world_action_model
from wallwm_jax.models.vlm import language_model, staircase, text_projector, vlm
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.staircase import StaircaseConfig
from wallwm_jax.models.vlm.text_projector import ProjectorConfig
from wallwm_jax.models.vlm.tokenizer import get_tokenizer
from wallwm_jax.models.vlm.vision_tower import VisionConfig
from wallwm_jax.models.vlm.vlm import VLMConfig

Params = dict[str, Any]

PROBES = 16  # states of the video tower's stream by which readings of a text are compared
GROUPS = ("vlm", "small", "vlm_text", "text", "staircase", "video", "action")


def vlm_config(config: ConfigDict) -> VLMConfig:
    """Sizes of the VLM of `config.vlm`. Raises `UserError` where they do not fit together."""
    how = dict(compute_dtype=config.vlm.compute_dtype, remat=config.vlm.remat)
    language = LanguageConfig(**config.vlm.language, **how)
    vision = VisionConfig(**config.vlm.vision, **how, out_width=language.width)
    return VLMConfig(language, vision, get_tokenizer(config.vlm.tokenizer).image_id)


def small_config(config: ConfigDict) -> LanguageConfig:
    """Sizes of the small language model of `config.vlm`."""
    return LanguageConfig(**config.vlm.small, compute_dtype=config.vlm.compute_dtype, remat=config.vlm.remat)


def text_shape(config: ConfigDict) -> tuple[int, int]:
    """(features, width) that the text encoder of `config.model` gives, padding too."""
    text = config.model.text
    return -(-config.data.text_length // (text.stride if text.kind == "bytes" else 1)), text.width


def projector_config(config: ConfigDict) -> ProjectorConfig:
    """Sizes of the projector: as many features, as wide, as the text encoder of `config.model` gives."""
    queries, width = text_shape(config)
    return ProjectorConfig(
        in_width=config.vlm.language.width,
        vocabulary=config.vlm.language.vocabulary,
        queries=queries,
        width=width,
        heads=config.model.text.heads,
        depth=config.vlm.resampler_depth,
        compute_dtype=config.vlm.compute_dtype,
        remat=config.vlm.remat,
    )


def staircase_config(config: ConfigDict) -> StaircaseConfig:
    """The stairs of `config.vlm.entry_depths`, into the text space of `config.model`."""
    stairs = StaircaseConfig(tuple(config.vlm.entry_depths), config.model.text.width, config.vlm.small.width)
    stairs.check(config.vlm.language.depth)
    return stairs


def init(config: ConfigDict, key: jax.Array, groups: Collection[str] = GROUPS) -> Params:
    """Random parameters, float32, of those of the `groups` that the config has; `config` is the whole config."""
    keys = dict(zip(GROUPS, jax.random.split(key, len(GROUPS))))
    params: Params = {}
    if "vlm" in groups:
        params["vlm"] = vlm.init(vlm_config(config), keys["vlm"])
    if "small" in groups:
        params["small"] = language_model.init(small_config(config), keys["small"])
    if "vlm_text" in groups:
        params["vlm_text"] = text_projector.init(projector_config(config), keys["vlm_text"])
    if "staircase" in groups:
        language = vlm_config(config).language
        backbone = language_model.init(language, keys["staircase"])  # taken over from the VLM where training starts
        params["staircase"] = staircase.init(staircase_config(config), language, backbone, keys["staircase"])
    world = [name for name in ("text", "video", "action") if name in groups]
    if world:
        found = world_action_model.init(config.model, keys["text"])
        params |= {name: found[name] for name in world if name in found}
    return params
