"""Positions of a sequence of text and images, `[3, B, S]`: frame, row and column (multimodal RoPE). numpy only.

A text token has one position on all three axes, the next after what precedes it. An image's tokens share the first
axis; row and column count on from there; the text after it starts behind the larger of the two.
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.console import UserError


def multimodal_positions(
    ids: np.ndarray, image_id: int, grid: tuple[int, int], mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of each token, and what to add to a token's index to go on from there.

    Args:
      ids: `[B, S]`; each run of `image_id` is one image.
      image_id: the placeholder's id.
      grid: rows and columns of an image's tokens.
      mask: `[B, S]` bool, False at padding, which gets position 0; all tokens by default.

    Returns:
      (positions `[3, B, S]` int32, delta `[B]` int32): the n-th token of a row, counted without padding from 0, that
      is appended later has position n + delta on all axes.

    Raises:
      UserError: a run of placeholders that is not one whole image; it names row and token.
    """
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    positions, delta = np.zeros((3, *ids.shape), np.int32), np.zeros(len(ids), np.int32)
    cells = np.stack([np.zeros(grid, np.int32), *np.indices(grid, np.int32)]).reshape(3, -1)
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask)):
        places = np.flatnonzero(row_mask)
        is_image = row_ids[places] == image_id
        edges = np.flatnonzero(np.diff(is_image)) + 1
        start = 0
        for run in np.split(places, edges):
            if len(run) and row_ids[run[0]] == image_id:
                if len(run) != cells.shape[1]:
                    raise UserError(
                        f"row {row}, token {run[0]}: {len(run)} image placeholders in a run; an image has "
                        f"{grid[0]} x {grid[1]} tokens"
                    )
                positions[:, row, run] = start + cells
                start += max(grid)
            else:
                positions[:, row, run] = start + np.arange(len(run))
                start += len(run)
        delta[row] = start - len(places)
    return positions, delta
