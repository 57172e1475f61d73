"""An exact, invertible video codec without weights: the 3-D orthonormal Haar wavelet with Wan's causal time layout.

Each block of 4 frames by s by s pixels becomes one latent cell. The transform is separable, two dyadic levels over time
and log2(s) over height and width, and orthonormal: energies are kept, so white noise stays white and the standard
deviation of a channel says how much of the picture it carries.

Channel layout: `channel = ((colour * 4 + t) * s + v) * s + h`, with colour in RGB order and `t`, `v`, `h` the position
in the transformed time, height and width. Position 0 is the low-pass, 1 the coarsest detail, 2-3 the next finer detail,
4-7 the next, and so on (`HaarCodec.bands` gives the levels). Latent 0 is the first frame as if it were shown four
times: its temporal details are zero and its low-pass has the scale of every other latent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wallwm_jax.console import UserError

GROUP = 4  # frames per latent after the first
COLOURS = 3


class HaarCodec:
    """Frames to Haar coefficients and back; see the module docstring for the layout of the channels."""

    def __init__(self, spatial_stride: int) -> None:
        """`spatial_stride` is the side of a latent cell in pixels, a power of two."""
        space = _haar_matrix(spatial_stride)
        self.name = f"haar{spatial_stride}"
        self.stride = (GROUP, spatial_stride, spatial_stride)
        self.channels = COLOURS * GROUP * spatial_stride**2
        self.stored = False  # ten times the size of JPEG frames, and quick to compute
        self._time = _haar_matrix(GROUP).astype(np.float32)
        self._space = np.kron(space, space).astype(np.float32)  # [s*s, s*s]: height and width in one product
        self._space_t = np.ascontiguousarray(self._space.T)

    def encode(self, frames: Any) -> np.ndarray:
        """Frames `[..., 1+4N, H, W, 3]`, uint8 or float in [-1, 1], to latents `[..., 1+N, H/s, W/s, C]` float32.

        Raises:
          UserError: the number of frames is not `1 + 4N`, the sides do not divide by the stride, or no RGB.
        """
        frames = np.asarray(frames)
        lead, (count, height, width) = frames.shape[:-4], self._check_frames(frames)
        flat = frames.reshape(-1, 1, count, height, width, COLOURS)
        side = self.stride[1]
        shape = (1 + count // GROUP, height // side, width // side)
        latents = np.empty((len(flat), *shape, self.channels), np.float32)
        cells = latents.reshape(-1, 1, *shape, COLOURS, GROUP, side * side)
        for video, out in zip(flat, cells):  # one video at a time: intermediate results stay in the cache
            first = self._transform_space(video[:, :1], 1)
            np.multiply(first[..., 0, :], np.float32(np.sqrt(GROUP)), out=out[:, :1, ..., 0, :])
            out[:, :1, ..., 1:, :] = 0.0
            if count > 1:
                np.matmul(self._time, self._transform_space(video[:, 1:], GROUP), out=out[:, 1:])
        return latents.reshape(*lead, *latents.shape[1:])

    def decode(self, latents: Any) -> np.ndarray:
        """Latents `[..., 1+N, h, w, C]` to frames `[..., 1+4N, h*s, w*s, 3]` float32; the exact inverse of `encode`.

        The temporal details of latent 0 are ignored: it is one frame.

        Raises:
          UserError: the last axis is not `C`, or an axis is missing.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim < 4 or latents.shape[-1] != self.channels or 0 in latents.shape[-4:]:
            raise UserError(
                f"{self.name}: latents have shape {latents.shape}, expected [..., 1+N, h, w, {self.channels}]"
            )
        lead = latents.shape[:-4]
        cells = latents.reshape(-1, *latents.shape[-4:-1], COLOURS, GROUP, self._space.shape[0])
        first = cells[:, :1, ..., :1, :] * np.float32(1 / np.sqrt(GROUP))
        rest = np.matmul(self._time.T, cells[:, 1:])
        frames = np.concatenate([self._restore_space(first), self._restore_space(rest)], axis=1)
        return frames.reshape(*lead, *frames.shape[1:])

    def bands(self) -> np.ndarray:
        """`[C, 3]` int: the temporal, vertical and horizontal level of each channel.

        Level 0 is the low-pass, 1 the coarsest detail; the finest are 2 over time and log2(s) over space.
        """
        time, space = _levels(GROUP), _levels(self.stride[1])
        grid = np.stack(np.meshgrid(time, space, space, indexing="ij"), axis=-1).reshape(-1, 3)
        return np.tile(grid, (COLOURS, 1))

    def _transform_space(self, frames: np.ndarray, group: int) -> np.ndarray:
        """`[B, N*group, H, W, 3]` to `[B, N, h, w, 3, group, s*s]` float32, transformed over height and width only."""
        batch, count, height, width, _ = frames.shape
        side = self.stride[1]
        split = frames.reshape(batch, count // group, group, height // side, side, width // side, side, COLOURS)
        blocks = np.ascontiguousarray(split.transpose(0, 1, 3, 5, 7, 2, 4, 6))  # small when still uint8
        values = blocks.reshape(*blocks.shape[:6], side * side).astype(np.float32)
        if frames.dtype == np.uint8:
            values *= np.float32(1 / 127.5)
            values -= 1
        return np.matmul(values, self._space_t)  # many small products: one large one would start BLAS threads

    def _restore_space(self, cells: np.ndarray) -> np.ndarray:
        """The inverse of `_transform_space`."""
        batch, groups, rows, columns, _, group, _ = cells.shape
        side = self.stride[1]
        blocks = np.matmul(cells, self._space).reshape(*cells.shape[:6], side, side)
        frames = blocks.transpose(0, 1, 5, 2, 6, 3, 7, 4)
        return frames.reshape(batch, groups * group, rows * side, columns * side, COLOURS)

    def _check_frames(self, frames: np.ndarray) -> tuple[int, int, int]:
        side = self.stride[1]
        if frames.ndim < 4 or frames.shape[-1] != COLOURS or 0 in frames.shape[-4:]:
            raise UserError(f"{self.name}: frames have shape {frames.shape}, expected [..., 1+4N, H, W, 3]")
        count, height, width = frames.shape[-4:-1]
        if count % GROUP != 1:
            raise UserError(f"{self.name}: {count} frames; the causal layout needs 1 + 4N (1, 5, 9, ...)")
        if height % side or width % side:
            raise UserError(f"{self.name}: frames of {height}x{width} pixels do not divide into cells of {side}x{side}")
        return count, height, width


def _haar_matrix(size: int) -> np.ndarray:
    """The orthonormal dyadic Haar matrix `[size, size]` float64; rows from the mean to the finest detail."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        means = np.kron(matrix, [1.0, 1.0])
        details = np.kron(np.eye(len(matrix)), [1.0, -1.0])
        matrix = np.concatenate([means, details]) / np.sqrt(2.0)
    if len(matrix) != size:
        raise UserError(f"the Haar transform needs a power of two, not {size}")
    return matrix


def _levels(size: int) -> np.ndarray:
    """`[size]`: detail level of each row of `_haar_matrix`, 0 for the mean: 0, 1, 2, 2, 3, 3, 3, 3 ..."""
    return np.array([int(row).bit_length() for row in range(size)])
