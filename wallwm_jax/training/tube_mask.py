"""Tube masks: a window of one view is pure noise through a whole event, so that the other views must fill it in.

WALL-WM section 2.4 and eq. 8; off in its main recipe. The window lies where another camera sees the same place (sight
cones), so what is hidden can be inferred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from wallwm_jax.models.sight_cone import sight_mask

Batch = Mapping[str, Any]


class Tubes(NamedTuple):
    """`hidden [B, V, F, h, w]`: latent cells in a tube; `hides_clean [B, E]`: whether it covers the first latent."""

    hidden: jax.Array
    hides_clean: jax.Array


def draw_tubes(key: jax.Array, batch: Batch, model: ConfigDict, tube: ConfigDict) -> Tubes:
    """Draws at most one tube per event.

    With probability `tube.prob` an event gets one: a view, a side of `tube.sides[0] .. tube.sides[1]` patches and a
    place are drawn in turn, uniformly among those whose whole window is seen by another view at the event's start.
    """
    keys = jax.random.split(key, 5)
    rows, columns = (size // patch for size, patch in zip(model.latent_shape, model.patch))
    b, events, views = batch["view_id"].shape
    seen = _seen_by_others(batch, model, rows, columns)  # [B, E, V, R, C]
    sides = range(tube.sides[0], min(tube.sides[1], rows, columns) + 1)
    fits = jnp.stack([_windows(seen, side) for side in sides], 2)  # [B, E, S, V, R, C]: a window may start here
    view = _draw(keys[0], jnp.any(fits, (2, 4, 5)))
    fits = jnp.take_along_axis(fits, view[:, :, None, None, None, None], 3)[:, :, :, 0]
    choice = _draw(keys[1], jnp.any(fits, (3, 4)))
    fits = jnp.take_along_axis(fits, choice[:, :, None, None, None], 2)[:, :, 0]
    row, column = jnp.divmod(_draw(keys[2], fits.reshape(b, events, -1)), columns)
    side = jnp.asarray(sides)[choice]
    in_row = (jnp.arange(rows) >= row[..., None]) & (jnp.arange(rows) < (row + side)[..., None])
    in_column = (jnp.arange(columns) >= column[..., None]) & (jnp.arange(columns) < (column + side)[..., None])
    chosen = (jax.random.uniform(keys[3], (b, events)) < tube.prob) & jnp.any(fits, (2, 3))
    window = in_row[..., :, None] & in_column[..., None, :] & chosen[..., None, None]
    window = window[:, :, None] & jax.nn.one_hot(view, views, dtype=bool)[..., None, None]
    window = jnp.repeat(jnp.repeat(window, model.patch[0], 3), model.patch[1], 4)
    slot = batch["latent_event"]
    hidden = jax.vmap(lambda of_events, slots: of_events[jnp.maximum(slots - 1, 0)])(window, slot)
    hidden &= (slot > 0)[:, :, None, None, None]
    hides_clean = chosen & (jax.random.uniform(keys[4], (b, events)) < tube.clean_prob)
    return Tubes(jnp.swapaxes(hidden, 1, 2), hides_clean)


def _seen_by_others(batch: Batch, model: ConfigDict, rows: int, columns: int) -> jax.Array:
    """`[B, E, V, R, C]`: patches of a present view that a patch of another present view sees at the event's start."""
    b, events, views = batch["view_id"].shape
    cone = model.sight_cone
    slots = jnp.arange(1, events + 1)[:, None]
    first = jnp.argmax((batch["latent_event"][:, None] == slots) & (batch["latent_pos"][:, None] == 0), -1)
    geometry = jnp.take_along_axis(jnp.swapaxes(batch["view_geometry"], 1, 2), first[:, :, None, None], 1)
    mask = sight_mask(geometry, rows, columns, near=cone.near, far=cone.far, widen=cone.widen)
    mask = mask.reshape(b, events, views, rows * columns, views, rows * columns)
    present = batch["view_id"] > 0
    other = ~jnp.eye(views, dtype=bool) & present[:, :, :, None] & present[:, :, None, :]
    seen = jnp.any(mask & other[:, :, :, None, :, None], (4, 5))
    return seen.reshape(b, events, views, rows, columns)


def _windows(seen: jax.Array, side: int) -> jax.Array:
    """Where a `side` x `side` window may start so that all of it is `seen [..., R, C]`."""
    padded = jnp.pad(seen, [(0, 0)] * (seen.ndim - 2) + [(0, side - 1)] * 2)
    rows, columns = seen.shape[-2:]
    parts = [padded[..., i : i + rows, j : j + columns] for i in range(side) for j in range(side)]
    return jnp.all(jnp.stack(parts), 0)


def _draw(key: jax.Array, allowed: jax.Array) -> jax.Array:
    """A uniform choice among the `allowed [..., N]`; 0 where there is none."""
    return jnp.argmax(jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0), -1)
