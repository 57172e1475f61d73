"""Attention over packed events that computes only tiles where queries and keys share an event; for the CPU.

A row holds many events, so most of a dense logit matrix is closed. One loop visits the open tiles (query tile x key
tile of one event) with an online softmax, and a second loop computes the gradients from the saved output and
log-sum-exp: no logits are ever stored. Events need not be contiguous, they are only fastest so.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_CLOSED = -1e30
_TILE_SHARE = 3 / 32  # of a row: most events fit one tile, and a visit costs little
_MIN_TILE = 32


class _Visits(NamedTuple):
    """The open tiles: row, event, first query and first key of each `[n]`, and how many are open."""

    row: jax.Array
    event: jax.Array
    query: jax.Array
    key: jax.Array
    number: jax.Array


def worthwhile(queries: int, keys: int, events: int) -> bool:
    """Whether visiting tiles beats the dense computation for rows of up to `events` events."""
    return events >= 4 and _tile(queries) * _tile(keys) * 4 <= queries * keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_events(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    events: int,
) -> jax.Array:
    """As `attention.attend` with segments 1..`events`: `[B, H, S, D]`, float32 inside, zero where no key is open."""
    return _forward(query, key, value, q_segments, kv_segments, events)[0]


def _tile(length: int) -> int:
    return min(length, max(_MIN_TILE, math.ceil(length * _TILE_SHARE)))


def _spans(segments: jax.Array, events: int) -> tuple[jax.Array, jax.Array]:
    """First position and length up to the last, `[B, E]` each, of events 1..E; length 0 where absent."""
    member = segments[:, None, :] == jnp.arange(1, events + 1)[:, None]
    first = jnp.argmax(member, -1)
    last = segments.shape[1] - 1 - jnp.argmax(member[:, :, ::-1], -1)
    return first, jnp.where(jnp.any(member, -1), last - first + 1, 0)


def _plan(q_segments: jax.Array, kv_segments: jax.Array, events: int) -> _Visits:
    """Lists the open tiles in order of row, event, query tile, key tile."""
    (b, s), t = q_segments.shape, kv_segments.shape[1]
    q_tile, k_tile = _tile(s), _tile(t)
    q_first, q_length = _spans(q_segments, events)
    k_first, k_length = _spans(kv_segments, events)
    q_step, k_step = jnp.arange(math.ceil(s / q_tile)), jnp.arange(math.ceil(t / k_tile))
    shape = (b, events, len(q_step), len(k_step))
    is_open = (q_step * q_tile < q_length[..., None])[..., None] & (k_step * k_tile < k_length[..., None])[:, :, None]
    parts = (
        jnp.arange(b)[:, None, None, None],
        jnp.arange(1, events + 1)[None, :, None, None],
        (q_first[..., None] + q_step * q_tile)[..., None],
        (k_first[..., None] + k_step * k_tile)[:, :, None],
    )
    order = jnp.argsort(~is_open.reshape(-1), stable=True)
    row, event, query, key = (jnp.broadcast_to(part, shape).reshape(-1)[order] for part in parts)
    return _Visits(row, event, query, key, jnp.sum(is_open))


def _slice(array: jax.Array, row: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Positions `[start, start + size)` of `array [B, H, N, D]` or `[B, H, N]` in a row; a start too late is moved."""
    begin = (row, 0, start, 0)[: array.ndim]
    return jax.lax.dynamic_slice(array, begin, (1, array.shape[1], size, *array.shape[3:]))[0]


def _update(array: jax.Array, part: jax.Array, row: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, part[None], (row, 0, start, 0)[: array.ndim])


def _member(segments: jax.Array, row: jax.Array, start: jax.Array, size: int, event: jax.Array) -> jax.Array:
    """Which positions of a tile `[size]` belong to the event and to this tile, not to the one before."""
    begin = jnp.minimum(start, segments.shape[1] - size)
    part = jax.lax.dynamic_slice(segments, (row, start), (1, size))[0]
    return (part == event) & (begin + jnp.arange(size) >= start)


def _with_columns(array: jax.Array, *columns: jax.Array) -> jax.Array:
    """`array [H, n, D]` with one more feature per `column`, `[n]` or `[H, n]`.

    A bias that is a column of the operands costs nothing in the product; added to the product, it is recomputed for
    every logit.
    """
    shape = array.shape[:2]
    return jnp.concatenate([array, *(jnp.broadcast_to(column, shape)[..., None] for column in columns)], -1)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, q_segments: jax.Array, kv_segments: jax.Array, events: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q_tile, k_tile = _tile(query.shape[2]), _tile(key.shape[2])
    queries, keys, values = (array.astype(jnp.float32) for array in (query / math.sqrt(query.shape[-1]), key, value))
    visits = _plan(q_segments, kv_segments, events)

    def visit(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row, event, q_start, k_start = visits.row[i], visits.event[i], visits.query[i], visits.key[i]
        q_open = _member(q_segments, row, q_start, q_tile, event)
        k_bias = jnp.where(_member(kv_segments, row, k_start, k_tile, event), 0.0, _CLOSED)
        mixed, peak, total = (_slice(array, row, q_start, q_tile) for array in carry)
        q_part = _with_columns(_slice(queries, row, q_start, q_tile), jnp.ones(q_tile))
        k_part = _with_columns(_slice(keys, row, k_start, k_tile), k_bias)
        logits = jnp.einsum("hsd,htd->hst", q_part, k_part)
        new_peak = jnp.maximum(peak, jnp.max(logits, -1))
        weights = jnp.exp(logits - new_peak[..., None])
        fade = jnp.exp(peak - new_peak)
        part = jnp.einsum("hst,htd->hsd", weights, _slice(values, row, k_start, k_tile))
        updates = (fade[..., None] * mixed + part, new_peak, fade * total + jnp.sum(weights, -1))
        kept = (
            jnp.where(q_open[:, None], updates[0], mixed),
            jnp.where(q_open, updates[1], peak),
            jnp.where(q_open, updates[2], total),
        )
        return tuple(_update(array, part, row, q_start) for array, part in zip(carry, kept))

    rows = queries.shape[:3]
    start = (jnp.zeros(queries.shape), jnp.full(rows, _CLOSED), jnp.zeros(rows))
    mixed, peak, total = jax.lax.fori_loop(0, visits.number, visit, start)
    total = jnp.where(total > 0, total, 1.0)
    output = (mixed / total[..., None]).astype(value.dtype)
    output, log_total = (checkpoint_name(part, "attention") for part in (output, peak + jnp.log(total)))
    return output, (query, key, value, q_segments, kv_segments, output, log_total)


def _backward(events: int, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, q_segments, kv_segments, output, log_total = saved
    q_tile, k_tile = _tile(query.shape[2]), _tile(key.shape[2])
    scale = 1.0 / math.sqrt(query.shape[-1])
    queries, keys, values, gradients = (array.astype(jnp.float32) for array in (query * scale, key, value, gradient))
    drift = jnp.sum(gradients * output, -1)
    visits = _plan(q_segments, kv_segments, events)

    def visit(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row, event, q_start, k_start = visits.row[i], visits.event[i], visits.query[i], visits.key[i]
        q_bias = jnp.where(
            _member(q_segments, row, q_start, q_tile, event), -_slice(log_total, row, q_start, q_tile), _CLOSED
        )
        k_bias = jnp.where(_member(kv_segments, row, k_start, k_tile, event), 0.0, _CLOSED)
        q_part, k_part = _slice(queries, row, q_start, q_tile), _slice(keys, row, k_start, k_tile)
        out_part, ones = _slice(gradients, row, q_start, q_tile), (jnp.ones(q_tile), jnp.ones(k_tile))
        weights = jnp.exp(
            jnp.einsum("hsd,htd->hst", _with_columns(q_part, ones[0], q_bias), _with_columns(k_part, k_bias, ones[1]))
        )
        of_logits = weights * jnp.einsum(
            "hsd,htd->hst",
            _with_columns(out_part, -_slice(drift, row, q_start, q_tile)),
            _with_columns(_slice(values, row, k_start, k_tile), ones[1]),
        )
        parts = (
            (jnp.einsum("hst,htd->hsd", of_logits, k_part) * scale, q_start),
            (jnp.einsum("hst,hsd->htd", of_logits, q_part), k_start),
            (jnp.einsum("hst,hsd->htd", weights, out_part), k_start),
        )
        return tuple(
            _update(total, _slice(total, row, start, part.shape[1]) + part, row, start)
            for total, (part, start) in zip(carry, parts)
        )

    start = tuple(jnp.zeros(array.shape) for array in (queries, keys, values))
    totals = jax.lax.fori_loop(0, visits.number, visit, start)
    of_query, of_key, of_value = (total.astype(array.dtype) for total, array in zip(totals, (query, key, value)))
    return of_query, of_key, of_value, None, None


attend_events.defvjp(_forward, _backward)
