"""The text of an optimised HLO module: its instructions, and what each reads from and writes to HBM."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

KERNEL = "tpu_custom_call"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_NO_ESTIMATE = 2**62
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}  # others say bits
_PART = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^\s*(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations?|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_STILL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
}
"""Opcodes that move nothing by themselves; what they call is counted there."""


class Array(NamedTuple):
    """One array of an instruction's result: element type, sizes, memory space (0 is HBM)."""

    kind: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Of its elements, without the padding of a tiled layout."""
        bits = re.search(r"\d+", self.kind)
        return math.prod(self.sizes) * (_BYTES[self.kind] if self.kind in _BYTES else int(bits[0]) / 8 if bits else 0)

    @property
    def hbm(self) -> float:
        """Bytes in HBM: all or none."""
        return 0.0 if self.space else self.bytes

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.sizes))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      parts: arrays of its result; a tuple has several.
      operands: names. literal: what stands between the parentheses. root: whether it is its computation's result.
    """

    name: str
    parts: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name for found in _CALLED.findall(self.attributes) for name in _NAME.findall(found)]

    @property
    def is_kernel(self) -> bool:
        """Whether it runs a Pallas kernel."""
        return self.opcode == "custom-call" and f'"{KERNEL}"' in self.attributes

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, 0 where it gives none; None where it gives the largest integer instead of one."""
        estimate = self.number("estimated_cycles", 0)
        return estimate if estimate < _NO_ESTIMATE else None

    def number(self, name: str, default: int) -> int:
        """A number that the compiler notes on this instruction, as `"name":"12"`, or inside braces after the name."""
        found = re.search(rf'"{name}":(?:\{{"n":)?"(\d+)"', self.attributes)
        return int(found[1]) if found else default


Computation = dict[str, Instruction]


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Computation → instruction by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in hlo.splitlines():
        body = line.strip()
        if " = " in body and (body.startswith(("%", "ROOT"))):
            instruction = _instruction(body)
            current[instruction.name] = instruction
        elif header := _HEADER.match(line):
            current = computations.setdefault(header[1], {})
            entry = header[1] if body.startswith("ENTRY") else entry
    return computations, entry


def arrays(types: str) -> tuple[Array, ...]:
    """The arrays in a type such as `(f32[8,4]{1,0:T(8,128)S(1)}, bf16[2]{0})`."""
    return tuple(
        Array(kind, tuple(int(size) for size in sizes.split(",") if size), int(space[1]) if space else 0)
        for kind, sizes, layout in _PART.findall(types)
        for space in [re.search(r"S\((\d+)\)", layout)]
    )


def is_beside(name: str, computation: Computation) -> bool:
    """Whether a fused computation is a product with a collective's transfer inside, or the end of that transfer."""
    return name.startswith("async_collective_fusion") or calls_target(computation, "AsyncCollectiveDone")


def calls_target(computation: Computation, target: str) -> bool:
    """Whether a computation has a custom call of that target."""
    return any(f'custom_call_target="{target}"' in i.attributes for i in computation.values())


def closing(text: str, stop: str) -> int:
    """Position of the first `stop` outside any bracket."""
    depth = 0
    for position, character in enumerate(text):
        if depth == 0 and character == stop:
            return position
        depth += (character in "([{") - (character in ")]}")
    return len(text)


def _instruction(line: str) -> Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    type_end = closing(rest, " ")
    opcode, rest_of = rest[type_end + 1 :].split("(", 1)
    operands_end = closing(rest_of, ")")
    return Instruction(
        name=name.lstrip("%"),
        parts=arrays(rest[:type_end]),
        opcode=opcode,
        operands=tuple(_NAME.findall(rest_of[:operands_end])),
        literal=rest_of[:operands_end],
        attributes=rest_of[operands_end:],
        root=line.startswith("ROOT "),
    )


def hbm_bytes(instruction: Instruction, scope: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes that an instruction outside fusions moves between HBM and the chip, its operands read and results written
    once. Of slices only what is cut out or written counts; a Pallas kernel may read a block of an array again.

    Args:
      instruction: of the computation `scope`.
      computations: of the module.
    """
    opcode = instruction.opcode
    if opcode in _STILL or opcode.endswith("-done") or (opcode == "custom-call" and not instruction.is_kernel):
        return 0.0
    if opcode == "fusion":
        name = instruction.called[0]
        fused = computations[name]
        if is_beside(name, fused):  # the collective is counted where it starts
            fused = {name: one for name, one in fused.items() if one.opcode not in COLLECTIVES}
        inside = [_read(i, fused, computations) for i in _parameters(fused)]
        outside = [scope[name] for name in instruction.operands]
        read = sum(min(one, _hbm(operand)) for one, operand in zip(inside, outside, strict=True))
        return read + sum(
            min(one, part.hbm) for one, part in zip(_written(_root(fused), fused, computations), instruction.parts)
        )
    results = written(instruction)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return min(results[0].bytes, _hbm(scope[instruction.operands[0]])) + results[0].hbm
    if opcode == "dynamic-update-slice":
        update = scope[instruction.operands[1]]
        return _hbm(update) + min(_size(update), results[0].hbm)
    return sum(_hbm(scope[name]) for name in instruction.operands) + sum(part.hbm for part in results)


def written(instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that an instruction writes. What starts a transfer names its operands among its results."""
    parts = instruction.parts
    if instruction.opcode in ("copy-start", "recv"):
        return parts[:1]
    if instruction.opcode == "collective-permute-start":
        return parts[1:2]
    if instruction.opcode in ("all-gather-start", "all-to-all-start"):
        arrays = [part for part in parts if part.kind != "u32"]
        return tuple(arrays[len(arrays) // 2 :])
    return () if instruction.opcode == "send" else parts


def _parameters(computation: Computation) -> list[Instruction]:
    found = [i for i in computation.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda parameter: int(parameter.literal))


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _size(instruction: Instruction) -> float:
    return sum(part.bytes for part in instruction.parts)


def _hbm(instruction: Instruction) -> float:
    return sum(part.hbm for part in instruction.parts)


def _read(value: Instruction, fused: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes of `value` that a fused computation needs: of slices what is cut out, of what is overwritten nothing."""
    total = _size(value) if value.root else 0.0  # it leaves as it is, through a bitcast
    for user in fused.values():
        for place, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in ("bitcast", "get-tuple-element"):
                total += _read(user, fused, computations)
            elif user.opcode == "fusion":
                inner = computations[user.called[0]]
                total += _read(_parameters(inner)[place], inner, computations)
            elif place == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += _size(user)
            elif place or user.opcode != "dynamic-update-slice":
                total += _size(value)
    return min(total, _size(value))


def _written(value: Instruction, fused: Computation, computations: Mapping[str, Computation]) -> list[float]:
    """Bytes of each array of a fused computation's result that it writes: of an array updated in place, the update."""
    if value.opcode in ("tuple", "bitcast") or (value.opcode == "custom-call" and not value.is_kernel):
        inner = [fused.get(name) for name in value.operands]
        return [size for one in inner for size in (_written(one, fused, computations) if one else [0.0])]
    if value.opcode == "fusion":
        called = computations[value.called[0]]
        return _written(_root(called), called, computations)
    if value.opcode == "dynamic-update-slice":
        return [_size(fused[value.operands[1]])]
    return [part.bytes for part in value.parts]
