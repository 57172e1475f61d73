"""The orthogonal factor of a matrix by Newton-Schulz iteration, the heart of Muon.

For `X = U S V^T` the polar factor is `U V^T`. Each step is an odd polynomial of the singular values,
`X <- a X + (b A + c A^2) X` with `A = X X^T`, that drives them towards one; matrix products are all it needs.
Operands are `dtype` (bfloat16 on TPU, which has no float16), sums of products float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Coefficients = tuple[tuple[float, float, float], ...]


def _with_safety(table: Coefficients, factor: float) -> Coefficients:
    """Polynomials for singular values that rounding may have lifted to `factor`."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in table)


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

COEFFICIENTS: dict[str, Coefficients] = {
    "polar_express": _with_safety(_POLAR_EXPRESS, 1.05),
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Presets: optimal polynomials for five steps (Polar Express, arXiv 2505.16932) with WALL-WM's safety of 1.05; Keller
Jordan's one polynomial, which ends near 0.87 rather than 1; Jiacheng You's five."""


def orthogonalize(
    x: jax.Array, coefficients: Coefficients, *, dtype: DTypeLike = jnp.bfloat16, eps: float = 1e-7
) -> jax.Array:
    """The orthogonal factor of each matrix of `x [..., m, n]`, approximately; `dtype`, zero for a zero matrix.

    Args:
      x: matrices of any floating type; the norm is taken in float32.
      coefficients: one polynomial per step.
      dtype: of the operands of all products.
      eps: added to the Frobenius norm.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), (-2, -1), keepdims=True))
    x = (x / (norm + eps)).astype(dtype)

    def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        gram = _product("...ik,...jk->...ij", x, x).astype(dtype)
        mixed = (b * gram + c * _product("...ij,...jk->...ik", gram, gram)).astype(dtype)
        return (a * x + _product("...ij,...jk->...ik", mixed, x)).astype(dtype), None

    x, _ = jax.lax.scan(step, x, jnp.asarray(coefficients, jnp.float32))
    return jnp.swapaxes(x, -1, -2) if tall else x


def flops(shape: Sequence[int], steps: int) -> float:
    """Of orthogonalising one matrix of `shape`, two per multiply-add: `steps (4 m^2 n + 2 m^3)` with `m <= n`."""
    m, n = sorted(shape)
    return steps * (4.0 * m * m * n + 2.0 * m**3)


def _product(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)
