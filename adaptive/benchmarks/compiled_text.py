"""What a compiled program holds, read from its text (`compiled.as_text()`): collectives, kernels, arrays in memory.

A computation is weighted by how often it runs: a loop's body by its trip count, where the text tells it, else once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\](?:\{[^}]*\})? constant\((\d+)\)")
_CUSTOM = re.compile(r'custom_call_target="([^"]*)"')
# Custom calls that are kernels: Pallas for TPUs, through Triton and for Hopper, Triton itself, cuDNN's attention.
_KERNELS = re.compile(r"tpu_custom_call|__gpu\$xla\.gpu\.triton|mosaic_gpu|triton_kernel_call|__cudnn\$fmha")

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
LANES = 128  # what kernels and TPUs make lengths a multiple of
# Name the memory that something else made, or none.
_VIEWS = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant", "iota"}
_BITS = re.compile(r"\d+")

# Who takes part in a collective, in the three ways in which compilers write it: groups one by one, an array of all
# devices that is transposed and cut into rows, axes (or parts of axes) of a mesh.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_ROWS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? ?\{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One of the results of an instruction. fast: lies in the memory of the core, not of the device."""

    dtype: str
    shape: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((_BITS.search(self.dtype) or ["8"])[0])
        return math.ceil(math.prod(self.shape) * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name and opcode as in the text, its results, the whole line, and the computation that it stands in."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    line: str
    inside: str


@dataclasses.dataclass(frozen=True)
class Count:
    """number  of such instructions in the text
    runs    how often they run in one execution of the program
    bytes   of their results on a device, over all runs"""

    number: int = 0
    runs: int = 0
    bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.number + other.number, self.runs + other.runs, self.bytes + other.bytes)


class Exchange(NamedTuple):
    """A collective.

    kind    one of COLLECTIVES, or "send"
    bytes   of a device before it is cut or after it is joined: what a gather gives, a scatter or a sum takes
    result  bytes that the text says it gives
    runs    how often it runs in one execution of the program
    groups  i64[groups, devices]: who exchanges with whom; (from, to) of a permutation
    """

    kind: str
    bytes: int
    result: int
    runs: int
    groups: np.ndarray


class Text:
    """A compiled program's text, taken apart.

    unknown_loops  loops whose trip count the text does not tell; their bodies count once
    partitions     devices that the program is for
    unknown_groups  collectives of which the text does not tell who takes part; counted as all devices
    """

    def __init__(self, text: str):
        self._bodies: dict[str, list[Instruction]] = {}
        stated = _PARTITIONS.search(text.partition("\n")[0])
        self.partitions = int(stated[1]) if stated else 1
        self._entry = inside = ""
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                inside = start[2]
                self._bodies[inside] = []
                self._entry = inside if start[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                made = Instruction(found[1], found[3], tuple(_arrays(found[2])), line, inside)
                self._bodies[inside].append(made)
        self.unknown_loops = self.unknown_groups = 0
        self._runs: dict[str, int] = collections.defaultdict(int)
        self._in_memory: set[str] = set()
        self._visit(self._entry, 1, True)

    def collectives(self) -> dict[str, Count]:
        """By kind. Bytes of a reduce-scatter that a compiler writes as an all-reduce are those before the share is
        taken."""
        found: dict[str, Count] = collections.defaultdict(Count)
        for one in self.exchanges():
            found[one.kind] += Count(1, one.runs, one.runs * one.result)
        return dict(sorted(found.items()))

    def exchanges(self) -> Iterator[Exchange]:
        """Every collective. Compilers for TPUs write some reduce-scatters as an all-reduce in a computation that is
        named after it, and what goes between slices as "send" by way of the host."""
        for one in self._all():
            kind = one.opcode.removesuffix("-start")
            if kind == "send" and "is_host_transfer=true" in one.line:
                size = one.results[0].bytes  # followed by what the transfer is known by
                yield Exchange(kind, size, size, self._runs[one.inside], self._groups(""))
            if kind not in COLLECTIVES:
                continue
            results = [array for array in one.results if array.dtype != "u32" or array.shape]
            if one.opcode.endswith("-start") and len(results) > 1:  # operands come first, then results
                results = results[len(results) // 2 :]
            size, groups = sum(array.bytes for array in results), self._groups(one.line)
            whole = size * groups.shape[1] if kind == "reduce-scatter" else size
            if kind == "all-reduce" and one.inside.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            yield Exchange(kind, whole, size, self._runs[one.inside], groups)

    def _groups(self, line: str) -> np.ndarray:
        everyone = np.arange(self.partitions)
        if found := _LISTED.search(line):
            rows = re.findall(r"\{([\d, ]+)\}", found[1])
            return np.array([[int(n) for n in row.split(",")] for row in rows])
        if found := _ROWS.search(line):
            return _ordered(found[3], found[4]).reshape(int(found[1]), int(found[2]))
        if found := _AXES.search(line):
            order = _ORDER.fullmatch(found[2] or "")
            return _along_axes(found[1], found[3], _ordered(order[1], order[2]) if order else None)
        if "replica_groups=" in line and "replica_groups={}" not in line:
            self.unknown_groups += 1
        return everyone[None]

    def kernels(self) -> dict[str, Count]:
        """Custom calls of kernels by their target, so that annotations and XLA's own are left out."""
        found: dict[str, Count] = collections.defaultdict(Count)
        for one in self._all():
            target = _CUSTOM.search(one.line)
            if one.opcode == "custom-call" and target and _KERNELS.match(target[1]):
                runs = self._runs[one.inside]
                found[target[1]] += Count(1, runs, runs * sum(array.bytes for array in one.results))
        return dict(sorted(found.items()))

    def largest(self, count: int) -> list[tuple[Array, int]]:
        """The largest kinds of arrays that are written to memory, and how many instructions write one."""
        return [(array, len(lines)) for array, lines in self.writers(count).items()]

    def writers(self, count: int) -> dict[Array, list[str]]:
        """The largest kinds of arrays that are written to memory, and the lines that write one."""
        found: dict[Array, list[str]] = collections.defaultdict(list)
        for array, line in self._written():
            found[array].append(line)
        return dict(sorted(found.items(), key=lambda item: -item[0].bytes)[:count])

    def _written(self) -> Iterator[tuple[Array, str]]:
        """Results that lie in the device's memory: of instructions outside of fusions, which write nothing but their
        last result."""
        for name in self._in_memory:
            for one in self._bodies[name]:
                if one.opcode not in _VIEWS and not one.opcode.endswith("-done"):
                    yield from ((array, one.line) for array in one.results if not array.fast)

    def largest_square(
        self, positions: Iterable[int], parameters: Iterable[tuple[int, ...]], vocab: int, rows: int
    ) -> Array | None:
        """The largest array in memory that holds something for pairs of positions: None if there is none.

        positions   how many positions rows have that are compared with each other. Both of the array's last two
                    dimensions are a multiple of such a number, or of it made a multiple of 128
        parameters  their shapes. An array of a parameter's last two dimensions is none. One of whose dimensions is one,
                    two or three times a parameter's, or the product of its last two, may be positions x channels: it
                    counts in float32 alone, which scores have, and if it is more than a matrix for each row
        vocab       of logits, which never count
        rows        of a device
        """
        shapes = list(parameters)
        known = {rounded for n in positions for rounded in (n, -(-n // LANES) * LANES)}
        own = {tuple(sorted(shape[-2:])) for shape in shapes}
        sizes = {size for shape in shapes for size in (*shape, math.prod(shape[-2:]))}
        channels = {times * size for size in sizes for times in (1, 2, 3)}

        def is_square(array: Array) -> bool:
            leading, pair = math.prod(array.shape[:-2]), array.shape[-2:]
            if len(pair) < 2 or vocab in pair or tuple(sorted(pair)) in own:
                return False
            if channels.intersection(pair) and (array.dtype != "f32" or leading <= rows):
                return False
            return all(any(size % n == 0 for n in known) for size in pair)

        squares = filter(is_square, {array for array, _ in self._written()})
        return max(squares, key=lambda array: array.bytes, default=None)

    def _all(self) -> Iterator[Instruction]:
        for name in self._runs:
            yield from self._bodies[name]

    def _visit(self, name: str, runs: int, in_memory: bool) -> None:
        self._runs[name] += runs
        if in_memory:
            self._in_memory.add(name)
        for one in self._bodies.get(name, ()):
            called = [(how, inner) for how, inner in _CALLED.findall(one.line) if inner in self._bodies]
            for branches in _BRANCHES.findall(one.line):
                called += [("branch", inner) for inner in re.findall(r"[\w.\-]+", branches)]
            trips = self._trips(one, dict(called)) if one.opcode == "while" else 1
            inner_memory = in_memory and one.opcode in ("while", "conditional", "call")
            for _, inner in called:
                self._visit(inner, runs * trips, inner_memory)

    def _trips(self, loop: Instruction, called: dict[str, str]) -> int:
        if known := _TRIPS.search(loop.line):
            return int(known[1])
        bounds = [
            int(value[1])
            for one in self._bodies.get(called.get("condition", ""), ())
            if (value := _CONSTANT.search(one.line))
        ]
        if len(bounds) == 1:
            return bounds[0]
        self.unknown_loops += 1
        return 1


def _ordered(sizes: str, order: str | None) -> np.ndarray:
    """Devices 0, 1, 2, ... as an array of these sizes, transposed."""
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _along_axes(mesh: str, along: str, devices: np.ndarray | None) -> np.ndarray:
    """Groups along axes of a mesh: 'x'=4,'y'=2 and 'y', or 'x':(2)2 for a part of two, behind another of two.

    devices  in the mesh's order; None: 0, 1, 2, ...
    """
    cuts: dict[str, list[int]] = {name: [int(size)] for name, size, _, _ in _AXIS.findall(mesh)}
    chosen: list[tuple[str, int, int]] = []
    for name, _, before, size in _AXIS.findall(along):
        whole = cuts[name][0]
        chosen.append((name, int(before or 1), int(size or whole)))
        if size:
            cuts[name] = [int(before), int(size), whole // (int(before) * int(size))]
    sizes = [size for parts in cuts.values() for size in parts]
    places, at = {}, 0
    for name, parts in cuts.items():
        places[name] = at + (1 if len(parts) > 1 else 0)
        at += len(parts)
    last = [places[name] for name, _, _ in chosen]
    order = [*(i for i in range(len(sizes)) if i not in last), *last]
    ids = (np.arange(math.prod(sizes)) if devices is None else devices).reshape(sizes).transpose(order)
    return ids.reshape(-1, math.prod(size for _, _, size in chosen))


def _arrays(text: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(size) for size in shape.split(",") if size), "S(1)" in layout)
