"""The gated delta rule (arXiv 2412.06464): a linear attention whose state forgets, and overwrites what it corrects.

A head keeps a state `S [K, V]`, a map from keys to values. Each token decays it and corrects what it holds at its key:

    S <- exp(g) S,   S <- S + beta k (v - S^T k)^T,   output S^T q        with g <= 0 and 0 <= beta <= 1

A token with g = 0 and beta = 0 leaves no trace. All is float32, products too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 64
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # states add up over whole texts


def delta_rule(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Runs S tokens through the rule; a single one by the recurrence, more by chunks.

    Args:
      query, key: `[B, S, H, K]`, of unit length, the query scaled.
      value: `[B, S, R H, V]`; each key head serves R consecutive value heads.
      log_decay, beta: g and beta, `[B, S, R H]`.
      state: before the first token, `[B, R H, K, V]`.

    Returns:
      (outputs `[B, S, R H, V]`, state after the last token), float32.
    """
    return (recurrent if query.shape[1] == 1 else chunked)(query, key, value, log_decay, beta, state)


def recurrent(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` token by token, as its definition says."""

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, value, log_decay, beta = token
        state = state * jnp.exp(log_decay)[..., None, None]
        error = value - _einsum("bhrkv,bhk->bhrv", state, key)
        state = state + _einsum("bhk,bhr,bhrv->bhrkv", key, beta, error)
        return state, _einsum("bhrkv,bhk->bhrv", state, query)

    heads = key.shape[2]
    tokens = (query, key, *(_by_key_head(x, heads) for x in (value, log_decay, beta)))
    tokens = tuple(jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in tokens)
    last, out = jax.lax.scan(step, state.reshape(len(state), heads, -1, *state.shape[2:]), tokens)
    return jnp.moveaxis(out, 0, 1).reshape(value.shape), last.reshape(state.shape)


def chunked(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` in chunks of as many tokens as a key is wide, up to `CHUNK`: matrix products, a scan over chunks.

    Within a chunk the corrections u of all tokens solve a triangular system (the paper's section 3.3): u = beta (v -
    decayed S^T k - the corrections of earlier tokens as far as their keys overlap), which is linear in the state.
    """
    length, heads = key.shape[1:3]
    size = min(CHUNK, key.shape[-1], length)
    query, key = (_in_chunks(x, size, 1) for x in (query, key))  # [N, B, H, C, K]
    values, log_decay, beta = (_in_chunks(_by_key_head(x, heads), size, 2) for x in (value, log_decay, beta))

    # From token j to token i, [N, B, H, R, C, C]: summed apart, since differences of long sums lose their small digits.
    between = _einsum("...il,lj->...ij", jnp.tri(size) * log_decay[..., None, :], jnp.tri(size, k=-1))
    decay = jnp.tri(size) * jnp.exp(between)
    since_start = jnp.exp(jnp.cumsum(log_decay, -1))
    system = beta[..., None] * decay * _einsum("nbhik,nbhjk->nbhij", key, key)[:, :, :, None]
    sides = jnp.concatenate([values, since_start[..., None] * key[:, :, :, None]], -1)
    solved = _einsum("...ij,...jv->...iv", _unit_inverse(system), beta[..., None] * sides)
    mixing = decay * _einsum("nbhik,nbhjk->nbhij", query, key)[:, :, :, None]

    def step(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, solved, mixing, since_start, to_end = chunk
        fresh, reading = jnp.split(solved, [value.shape[-1]], -1)
        correction = fresh - _einsum("bhrck,bhrkv->bhrcv", reading, state)
        out = since_start[..., None] * _einsum("bhck,bhrkv->bhrcv", query, state)
        out = out + _einsum("bhrij,bhrjv->bhriv", mixing, correction)
        state = state * since_start[..., -1, None, None]
        state = state + _einsum("bhck,bhrcv->bhrkv", key, to_end[..., None] * correction)
        return state, out

    start = state.astype(jnp.float32).reshape(len(state), heads, -1, *state.shape[2:])
    last, out = jax.lax.scan(step, start, (query, key, solved, mixing, since_start, decay[..., -1, :]))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # [B, N, C, H, R, V]
    return out.reshape(len(out), -1, *value.shape[2:])[:, :length], last.reshape(state.shape)


def causal_conv(x: jax.Array, kernel: jax.Array, before: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convolves every channel with its own taps over time.

    Args:
      x: inputs `[B, S, C]`.
      kernel: `[taps, C]`, the last tap for the token itself.
      before: inputs before the first, `[B, taps - 1, C]`.
      end: `[B]`, up to where inputs count, in 0..S.

    Returns:
      (outputs `[B, S, C]` float32, the `taps - 1` inputs before `end`, in the dtype of `before`).
    """
    taps, length = len(kernel), x.shape[1]
    x = jnp.concatenate([before.astype(x.dtype), x], 1)
    out = sum(x[:, i : i + length].astype(jnp.float32) * kernel[i].astype(jnp.float32) for i in range(taps))
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, taps - 1))
    return jnp.asarray(out), cut(x, end).astype(before.dtype)


@jax.custom_vjp
def _unit_inverse(matrix: jax.Array) -> jax.Array:
    """Inverse of `[..., C, C]`, of which only what is below the diagonal is read; the diagonal is one.

    Inverts diagonal blocks of twice the size at each step: few large products, where a substitution has C small ones.
    """
    size = matrix.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=matrix.dtype), matrix.shape)
    block = 1
    while block < size:
        at = np.arange(size) // block
        corners = (at[:, None] % 2 == 1) & (at[None] == at[:, None] - 1)
        corner = _einsum("...ij,...jk->...ik", inverse, jnp.where(corners, matrix, 0.0))
        inverse = inverse - _einsum("...ij,...jk->...ik", corner, inverse)
        block *= 2
    return inverse


def _unit_inverse_forward(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _unit_inverse(matrix)
    return inverse, inverse


def _unit_inverse_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    of_matrix = -_einsum("...ji,...jk,...lk->...il", inverse, gradient, inverse)
    return (jnp.where(np.tri(inverse.shape[-1], k=-1, dtype=bool), of_matrix, 0.0),)


_unit_inverse.defvjp(_unit_inverse_forward, _unit_inverse_backward)


def _by_key_head(x: jax.Array, heads: int) -> jax.Array:
    """`[B, S, R H, ...]` to `[B, S, H, R, ...]`."""
    return x.reshape(*x.shape[:2], heads, -1, *x.shape[3:])


def _in_chunks(x: jax.Array, size: int, head_axes: int) -> jax.Array:
    """`[B, S, heads..., ...]` to float32 `[N, B, heads..., size, ...]`, padded with tokens without trace."""
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), (1, 2), (0, 2 + head_axes))
