"""The gated delta rule (arXiv 2412.06464): a linear attention whose state forgets, and overwrites what it corrects.

A head keeps a state `S [K, V]`, a map from keys to values. Each token decays it and corrects what it holds at its key:

    S <- exp(g) S,   S <- S + beta k (v - S^T k)^T,   output S^T q        with g <= 0 and 0 <= beta <= 1

A token with g = 0 and beta = 0 leaves no trace. All is float32, products too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

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
    """`delta_rule` in chunks of `CHUNK` tokens: products of matrices within one, a scan over them.

    Within a chunk the corrections u of all tokens solve a triangular system (the paper's section 3.3): u = beta (v -
    decayed S^T k - the corrections of earlier tokens as far as their keys overlap), which is linear in the state.
    """
    length, heads = key.shape[1:3]
    size = min(CHUNK, length)
    query, key = (_in_chunks(x, size, 1) for x in (query, key))  # [N, B, H, C, K]
    values, log_decay, beta = (_in_chunks(_by_key_head(x, heads), size, 2) for x in (value, log_decay, beta))

    # From token j to token i, [N, B, H, R, C, C]: summed apart, since differences of long sums lose their small digits.
    between = _einsum("...il,lj->...ij", jnp.tri(size) * log_decay[..., None, :], jnp.tri(size, k=-1))
    decay = jnp.tri(size) * jnp.exp(between)
    since_start = jnp.exp(jnp.cumsum(log_decay, -1))
    system = beta[..., None] * decay * _einsum("nbhik,nbhjk->nbhij", key, key)[:, :, :, None]
    sides = jnp.concatenate([values, since_start[..., None] * key[:, :, :, None]], -1)
    solved = _solve(system, beta[..., None] * sides)
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


@jax.custom_vjp
def _solve(system: jax.Array, sides: jax.Array) -> jax.Array:
    """x of `(I + L) x = sides`, `[..., C, D]`; L `[..., C, C]` is `system` below its diagonal.

    Its own derivative is products with the inverse: XLA's CPU backend takes seconds for that of a batch of solves.
    """
    return _solve_forward(system, sides)[0]


def _solve_forward(system: jax.Array, sides: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    one = jnp.broadcast_to(jnp.eye(system.shape[-1]), system.shape)
    inverse = jax.lax.linalg.triangular_solve(system, one, left_side=True, lower=True, unit_diagonal=True)
    solved = _einsum("...ij,...jd->...id", inverse, sides)
    return solved, (inverse, solved)


def _solve_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solved = saved
    of_sides = _einsum("...ji,...jd->...id", inverse, gradient)
    return -jnp.tril(_einsum("...id,...jd->...ij", of_sides, solved), -1), of_sides


_solve.defvjp(_solve_forward, _solve_backward)


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


def _by_key_head(x: jax.Array, heads: int) -> jax.Array:
    """`[B, S, R H, ...]` to `[B, S, H, R, ...]`."""
    return x.reshape(*x.shape[:2], heads, -1, *x.shape[3:])


def _in_chunks(x: jax.Array, size: int, head_axes: int) -> jax.Array:
    """`[B, S, heads..., ...]` to float32 `[N, B, heads..., size, ...]`, padded with tokens without trace."""
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), (1, 2), (0, 2 + head_axes))
