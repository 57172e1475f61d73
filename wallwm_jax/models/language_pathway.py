"""The language pathway beside the world action model, by parameter group:

vlm       the vision-language model: backbone of text, planner
small     a small language model, which reads reasoning traces
vlm_text  from the VLM's features into the video tower's text space, with two heads
text      the world action model's text encoder, towards which `vlm_text` is trained; absent with stored features
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from ml_collections import ConfigDict

from wallwm_jax.models import world_action_model
from wallwm_jax.models.vlm import language_model, text_projector, vlm
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.text_projector import ProjectorConfig
from wallwm_jax.models.vlm.tokenizer import get_tokenizer
from wallwm_jax.models.vlm.vision_tower import VisionConfig
from wallwm_jax.models.vlm.vlm import VLMConfig

Params = dict[str, Any]

GROUPS = ("vlm", "small", "vlm_text", "text")


def vlm_config(config: ConfigDict) -> VLMConfig:
    """Sizes of the VLM of `config.vlm`. Raises `UserError` where they do not fit together."""
    how = dict(compute_dtype=config.vlm.compute_dtype, remat=config.vlm.remat)
    language = LanguageConfig(**config.vlm.language, **how)
    vision = VisionConfig(**config.vlm.vision, **how, out_width=language.width)
    return VLMConfig(language, vision, get_tokenizer(config.vlm.tokenizer).image_id)


def small_config(config: ConfigDict) -> LanguageConfig:
    """Sizes of the small language model of `config.vlm`."""
    return LanguageConfig(**config.vlm.small, compute_dtype=config.vlm.compute_dtype, remat=config.vlm.remat)


def projector_config(config: ConfigDict) -> ProjectorConfig:
    """Sizes of the projector: as many features, as wide, as the text encoder of `config.model` gives."""
    text = config.model.text
    return ProjectorConfig(
        in_width=config.vlm.language.width,
        vocabulary=config.vlm.language.vocabulary,
        queries=-(-config.data.text_length // (text.stride if text.kind == "bytes" else 1)),
        width=text.width,
        heads=text.heads,
        depth=config.vlm.resampler_depth,
        compute_dtype=config.vlm.compute_dtype,
        remat=config.vlm.remat,
    )


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
    if "text" in groups and config.model.text.kind == "bytes":
        params["text"] = world_action_model.init(config.model, keys["text"])["text"]
    return params
