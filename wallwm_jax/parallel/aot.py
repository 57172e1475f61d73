r"""Compiling for TPUs that are not there, and reading what the compiler says.

    mesh = make_mesh(config.mesh, topology_devices("v5p:4x4x8"))       # 128 chips that only exist for the compiler
    compiled = build_train_step(config, mesh).step.lower(...).compile()
    print(statistics(compiled).table())

The real TPU compiler runs on a machine without TPUs (`pip install "jax[tpu]"`). XLA counts the body of a scan once;
here every instruction is counted as often as its loops run, and of a conditional the branch with most products. Pallas
kernels are opaque to the compiler's own estimate and are listed by name.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from wallwm_jax.console import UserError
from wallwm_jax.parallel.chips import GIB

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_KERNEL = "tpu_custom_call"
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # others say their bits
_PART = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^\s*(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations?|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)

Shape = tuple[str, tuple[int, ...]]


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice that exists for the compiler alone, for `make_mesh` and `jax.jit(...).lower`.

    Args:
      topology: generation and extents of the torus, "v5p:4x4x8" (128 chips), "v6e:16x16".

    Raises:
      UserError: no TPU compiler is installed, or it does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the metadata server of a cloud machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody holds a chip here: several may compile at once
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # the plug-in raises whatever its C++ side reports
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot compile for TPU topology {topology!r} ({reason}); write it as v5p:4x4x8, and install the compiler "
            'with pip install "jax[tpu]"'
        ) from None


@dataclass
class Traffic:
    """Collectives of one kind over groups of one size: executions, bytes that a chip receives, and how many of these
    while it waits, because the program does not overlap the collective with anything. `beside` are the estimated cycles
    of the products that the compiler has put the others into."""

    count: int = 0
    received: float = 0.0
    exposed: float = 0.0
    beside: float = 0.0


@dataclass
class Statistics:
    """What one chip does in one call of a compiled program.

    Attributes:
      flops: of all matrix products and convolutions, outside Pallas kernels; product_cycles: of those in the estimate.
      products: sizes of an operand → number of executions of matrix products that have it.
      cycles: the compiler's own estimate for everything outside Pallas kernels; 0 where it gives none.
      traffic: (kind of collective, chips of a group) → what it moves.
      kernels: name of Pallas kernel → number of executions. kernel_flops: of attention kernels, as executed: 4 per
        query, key and feature forward, 10 in the fused backward.
      arguments, temporaries, outputs: bytes of device memory; outputs that reuse an argument's memory not counted.
      peak: bytes of the temporaries that are alive at once, without the holes that the allocator leaves between them.
    """

    flops: float = 0.0
    product_cycles: float = 0.0
    cycles: float = 0.0
    kernel_flops: float = 0.0
    products: Counter[tuple[int, ...]] = field(default_factory=Counter)
    traffic: dict[tuple[str, int], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    kernels: Counter[str] = field(default_factory=Counter)
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    peak: int = 0

    @property
    def memory(self) -> int:
        """Bytes a chip needs: arguments, temporaries and outputs."""
        return self.arguments + self.temporaries + self.outputs

    def add(self, other: Statistics) -> None:
        """Adds what another part of the program does; memory apart."""
        self.flops += other.flops
        self.product_cycles += other.product_cycles
        self.cycles += other.cycles
        self.kernel_flops += other.kernel_flops
        self.products += other.products
        self.kernels += other.kernels
        for key, moved in other.traffic.items():
            mine = self.traffic[key]
            mine.count += moved.count
            mine.received += moved.received
            mine.exposed += moved.exposed
            mine.beside += moved.beside

    @property
    def collectives(self) -> Counter[str]:
        """Kind of collective → number of executions."""
        total: Counter[str] = Counter()
        for (kind, _), moved in self.traffic.items():
            total[kind] += moved.count
        return total

    @property
    def received(self) -> dict[str, float]:
        """Kind of collective → bytes that a chip receives; 0 for the others."""
        total: dict[str, float] = defaultdict(float)
        for (kind, _), moved in self.traffic.items():
            total[kind] += moved.received
        return total

    def table(self) -> str:
        """Some lines for people."""
        lines = [
            f"memory       {self.memory / GIB:8.2f} GiB (arguments {self.arguments / GIB:.2f}, temporaries "
            f"{self.temporaries / GIB:.2f}, outputs {self.outputs / GIB:.2f})",
            f"products     {self.flops / 1e12:8.2f} TFLOP outside kernels",
            f"cycles       {self.cycles / 1e6:8.1f} M outside kernels, as the compiler estimates",
        ]
        lines += [
            f"{kind:<18} of {chips:>4} {moved.count:>6} times, {moved.received / 1e9:8.2f} GB received, "
            f"{moved.exposed / 1e9:.2f} waited for"
            for (kind, chips), moved in sorted(self.traffic.items())
        ]
        lines += [f"kernel {name:<40} {count:>6} times" for name, count in sorted(self.kernels.items())]
        return "\n".join(lines)


def statistics(compiled: Any) -> Statistics:
    """The statistics of a compiled program (`jax.stages.Compiled`), per chip and call."""
    result = count_instructions(compiled.as_text())
    memory = compiled.memory_analysis()
    result.arguments, result.temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    result.outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    result.peak = memory.peak_memory_in_bytes - result.arguments - result.outputs
    return result


def count_instructions(hlo: str) -> Statistics:
    """`Statistics` of the text of an optimised HLO module; memory stays 0."""
    computations, entry = _parse(hlo)
    result = Statistics()
    _count(computations, entry, 1, result, _Inside())
    return result


@dataclass(frozen=True)
class _Inside:
    """What a computation is inside of: a fusion, whose cycles are already counted; the compiler's reduce-scatter, an
    all-reduce on paper; a collective that runs beside other work; or that other work, which names the collective again.
    """

    fusion: bool = False
    reduce_scatter: bool = False
    asynchronous: bool = False
    beside: bool = False


@dataclass(frozen=True)
class _Instruction:
    name: str
    parts: tuple[Shape, ...]  # of its result; a tuple has several
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str

    @property
    def called(self) -> list[str]:
        return [name for found in _CALLED.findall(self.attributes) for name in _NAME.findall(found)]

    def number(self, name: str, default: int) -> int:
        """A number that the compiler notes on this instruction, as `"name":"12"`, or inside braces after the name."""
        found = re.search(rf'"{name}":(?:\{{"n":)?"(\d+)"', self.attributes)
        return int(found[1]) if found else default


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Computation → instruction by name, and the name of the entry computation."""
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
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


def _instruction(line: str) -> _Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    type_end = _end(rest, " ")
    opcode, rest_of = rest[type_end + 1 :].split("(", 1)
    operands_end = _end(rest_of, ")")
    return _Instruction(
        name=name.lstrip("%"),
        parts=_parts(rest[:type_end]),
        opcode=opcode,
        operands=tuple(_NAME.findall(rest_of[:operands_end])),
        literal=rest_of[:operands_end],
        attributes=rest_of[operands_end:],
    )


def _parts(types: str) -> tuple[Shape, ...]:
    """Element type and sizes of each array in a type such as `(f32[8,4]{1,0}, bf16[2]{0})`."""
    return tuple(
        (kind, tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in _PART.findall(re.sub(r"\{[^}]*\}", "", types))
    )


def _end(text: str, stop: str) -> int:
    """Position of the first `stop` outside any bracket."""
    depth = 0
    for position, character in enumerate(text):
        if depth == 0 and character == stop:
            return position
        depth += (character in "([{") - (character in ")]}")
    return len(text)


def _count(
    computations: dict[str, dict[str, _Instruction]], computation: str, times: int, result: Statistics, inside: _Inside
) -> None:
    """Adds a computation that runs `times` times."""
    for instruction in computations[computation].values():
        opcode, inner, called = instruction.opcode, times, [n for n in instruction.called if n in computations]
        cycles = times * instruction.number("estimated_cycles", 0)
        if opcode == "while":
            inner *= instruction.number("known_trip_count", _trips(instruction, computations))
        elif not inside.fusion:
            result.cycles += cycles
        if opcode in ("dot", "convolution"):
            result.flops += times * _product_flops(instruction, computations[computation])
            for name in instruction.operands[:2]:
                result.products[computations[computation][name].parts[0][1]] += times
        elif opcode == "custom-call" and f'"{_KERNEL}"' in instruction.attributes:
            name = _kernel_name(instruction)
            result.kernels[name] += times
            result.kernel_flops += times * _attention_flops(name, instruction)
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES and not inside.beside:
            _count_collective(kind, instruction, times, result, inside)
        if opcode in ("reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map") or kind in COLLECTIVES:
            continue  # what they call runs per element
        if opcode == "conditional":
            branches = [Statistics() for _ in called]
            for name, branch in zip(called, branches):
                _count(computations, name, inner, branch, inside)
            result.add(max(branches, key=lambda branch: branch.flops))
            continue
        before = result.flops
        for name in called:
            within = _Inside(
                inside.fusion or opcode == "fusion",
                inside.reduce_scatter or name.startswith("all-reduce-scatter"),
                inside.asynchronous or opcode == "async-start" or _calls(computations[name], "AsyncCollectiveStart"),
                inside.beside or _is_beside(name, computations[name]),
            )
            _count(computations, name, inner, result, within)
            if within.beside and not inside.beside:
                _count_beside(computations[name], cycles, result)
        if opcode == "fusion" and not inside.fusion and result.flops > before:
            result.product_cycles += cycles


def _is_beside(name: str, computation: dict[str, _Instruction]) -> bool:
    """Whether it is a product with a collective's transfer inside, or the end of that transfer."""
    return name.startswith("async_collective_fusion") or _calls(computation, "AsyncCollectiveDone")


def _calls(computation: dict[str, _Instruction], target: str) -> bool:
    return any(f'custom_call_target="{target}"' in i.attributes for i in computation.values())


def _count_beside(computation: dict[str, _Instruction], cycles: float, result: Statistics) -> None:
    for instruction in computation.values():
        if instruction.opcode in COLLECTIVES:
            result.traffic[instruction.opcode, _group_size(instruction.attributes)].beside += cycles


def _count_collective(kind: str, instruction: _Instruction, times: int, result: Statistics, inside: _Inside) -> None:
    received = times * _received(kind, instruction)
    if kind == "all-reduce" and inside.reduce_scatter:
        kind, received = "reduce-scatter", received / 2
    moved = result.traffic[kind, _group_size(instruction.attributes)]
    moved.count += times
    moved.received += received
    if not inside.asynchronous and not instruction.opcode.endswith("-start"):
        moved.exposed += received


def _attention_flops(name: str, instruction: _Instruction) -> float:
    """Of a splash kernel: its first two floating-point arrays are queries `[B, H, S, d]` and keys `[B, H, T, d]`; B may
    be missing where it is 1."""
    _, _, layout = instruction.attributes.partition("operand_layout_constraints={")
    arrays = [shape for kind, shape in _parts(layout[: _end(layout, "}")]) if "f" in kind]
    per_pair = 4 if "fwd" in name else 10 if "dkv" in name else 0
    return per_pair * math.prod(arrays[0]) * arrays[1][-2] if len(arrays) > 1 else 0.0


def _trips(loop: _Instruction, computations: dict[str, dict[str, _Instruction]]) -> int:
    """How often a scan's loop runs: the constant that its condition compares the counter with; 1 without one."""
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    instructions = computations[condition[1]].values() if condition else ()
    limits = [int(i.literal) for i in instructions if i.opcode == "constant" and i.literal.isdigit()]
    return limits[0] if len(limits) == 1 else 1


def _product_flops(instruction: _Instruction, computation: dict[str, _Instruction]) -> float:
    """Two per multiply-add of a `dot` or `convolution`."""
    _, output = instruction.parts[0]
    left, right = (computation[name].parts[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(output) * math.prod(sizes)
    return 2.0 * math.prod(output) * _taps(instruction, left, right, output)


def _taps(instruction: _Instruction, left: tuple[int, ...], right: tuple[int, ...], output: tuple[int, ...]) -> float:
    """Multiply-adds per element of a convolution's output.

    The compiler writes batched products as convolutions over the batch axes, dilated so that each position sees one
    real tap. Taps between the elements or in the padding are free and left out.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None  # every convolution names its dimensions
    taps = float(right[labels[2].index("i")])
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    if window is None:
        return taps
    fields = dict(part.split("=", 1) for part in window[1].split())
    sizes = [int(size) for size in fields["size"].split("x")]

    def per_axis(name: str, default: str) -> list[int]:
        values = fields.get(name, "x".join([default] * len(sizes)))
        return [int(value.split("_")[0]) for value in values.split("x")]

    windows = zip(
        sizes, per_axis("stride", "1"), per_axis("rhs_dilate", "1"), per_axis("lhs_dilate", "1"), per_axis("pad", "0_0")
    )
    for axis, (size, stride, dilation, base, pad) in enumerate(windows):
        extent, positions = left[labels[1].index(str(axis))], output[labels[3].index(str(axis))]
        places = (p * stride + tap * dilation - pad for p in range(positions) for tap in range(size))
        taps *= sum(0 <= place <= (extent - 1) * base and place % base == 0 for place in places) / positions
    return taps


def _kernel_name(instruction: _Instruction) -> str:
    for pattern in (r'kernel_name\\?":\s*\\?"([^"\\]+)', r'op_name="[^"]*?([\w.\-]+)"'):
        if found := re.search(pattern, instruction.attributes):
            return found[1]
    return instruction.name


def _received(kind: str, instruction: _Instruction) -> float:
    """Bytes that a chip receives in one execution, by the ring algorithm."""
    sizes = list(_sizes(instruction.parts))
    group = _group_size(instruction.attributes)
    if kind == "collective-permute":
        return sizes[-1] if not instruction.opcode.endswith("-start") else sizes[min(1, len(sizes) - 1)]
    if instruction.opcode.endswith("-start") and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # the first half are the operands
    total, others = sum(sizes), (group - 1) / group
    return {"all-reduce": 2 * total * others, "reduce-scatter": total * (group - 1)}.get(kind, total * others)


def _sizes(parts: Sequence[Shape]) -> Iterator[float]:
    for kind, shape in parts:
        bits = re.search(r"\d+", kind)
        yield math.prod(shape) * (_BYTES[kind] if kind in _BYTES else int(bits[0]) / 8 if bits else 0)


def _group_size(attributes: str) -> int:
    """Chips of one replica group, in any notation: `[4,32]<=[128]` is four groups of 32, `mesh['a'=4,'b'=32] {'b'}`
    also."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    return 1
