"""Two ways to split a long attention over chips, compiled for a TPU slice: by all-to-all, and in a ring.

By all-to-all (`models.per_device`) tokens are exchanged for heads before the kernel and back after it; in a ring every
chip keeps its queries, and keys and values go round. tokamax has a kernel for both, so that only the exchange differs;
what the towers do (`models.flash_attention`), rotary embedding included, stands beside. All get and give arrays split
by tokens, as the projections around them want it, and are differentiated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from wallwm_jax.benchmarks.preflight import ETAS, project
from wallwm_jax.console import UserError, phase
from wallwm_jax.models.flash_attention import attend_flash
from wallwm_jax.models.per_device import per_device
from wallwm_jax.models.resident_attention import Rotary
from wallwm_jax.models.splash_attention import block_size
from wallwm_jax.parallel.aot import statistics, topology_devices
from wallwm_jax.parallel.chips import GIB, chip_of
from wallwm_jax.parallel.mesh import AXES, make_mesh

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_TOKENS = PartitionSpec(None, None, "context", None)


def measure(config: ConfigDict, topology: str, rows: Sequence[str] = ()) -> dict[str, Any]:
    """Row → figures per chip of one attention along a view and its gradient; the context axis is the whole slice.

    Args:
      config: of a training; one row of one view is taken.
      topology: see `aot.topology_devices`.
      rows: of `ROWS`; none takes all.

    Raises:
      UserError: no such row or topology; the chips do not divide the tokens; tokamax is needed and not there.
    """
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise UserError(f"--rows={unknown[0]}: one of {', '.join(ROWS)}")
    model, devices = config.model, topology_devices(topology)
    tokens = config.data.latents_per_row * math.prod(n // p for n, p in zip(model.latent_shape, model.patch))
    if tokens % len(devices):
        raise UserError(f"{len(devices)} chips do not divide the {tokens} tokens of a view; choose another topology")
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "context": len(devices)}, devices)
    by_head = (1, model.heads, tokens, model.width // model.heads)
    result: dict[str, Any] = {"topology": topology, "chips": len(devices), "attention": by_head}
    for name in rows or ROWS:
        attention, shape = ROWS[name], by_head
        if attention is _towers:
            attention, shape = functools.partial(_towers, heads=model.heads), (1, 1, tokens, model.width)
        with phase(f"{name}: {shape} over {len(devices)} chips"):
            result[name] = _compile(attention, shape, mesh, topology)
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    _, heads, tokens, width = result["attention"]
    lines = [
        f"one attention of {heads} heads of {width} over {tokens} tokens, and its gradient; {result['topology']}, "
        f"{result['chips']} chips; per chip:",
        f"{'':<12}{'GB recv':>9}{'waited':>9}{'TFLOP':>9}{'GiB':>7}{'other s':>9}{'waits s':>9}"
        + "".join(f"{f's at {eta:.2f}':>11}" for eta in ETAS),
    ]
    lines += [
        f"{name:<12}{row['received'] / 1e9:>9.3f}{row['exposed'] / 1e9:>9.3f}{row['flops'] / 1e12:>9.2f}"
        f"{row['memory'] / GIB:>7.2f}{row['other_seconds']:>9.4f}{row['exchange_seconds']:>9.4f}"
        + "".join(f"{seconds:>11.4f}" for seconds in row["seconds"])
        for name, row in result.items()
        if name in ROWS
    ]
    return "\n".join(
        [*lines, "other: outside kernels; waits: for what is received; last all, kernels at 0.42 of the peak or more"]
    )


def _compile(attention: Attention, shape: tuple[int, ...], mesh: Mesh, topology: str) -> dict[str, Any]:
    """Figures of `attention(query, key, value)` and its gradient."""
    place = NamedSharding(mesh, _TOKENS)
    like = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def both(query: jax.Array, key: jax.Array, value: jax.Array, towards: jax.Array) -> Any:
        mixed, back = jax.vjp(attention, query, key, value)
        return mixed, back(towards)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = statistics(jax.jit(both, out_shardings=place).lower(like, like, like, like).compile())
    projected = project(found, chip_of(topology), 0.0)
    return {
        "received": float(sum(found.received.values())),
        "exposed": float(sum(moved.exposed for moved in found.traffic.values())),
        "collectives": dict(found.collectives),
        "flops": found.flops + found.kernel_flops,
        "memory": found.memory,
        "other_seconds": projected["product_seconds"] + projected["other_seconds"],
        "exchange_seconds": projected["exchange_seconds"],
        "seconds": [one.seconds for one in projected["projections"]],
    }


def _towers(query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int = 1) -> jax.Array:
    """Of `[1, 1, S, H * d]`."""
    tokens, features = query.shape[2:]
    rotary = Rotary.of(jnp.zeros((1, 1, tokens, features // heads // 2)))
    segments = jnp.ones((1, 1, tokens), jnp.int32)
    return attend_flash(query, key, value, heads=heads, segments=segments, rotary=rotary)


def _all_to_all(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    _, splash, masks, _ = _tokamax()
    length = _whole_blocks(query.shape[2])
    kernel = splash.make_splash_mha(masks.FullMask((length, length)), config=_blocks(length), q_seq_shards=1)
    segments = jnp.ones((1, query.shape[2]), jnp.int32)
    return per_device(lambda q, k, v, *_: _padded(kernel, q, k, v), query, key, value, segments, segments)


def _ring(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    _, _, masks, rings = _tokamax()
    chips = jax.sharding.get_abstract_mesh().shape["context"]
    length = _whole_blocks(query.shape[2] // chips)
    kernel = rings.make_ring_attention(
        masks.FullMask((length * chips, length * chips)),
        config=_blocks(length),
        is_mqa=False,
        ring_axis="context",
        q_seq_shards=chips,
        kv_seq_shards=chips,
    )
    split = jax.shard_map(
        functools.partial(_padded, kernel), in_specs=(_TOKENS,) * 3, out_specs=_TOKENS, check_vma=False
    )
    return split(query, key, value)


ROWS: dict[str, Attention] = {"towers": _towers, "all_to_all": _all_to_all, "ring": _ring}


def _padded(kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`kernel` of what a chip has, padded to whole blocks and scaled."""
    tokens, width = query.shape[2:]
    spare = _whole_blocks(tokens) - tokens
    query = (query.astype(jnp.float32) / math.sqrt(width)).astype(query.dtype)
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0))) for x in (query, key, value))
    real = jnp.arange(tokens + spare) < tokens
    segments = _tokamax()[0].SegmentIds(q=real.astype(jnp.int32), kv=jnp.where(real, 1, -1))
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(query, key, value)[:, :, :tokens]


def _whole_blocks(tokens: int) -> int:
    block = block_size(tokens)
    return -(-tokens // block) * block


def _blocks(length: int) -> Any:
    """Of both kernels. Gradients of queries are summed in three arrays, not in one per block of keys; the ring takes
    partial softmaxes together in base e."""
    block = block_size(length)
    return _tokamax()[1].SplashConfig(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        dq_reduction_steps=3,
        use_base2_exp=False,
    )


def _tokamax() -> tuple[Any, Any, Any, Any]:
    """Its modules of types, of the kernel, of masks, and of the ring."""
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import base
        from tokamax._src.ops.experimental.tpu.splash_attention import ring_attention_kernel as rings
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks
    except ImportError:
        raise UserError("all_to_all and ring are tokamax's kernels: pip install tokamax, or --rows=towers") from None
    return base, splash, masks, rings
