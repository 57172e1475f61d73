"""Names and shapes of Qwen3.5, in the layout of transformers: the language model here, the vision tower beside it.

Published weights carry a head that predicts one token further ahead (`mtp.*`). Our model has no use for it; it is kept
as the parameters "mtp/...", so that going back gives the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wallwm_jax.models.convert import qwen3_5_vision
from wallwm_jax.models.convert.rules import (
    LINEAR,
    SAME,
    Reshape,
    Rule,
    Shape,
    Table,
    Transform,
    Transpose,
    chain,
    read_size,
    require,
)
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.vlm import VLMConfig

FOLDER = ""
COMPANIONS = ("tokenizer.json",)
OPTIONAL = (
    "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip

_EMBEDDING, _NORM, _HEAD = (
    "model.language_model.embed_tokens.weight",
    "model.language_model.norm.weight",
    "lm_head.weight",
)
_LAYER = "model.language_model.layers.{}."

_EVERY_LAYER = {
    "mixer_norm/scale": "input_layernorm.weight",
    "ffn_norm/scale": "post_attention_layernorm.weight",
    "ffn/gate/kernel": "mlp.gate_proj.weight",
    "ffn/up/kernel": "mlp.up_proj.weight",
    "ffn/down/kernel": "mlp.down_proj.weight",
}
_LINEAR = {
    "delta/qkv/kernel": "linear_attn.in_proj_qkv.weight",
    "delta/gate/kernel": "linear_attn.in_proj_z.weight",
    "delta/beta/kernel": "linear_attn.in_proj_b.weight",
    "delta/decay/kernel": "linear_attn.in_proj_a.weight",
    "delta/output/kernel": "linear_attn.out_proj.weight",
    "delta/conv": "linear_attn.conv1d.weight",
    "delta/A_log": "linear_attn.A_log",
    "delta/dt_bias": "linear_attn.dt_bias",
    "delta/norm/scale": "linear_attn.norm.weight",
}
_FULL = {
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/output/kernel": "self_attn.o_proj.weight",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
}
_AHEAD = {
    "fc/kernel": "fc.weight",
    "norm/scale": "norm.weight",
    "embedding_norm/scale": "pre_fc_norm_embedding.weight",
    "hidden_norm/scale": "pre_fc_norm_hidden.weight",
}


def table(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Table:
    """The rules of a whole Qwen3.5: language model, vision tower and, where the file has it, the `mtp` head.

    Args:
      shapes: of every tensor in the file.
      config: its config.json.

    Raises:
      UserError: another model, or a variant that ours is not.
    """
    require(config, "model_type", ["qwen3_5"], None)
    vlm = VLMConfig.from_json(config)
    rules = [*language_rules(vlm.language), *qwen3_5_vision.vision_rules(vlm.vision)]
    if any(name.startswith("mtp.") for name in shapes):
        rules += _ahead_rules(vlm.language, read_size(config["text_config"], "mtp_num_hidden_layers"))
    return Table("transformers", vlm.sizes(), tuple(rules), tuple(language_aliases(vlm.language)))


def language_rules(config: LanguageConfig, prefix: str = "language/") -> list[Rule]:
    """The rules of the language model; paths of our parameters start with `prefix`."""
    table = (config.vocabulary, config.width)
    rules = [
        Rule(_EMBEDDING, f"{prefix}embedding", table),
        Rule(_NORM, f"{prefix}norm/scale", (config.width,)),
    ]
    if not config.tied:
        rules.append(Rule(_HEAD, f"{prefix}head/kernel", table, LINEAR))
    numbers = range(config.depth)
    full = tuple(number for number in numbers if (number + 1) % config.interval == 0)
    linear = tuple(number for number in numbers if (number + 1) % config.interval)
    shapes = _shapes(config)
    for stack, names, layers in (("linear", _LINEAR, linear), ("full", _FULL, full)):
        for path, name in (_EVERY_LAYER | names).items():
            shape, transform = shapes[path]
            target = f"{prefix}blocks/{stack}/{path}"
            rules.append(Rule(_LAYER + name, target, shape, transform, len(layers), layers))
    return rules


def language_aliases(config: LanguageConfig) -> list[tuple[str, str]]:
    """The copy of a tied embedding that a file may hold as its head."""
    return [(_HEAD, _EMBEDDING)] if config.tied else []


def _ahead_rules(config: LanguageConfig, layers: int) -> list[Rule]:
    """The `mtp` head: embedding and features, normed, to the stream; layers with full attention; norm."""
    width, shapes = config.width, _shapes(config)
    rules = [
        Rule(f"mtp.{name}", f"mtp/{path}", *(((width, 2 * width), LINEAR) if "fc/" in path else ((width,), SAME)))
        for path, name in _AHEAD.items()
    ]
    names = _EVERY_LAYER | _FULL
    return rules + [
        Rule(f"mtp.layers.{{}}.{name}", f"mtp/layers/{path}", *shapes[path], layers) for path, name in names.items()
    ]


def _shapes(config: LanguageConfig) -> dict[str, tuple[Shape, Transform]]:
    """Shape in the file and transform, by path within a block."""
    width, ffn, taps, channels = config.width, config.ffn, config.linear_conv, config.linear_channels
    inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    values = config.linear_value_heads * config.linear_value_dim
    linear = {
        "ffn/gate": (ffn, width), "ffn/up": (ffn, width), "ffn/down": (width, ffn),
        "delta/qkv": (channels, width), "delta/gate": (values, width), "delta/output": (width, values),
        "delta/beta": (config.linear_value_heads, width), "delta/decay": (config.linear_value_heads, width),
        "attention/query": (2 * inner, width), "attention/key": (shared, width), "attention/value": (shared, width),
        "attention/output": (width, inner),
    }  # fmt: skip
    vectors = {
        "mixer_norm/scale": width, "ffn_norm/scale": width, "delta/norm/scale": config.linear_value_dim,
        "delta/A_log": config.linear_value_heads, "delta/dt_bias": config.linear_value_heads,
        "attention/query_norm/scale": config.head_dim, "attention/key_norm/scale": config.head_dim,
    }  # fmt: skip
    conv = (channels, 1, taps)
    return {
        **{f"{path}/kernel": (shape, LINEAR) for path, shape in linear.items()},
        **{path: ((size,), SAME) for path, size in vectors.items()},
        "delta/conv": (conv, chain(Reshape(conv, (channels, taps)), Transpose((1, 0)))),
    }
