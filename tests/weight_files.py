"""Generated weights: safetensors folders in a public layout with random values, written a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from wallwm_jax.models.convert import qwen3_5, umt5, wan, wan_vae
from wallwm_jax.models.convert.rules import Table
from wallwm_jax.models.convert.safetensors_files import Folder

BYTES = {"BF16": 2, "F32": 4}

TINY_WAN = {
    "diffusers": dict(num_attention_heads=2, attention_head_dim=8, in_channels=6, out_channels=6, text_dim=10,
                      freq_dim=8, ffn_dim=20, num_layers=3, patch_size=[1, 2, 2], eps=1e-6),
    "original": dict(model_type="ti2v", dim=16, num_heads=2, in_dim=6, out_dim=6, text_dim=10, freq_dim=8, ffn_dim=20,
                     num_layers=3, eps=1e-6),
}  # fmt: skip
TINY_UMT5 = dict(
    model_type="umt5", vocab_size=40, d_model=12, num_heads=2, d_kv=4, d_ff=20, num_layers=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
)  # fmt: skip

TINY_QWEN3_5 = dict(
    model_type="qwen3_5", image_token_id=30, tie_word_embeddings=False,
    text_config=dict(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=4, full_attention_interval=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1, linear_num_value_heads=2,
        linear_key_head_dim=4, linear_value_head_dim=6, linear_conv_kernel_dim=4, mtp_num_hidden_layers=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=1.0, mrope_section=[2, 1, 1]),
    ),
    vision_config=dict(
        depth=2, hidden_size=8, num_heads=2, intermediate_size=10, patch_size=2, temporal_patch_size=2,
        spatial_merge_size=2, out_hidden_size=12, num_position_embeddings=9,
    ),
)  # fmt: skip


def wan_shapes(layout: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Wan transformer, layer by layer as published files have them."""
    marker = {"diffusers": "condition_embedder.time_proj.weight", "original": "time_projection.1.weight"}[layout]
    return _shapes(wan.table({marker: ()}, config))


def umt5_shapes(config: Mapping[str, Any] = TINY_UMT5) -> dict[str, tuple[int, ...]]:
    """Every tensor of a UMT5 encoder, without the tied copy of its embedding."""
    return _shapes(umt5.table({"shared.weight": ()}, config))


def qwen3_5_shapes(config: Mapping[str, Any] = TINY_QWEN3_5, mtp: bool = True) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen3.5, without the tied copy of its embedding; `mtp`: with the head of published files."""
    return _shapes(qwen3_5.table({"mtp.fc.weight": ()} if mtp else {}, config))


def wan_vae_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Wan video autoencoder in the layout of diffusers; `sizes` as `WanVaeConfig` takes them."""
    return _shapes(Table("diffusers", sizes, wan_vae._rules(sizes, "diffusers")))


def write_wan22_vae(directory: Path) -> None:
    """A Wan 2.2 autoencoder of a few channels, with unit norms: what it encodes depends on the pictures."""
    sizes = dict(
        encoder_width=4, decoder_width=4, latent_channels=48, averaging=True, patch=2, multipliers=(1, 2, 2, 2),
        blocks=1, over_time=(False, True, True),
    )  # fmt: skip
    config = dict(dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    folder = write_weights(directory, wan_vae_shapes(sizes), config)
    for name, place in folder.places.items():
        if name.endswith("gamma"):
            folder.write(name, np.ones(place.shape, place.dtype))


def write_umt5(directory: Path, texts: Sequence[str], width: int = 16) -> None:
    """A tiny UMT5 encoder with a SentencePiece model that was trained on `texts`."""
    write_weights(directory, umt5_shapes({**TINY_UMT5, "vocab_size": 160, "d_model": width}),
                  {**TINY_UMT5, "vocab_size": 160, "d_model": width})  # fmt: skip
    (directory / "texts.txt").write_text("\n".join([*texts] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "texts.txt"), model_prefix=str(directory / "spiece"), vocab_size=120, pad_id=0, eos_id=1,
        model_type="unigram", unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


def _shapes(table: Table) -> dict[str, tuple[int, ...]]:
    return {name: rule.shape for rule in table.rules for name in rule.names()}


def write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str | Callable[[str], str] = "F32",
    shards: int = 1,
    seed: int = 0,
) -> Folder:
    """Writes random weights: one file, or `shards` with an index; `dtype` for all tensors, or by name."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    dtype_of = dtype if callable(dtype) else lambda name: dtype
    names = np.array_split(np.array(list(shapes), dtype=object), shards)
    files = [
        "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)
    ]
    headers, weight_map = {}, {}
    for file, part in zip(files, names):
        end, header = 0, {"__metadata__": {"format": "pt"}}
        for name in part:
            size = math.prod(shapes[name]) * BYTES[dtype_of(name)]
            header[name] = {"dtype": dtype_of(name), "shape": list(shapes[name]), "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":"))
        headers[file] = text + " " * (-len(text) % 8)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = Folder(directory, headers)
    folder.create()
    for name, place in folder.places.items():
        values = rng.standard_normal(place.size, np.float32) * np.float32(0.02)
        folder.write(name, values.astype(place.dtype).reshape(place.shape))
    return folder
