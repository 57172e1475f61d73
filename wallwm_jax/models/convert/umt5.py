"""Names and shapes of the UMT5 encoder, in the layout of transformers and in Wan's own.

The first is called "diffusers", as the other models call the layout of the repositories that it is published in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wallwm_jax.console import UserError
from wallwm_jax.models.convert.rules import LINEAR, SAME, Rule, Shape, Table, Transform, read_size, require

FOLDER = "text_encoder"
COMPANIONS = ("spiece.model",)

_DIFFUSERS = {
    "embedding": "shared.weight",
    "blocks/attention_norm/scale": "encoder.block.{}.layer.0.layer_norm.weight",
    "blocks/query/kernel": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "blocks/key/kernel": "encoder.block.{}.layer.0.SelfAttention.k.weight",
    "blocks/value/kernel": "encoder.block.{}.layer.0.SelfAttention.v.weight",
    "blocks/output/kernel": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "blocks/position_bias": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    "blocks/ffn_norm/scale": "encoder.block.{}.layer.1.layer_norm.weight",
    "blocks/gate/kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "blocks/up/kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "blocks/down/kernel": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
    "norm/scale": "encoder.final_layer_norm.weight",
}
_ORIGINAL = {
    "embedding": "token_embedding.weight",
    "blocks/attention_norm/scale": "blocks.{}.norm1.weight",
    "blocks/query/kernel": "blocks.{}.attn.q.weight",
    "blocks/key/kernel": "blocks.{}.attn.k.weight",
    "blocks/value/kernel": "blocks.{}.attn.v.weight",
    "blocks/output/kernel": "blocks.{}.attn.o.weight",
    "blocks/position_bias": "blocks.{}.pos_embedding.embedding.weight",
    "blocks/ffn_norm/scale": "blocks.{}.norm2.weight",
    "blocks/gate/kernel": "blocks.{}.ffn.gate.0.weight",
    "blocks/up/kernel": "blocks.{}.ffn.fc1.weight",
    "blocks/down/kernel": "blocks.{}.ffn.fc2.weight",
    "norm/scale": "norm.weight",
}
_TIED = "encoder.embed_tokens.weight"  # the embedding once more; files hold either or both
_HEAD_DIM = 64  # of every published UMT5; Wan's own layout does not state it


def table(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Table:
    """The rules of a UMT5 encoder.

    Args:
      shapes: of every tensor in the file.
      config: its config.json; Wan's own layout has none, its sizes are read from the shapes.

    Raises:
      UserError: neither layout, or a variant of T5 that our module does not have.
    """
    if _DIFFUSERS["embedding"] in shapes:
        sizes = _diffusers_sizes(config)
        return Table("diffusers", sizes, tuple(_rules(_DIFFUSERS, sizes)), ((_TIED, _DIFFUSERS["embedding"]),))
    if _TIED in shapes:
        sizes = _diffusers_sizes(config)
        return Table("diffusers", sizes, tuple(_rules(_DIFFUSERS | {"embedding": _TIED}, sizes)))
    if _ORIGINAL["embedding"] in shapes:
        sizes = _original_sizes(shapes)
        return Table("original", sizes, tuple(_rules(_ORIGINAL, sizes)))
    raise UserError("no UMT5 encoder: neither 'shared.weight' nor 'token_embedding.weight'")


def _diffusers_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "model_type", ["umt5"], "umt5")
    require(config, "feed_forward_proj", ["gated-gelu"], "gated-gelu")
    require(config, "layer_norm_epsilon", [1e-6], 1e-6)
    return dict(
        vocabulary=read_size(config, "vocab_size"),
        width=read_size(config, "d_model"),
        heads=read_size(config, "num_heads"),
        head_dim=read_size(config, "d_kv"),
        ffn=read_size(config, "d_ff"),
        depth=read_size(config, "num_layers"),
        buckets=read_size(config, "relative_attention_num_buckets", 32),
        max_distance=read_size(config, "relative_attention_max_distance", 128),
    )


def _original_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    def shape(path: str, rank: int = 2) -> Shape:
        name = _ORIGINAL[path].format(0)
        if len(shapes.get(name, ())) != rank:
            raise UserError(f"tensor {name!r} is missing or has not {rank} axes; the encoder's sizes are read from it")
        return shapes[name]

    prefix, suffix = _ORIGINAL["blocks/query/kernel"].split("{}")
    vocabulary, width = shape("embedding")
    inner, _ = shape("blocks/query/kernel")
    buckets, heads = shape("blocks/position_bias")
    if inner != heads * _HEAD_DIM:
        raise UserError(f"{heads} heads of {_HEAD_DIM} do not make queries of width {inner}")
    return dict(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_dim=_HEAD_DIM,
        ffn=shape("blocks/gate/kernel")[0],
        depth=sum(name.startswith(prefix) and name.endswith(suffix) for name in shapes),
        buckets=buckets,
        max_distance=128,
    )


def _rules(names: Mapping[str, str], sizes: Mapping[str, Any]) -> list[Rule]:
    width, inner, ffn = sizes["width"], sizes["heads"] * sizes["head_dim"], sizes["ffn"]
    shapes: dict[str, tuple[Shape, Transform]] = {
        "embedding": ((sizes["vocabulary"], width), SAME),
        "blocks/attention_norm/scale": ((width,), SAME),
        "blocks/query/kernel": ((inner, width), LINEAR),
        "blocks/key/kernel": ((inner, width), LINEAR),
        "blocks/value/kernel": ((inner, width), LINEAR),
        "blocks/output/kernel": ((width, inner), LINEAR),
        "blocks/position_bias": ((sizes["buckets"], sizes["heads"]), SAME),
        "blocks/ffn_norm/scale": ((width,), SAME),
        "blocks/gate/kernel": ((ffn, width), LINEAR),
        "blocks/up/kernel": ((ffn, width), LINEAR),
        "blocks/down/kernel": ((width, ffn), LINEAR),
        "norm/scale": ((width,), SAME),
    }
    return [
        Rule(names[path], path, shape, transform, sizes["depth"] if "{}" in names[path] else 0)
        for path, (shape, transform) in shapes.items()
    ]
