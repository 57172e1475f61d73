"""Qwen3.5 whole: images and text to features, logits, and a cache to go on from. Pure functions of plain parameters.

Parameters are a nested dict with "vision" and "language". Text comes as ids with one placeholder per image token
(`tokenizer.prompt`); `prepare` checks them against the images on the host, all else runs under jit with static shapes.
The same function as transformers' Qwen3_5ForConditionalGeneration on images of one size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.console import UserError
from wallwm_jax.models.convert.rules import read_size
from wallwm_jax.models.vlm import language_model, vision_tower
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.images import normalise
from wallwm_jax.models.vlm.language_model import Cache
from wallwm_jax.models.vlm.positions import multimodal_positions
from wallwm_jax.models.vlm.tokenizer import BytesTokenizer, FolderTokenizer, Tokenizer
from wallwm_jax.models.vlm.vision_tower import VisionConfig

Params = dict[str, Any]


@dataclass(frozen=True)
class VLMConfig:
    """Sizes of the two parts, and the id of the placeholder of an image's token."""

    language: LanguageConfig
    vision: VisionConfig
    image_id: int

    def __post_init__(self) -> None:
        if self.vision.out_width != self.language.width:
            raise UserError(
                f"image tokens {self.vision.out_width} wide do not fit a language model of width {self.language.width}"
            )
        if not 0 <= self.image_id < self.language.vocabulary:
            raise UserError(f"image id {self.image_id} is not among {self.language.vocabulary} ids")

    @classmethod
    def tiny(cls) -> VLMConfig:
        """A model over bytes that trains on a CPU."""
        language = LanguageConfig.tiny()
        return cls(language, VisionConfig.tiny(out_width=language.width), BytesTokenizer.image_id)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], **changes: Any) -> VLMConfig:
        """From a published config.json; `changes` (`compute_dtype`, `remat`) are of both parts.

        Raises:
          UserError: a size is missing, or it is a variant that this model is not.
        """
        return cls(
            LanguageConfig.from_json(config, **changes),
            VisionConfig.from_json(read_size(config, "vision_config"), **changes),
            read_size(config, "image_token_id"),
        )

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any], **changes: Any) -> VLMConfig:
        """From the `sizes` of a conversion; `changes` as for `from_json`."""
        return cls(
            LanguageConfig(**sizes["language"] | changes), VisionConfig(**sizes["vision"] | changes), sizes["image_id"]
        )

    def sizes(self) -> dict[str, Any]:
        """What `from_sizes` takes, plain JSON: all but how to compute."""
        sizes = dataclasses.asdict(self)
        for part in ("language", "vision"):
            del sizes[part]["compute_dtype"], sizes[part]["remat"]
        return sizes

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of `height` x `width` pixels.

        Raises:
          UserError: the size is no multiple of a token's side.
        """
        rows, columns = self.vision.token_grid(height, width)
        return rows * columns


class Inputs(NamedTuple):
    """A checked batch.

    Attributes:
      ids: `[B, S]` int32. mask: `[B, S]` bool, False is padding. positions: `[3, B, S]` int32.
      images: `[B, N, H, W, 3]` uint8, N for each row in the order of its placeholders; None for text alone.
    """

    ids: Any
    mask: Any
    positions: Any
    images: Any = None


def prepare(config: VLMConfig, ids: np.ndarray, mask: np.ndarray, images: np.ndarray | None = None) -> Inputs:
    """Checks a batch and computes its positions, on the host.

    Args:
      config: of the model.
      ids, mask: `[B, S]`, from `tokenizer.pad`.
      images: `[B, N, H, W, 3]` uint8, from `images.fit`; None for text alone.

    Raises:
      UserError: the images are not uint8 RGB of a fitting size, or a row has placeholders for more or fewer.
    """
    grid = (1, 1)
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3 or len(images) != len(ids):
            raise UserError(
                f"images {images.dtype}{list(images.shape)}: uint8 [{len(ids)}, images, height, width, 3] is needed"
            )
        grid = config.vision.token_grid(*images.shape[2:4])
    expected = 0 if images is None else images.shape[1]
    counts = np.sum((ids == config.image_id) & mask, 1)
    for row in np.flatnonzero(counts != expected * grid[0] * grid[1]):
        raise UserError(
            f"row {row} has {counts[row]} image placeholders, but {expected} images with {grid[0]} x {grid[1]} tokens "
            "each; give as many images as the prompt names"
        )
    positions, _ = multimodal_positions(ids, config.image_id, grid, mask)
    return Inputs(np.asarray(ids, np.int32), np.asarray(mask, bool), positions, images)


def init(config: VLMConfig, key: jax.Array) -> Params:
    """Random parameters, float32."""
    keys = jax.random.split(key)
    return {
        "language": language_model.init(config.language, keys[0]),
        "vision": vision_tower.init(config.vision, keys[1]),
    }


def abstract_params(config: VLMConfig) -> Params:
    """Shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def embed(params: Params, config: VLMConfig, inputs: Inputs) -> jax.Array:
    """Embeddings `[B, S, D]`, each image's tokens at its placeholders."""
    embedded = language_model.embed(params["language"], config.language, inputs.ids)
    if inputs.images is None:
        return embedded
    tokens = vision_tower.encode(params["vision"], config.vision, normalise(inputs.images))
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1]).astype(embedded.dtype)
    is_image = (inputs.ids == config.image_id) & inputs.mask
    which = jnp.maximum(jnp.cumsum(is_image, 1) - 1, 0)
    return jnp.where(is_image[..., None], jnp.take_along_axis(tokens, which[..., None], 1), embedded)


def forward(params: Params, config: VLMConfig, inputs: Inputs) -> jax.Array:
    """Features `[B, S, D]` after the final norm, in the compute dtype; those of padding mean nothing."""
    embedded = embed(params, config, inputs)
    return language_model.forward(
        params["language"], config.language, embedded, positions=inputs.positions, mask=inputs.mask
    )


def logits(params: Params, config: VLMConfig, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]`, float32, of features `[..., D]`."""
    return language_model.logits(params["language"], config.language, hidden)


def prefill(params: Params, config: VLMConfig, inputs: Inputs, *, slots: int) -> tuple[jax.Array, Cache]:
    """`forward`, and a cache of `slots` slots, of which the first S are used."""
    embedded = embed(params, config, inputs)
    return language_model.prefill(
        params["language"], config.language, embedded, slots=slots, positions=inputs.positions, mask=inputs.mask
    )


def extend(params: Params, config: VLMConfig, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Features `[B, S, D]` of further text `ids [B, S]`, and the cache with it; S = 1 is a step of decoding."""
    return language_model.extend(params["language"], config.language, ids, cache)


def generate(
    params: Params, config: VLMConfig, inputs: Inputs, *, steps: int, end_id: jax.Array | int, pad_id: int
) -> jax.Array:
    """The likeliest continuation, token by token: ids `[B, steps]`, `pad_id` after the `end_id` that ends a row.

    Stops when every row has ended.
    """
    batch, length = inputs.ids.shape
    hidden, cache = prefill(params, config, inputs, slots=length + steps)
    last = jnp.max(jnp.where(inputs.mask, jnp.arange(length), 0), 1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        at, _, _, _, done = carry
        return (at < steps) & ~jnp.all(done)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        at, tokens, hidden, cache, done = carry
        likeliest = jnp.argmax(logits(params, config, hidden[:, 0]), -1).astype(jnp.int32)
        token = jnp.where(done, pad_id, likeliest)
        hidden, cache = extend(params, config, token[:, None], cache)
        return at + 1, tokens.at[:, at].set(token), hidden, cache, done | (token == end_id)

    tokens = jnp.full((batch, steps), pad_id, jnp.int32)
    return jax.lax.while_loop(goes_on, step, (0, tokens, hidden, cache, jnp.zeros(batch, bool)))[1]


def load(
    directory: str | Path, compute_dtype: str = "bfloat16", sharding: Any = None
) -> tuple[Params, VLMConfig, Tokenizer]:
    """Opens the result of `python -m wallwm_jax.convert qwen3_5 --out=directory`; parameters keep their dtype.

    Raises:
      UserError: not such a folder, or its tokenizer is another model's.
    """
    from wallwm_jax.models.convert import stream

    loaded = stream.load(directory, "qwen3_5", sharding)
    config, tokenizer = VLMConfig.from_sizes(loaded.sizes, compute_dtype=compute_dtype), FolderTokenizer(directory)
    if tokenizer.vocabulary > config.language.vocabulary or tokenizer.image_id != config.image_id:
        raise UserError(
            f"the tokenizer in {str(directory)!r} has {tokenizer.vocabulary} ids, images are {tokenizer.image_id}; the "
            f"model has {config.language.vocabulary} and {config.image_id}: they were not published together"
        )
    return {part: loaded.params[part] for part in ("language", "vision")}, config, tokenizer
