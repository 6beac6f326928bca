"""Matmul FLOPs and collectives of a compiled program, from its text.

XLA's own cost analysis counts the body of a loop once.
"""

import collections
import functools
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\(%([\w.\-]+), .*lhs_contracting_dims=\{([\d,]*)\}")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def matmul_flops(text: str) -> int:
    """2 m n k of every dot in `compiled.as_text()`, times the trip counts of the loops it is in.

    Fails on a loop whose trip count is not known and on matmuls that went to a library call.
    """
    assert "matmul" not in "".join(re.findall(r'custom_call_target="([^"]*)"', text)), "a matmul became a custom call"
    bodies: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif _INSTRUCTION.match(line) or " = (" in line:
            bodies[name].append(line)

    @functools.cache
    def flops(name: str) -> int:
        shapes = {m[1]: _numbers(m[2]) for line in bodies[name] if (m := _INSTRUCTION.match(line))}
        total = 0
        for line in bodies[name]:
            if dot := _DOT.search(line):
                contracted = math.prod(shapes[dot[1]][axis] for axis in _numbers(dot[2]))
                out = _INSTRUCTION.match(line)
                assert out is not None
                total += 2 * contracted * math.prod(_numbers(out[2]))
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"%([\w.\-]+)", branches)
            inner = sum(map(flops, called))
            if inner and " while(" in line:
                trips = _TRIPS.search(line)
                assert trips, f"a loop with matmuls has no known trip count: {line[:120]}"
                inner *= int(trips[1])
            total += inner
        return total

    return flops(entry)


def collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind `compiled.as_text()` holds; one in a loop counts once."""
    return dict(sorted(collections.Counter(_COLLECTIVE.findall(text)).items()))


def moved(text: str) -> dict[str, int]:
    """Bytes of the results of the collectives of `compiled.as_text()` on each device, by "kind dtype"; one in a loop
    counts once. Compilers for TPUs write some reduce-scatters as an all-reduce in a computation that is called after
    it: their bytes are those before the share is taken."""
    found: collections.Counter[str] = collections.Counter()
    inside = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            inside = start[1]
        elif kind := _COLLECTIVE.search(line):
            scattered = kind[1] == "all-reduce" and inside.startswith("all-reduce-scatter")
            for dtype, shape in _ARRAY.findall(line[: kind.start()]):
                size = math.prod(_numbers(shape)) * BYTES[dtype]
                found[f"{'reduce-scatter' if scattered else kind[1]} {dtype}"] += size
    return dict(sorted(found.items()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
