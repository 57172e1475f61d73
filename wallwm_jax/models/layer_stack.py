"""Stacks of equal blocks: built under vmap with parameters `[L, ...]`, run by one scan.

The only place with scan and rematerialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)

REMAT = {
    "none": None,
    "products": ("attention", "ffn", "projection", "query"),
    "most": ("attention", "ffn", "projection"),
    "selective": ("attention", "ffn"),
    "attention": ("attention",),
    "full": (),
}
"""Policy → what is kept for the backward pass: of long attentions output and normaliser, of feed-forwards hidden layer
and output, of all attentions what their projections give, "most" but for queries; None keeps all."""


def build(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """One module whose every parameter carries a leading layer axis: `depth` blocks, each from its own random key."""
    return nnx.vmap(make)(rngs.split(depth))


def run(
    step: Callable[..., tuple[Any, Any]], carry: Any, blocks: tuple[nnx.Module, ...], inputs: Any = None
) -> tuple[Any, Any]:
    """Runs `carry, output = step(carry, (block of this layer, ...), inputs of this layer)` over the layers.

    Args:
      step: pure; gets the blocks of one layer in the order of `blocks`.
      carry: what the layers hand on.
      blocks: stacked modules from `build`, of equal depth.
      inputs: pytree with a leading layer axis, or None.

    Returns:
      (last carry, outputs stacked on a leading layer axis).
    """
    graphs, states = zip(*(nnx.split(block) for block in blocks))

    def body(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        states, inputs = layer
        return step(carry, tuple(nnx.merge(graph, state) for graph, state in zip(graphs, states)), inputs)

    return jax.lax.scan(body, carry, (states, inputs))


def group(blocks: Block, first: int, groups: int, size: int) -> Block:
    """A stack of `groups` stacks of `size` blocks each (0 is allowed): those of a stack from `first` on."""
    graph, state = nnx.split(blocks)
    return nnx.merge(graph, group_leaves(state, first, groups, size))


def group_leaves(tree: Any, first: int, groups: int, size: int) -> Any:
    """Leaves `[L, ...]` to `[groups, size, ...]`: the entries from `first` on."""
    cut = slice(first, first + groups * size)
    return jax.tree.map(lambda leaf: leaf[cut].reshape(groups, size, *leaf.shape[1:]), tree)


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`function`, with its intermediates recomputed in the backward pass, but for those that `REMAT[policy]` names.

    Raises:
      ValueError: unknown policy.
    """
    if policy not in REMAT:
        raise ValueError(f"model.remat {policy!r}: one of {', '.join(REMAT)}")
    kept = REMAT[policy]
    if kept is None:
        return function
    keep = jax.checkpoint_policies.save_only_these_names(*kept) if kept else None
    return jax.checkpoint(function, prevent_cse=False, policy=keep)
