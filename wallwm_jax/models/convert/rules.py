"""The vocabulary of weight conversion: which tensor of a file is which parameter, and how its indices move. numpy only.

A model's file holds one function `table(shapes, config) -> Table`. Transforms move indices and never touch values, so
that a round trip is byte-identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wallwm_jax.console import UserError

Shape = tuple[int, ...]


class Transform(Protocol):
    """An invertible movement of indices; arrays of any dtype, views where possible."""

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The tensor of the file as our parameter."""

    def invert(self, array: np.ndarray) -> np.ndarray:
        """Our parameter as the tensor of the file."""


@dataclass(frozen=True)
class Transpose:
    """Axes in a new order, as `numpy.transpose`."""

    axes: Shape

    def apply(self, array: np.ndarray) -> np.ndarray:
        return np.transpose(array, self.axes)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return np.transpose(array, np.argsort(self.axes))


@dataclass(frozen=True)
class Reshape:
    """From one whole shape to another."""

    before: Shape
    after: Shape

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.after)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.before)


@dataclass(frozen=True)
class Take:
    """A permutation along one axis: result index `i` holds source index `indices[i]`."""

    indices: Shape
    axis: int

    def apply(self, array: np.ndarray) -> np.ndarray:
        return np.take(array, self.indices, self.axis)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return np.take(array, np.argsort(self.indices), self.axis)


@dataclass(frozen=True)
class Chain:
    """Several transforms, the first one first."""

    parts: tuple[Transform, ...]

    def apply(self, array: np.ndarray) -> np.ndarray:
        for part in self.parts:
            array = part.apply(array)
        return array

    def invert(self, array: np.ndarray) -> np.ndarray:
        for part in reversed(self.parts):
            array = part.invert(array)
        return array


def chain(*parts: Transform) -> Chain:
    """The transforms one after the other."""
    return Chain(parts)


SAME = Chain(())
LINEAR = Transpose((1, 0))
"""A linear map's `[out, in]` as our kernel `[in, out]`."""


def conv_kernel(rank: int) -> Transpose:
    """A convolution's `[O, I, *k]` with `rank` kernel axes as `[*k, I, O]`."""
    return Transpose((*range(2, 2 + rank), 1, 0))


def drop_ones(shape: Shape) -> Reshape:
    """Axes of length one removed: `[C, 1, 1]` to `[C]`."""
    return Reshape(shape, tuple(size for size in shape if size != 1))


def rope_halves(heads: int, head_dim: int) -> Shape:
    """Indices that turn interleaved rotary pairs (2j, 2j + 1) into halves (j, j + d/2), within each head."""
    within = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)
    return tuple(int(i) for i in (np.arange(heads)[:, None] * head_dim + within).reshape(-1))


@dataclass(frozen=True)
class Rule:
    """One parameter and where it comes from.

    Attributes:
      source: name in the file; with `layers`, "{}" stands for the layer.
      path: of our parameter, "/"-joined.
      shape: of one tensor in the file.
      transform: from the file's tensor to our parameter (of one layer).
      layers: 0, or the number of tensors stacked on a leading axis.
      numbers: what "{}" stands for, one per layer; empty counts from 0.
    """

    source: str
    path: str
    shape: Shape
    transform: Transform = SAME
    layers: int = 0
    numbers: Shape = ()

    def names(self) -> list[str]:
        """The tensors of the file that this parameter needs, layer by layer."""
        if not self.layers:
            return [self.source]
        return [self.source.format(number) for number in self.numbers or range(self.layers)]

    def target_shape(self) -> Shape:
        """Shape of our parameter, with its layer axis."""
        one = self.transform.apply(np.broadcast_to(np.zeros((), np.int8), self.shape)).shape
        return (self.layers, *one) if self.layers else one


@dataclass(frozen=True)
class Table:
    """How one model's file maps to our parameters.

    Attributes:
      layout: which names were recognised, "diffusers" or "original".
      sizes: what rebuilds the module; plain JSON.
      rules: every parameter once.
      aliases: (name, same_as): a tensor that the file may hold in addition; it must equal the other byte for byte.
    """

    layout: str
    sizes: dict[str, Any]
    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    def parameters(self) -> int:
        """Number of values in all parameters."""
        return sum(math.prod(rule.shape) * max(rule.layers, 1) for rule in self.rules)

    def check(self, shapes: Mapping[str, Shape], where: str) -> None:
        """Holds the tensors of a file against the rules.

        Raises:
          UserError: names the missing, left-over or misshapen tensors.
        """
        wanted = {name: rule for rule in self.rules for name in rule.names()}
        missing = [name for name in wanted if name not in shapes]
        known = wanted.keys() | {alias for alias, _ in self.aliases}
        left_over = [name for name in shapes if name not in known]
        if missing:
            raise UserError(f"{where}: missing tensor {_some(missing)}; is a shard absent, or is this another model?")
        if left_over:
            raise UserError(
                f"{where}: left-over tensor {_some(left_over)}; the {self.layout} layout has no place for it"
            )
        expected = {name: rule.shape for name, rule in wanted.items()}
        expected |= {alias: expected[same_as] for alias, same_as in self.aliases}
        for name, shape in shapes.items():
            if tuple(shape) != expected[name]:
                raise UserError(f"{where}: tensor {name!r} has shape {list(shape)}, expected {list(expected[name])}")

    def to_params(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Our nested parameters from the tensors of a (small) file held in memory."""
        params: dict[str, Any] = {}
        for rule in self.rules:
            layers = [rule.transform.apply(np.asarray(tensors[name])) for name in rule.names()]
            _insert(params, rule.path, np.stack(layers) if rule.layers else layers[0])
        return params

    def to_tensors(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Inverse of `to_params`, without aliases; other parameters in the tree are left alone."""
        tensors = {}
        for rule in self.rules:
            leaf: Any = params
            for key in rule.path.split("/"):
                leaf = leaf[key]
            leaf = np.asarray(leaf)
            for layer, name in enumerate(rule.names()):
                tensors[name] = rule.transform.invert(leaf[layer] if rule.layers else leaf)
        return tensors


def read_size(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A size from a model's config.json.

    Raises:
      UserError: absent, and no default.
    """
    value = config.get(key, default)
    if value is None:
        raise UserError(
            f"config.json has no {key!r}; copy the config.json that was published with the weights beside them"
        )
    return value


def require(config: Mapping[str, Any], key: str, allowed: Iterable[Any], default: Any) -> None:
    """Raises `UserError` if a config names a variant of the model that our module does not have."""
    value, allowed = config.get(key, default), list(allowed)
    if value not in allowed:
        raise UserError(f"config.json: {key} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}")


def _insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _some(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
