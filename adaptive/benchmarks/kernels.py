"""Every operation on this machine: time beside its reference and a floor, and how far its results are from the former.

    adaptive bench kernels [--only NAME] [--dtype float32|bfloat16] [--sizes small|large]

The floor is the least time that the machine could need: the matmul's FLOPs at the rate of a plain matmul, or the bytes
that must be read and written at the rate of a copy, whichever is longer; both rates are measured in this process. Times
are the fastest of the repeats, form and reference in turns; errors are the largest, over the largest value of the
reference in float32.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options
from adaptive.benchmarks.kernel_cases import LARGE, SMALL, Case, Least, Way, cases
from adaptive.benchmarks.train_step import matmul_timer
from adaptive.errors import UserError
from adaptive.training.plan import runs_on
from kernels_pallas.choice import here

COPY_BYTES = {"cpu": 64 * 2**20}  # of the array that stands for the memory's rate, by platform
ACCELERATOR_COPY = 2**30

Arrays = tuple[jax.Array, ...]
Programs = dict[str, Callable[[Arrays], Any]]


class Rates(NamedTuple):
    """FLOP/s of a plain matmul, and bytes/s that a copy reads and writes."""

    flops: float
    bytes: float

    def floor(self, least: Least) -> float:
        """Seconds."""
        return max(least.flops / self.flops, least.bytes / self.bytes)


def rates(dtype: jnp.dtype, repeats: int) -> Rates:
    device = jax.devices()[0]
    matmul = matmul_timer(device, dtype)
    size = COPY_BYTES.get(device.platform, ACCELERATOR_COPY)
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    best = min(seconds(copy, x) for _ in range(repeats))
    return Rates(max(matmul() for _ in range(repeats)), 2 * size / best)


def measured(case: Case, rate: Rates, repeats: int) -> dict[str, Any]:
    """What is told of a case: of the forward pass and, as "both", with the backward pass: least costs, seconds of the
    form, the reference, the floor and where there is one the library's kernel, bytes of temporaries; and errors of
    results and gradients."""
    ways, failed = {"form": _programs(case, case.form), "reference": _programs(case, case.reference)}, {}
    if case.stock and jax.default_backend() == "gpu":
        try:
            ways["stock"] = _programs(case, case.stock)
        except Exception as failure:
            failed = {"stock_failed": _line(failure)}
    least = {(name, which): math.inf for name, made in ways.items() for which in made}
    for _ in range(repeats):
        for name, which in least:
            least[name, which] = min(least[name, which], seconds(ways[name][which], case.inputs))
    passes = {"forward": case.forward, "both": case.both} if case.wrt else {"forward": case.forward}
    return {
        "case": case.name,
        "shape": case.shape,
        "computed_by": form_of(case.operation),
        **{
            which: {
                "flops": costs.flops,
                "bytes": costs.bytes,
                "floor_s": rate.floor(costs),
                **{f"{name}_s": least[name, which] for name in ways},
                **{f"{name}_temporaries": temporaries(made[which]) for name, made in ways.items()},
            }
            for which, costs in passes.items()
        },
        "error": error(case, ways["form"], ways["reference"]),
        **failed,
    }


def _line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


def temporaries(program: Any) -> int:
    """Bytes of a compiled program's temporaries."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes if memory else 0


def form_of(operation: str) -> str:
    """What computes it on this machine, and why."""
    return "chunks of positions in XLA" if operation == "loss" else runs_on(operation, jax.default_backend())


def error(case: Case, form: Programs, reference: Programs) -> dict[str, float]:
    """Largest difference of the result, and of any gradient, over the largest value of the reference in float32."""
    which = "both" if case.wrt else "forward"
    wide = tuple(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in case.inputs)
    same = all(a.dtype == b.dtype for a, b in zip(wide, case.inputs, strict=True))
    exact = reference[which]
    if not same or jax.default_backend() != "cpu":
        with jax.default_matmul_precision("highest"):  # accelerators multiply float32 in fewer bits otherwise
            exact = compiled(case, case.reference, wide, which)
    got, expected = jax.tree.leaves(form[which](case.inputs)), jax.tree.leaves(exact(wide))
    away = [_away(a, b) for a, b in zip(got, expected, strict=True)]
    return {"forward": away[0], **({"gradients": max(away[1:])} if away[1:] else {})}


def _away(got: jax.Array, expected: jax.Array) -> float:
    expected = expected.astype(jnp.float32)
    most = jnp.maximum(jnp.abs(expected).max(), jnp.finfo(jnp.float32).tiny)
    return float(jnp.abs(got.astype(jnp.float32) - expected).max() / most)


def _programs(case: Case, way: Way) -> Programs:
    """ "forward" and, where there are gradients, "both", compiled; they have run once, which touches memory."""
    made = {name: compiled(case, way, case.inputs, name) for name in ("forward", *(["both"] if case.wrt else []))}
    for program in made.values():
        jax.block_until_ready(program(case.inputs))
    return made


def compiled(case: Case, way: Way, inputs: Arrays, which: str) -> Callable[[Arrays], Any]:
    """The program of inputs like these: the result or, for "both", also the gradients for a random pull on it."""

    def forward(inputs: Arrays) -> Any:
        with here():
            return way(*inputs)

    def both(inputs: Arrays) -> Any:
        def of(*some: jax.Array) -> jax.Array:
            given = dict(enumerate(inputs)) | dict(zip(case.wrt, some, strict=True))
            return way(*given.values())

        with here():
            out, pull = jax.vjp(of, *(inputs[at] for at in case.wrt))
            return out, pull(jax.random.normal(jax.random.key(9), out.shape, jnp.float32).astype(out.dtype))

    return jax.jit({"forward": forward, "both": both}[which]).lower(inputs).compile()


def seconds(run: Callable[[Any], Any], inputs: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(inputs))
    return time.perf_counter() - start


# Command


def table(records: Sequence[dict[str, Any]], title: str) -> Table:
    columns = "case", "shape", "pass", "time", "of reference", "floor", "over floor", "error"
    out = Table(*columns, title=title)
    for record in records:
        if "failed" in record:
            out.add_row(record["case"], record["failed"], *[""] * 6)
            continue
        for name, which in (("forward", "forward"), ("both", "gradients")):
            if name in record:
                out.add_row(
                    *([record["case"], record["shape"]] if name == "forward" else ["", ""]), *cells(record, name, which)
                )
    return out


def cells(record: dict[str, Any], name: str, which: str) -> tuple[str, ...]:
    """Of one pass: its name, times in ms and their ratios, the error."""
    took = record[name]
    form, floor = took["form_s"], took["floor_s"]
    shown = f"{form * 1e3:.3f} ms", f"{form / took['reference_s']:.2f}", f"{floor * 1e3:.3f} ms", f"{form / floor:.1f}"
    return {"forward": "forward", "both": "with backward"}[name], *shown, f"{record['error'][which]:.1e}"


def main(arguments: Sequence[str]) -> int:
    """Measures case by case; a case that fails is told and the others go on."""
    made = options.options("kernels", __doc__ or "", 5)
    options.add_dtype(made)
    made.add_argument("--only", action="append", metavar="NAME", help="a case, as often as wanted (default: all)")
    made.add_argument("--sizes", choices=["small", "large"], help="of the inputs; default: small on CPU, else large")
    made.add_argument("--json", action="store_true", help="print a line of JSON for each case, when it is done")
    given = made.read(arguments)
    dtype, platform = options.dtype_of(given), jax.default_backend()
    sizes = {"small": SMALL, "large": LARGE}[given.sizes or ("small" if platform == "cpu" else "large")]
    known = dict(cases(sizes, dtype))
    for name in given.only or ():
        if name not in known:
            raise UserError(f"--only: there is no case '{name}'; there are {', '.join(known)}")
    console, found = Console(stderr=given.json), []
    with console.status("") as status:
        rate = rates(dtype, given.repeats)
        for name in given.only or known:
            status.update(name)
            try:
                found.append(measured(known[name](), rate, given.repeats))
            except Exception as failure:
                found.append({"case": name, "failed": _line(failure)})
            if given.json:
                about = {"dtype": str(dtype), "device": jax.devices()[0].device_kind, "rates": rate._asdict()}
                print(json.dumps({**found[-1], **about}), flush=True)
    if not given.json:
        reached = f"matmul {rate.flops / 1e9:,.0f} GFLOP/s, copy {rate.bytes / 1e9:,.1f} GB/s"
        console.print(table(found, f"{dtype} on {jax.devices()[0].device_kind}: {reached}"))
    return 1 if any("failed" in one for one in found) else 0
