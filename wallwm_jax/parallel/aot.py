r"""Compiling for TPUs that are not there, and reading what the compiler says.

    mesh = make_mesh(config.mesh, topology_devices("v5p:4x4x8"))       # 128 chips that only exist for the compiler
    compiled = build_train_step(config, mesh).step.lower(...).compile()
    print(statistics(compiled).table())

The real TPU compiler runs on a machine without TPUs (`pip install "jax[tpu]"`). XLA counts the body of a scan once;
here every instruction is counted as often as its loops run, and of a conditional the branch with most products. Pallas
kernels are opaque to the compiler's own estimate and are listed by name. Of several slices, what goes over the
data-centre network between them has kinds of its own, "dcn-all-reduce" and the like.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from wallwm_jax.console import UserError
from wallwm_jax.parallel.chips import GIB
from wallwm_jax.parallel.hlo import (
    COLLECTIVES,
    Array,
    Computation,
    Instruction,
    arrays,
    calls_target,
    closing,
    hbm_bytes,
    is_beside,
    parse,
    written,
)

DCN = "dcn-"
"""Begins the kind of a collective between slices, over the data-centre network."""


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice that exists for the compiler alone, for `make_mesh` and `jax.jit(...).lower`.

    Args:
      topology: generation and extents of the torus, "v5p:4x4x8" (128 chips), "v6e:16x16"; "v6e:16x16*4", four slices.

    Raises:
      UserError: no TPU compiler is installed, or it does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the metadata server of a cloud machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody holds a chip here: several may compile at once
    torus, _, slices = topology.partition("*")
    try:
        several = {"num_slices": int(slices)} if slices else {}
        return topologies.get_topology_desc(torus, platform="tpu", **several).devices
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
    of the products that the compiler has put some of the others into. `overlapped`, of those that begin and end in
    instructions of their own: (bytes received, estimated cycles of what stands between, FLOPs of its Pallas kernels) →
    executions; SparseCores run `sparse` of them. `arrays`, type and sizes of what moves → executions."""

    count: int = 0
    received: float = 0.0
    exposed: float = 0.0
    beside: float = 0.0
    overlapped: Counter[tuple[float, float, float]] = field(default_factory=Counter)
    sparse: int = 0
    arrays: Counter[str] = field(default_factory=Counter)


@dataclass
class Statistics:
    """What one chip does in one call of a compiled program.

    Attributes:
      flops: of all matrix products and convolutions, outside Pallas kernels; product_cycles: of those in the estimate.
      products: sizes of an operand → number of executions of matrix products that have it.
      cycles: the compiler's own estimate for everything outside Pallas kernels; 0 where it gives none.
      hbm: bytes between HBM and the chip, see `hlo.hbm_bytes`; unpriced: of instructions without an estimate of cycles.
      traffic: (kind of collective, chips of a group; slices, if over `DCN`) → what it moves.
      kernels: name of Pallas kernel → number of executions.
      kernel_work: (FLOPs, bytes between HBM and the chip) of a Pallas kernel → number of executions. Of attention FLOPs
        as executed: 4 per query, key and feature forward, 10 in the fused backward.
      arguments, temporaries, outputs: bytes of device memory; outputs that reuse an argument's memory not counted. What
        the compiler allocates, and refuses a program by, where it says so (from jax 0.11 on).
      counted: bytes of temporaries as `memory_analysis` adds them up, up to half as many again as are allocated.
      peak: bytes of the temporaries that are alive at once, without the holes that the allocator leaves between them.
    """

    flops: float = 0.0
    product_cycles: float = 0.0
    cycles: float = 0.0
    hbm: float = 0.0
    unpriced: float = 0.0
    products: Counter[tuple[int, ...]] = field(default_factory=Counter)
    traffic: dict[tuple[str, int], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    kernels: Counter[str] = field(default_factory=Counter)
    kernel_work: Counter[tuple[float, float]] = field(default_factory=Counter)
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    counted: int = 0
    peak: int = 0

    @property
    def memory(self) -> int:
        """Bytes a chip needs: arguments, temporaries and outputs."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def kernel_flops(self) -> float:
        """Of all executions of Pallas kernels."""
        return sum(flops * times for (flops, _), times in self.kernel_work.items())

    def kernel_seconds(self, rate: float, bandwidth: float) -> float:
        """Of all executions of Pallas kernels: each takes as long as its FLOPs at `rate` FLOP/s, or its bytes at
        `bandwidth` bytes/s if that is more."""
        return sum(max(flops / rate, moved / bandwidth) * times for (flops, moved), times in self.kernel_work.items())

    def add(self, other: Statistics) -> None:
        """Adds what another part of the program does; memory apart."""
        self.flops += other.flops
        self.product_cycles += other.product_cycles
        self.cycles += other.cycles
        self.kernel_work += other.kernel_work
        self.hbm += other.hbm
        self.unpriced += other.unpriced
        self.products += other.products
        self.kernels += other.kernels
        for key, moved in other.traffic.items():
            mine = self.traffic[key]
            mine.count += moved.count
            mine.received += moved.received
            mine.exposed += moved.exposed
            mine.beside += moved.beside
            mine.overlapped += moved.overlapped
            mine.sparse += moved.sparse
            mine.arrays += moved.arrays

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
            f"HBM          {self.hbm / 1e9:8.2f} GB read and written",
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
    result.arguments, result.counted = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    result.outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated = getattr(memory, "total_allocation_bytes", 0)
    result.temporaries = allocated - result.arguments - result.outputs if allocated else result.counted
    result.peak = memory.peak_memory_in_bytes - result.arguments - result.outputs
    return result


def count_instructions(hlo: str) -> Statistics:
    """`Statistics` of the text of an optimised HLO module; memory stays 0."""
    computations, entry = parse(hlo)
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


def _count(
    computations: dict[str, Computation], computation: str, times: int, result: Statistics, inside: _Inside
) -> None:
    """Adds a computation that runs `times` times."""
    under_way: dict[str, _Transfer] = {}
    for own, instruction in computations[computation].items():
        opcode, inner, called = instruction.opcode, times, [n for n in instruction.called if n in computations]
        once = instruction.cycles or 0
        cycles = times * once
        work = _attention_flops(_kernel_name(instruction), instruction) if instruction.is_kernel else 0.0
        for transfer in under_way.values():
            transfer.cycles += once / len(under_way)
            transfer.flops += work / len(under_way)
        if opcode == "call-start":
            under_way[own] = _Transfer(_collectives(computations, called), sparse=True)
        elif opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
            under_way[own] = _Transfer([instruction])
        elif opcode == "call-update":  # gives the call its arguments, and another name
            under_way[own] = under_way.pop(instruction.operands[0], _Transfer([]))
        elif opcode.endswith("-done"):
            _count_transfer(under_way.pop(instruction.operands[0], _Transfer([])), times, result)
        if opcode == "while":
            inner *= instruction.number("known_trip_count", _trips(instruction, computations))
        elif not inside.fusion:
            result.cycles += cycles
            moved = hbm_bytes(instruction, computations[computation], computations)
            result.hbm += times * moved
            result.unpriced += times * moved if instruction.cycles is None else 0.0
        if opcode in ("dot", "convolution"):
            result.flops += times * _product_flops(instruction, computations[computation])
            for name in instruction.operands[:2]:
                result.products[computations[computation][name].parts[0].sizes] += times
        elif instruction.is_kernel:
            result.kernels[_kernel_name(instruction)] += times
            moved = hbm_bytes(instruction, computations[computation], computations)
            result.kernel_work[work, moved] += times
        kind = _between_slices(instruction) or opcode.removesuffix("-start")
        if kind.removeprefix(DCN) in COLLECTIVES and not inside.beside:
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
                inside.asynchronous
                or opcode in ("async-start", "call-start")
                or calls_target(computations[name], "AsyncCollectiveStart"),
                inside.beside or is_beside(name, computations[name]),
            )
            _count(computations, name, inner, result, within)
            if within.beside and not inside.beside:
                _count_beside(computations[name], cycles, result)
        if opcode == "fusion" and not inside.fusion and result.flops > before:
            result.product_cycles += cycles
    for transfer in under_way.values():  # which end in the loop's next turn
        _count_transfer(transfer, times, result)


@dataclass
class _Transfer:
    """Collectives under way, on a SparseCore or not, and cycles and FLOPs of kernels of what the chip has done since
    they began; what runs beside several transfers is shared among them."""

    collectives: list[Instruction]
    sparse: bool = False
    cycles: float = 0.0
    flops: float = 0.0


def _count_transfer(transfer: _Transfer, times: int, result: Statistics) -> None:
    for collective in transfer.collectives:
        kind = collective.opcode.removesuffix("-start")
        moved = result.traffic[kind, _group_size(collective.attributes)]
        moved.overlapped[_received(kind, collective), transfer.cycles, transfer.flops] += times
        moved.sparse += times * transfer.sparse


def _collectives(computations: dict[str, Computation], called: Sequence[str]) -> list[Instruction]:
    """All collectives in computations and in what they call."""
    found = []
    for instruction in (instruction for name in called for instruction in computations[name].values()):
        if instruction.opcode in COLLECTIVES:
            found.append(instruction)
        else:
            found += _collectives(computations, [name for name in instruction.called if name in computations])
    return found


def _count_beside(computation: Computation, cycles: float, result: Statistics) -> None:
    for instruction in computation.values():
        if instruction.opcode in COLLECTIVES:
            result.traffic[instruction.opcode, _group_size(instruction.attributes)].beside += cycles


def _count_collective(kind: str, instruction: Instruction, times: int, result: Statistics, inside: _Inside) -> None:
    received = times * _received(kind, instruction)
    if kind == "all-reduce" and inside.reduce_scatter:
        kind, received = "reduce-scatter", received / 2
    moved = result.traffic[kind, _group_size(instruction.attributes)]
    moved.count += times
    moved.received += received
    moved.arrays[" ".join(map(str, _moved(instruction)))] += times
    if not inside.asynchronous and not instruction.opcode.endswith("-start"):
        moved.exposed += received


def _attention_flops(name: str, instruction: Instruction) -> float:
    """What the kernel says, where it does. Else, of a splash kernel: its first two floating-point arrays are queries
    `[B, H, S, d]` and keys `[B, H, T, d]`; B may be missing where it is 1."""
    if said := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes):
        return float(said[1])
    _, _, layout = instruction.attributes.partition("operand_layout_constraints={")
    shapes = [array.sizes for array in arrays(layout[: closing(layout, "}")]) if "f" in array.kind]
    per_pair = 4 if "fwd" in name else 10 if "dkv" in name else 0
    return per_pair * math.prod(shapes[0]) * shapes[1][-2] if len(shapes) > 1 else 0.0


def _trips(loop: Instruction, computations: dict[str, Computation]) -> int:
    """How often a scan's loop runs: the constant that its condition compares the counter with; 1 without one."""
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    instructions = computations[condition[1]].values() if condition else ()
    limits = [int(i.literal) for i in instructions if i.opcode == "constant" and i.literal.isdigit()]
    return limits[0] if len(limits) == 1 else 1


def _product_flops(instruction: Instruction, computation: Computation) -> float:
    """Two per multiply-add of a `dot` or `convolution`."""
    output = instruction.parts[0].sizes
    left, right = (computation[name].parts[0].sizes for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(output) * math.prod(sizes)
    return 2.0 * math.prod(output) * _taps(instruction, left, right, output)


def _taps(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], output: tuple[int, ...]) -> float:
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


def _kernel_name(instruction: Instruction) -> str:
    for pattern in (
        r'kernel_name\\?":\s*\\?"([^"\\]+)',
        r'op_name="[^"]*?(\w+)\)*/pallas_call"',
        r'op_name="[^"]*?([\w.\-]+)"',
    ):
        if found := re.search(pattern, instruction.attributes):
            return found[1]
    return instruction.name


def _received(kind: str, instruction: Instruction) -> float:
    """Bytes that a chip receives in one execution, by the ring algorithm."""
    kind, total = kind.removeprefix(DCN), sum(array.bytes for array in _moved(instruction))
    if kind == "collective-permute":
        return total
    group = _group_size(instruction.attributes)
    others = (group - 1) / group
    return {"all-reduce": 2 * total * others, "reduce-scatter": total * (group - 1)}.get(kind, total * others)


def _moved(instruction: Instruction) -> tuple[Array, ...]:
    """What a collective leaves on this chip."""
    return tuple(array for array in written(instruction) if array.kind not in ("u32", "token"))


def _between_slices(instruction: Instruction) -> str:
    """Kind of the collective that a receiving from other slices is part of; empty of any other instruction."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    return DCN + found[1].lower().replace("_", "-") if found and instruction.opcode == "recv" else ""


def _group_size(attributes: str) -> int:
    """Chips of one replica group, in any notation: `[4,32]<=[128]` is four groups of 32, `mesh['a'=4,'b'=32] {'b'}`
    also. Of a transfer between slices, these: `{1:3}x{0:4}` are three."""
    if found := re.search(r'_xla_megascale_target="\{([^}]*)\}', attributes):
        ranges = [[int(end) for end in part.split(":")] for part in found[1].split(",")]
        return sum(ends[-1] - ends[0] + 1 for ends in ranges)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    return 1
