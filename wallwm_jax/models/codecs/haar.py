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

import functools
import math
from typing import Any

import cv2
import numpy as np

from wallwm_jax.console import UserError

GROUP = 4  # frames per latent after the first
COLOURS = 3
_GREY = 128  # where bytes are counted from: small numbers keep more digits
_UNTHREADED = 2**18  # multiplications that OpenBLAS does without starting threads


class HaarCodec:
    """Frames to Haar coefficients and back; see the module docstring for the layout of the channels."""

    def __init__(self, spatial_stride: int, mean: Any = 0.0, std: Any = 1.0) -> None:
        """`spatial_stride` is the side of a latent cell in pixels, a power of two; see `normalized` for the rest."""
        self.name = f"haar{spatial_stride}"
        self.stride = (GROUP, spatial_stride, spatial_stride)
        self.channels = COLOURS * GROUP * spatial_stride**2
        self.stored = False  # ten times the size of JPEG frames, and quick to compute
        self._mean, self._std = (np.broadcast_to(np.asarray(one, np.float32), self.channels) for one in (mean, std))
        space = _haar_matrix(spatial_stride)
        self._time = _haar_matrix(GROUP).astype(np.float32)
        self._space = np.kron(space, space).astype(np.float32)  # [s*s, s*s]: height and width in one product

    def normalized(self, mean: np.ndarray, std: np.ndarray) -> HaarCodec:
        """This codec with latents `(coefficient - mean) / std`, `[C]` each: normalisation at no cost."""
        return HaarCodec(self.stride[1], mean, std)

    def encode(self, frames: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Frames `[..., 1+4N, H, W, 3]`, uint8 or float in [-1, 1], to latents `[..., 1+N, H/s, W/s, C]` float32.

        Args:
          frames: the pictures.
          out: where the latents are to be written; each video's place in it is contiguous.

        Raises:
          UserError: the number of frames is not `1 + 4N`, the sides do not divide by the stride, or no RGB.
          ValueError: `out` has another shape, or is not contiguous.
        """
        frames = np.asarray(frames)
        lead, (count, height, width) = frames.shape[:-4], self._check_frames(frames)
        if out is None:
            side = self.stride[1]
            shape = (*lead, 1 + count // GROUP, height // side, width // side, self.channels)
            out = np.empty(shape, np.float32)
        for video in np.ndindex(lead):  # one at a time: intermediate results stay in the cache
            self._encode(frames[video], out[video])
        return out

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
        cells = (latents * self._std + self._mean).reshape(-1, *latents.shape[-4:-1], COLOURS, GROUP, len(self._space))
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

    def _encode(self, video: np.ndarray, out: np.ndarray) -> None:
        """`[1+4N, H, W, 3]` to `out`, `[1+N, h, w, C]`."""
        products, offset = self._of_bytes if video.dtype == np.uint8 else self._of_floats
        bands = out.reshape(-1, COLOURS * GROUP, len(self._space), copy=False)
        first = math.prod(out.shape[1:3])  # cells of latent 0
        planes = _planes(video)
        still = self._blocks(_over_time(planes[:, :1, None].repeat(GROUP, 2))[:, :, :1])
        bands[:first] = offset
        _multiply(still, products[::GROUP], bands[:first, ::GROUP])
        bands[:first, ::GROUP] += offset[::GROUP]
        if len(video) > 1:
            moving = self._blocks(_over_time(planes[:, 1:].reshape(COLOURS, -1, GROUP, *video.shape[1:3])))
            _multiply(moving, products, bands[first:])
            bands[first:] += offset

    @functools.cached_property
    def _of_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        return self._affine(1 / 127.5, _GREY / 127.5 - 1)

    @functools.cached_property
    def _of_floats(self) -> tuple[np.ndarray, np.ndarray]:
        return self._affine(1.0, 0.0)

    def _affine(self, scale: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
        """What makes latents of sums and differences over time, `_over_time`, of pixels `scale * x + shift`.

        Returns:
          Products `[12, s*s pixels, s*s channels]` of each colour and temporal band, and what is then added
          `[12, s*s channels]`; float32.
        """
        std = self._std.reshape(COLOURS, GROUP, 1, -1).astype(np.float64)
        lengths = np.abs(_haar_matrix(GROUP)).max(axis=1)  # every row of the matrix has one value but for its sign
        products = scale * lengths[:, None, None] * self._space.T / std
        added = -self._mean.reshape(COLOURS, GROUP, -1).astype(np.float64)
        added[:, 0, 0] += shift * np.sqrt(GROUP) * self.stride[1]  # a constant is seen by the low-pass alone
        added = added / std[:, :, 0]
        return _flat(products), _flat(added)

    def _blocks(self, bands: np.ndarray) -> np.ndarray:
        """`[3, N, bands, H, W]` to `[N*h*w, 3*bands, s*s]` float32: the pixels of each cell end to end."""
        colours, count, groups, height, _ = bands.shape
        side = self.stride[1]
        one_run = np.dtype((np.void, side * bands.itemsize))  # a cell's pixels of one line, moved together
        runs = np.ascontiguousarray(bands).view(one_run).reshape(colours, count, groups, height // side, side, -1)
        runs = runs.transpose(1, 3, 5, 0, 2, 4)
        blocks = np.ascontiguousarray(runs).view(bands.dtype).astype(np.float32)
        return blocks.reshape(-1, colours * groups, side * side)

    def _restore_space(self, cells: np.ndarray) -> np.ndarray:
        """`[B, N, h, w, 3, group, s*s]` over height and width back to `[B, N*group, H, W, 3]`."""
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


def _flat(bands: np.ndarray) -> np.ndarray:
    """`[3, 4, ...]` to `[12, ...]` float32."""
    return bands.reshape(-1, *bands.shape[2:]).astype(np.float32, order="C")


def _planes(video: np.ndarray) -> np.ndarray:
    """`[n, H, W, 3]` uint8 or float to `[3, n, H, W]` uint8 or float32."""
    video = video if video.dtype == np.uint8 else video.astype(np.float32)
    planes: np.ndarray = np.empty((COLOURS, *video.shape[:3]), video.dtype)
    cv2.split(video.reshape(-1, *video.shape[2:]), [plane.reshape(-1, video.shape[2]) for plane in planes])
    return planes


def _over_time(groups: np.ndarray) -> np.ndarray:
    """`[3, N, 4, H, W]` frames to their Haar bands over time but for a factor: sum, and three differences.

    Bytes count from `_GREY`, and become int16, which is exact.
    """
    wide, zero = (np.int16, _GREY) if groups.dtype == np.uint8 else (np.float32, 0)
    bands: np.ndarray = np.empty(groups.shape, wide)
    one, two, three, four = (groups[:, :, frame] for frame in range(GROUP))
    early, late = np.add(one, two, dtype=wide), np.add(three, four, dtype=wide)
    np.add(early, late, out=bands[:, :, 0])
    bands[:, :, 0] -= GROUP * zero
    np.subtract(early, late, out=bands[:, :, 1])
    np.subtract(one, two, dtype=wide, out=bands[:, :, 2])
    np.subtract(three, four, dtype=wide, out=bands[:, :, 3])
    return bands


def _multiply(blocks: np.ndarray, products: np.ndarray, out: np.ndarray) -> None:
    """`out[n, b] = blocks[n, b] @ products[b]`, in parts so small that no threads are started."""
    part = max(1, _UNTHREADED // products[0].size)
    whole = len(blocks) - len(blocks) % part
    for rows, size in ((slice(0, whole), part), (slice(whole, None), len(blocks) - whole)):
        if size:
            split, place = (one[rows].reshape(-1, size, *one.shape[1:]).swapaxes(1, 2) for one in (blocks, out))
            np.matmul(split, products, out=place)


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
