"""Sight cones: which patches of two cameras can see the same part of the scene (WALL-WM section 2.4).

A patch sees a cone: its apex is the camera's centre, its axis passes through the patch's centre, its half-angle
encloses the patch's corners. Two patches of one latent frame may attend to each other in the cross-view attention
where their cones meet between a nearest and a farthest distance. Cameras may move from frame to frame. The mask is for
training; a batch without calibration (all-zero geometry), as at inference, leaves everything open.

docs/sight_cones.png shows what four patches of a wrist camera see of the front camera while the arm moves a block
(`python -m wallwm_jax.evaluation.sight_cones` draws it).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_UNDISTORT_STEPS = 8
_SMALL = 1e-6


class Cones(NamedTuple):
    """The cones of all patches of one camera, metres and world axes.

    Attributes:
      apex: `[..., 3]` camera centre.
      axis: `[..., P, 3]` unit vectors through the patch centres.
      slope: `[..., P]` tangent of the half-angle: radius per metre of distance along the axis.
      known: `[...]` whether the camera is calibrated.
    """

    apex: jax.Array
    axis: jax.Array
    slope: jax.Array
    known: jax.Array


def cones(geometry: jax.Array, rows: int, columns: int, widen: float = 1.0) -> Cones:
    """Cones of `rows * columns` patches, row by row.

    Args:
      geometry: `[..., 21]` fx/W fy/H cx/W cy/H, k1 k2 p1 p2 k3, world-from-camera 3x4 row-major (`data.event_store`);
        zeros where there is no calibration.
      widen: factor on the radius.
    """
    known = geometry[..., 0] > 0
    corners = _rays(geometry, _grid(rows + 1, columns + 1, 0.0, rows, columns))
    corners = corners.reshape(*corners.shape[:-2], rows + 1, columns + 1, 3)
    axis = _rays(geometry, _grid(rows, columns, 0.5, rows, columns))
    around = jnp.stack([corners[..., i : rows + i, j : columns + j, :] for i in (0, 1) for j in (0, 1)], -2)
    around = around.reshape(*axis.shape[:-1], 4, 3)
    cosine = jnp.min(jnp.einsum("...pd,...pcd->...pc", axis, around), -1)
    slope = widen * jnp.sqrt(jnp.maximum(1.0 - cosine**2, 0.0)) / jnp.maximum(cosine, 1e-3)
    pose = geometry[..., 9:].reshape(*geometry.shape[:-1], 3, 4)
    return Cones(pose[..., 3], jnp.einsum("...ij,...pj->...pi", pose[..., :3], axis), slope, known)


def sight_mask(
    geometry: jax.Array, rows: int, columns: int, *, near: float, far: float, widen: float = 1.0
) -> jax.Array:
    """Which patches of all views of a latent frame may attend to each other.

    Args:
      geometry: `[..., V, 21]`, see `cones`.
      rows, columns: patches per view.
      near, far: metres along the axes between which cones must meet.
      widen: factor on the cones' radii.

    Returns:
      `[..., V * P, V * P]` bool, symmetric. Patches of one view are open to each other, and all patches of a view
      without calibration are open to all.
    """
    views, patches = geometry.shape[-2], rows * columns
    every = cones(geometry, rows, columns, widen)
    apex = jnp.repeat(every.apex, patches, axis=-2)
    axis = every.axis.reshape(*every.axis.shape[:-3], views * patches, 3)
    slope = every.slope.reshape(*every.slope.shape[:-2], views * patches)
    meet = _meet(apex, axis, slope, near, far)
    known, view = jnp.repeat(every.known, patches, axis=-1), jnp.repeat(jnp.arange(views), patches)
    unknown = ~(known[..., :, None] & known[..., None, :])
    return meet | unknown | (view[:, None] == view)


def _meet(apex: jax.Array, axis: jax.Array, slope: jax.Array, near: float, far: float) -> jax.Array:
    """Whether cones `i` and `j` meet, `[..., N, N]`: somewhere on their axes between `near` and `far`, their distance
    is at most the sum of the radii.

    Squared, this asks whether a quadratic in the two distances `t`, `u` is negative on a square; its least value lies
    at the interior critical point, on an edge, or in a corner. The paper looks at the closest points of the axes alone
    and so misses cones that meet only further out, where their radii are larger.
    """
    offset = apex[..., :, None, :] - apex[..., None, :, :]
    along = jnp.einsum("...id,...jd->...ij", axis, axis)
    own, other = jnp.einsum("...id,...ijd->...ij", axis, offset), jnp.einsum("...jd,...ijd->...ij", axis, offset)
    slope_t, slope_u = slope[..., :, None], slope[..., None, :]
    tt, uu, tu = 1.0 - slope_t**2, 1.0 - slope_u**2, -(along + slope_t * slope_u)
    constant = jnp.sum(offset * offset, -1)

    def best_t(u: jax.Array | float) -> jax.Array:
        return jnp.clip(-(own + tu * u) / jnp.maximum(tt, _SMALL), near, far)

    def best_u(t: jax.Array | float) -> jax.Array:
        return jnp.clip((other - tu * t) / jnp.maximum(uu, _SMALL), near, far)

    determinant = tt * uu - tu * tu
    inside = jnp.clip(-(tu * other + uu * own) / jnp.where(determinant > _SMALL, determinant, 1.0), near, far)
    places: list[tuple[jax.Array | float, jax.Array | float]] = [(t, u) for t in (near, far) for u in (near, far)]
    places += [(t, best_u(t)) for t in (near, far)] + [(best_t(u), u) for u in (near, far)] + [(inside, best_u(inside))]
    meet = jnp.zeros(along.shape, bool)
    for t, u in places:
        meet |= constant + tt * t * t + uu * u * u + 2.0 * (tu * t * u + own * t - other * u) <= 0.0
    return meet | jnp.swapaxes(meet, -1, -2)


def _grid(rows: int, columns: int, shift: float, total_rows: int, total_columns: int) -> jax.Array:
    """`[rows * columns, 2]` picture coordinates (x, y) in units of width and height."""
    y, x = jnp.meshgrid(
        (jnp.arange(rows) + shift) / total_rows, (jnp.arange(columns) + shift) / total_columns, indexing="ij"
    )
    return jnp.stack([x, y], -1).reshape(-1, 2)


def _rays(geometry: jax.Array, points: jax.Array) -> jax.Array:
    """Unit rays `[..., N, 3]` in camera axes (x right, y down, z forward) of picture `points [N, 2]`."""
    focal, centre = jnp.where(geometry[..., None, :2] > 0, geometry[..., None, :2], 1.0), geometry[..., None, 2:4]
    ray = _undistorted((points - centre) / focal, geometry[..., None, 4:9])
    ray = jnp.concatenate([ray, jnp.ones_like(ray[..., :1])], -1)
    return ray / jnp.linalg.norm(ray, axis=-1, keepdims=True)


def _undistorted(distorted: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Inverts the Brown-Conrady model (k1 k2 p1 p2 k3) on normalised coordinates by fixed-point iteration."""
    k1, k2, p1, p2, k3 = jnp.moveaxis(coefficients, -1, 0)
    point = distorted
    for _ in range(_UNDISTORT_STEPS):
        x, y = point[..., 0], point[..., 1]
        r2 = x * x + y * y
        radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
        shift = jnp.stack([2 * p1 * x * y + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], -1)
        point = (distorted - shift) / radial[..., None]
    return point
