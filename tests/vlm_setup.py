"""What the tests of the VLM stages share: a tiny VLM on the small store."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict
from training_setup import training_config


def vlm_training_config(store_path: str | Path, stage: str = "vlm_sft") -> ConfigDict:
    """The tests' run of a VLM stage, with one group of layers per language model; names actions and subtasks."""
    config = training_config(store_path, stage).copy_and_resolve_references()
    with config.unlocked():
        config.data.vlm.update(image_size=32, length=256, answer_length=64, trace_length=96)
        config.data.text_length = 48
        for part in ("language", "small"):
            config.vlm[part].update(
                width=32, ffn=48, depth=2, interval=2, heads=2, kv_heads=1, head_dim=16, rotary_dim=8,
                mrope_section=(2, 1, 1), linear_key_heads=1, linear_value_heads=2, linear_key_dim=16,
                linear_value_dim=16,
            )  # fmt: skip
        config.vlm.vision.update(width=16, ffn=24, depth=1)
        config.vlm.resampler_depth = 1
        config.optim.update(name="adamw", lr=1e-2)
    return config.lock()
