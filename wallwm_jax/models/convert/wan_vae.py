"""Names and shapes of Wan's video autoencoders (2.1 and 2.2), in the diffusers and the original layout.

Both layouts hold the same tensors. They differ in how stages are numbered: diffusers nests residual blocks in stages
except in the encoder of 2.1; the original layout nests in 2.2 and counts blocks and resamplings through in 2.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from wallwm_jax.console import UserError
from wallwm_jax.models.codecs.wan_codec import LAYOUTS
from wallwm_jax.models.convert.rules import (
    LINEAR,
    Reshape,
    Rule,
    Shape,
    Table,
    Transform,
    chain,
    conv_kernel,
    drop_ones,
    read_size,
    require,
)

FOLDER = "vae"
COMPANIONS = ()
COLOURS = 3

_DIFFUSERS = {
    "encoder/moments": "quant_conv",
    "decoder/latents": "post_quant_conv",
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "norm_out",
    "middle/block_1": "mid_block.resnets.0",
    "middle/attention": "mid_block.attentions.0",
    "middle/block_2": "mid_block.resnets.1",
    "norm_1": "norm1",
    "conv_1": "conv1",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
}
_ORIGINAL = {
    "encoder/moments": "conv1",
    "decoder/latents": "conv2",
    "conv_in": "conv1",
    "conv_out": "head.2",
    "norm_out": "head.0",
    "middle/block_1": "middle.0",
    "middle/attention": "middle.1",
    "middle/block_2": "middle.2",
    "norm_1": "residual.0",
    "conv_1": "residual.2",
    "norm_2": "residual.3",
    "conv_2": "residual.6",
    "shortcut": "shortcut",
}
_NAMES = {"diffusers": _DIFFUSERS, "original": _ORIGINAL}


def table(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Table:
    """The rules of a Wan video autoencoder.

    Args:
      shapes: of every tensor in the file.
      config: the config.json beside it, {} if there is none: then the structure is the published one, and widths are
        read from the shapes.

    Returns:
      The table; its `sizes` are the arguments of `codecs.wan_vae.WanVaeConfig`.

    Raises:
      UserError: names of no known layout, or a variant that the module does not have (attention outside the middle,
        other latent statistics than the published ones, which stores normalise with).
    """
    layout = _layout(shapes)
    names = _NAMES[layout]
    require(config, "attn_scales", [[]], [])
    require(config, "in_channels", [COLOURS, COLOURS * 4], COLOURS)
    sizes = _sizes(shapes, config, names)
    for name, published in LAYOUTS.items():
        for key, values in (("latents_mean", published.latent_mean), ("latents_std", published.latent_std)):
            if published.channels == sizes["latent_channels"] and tuple(config.get(key, values)) != values:
                raise UserError(f"config.json: {key} is not that of {name}, which latents are normalised with")
    return Table(layout, sizes, _rules(sizes, layout))


def _layout(shapes: Mapping[str, Shape]) -> str:
    for layout, names in _NAMES.items():
        if f"{names['decoder/latents']}.weight" in shapes and f"decoder.{names['norm_out']}.gamma" in shapes:
            return layout
    raise UserError(
        "these are not the tensors of a Wan video autoencoder: there are neither post_quant_conv.weight and "
        "decoder.norm_out.gamma (diffusers layout) nor conv2.weight and decoder.head.0.gamma (original layout)"
    )


def _sizes(shapes: Mapping[str, Shape], config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise UserError(f"missing tensor {name!r}; is a shard absent, or is this another model?")
        return int(shapes[name][axis])

    conv_in = f"encoder.{names['conv_in']}.weight"
    multipliers = read_size(config, "dim_mult", (1, 2, 4, 4))
    return dict(
        encoder_width=size(conv_in, 0),
        decoder_width=size(f"decoder.{names['norm_out']}.gamma", 0) // multipliers[0],
        latent_channels=size(f"{names['decoder/latents']}.weight", 0),
        averaging=any(name.startswith(("encoder.down_blocks.0.resnets", "encoder.downsamples.0.d")) for name in shapes),
        patch=math.isqrt(size(conv_in, 1) // COLOURS),
        multipliers=list(multipliers),
        blocks=read_size(config, "num_res_blocks", 2),
        over_time=list(read_size(config, "temperal_downsample", (False, True, True))),
    )


def _rules(sizes: Mapping[str, Any], layout: str) -> tuple[Rule, ...]:
    return (*_encoder(sizes, _NAMES[layout]), *_decoder(sizes, _NAMES[layout]))


def _encoder(sizes: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Rule]:
    widths = [sizes["encoder_width"] * m for m in (1, *sizes["multipliers"])]
    moments = 2 * sizes["latent_channels"]
    yield from _conv(
        "encoder/conv_in", f"encoder.{names['conv_in']}", COLOURS * sizes["patch"] ** 2, widths[0], (3, 3, 3)
    )
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        for j in range(sizes["blocks"]):
            source = _stage_name("encoder", i, j, sizes["blocks"], sizes, names)
            yield from _block(f"encoder/stages/{i}/blocks/{j}", source, fan_out if j else fan_in, fan_out, names)
        if i < len(sizes["over_time"]):
            source = _stage_name("encoder", i, sizes["blocks"], sizes["blocks"], sizes, names)
            path = f"encoder/stages/{i}/downsample"
            yield from _conv(f"{path}/conv", f"{source}.resample.1", fan_out, fan_out, (3, 3))
            if sizes["over_time"][i]:
                yield from _conv(f"{path}/time_conv", f"{source}.time_conv", fan_out, fan_out, (3, 1, 1))
    yield from _middle("encoder", widths[-1], names)
    yield _norm("encoder/norm_out", f"encoder.{names['norm_out']}", (widths[-1], 1, 1, 1))
    yield from _conv("encoder/conv_out", f"encoder.{names['conv_out']}", widths[-1], moments, (3, 3, 3))
    yield from _linear("encoder/moments", names["encoder/moments"], moments, moments, 3)


def _decoder(sizes: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Rule]:
    channels, blocks = sizes["latent_channels"], sizes["blocks"] + 1
    widths = [sizes["decoder_width"] * m for m in reversed(sizes["multipliers"])]
    over_time = [*reversed(sizes["over_time"])]
    yield from _linear("decoder/latents", names["decoder/latents"], channels, channels, 3)
    yield from _conv("decoder/conv_in", f"decoder.{names['conv_in']}", channels, widths[0], (3, 3, 3))
    yield from _middle("decoder", widths[0], names)
    fan_in = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            source = _stage_name("decoder", i, j, blocks, sizes, names)
            yield from _block(f"decoder/stages/{i}/blocks/{j}", source, width if j else fan_in, width, names)
        fan_in = width if sizes["averaging"] else width // 2
        if i < len(over_time):
            source = _stage_name("decoder", i, blocks, blocks, sizes, names)
            path = f"decoder/stages/{i}/upsample"
            yield from _conv(f"{path}/conv", f"{source}.resample.1", width, fan_in, (3, 3))
            if over_time[i]:
                yield from _conv(f"{path}/time_conv", f"{source}.time_conv", width, 2 * width, (3, 1, 1))
    yield _norm("decoder/norm_out", f"decoder.{names['norm_out']}", (widths[-1], 1, 1, 1))
    out = COLOURS * sizes["patch"] ** 2
    yield from _conv("decoder/conv_out", f"decoder.{names['conv_out']}", widths[-1], out, (3, 3, 3))


def _stage_name(
    side: str, stage: int, part: int, blocks: int, sizes: Mapping[str, Any], names: Mapping[str, str]
) -> str:
    """Name of residual block `part` of a stage, or of its resampling where `part == blocks`."""
    nested, down = sizes["averaging"], side == "encoder"
    through = stage * (blocks + 1) + part
    if names is _ORIGINAL:
        kind = "downsamples" if down else "upsamples"
        return f"{side}.{kind}.{stage}.{kind}.{part}" if nested else f"{side}.{kind}.{through}"
    if down and not nested:
        return f"{side}.down_blocks.{through}"
    stage_name = f"{side}.{'down' if down else 'up'}_blocks.{stage}"
    if part < blocks:
        return f"{stage_name}.resnets.{part}"
    return f"{stage_name}.{'downsampler' if down else 'upsampler' if nested else 'upsamplers.0'}"


def _middle(side: str, width: int, names: Mapping[str, str]) -> Iterator[Rule]:
    for block in ("middle/block_1", "middle/block_2"):
        yield from _block(f"{side}/{block}", f"{side}.{names[block]}", width, width, names)
    path, source = f"{side}/middle/attention", f"{side}.{names['middle/attention']}"
    yield _norm(f"{path}/norm", f"{source}.norm", (width, 1, 1))
    yield from _linear(f"{path}/qkv", f"{source}.to_qkv", width, 3 * width, 2)
    yield from _linear(f"{path}/output", f"{source}.proj", width, width, 2)


def _block(path: str, source: str, fan_in: int, fan_out: int, names: Mapping[str, str]) -> Iterator[Rule]:
    for n, width in ((1, fan_in), (2, fan_out)):
        yield _norm(f"{path}/norm_{n}", f"{source}.{names[f'norm_{n}']}", (width, 1, 1, 1))
        yield from _conv(f"{path}/conv_{n}", f"{source}.{names[f'conv_{n}']}", width, fan_out, (3, 3, 3))
    if fan_in != fan_out:
        yield from _linear(f"{path}/shortcut", f"{source}.{names['shortcut']}", fan_in, fan_out, 3)


def _norm(path: str, source: str, shape: Shape) -> Rule:
    return Rule(f"{source}.gamma", f"{path}/scale", shape, drop_ones(shape))


def _conv(path: str, source: str, fan_in: int, fan_out: int, size: Shape) -> Iterator[Rule]:
    yield from _weight_and_bias(path, source, (fan_out, fan_in, *size), conv_kernel(len(size)))


def _linear(path: str, source: str, fan_in: int, fan_out: int, rank: int) -> Iterator[Rule]:
    """A convolution over one cell, `rank` axes."""
    shape = (fan_out, fan_in, *(1,) * rank)
    yield from _weight_and_bias(path, source, shape, chain(Reshape(shape, shape[:2]), LINEAR))


def _weight_and_bias(path: str, source: str, shape: Shape, transform: Transform) -> Iterator[Rule]:
    yield Rule(f"{source}.weight", f"{path}/kernel", shape, transform)
    yield Rule(f"{source}.bias", f"{path}/bias", shape[:1])
