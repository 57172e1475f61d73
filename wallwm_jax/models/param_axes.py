"""The one table of parameters: each path's logical axes, and how the optimizer treats it.

Shardings, Muon's matrix axes, weight decay and freezing read it.

A path is the keys of the parameter tree joined by "/", for example "video/blocks/ffn/up/kernel". Every parameter
matches exactly one rule; `rule_for` raises otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from wallwm_jax.models.layers import Linear
from wallwm_jax.optim.ownership import ADAMW, MatrixSpec

MATRIX, TABLE, VECTOR = "matrix", "table", "vector"


@dataclass(frozen=True)
class Rule:
    """Logical axes of the paths that match `pattern` (whole path), outermost first.

    `kind`: "matrix" is a linear map inside a block (Muon, decayed); "table" is a linear map at the border or an
    embedding (AdamW, decayed); "vector" is a bias, norm, modulation or position table (AdamW, not decayed).
    """

    pattern: str
    axes: tuple[str, ...]
    kind: str


_BLOCK = r"(video|action|text|vlm_text|vlm/vision)/blocks/"
_ATTENTION = _BLOCK + r"(\w*attention/)+"
_MODEL = r"(vlm/language|small|staircase)/"
_LANGUAGE = _MODEL + r"blocks/(linear|full)/"
_DELTA = _MODEL + r"blocks/linear/delta/"
_GATED = _MODEL + r"blocks/full/attention/"

_FROM_VIDEO = r"action/blocks/video_attention/(key|value)/kernel"  # in the towers alone narrower than its input

RULES = (
    Rule(_FROM_VIDEO, ("layers", "video", "split_heads"), MATRIX),
    Rule(rf"(?!{_FROM_VIDEO})" + _ATTENTION + r"(query|key|value)/kernel", ("layers", "embed", "heads"), MATRIX),
    Rule(_ATTENTION + r"output/kernel", ("layers", "heads", "embed"), MATRIX),
    Rule(_ATTENTION + r"(query|key|value)/bias", ("layers", "heads"), VECTOR),
    Rule(_ATTENTION + r"output/bias", ("layers", "embed"), VECTOR),
    Rule(_ATTENTION + r"(query|key)_norm/scale", ("layers", "heads"), VECTOR),
    Rule(r"action/blocks/state_value/kernel", ("layers", "embed", "heads"), MATRIX),
    Rule(r"action/blocks/state_output/kernel", ("layers", "heads", "embed"), MATRIX),
    Rule(r"action/blocks/state_value/bias", ("layers", "heads"), VECTOR),
    Rule(r"action/blocks/state_output/bias", ("layers", "embed"), VECTOR),
    Rule(_BLOCK + r"ffn/(up|gate)/kernel", ("layers", "embed", "mlp"), MATRIX),
    Rule(_BLOCK + r"ffn/down/kernel", ("layers", "mlp", "embed"), MATRIX),
    Rule(_BLOCK + r"ffn/(up|gate)/bias", ("layers", "mlp"), VECTOR),
    Rule(_BLOCK + r"ffn/down/bias", ("layers", "embed"), VECTOR),
    Rule(_BLOCK + r"(view_attention/)?modulation", ("layers", "modulation", "embed"), VECTOR),
    Rule(_BLOCK + r"\w+_norm/(scale|bias)", ("layers", "embed"), VECTOR),
    Rule(r"video/patch_embedding/kernel", ("patch", "embed"), TABLE),
    Rule(r"video/head/kernel", ("embed", "patch"), TABLE),
    Rule(r"video/head/bias", ("patch",), VECTOR),
    Rule(r"video/cameras/angles", ("view", "angle"), VECTOR),
    Rule(r"video/place_embedding", ("view", "patch", "embed"), VECTOR),
    Rule(r"video/text_up/kernel", ("text", "embed"), TABLE),
    Rule(r"(video/text_down|action/(encoder_down|head_up))/kernel", ("embed", "embed_out"), TABLE),
    Rule(r"\w+/\w*time_embedding/up/kernel", ("frequency", "embed"), TABLE),
    Rule(r"\w+/\w*time_embedding/down/kernel", ("embed", "embed_out"), TABLE),
    Rule(r"\w+/\w*time_embedding/projection/kernel", ("embed", "modulation"), TABLE),
    Rule(r"\w+/\w*time_embedding/projection/bias", ("modulation",), VECTOR),
    Rule(r"\w+/\w*time_embedding/(up|down)/bias", ("embed",), VECTOR),
    Rule(r"\w+/head_modulation", ("modulation", "embed"), VECTOR),
    Rule(r"video/(patch_embedding|text_up|text_down)/bias", ("embed",), VECTOR),
    Rule(r"action/encoder_up/kernel", ("action", "embed"), TABLE),
    Rule(r"action/head_down/kernel", ("embed", "action"), TABLE),
    Rule(r"action/head_down/bias", ("action",), VECTOR),
    Rule(r"action/(encoder_up|encoder_down|head_up)/bias", ("embed",), VECTOR),
    Rule(r"action/(frame|window)_embedding", ("frame", "embed"), VECTOR),
    Rule(r"text/embedding", ("vocabulary", "features"), TABLE),
    Rule(r"text/ngram_embedding", ("ngram", "vocabulary", "features"), TABLE),
    Rule(r"text/merge/kernel", ("features", "embed"), TABLE),
    Rule(r"text/merge/bias", ("embed",), VECTOR),
    Rule(r"text/norm/(scale|bias)", ("embed",), VECTOR),
    Rule(r"duration/up/kernel", ("features", "embed"), TABLE),
    Rule(r"duration/down/kernel", ("embed", "quantile"), TABLE),
    Rule(r"duration/up/bias", ("embed",), VECTOR),
    Rule(r"duration/down/bias", ("quantile",), VECTOR),
    Rule(_MODEL + r"embedding", ("vocabulary", "embed"), TABLE),
    Rule(_MODEL + r"head/kernel", ("embed", "vocabulary"), TABLE),
    Rule(_MODEL + r"norm/scale", ("embed",), VECTOR),
    Rule(_LANGUAGE + r"(mixer|ffn)_norm/scale", ("layers", "embed"), VECTOR),
    Rule(_LANGUAGE + r"ffn/(up|gate)/kernel", ("layers", "embed", "mlp"), MATRIX),
    Rule(_LANGUAGE + r"ffn/down/kernel", ("layers", "mlp", "embed"), MATRIX),
    Rule(_DELTA + r"(qkv|gate|beta|decay)/kernel", ("layers", "embed", "heads"), MATRIX),
    Rule(_DELTA + r"output/kernel", ("layers", "heads", "embed"), MATRIX),
    Rule(_DELTA + r"conv", ("layers", "tap", "heads"), VECTOR),
    Rule(_DELTA + r"(A_log|dt_bias)", ("layers", "heads"), VECTOR),
    Rule(_DELTA + r"norm/scale", ("layers", "head_dim"), VECTOR),
    Rule(_GATED + r"(query|key|value)/kernel", ("layers", "embed", "heads"), MATRIX),
    Rule(_GATED + r"output/kernel", ("layers", "heads", "embed"), MATRIX),
    Rule(_GATED + r"(query|key)_norm/scale", ("layers", "head_dim"), VECTOR),
    Rule(r"vlm/vision/blocks/qkv/kernel", ("layers", "embed", "heads"), MATRIX),
    Rule(r"vlm/vision/blocks/qkv/bias", ("layers", "heads"), VECTOR),
    Rule(r"vlm/vision/blocks/output/kernel", ("layers", "heads", "embed"), MATRIX),
    Rule(r"vlm/vision/blocks/output/bias", ("layers", "embed"), VECTOR),
    Rule(r"vlm/vision/patch_embedding/kernel", ("patch", "embed"), TABLE),
    Rule(r"vlm/vision/patch_embedding/bias", ("embed",), VECTOR),
    Rule(r"vlm/vision/position_embedding", ("patch", "embed"), VECTOR),
    Rule(r"vlm/vision/merger/norm/(scale|bias)", ("embed",), VECTOR),
    Rule(r"vlm/vision/merger/up/kernel", ("embed", "mlp"), TABLE),
    Rule(r"vlm/vision/merger/up/bias", ("mlp",), VECTOR),
    Rule(r"vlm/vision/merger/down/kernel", ("mlp", "embed"), TABLE),
    Rule(r"vlm/vision/merger/down/bias", ("embed",), VECTOR),
    Rule(r"vlm_text/(project|output)/kernel", ("embed", "embed_out"), TABLE),
    Rule(r"vlm_text/(project|output)/bias", ("embed",), VECTOR),
    Rule(r"vlm_text/(memory_)?norm/(scale|bias)", ("embed",), VECTOR),
    Rule(r"vlm_text/queries", ("text", "embed"), VECTOR),
    Rule(r"staircase/border/start", ("embed",), VECTOR),
    Rule(r"staircase/border/steps", ("text", "embed"), VECTOR),
    Rule(r"staircase/border/(relay_)?norm/scale", ("embed",), VECTOR),
    Rule(r"staircase/border/(relay|projector|prefix)/kernel", ("embed", "embed_out"), TABLE),
    Rule(r"staircase/border/(relay|projector|prefix)/bias", ("embed",), VECTOR),
    Rule(r"vlm_text/next/kernel", ("embed", "vocabulary"), TABLE),
    Rule(r"vlm_text/(time|present)/kernel", ("embed", "quantile"), TABLE),
    Rule(r"vlm_text/(time|present)/bias", ("quantile",), VECTOR),
)


def rule_for(path: str) -> Rule:
    """The one rule of a path.

    Raises:
      ValueError: no rule matches, or several do.
    """
    matches = [rule for rule in RULES if re.fullmatch(rule.pattern, path)]
    if len(matches) != 1:
        found = ", ".join(repr(rule.pattern) for rule in matches) or "none"
        raise ValueError(f"parameter {path!r} must match exactly one rule of param_axes.RULES; matches: {found}")
    return matches[0]


def map_params(function: Callable[[str, Rule, Any], Any], params: Any) -> Any:
    """The tree of `function(path, rule, leaf)` over all parameters (arrays or shapes).

    Raises:
      ValueError: a parameter without exactly one rule, or whose rank is not its rule's.
    """

    def visit(keys: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        rule = rule_for(path)
        if len(rule.axes) != len(leaf.shape):
            raise ValueError(f"parameter {path!r} has shape {tuple(leaf.shape)}, its rule the axes {rule.axes}")
        return function(path, rule, leaf)

    return jax.tree_util.tree_map_with_path(visit, params)


def name_axes(model: nnx.Module) -> None:
    """Tells every linear map of a whole model the logical axes of its kernel `[in, out]`, and which axis of its input
    are rows: in blocks of the action tower the second, after noise draws, unless it reads the video."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            name = "/".join(map(str, (*path, "kernel")))
            fan_in, fan_out = rule_for(name).axes[-2:]
            module.axes = (fan_in, fan_out)
            module.rows = int(name.startswith("action/blocks/") and not re.fullmatch(_FROM_VIDEO, name))


def muon_matrices(params: Any) -> Any:
    """Per leaf a `MatrixSpec` where Muon applies, the linear maps of the blocks, `[L, in, out]`; `ADAMW` elsewhere."""
    return map_params(lambda path, rule, leaf: MatrixSpec(1, 2) if rule.kind == MATRIX else ADAMW, params)


def decay_mask(params: Any) -> Any:
    """Per leaf: whether weight decay applies."""
    return map_params(lambda path, rule, leaf: rule.kind != VECTOR, params)


def groups(params: Any) -> Any:
    """Per leaf its part of the model: "video", "action", "text", "duration", "vlm", "small", "vlm_text" or "staircase".

    Stages train and freeze by it.
    """
    return map_params(lambda path, rule, leaf: path.split("/", 1)[0], params)
