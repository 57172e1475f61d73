"""Sizes of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wallwm_jax.console import UserError
from wallwm_jax.models.convert.rules import read_size, require
from wallwm_jax.models.layers import NORM_EPS

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a Qwen3.5 language model; the defaults are those of the 9B model.

    Attributes:
      vocabulary: rows of the embedding. width: of the stream. ffn: hidden width. depth: layers.
      interval: every `interval`-th layer has full attention, the others are gated delta nets; divides `depth`.
      heads, kv_heads, head_dim: of the full attention; `heads / kv_heads` queries share a key.
      rotary_dim: dimensions of a head that rotate; the others do not.
      rope_theta: base of the rotary periods.
      mrope_section: how many of the `rotary_dim / 2` rotations follow (time, row, column) positions.
      linear_key_heads, linear_value_heads, linear_key_dim, linear_value_dim: of the delta nets.
      linear_conv: taps of their convolution over time.
      tied: the embedding is the output head too.
      compute_dtype: "float32" or "bfloat16"; norms, softmax and the recurrent state are float32 in both.
      remat: as `layer_stack.remat`.
    """

    vocabulary: int = 248320
    width: int = 4096
    ffn: int = 12288
    depth: int = 32
    interval: int = 4
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 256
    rotary_dim: int = 64
    rope_theta: float = 1e7
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    linear_key_heads: int = 16
    linear_value_heads: int = 32
    linear_key_dim: int = 128
    linear_value_dim: int = 128
    linear_conv: int = 4
    tied: bool = False
    compute_dtype: str = "bfloat16"
    remat: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mrope_section", tuple(self.mrope_section))  # JSON has lists
        if self.interval < 2 or self.depth % self.interval:
            raise UserError(
                f"{self.depth} layers with full attention at every {self.interval}-th: layers must come in whole "
                "groups of at least two"
            )
        if self.heads % self.kv_heads or self.linear_value_heads % self.linear_key_heads:
            raise UserError(
                f"every key head must serve equally many others: {self.heads} heads over {self.kv_heads}, "
                f"{self.linear_value_heads} value heads of the delta nets over {self.linear_key_heads}"
            )
        if 2 * sum(self.mrope_section) != self.rotary_dim or self.rotary_dim > self.head_dim:
            raise UserError(
                f"mrope_section {list(self.mrope_section)} must sum to half of the rotary dimensions, "
                f"{self.rotary_dim} of {self.head_dim}"
            )

    @property
    def linear_depth(self) -> int:
        """Number of delta-net layers."""
        return self.depth - self.full_depth

    @property
    def full_depth(self) -> int:
        """Number of full-attention layers."""
        return self.depth // self.interval

    @property
    def linear_channels(self) -> int:
        """Channels of a delta net's convolution: queries, keys, values of all heads."""
        return 2 * self.linear_key_heads * self.linear_key_dim + self.linear_value_heads * self.linear_value_dim

    @classmethod
    def tiny(cls, **changes: Any) -> LanguageConfig:
        """A model over bytes that trains on a CPU: 8 layers of width 128, float32; `changes` replace sizes."""
        sizes: dict[str, Any] = dict(
            vocabulary=264, width=128, ffn=256, depth=8, heads=4, kv_heads=2, head_dim=32, rotary_dim=16,
            rope_theta=1e4, mrope_section=(4, 2, 2), linear_key_heads=2, linear_value_heads=4, linear_key_dim=32,
            linear_value_dim=32, tied=True, compute_dtype="float32",
        )  # fmt: skip
        return cls(**sizes | changes)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], **changes: Any) -> LanguageConfig:
        """The sizes in a published config.json: of the whole model, or of its `text_config` alone.

        Raises:
          UserError: a size is missing, or a variant of the model that this one does not have.
        """
        text = config.get("text_config", config)
        rope = text.get("rope_parameters") or {}
        require(text, "model_type", ["qwen3_5_text"], "qwen3_5_text")
        require(text, "hidden_act", ["silu"], "silu")
        require(text, "attention_bias", [False], False)
        require(text, "attn_output_gate", [True], True)
        require(text, "rms_norm_eps", [NORM_EPS], NORM_EPS)
        require(rope, "rope_type", ["default"], "default")
        require(rope, "mrope_interleaved", [True], True)
        head_dim, depth = read_size(text, "head_dim"), read_size(text, "num_hidden_layers")
        sizes: dict[str, Any] = dict(
            vocabulary=read_size(text, "vocab_size"),
            width=read_size(text, "hidden_size"),
            ffn=read_size(text, "intermediate_size"),
            depth=depth,
            interval=_interval(text, depth),
            heads=read_size(text, "num_attention_heads"),
            kv_heads=read_size(text, "num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=int(head_dim * read_size(rope, "partial_rotary_factor")),
            rope_theta=float(read_size(rope, "rope_theta")),
            mrope_section=tuple(read_size(rope, "mrope_section")),
            linear_key_heads=read_size(text, "linear_num_key_heads"),
            linear_value_heads=read_size(text, "linear_num_value_heads"),
            linear_key_dim=read_size(text, "linear_key_head_dim"),
            linear_value_dim=read_size(text, "linear_value_head_dim"),
            linear_conv=read_size(text, "linear_conv_kernel_dim"),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )
        return cls(**sizes | changes)


def _interval(text: Mapping[str, Any], depth: int) -> int:
    """Every how many layers there is one of full attention."""
    types = text.get("layer_types")
    if types is None:
        return read_size(text, "full_attention_interval", 4)
    interval = [*types, FULL].index(FULL) + 1
    if list(types) != [LINEAR if (i + 1) % interval else FULL for i in range(depth)]:
        raise UserError(
            f"config.json: layer_types must be {depth} names, {FULL!r} at every n-th layer and {LINEAR!r} elsewhere; "
            f"found {list(types)}"
        )
    return interval
