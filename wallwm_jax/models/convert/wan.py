"""Names and shapes of Wan's video transformer (text to video; 2.1 and 2.2), in the diffusers and the original layout.

Rotary dimensions are stored as interleaved pairs in both layouts and as halves in ours: queries and keys of the
self-attention, with their biases and norm scales, are permuted within each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wallwm_jax.console import UserError
from wallwm_jax.models.convert.rules import (
    LINEAR,
    SAME,
    Reshape,
    Rule,
    Shape,
    Table,
    Take,
    Transform,
    Transpose,
    chain,
    drop_ones,
    read_size,
    require,
    rope_halves,
)

FOLDER = "transformer"
COMPANIONS = ()

_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "time_embedding/up": "condition_embedder.time_embedder.linear_1",
    "time_embedding/down": "condition_embedder.time_embedder.linear_2",
    "time_embedding/projection": "condition_embedder.time_proj",
    "text_up": "condition_embedder.text_embedder.linear_1",
    "text_down": "condition_embedder.text_embedder.linear_2",
    "head": "proj_out",
    "head_modulation": "scale_shift_table",
    "blocks/modulation": "blocks.{}.scale_shift_table",
    "blocks/self_attention": "blocks.{}.attn1",
    "blocks/text_attention": "blocks.{}.attn2",
    "blocks/text_norm": "blocks.{}.norm2",
    "blocks/ffn/up": "blocks.{}.ffn.net.0.proj",
    "blocks/ffn/down": "blocks.{}.ffn.net.2",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "output": "to_out.0",
}
_ORIGINAL = {
    "patch_embedding": "patch_embedding",
    "time_embedding/up": "time_embedding.0",
    "time_embedding/down": "time_embedding.2",
    "time_embedding/projection": "time_projection.1",
    "text_up": "text_embedding.0",
    "text_down": "text_embedding.2",
    "head": "head.head",
    "head_modulation": "head.modulation",
    "blocks/modulation": "blocks.{}.modulation",
    "blocks/self_attention": "blocks.{}.self_attn",
    "blocks/text_attention": "blocks.{}.cross_attn",
    "blocks/text_norm": "blocks.{}.norm3",
    "blocks/ffn/up": "blocks.{}.ffn.0",
    "blocks/ffn/down": "blocks.{}.ffn.2",
    "query": "q",
    "key": "k",
    "value": "v",
    "output": "o",
}
_NAMES = {"diffusers": _DIFFUSERS, "original": _ORIGINAL}


def table(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Table:
    """The rules of a Wan text-to-video transformer.

    Args:
      shapes: of every tensor in the file.
      config: its config.json.

    Raises:
      UserError: neither layout, or a variant that the video tower does not have (image conditioning, other norms).
    """
    if _DIFFUSERS["time_embedding/projection"] + ".weight" in shapes:
        layout, sizes = "diffusers", _diffusers_sizes(config)
    elif _ORIGINAL["time_embedding/projection"] + ".weight" in shapes:
        layout, sizes = "original", _original_sizes(config)
    else:
        raise UserError(
            "no Wan transformer: neither 'condition_embedder.time_proj.weight' nor 'time_projection.1.weight'"
        )
    return Table(layout, sizes, tuple(_rules(_NAMES[layout], sizes)))


def _diffusers_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "image_dim", [None], None)
    require(config, "added_kv_proj_dim", [None], None)
    require(config, "cross_attn_norm", [True], True)
    require(config, "qk_norm", ["rms_norm_across_heads"], "rms_norm_across_heads")
    heads = read_size(config, "num_attention_heads")
    channels = read_size(config, "in_channels")
    return _sizes(
        config,
        channels=channels,
        out_channels=config.get("out_channels") or channels,
        width=heads * read_size(config, "attention_head_dim"),
        depth=read_size(config, "num_layers"),
        heads=heads,
    )


def _original_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "model_type", ["t2v", "ti2v"], "t2v")
    require(config, "cross_attn_norm", [True], True)
    require(config, "qk_norm", [True], True)
    return _sizes(
        config,
        channels=read_size(config, "in_dim"),
        out_channels=read_size(config, "out_dim"),
        width=read_size(config, "dim"),
        depth=read_size(config, "num_layers"),
        heads=read_size(config, "num_heads"),
    )


def _sizes(
    config: Mapping[str, Any], *, channels: int, out_channels: int, width: int, depth: int, heads: int
) -> dict[str, Any]:
    """What both layouts name alike, and the result: keys of `config.model`, with `text_width` for `text.width`."""
    require(config, "eps", [1e-6], 1e-6)
    if channels != out_channels:
        raise UserError(
            f"config.json: {channels} input and {out_channels} output channels; only text to video is supported"
        )
    patch = tuple(config.get("patch_size", (1, 2, 2)))
    if patch[0] != 1:
        raise UserError(f"config.json: patch_size = {list(patch)} is not supported, only one latent frame per patch")
    return dict(
        latent_channels=channels,
        patch=list(patch[1:]),
        width=width,
        depth=depth,
        heads=heads,
        ffn=read_size(config, "ffn_dim"),
        freq_dim=read_size(config, "freq_dim", 256),
        text_width=read_size(config, "text_dim", 4096),
    )


def _rules(names: Mapping[str, str], sizes: Mapping[str, Any]) -> list[Rule]:
    width, depth, ffn, channels = sizes["width"], sizes["depth"], sizes["ffn"], sizes["latent_channels"]
    rows, columns = sizes["patch"]
    rules: list[Rule] = []

    def add(path: str, source: str, shape: Shape, transform: Transform = SAME) -> None:
        rules.append(Rule(source, f"video/{path}", shape, transform, depth if "{}" in source else 0))

    def linear(path: str, fan_in: int, fan_out: int) -> None:
        add(f"{path}/kernel", f"{names[path]}.weight", (fan_out, fan_in), LINEAR)
        add(f"{path}/bias", f"{names[path]}.bias", (fan_out,))

    def attention(path: str, rotary: bool) -> None:
        halves = rope_halves(sizes["heads"], width // sizes["heads"])
        for part in ("query", "key", "value", "output"):
            source, permuted = f"{names[path]}.{names[part]}", rotary and part in ("query", "key")
            vector = Take(halves, 0) if permuted else SAME
            kernel = chain(LINEAR, Take(halves, 1)) if permuted else LINEAR
            add(f"{path}/{part}/kernel", f"{source}.weight", (width, width), kernel)
            add(f"{path}/{part}/bias", f"{source}.bias", (width,), vector)
            if part in ("query", "key"):
                add(f"{path}/{part}_norm/scale", f"{names[path]}.norm_{part[0]}.weight", (width,), vector)

    kernel_shape = (width, channels, 1, rows, columns)
    moved = (1, rows, columns, channels, width)
    to_matrix = chain(Transpose((2, 3, 4, 1, 0)), Reshape(moved, (rows * columns * channels, width)))
    add("patch_embedding/kernel", f"{names['patch_embedding']}.weight", kernel_shape, to_matrix)
    add("patch_embedding/bias", f"{names['patch_embedding']}.bias", (width,))
    linear("time_embedding/up", sizes["freq_dim"], width)
    linear("time_embedding/down", width, width)
    linear("time_embedding/projection", width, 6 * width)
    linear("text_up", sizes["text_width"], width)
    linear("text_down", width, width)
    add("blocks/modulation", names["blocks/modulation"], (1, 6, width), drop_ones((1, 6, width)))
    attention("blocks/self_attention", rotary=True)
    add("blocks/text_norm/scale", f"{names['blocks/text_norm']}.weight", (width,))
    add("blocks/text_norm/bias", f"{names['blocks/text_norm']}.bias", (width,))
    attention("blocks/text_attention", rotary=False)
    linear("blocks/ffn/up", width, ffn)
    linear("blocks/ffn/down", ffn, width)
    add("head_modulation", names["head_modulation"], (1, 2, width), drop_ones((1, 2, width)))
    linear("head", width, rows * columns * channels)
    return rules
