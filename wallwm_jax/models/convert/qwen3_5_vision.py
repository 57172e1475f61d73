"""Names and shapes of Qwen3.5's vision tower, as transformers saves it and as it is published."""

from __future__ import annotations

from collections.abc import Mapping

from wallwm_jax.models.convert.rules import LINEAR, SAME, Reshape, Rule, Shape, Transform, Transpose, chain
from wallwm_jax.models.vlm.vision_tower import CHANNELS, VisionConfig

SOURCE, PATH = "model.visual.", "vision/"

_NAMES = {
    "patch_embedding/kernel": "patch_embed.proj.weight",
    "patch_embedding/bias": "patch_embed.proj.bias",
    "position_embedding": "pos_embed.weight",
    "blocks/attention_norm/scale": "blocks.{}.norm1.weight",
    "blocks/attention_norm/bias": "blocks.{}.norm1.bias",
    "blocks/qkv/kernel": "blocks.{}.attn.qkv.weight",
    "blocks/qkv/bias": "blocks.{}.attn.qkv.bias",
    "blocks/output/kernel": "blocks.{}.attn.proj.weight",
    "blocks/output/bias": "blocks.{}.attn.proj.bias",
    "blocks/ffn_norm/scale": "blocks.{}.norm2.weight",
    "blocks/ffn_norm/bias": "blocks.{}.norm2.bias",
    "blocks/ffn/up/kernel": "blocks.{}.mlp.linear_fc1.weight",
    "blocks/ffn/up/bias": "blocks.{}.mlp.linear_fc1.bias",
    "blocks/ffn/down/kernel": "blocks.{}.mlp.linear_fc2.weight",
    "blocks/ffn/down/bias": "blocks.{}.mlp.linear_fc2.bias",
    "merger/norm/scale": "merger.norm.weight",
    "merger/norm/bias": "merger.norm.bias",
    "merger/up/kernel": "merger.linear_fc1.weight",
    "merger/up/bias": "merger.linear_fc1.bias",
    "merger/down/kernel": "merger.linear_fc2.weight",
    "merger/down/bias": "merger.linear_fc2.bias",
}


def vision_rules(config: VisionConfig) -> list[Rule]:
    """The rules of a tower of these sizes."""
    width, ffn, out = config.width, config.ffn, config.out_width
    merged = width * config.merge**2
    patch = (config.frames, config.patch, config.patch, CHANNELS)
    convolution = (width, CHANNELS, *patch[:-1])  # its [O, I, t, h, w] becomes [(t, h, w, I), O]
    flat = chain(Transpose((2, 3, 4, 1, 0)), Reshape((*patch, width), (config.patch_values, width)))
    shapes: Mapping[str, tuple[Shape, Transform]] = {
        "patch_embedding/kernel": (convolution, flat),
        "position_embedding": ((config.positions, width), SAME),
        "blocks/qkv/kernel": ((3 * width, width), LINEAR),
        "blocks/qkv/bias": ((3 * width,), SAME),
        "blocks/output/kernel": ((width, width), LINEAR),
        "blocks/ffn/up/kernel": ((ffn, width), LINEAR),
        "blocks/ffn/up/bias": ((ffn,), SAME),
        "blocks/ffn/down/kernel": ((width, ffn), LINEAR),
        "merger/up/kernel": ((merged, merged), LINEAR),
        "merger/up/bias": ((merged,), SAME),
        "merger/down/kernel": ((out, merged), LINEAR),
        "merger/down/bias": ((out,), SAME),
    }
    vector: tuple[Shape, Transform] = ((width,), SAME)
    return [
        Rule(SOURCE + name, PATH + path, *shapes.get(path, vector), config.depth if "{}" in name else 0)
        for path, name in _NAMES.items()
    ]
