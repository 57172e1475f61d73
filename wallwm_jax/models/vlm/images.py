"""Pictures as the vision tower takes them: resized on the host as the published processor does, scaled on the device.

The processor resizes with Pillow's bicubic filter (antialiased, which OpenCV's is not), so Pillow does it here too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from wallwm_jax.console import UserError

MIN_PIXELS, MAX_PIXELS = 256 * 256, 4096 * 4096  # as published with the weights, preprocessor_config.json
_MAX_ASPECT = 200
_HIGH = 32896 * 2.0**-23  # the first 16 bits of 1 / 255: a level times it is exact, and so rounds once with the rest
_LOW = 1 / 255 - _HIGH


def model_size(
    height: int, width: int, side: int, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width that an image is resized to.

    Multiples of `side`, near the aspect ratio, with an area between the limits.

    Args:
      height, width: pixels of the image.
      side: pixels of a token's side, patch times merge.
      min_pixels, max_pixels: limits of the area.

    Raises:
      UserError: an empty image, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise UserError(f"an image of {height} x {width} pixels: one side may be at most {_MAX_ASPECT} times the other")
    new = [round(size / side) * side for size in (height, width)]
    if math.prod(new) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new = [max(side, math.floor(size / shrink / side) * side) for size in (height, width)]
    elif math.prod(new) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(size * grow / side) * side for size in (height, width)]
    return new[0], new[1]


def fit(images: np.ndarray, side: int, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Resizes `images [..., H, W, 3]` uint8 to their `model_size`, also uint8.

    Raises:
      UserError: not uint8 RGB, or an aspect ratio out of range.
    """
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise UserError(f"images {images.dtype}{list(images.shape)}: uint8 [..., height, width, 3] is needed")
    *lead, height, width, _ = images.shape
    size = model_size(height, width, side, min_pixels=min_pixels, max_pixels=max_pixels)
    if size == (height, width):
        return images
    resized = np.empty((math.prod(lead), *size, 3), np.uint8)
    for target, image in zip(resized, images.reshape(-1, height, width, 3)):
        target[...] = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    return resized.reshape(*lead, *size, 3)


def normalise(images: jax.Array) -> jax.Array:
    """uint8 `[...]` to float32 in [-1, 1]: mean and standard deviation 0.5, every bit as the published processor's."""
    levels = images.astype(jnp.float32)
    return (levels * _HIGH + levels * _LOW - 0.5) / 0.5
