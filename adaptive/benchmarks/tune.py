"""Sizes of blocks that are fastest on this machine's device, for the table that programs read.

    adaptive bench tune [--dry_run]

The table is `kernels_pallas/sizes.json`, beside the operations.

One after the other, each set of numbers is timed with some others on a case of the operation, forward and backward
together, in turns; what is at least 3 % faster than the usual takes its place. Programs compiled later use it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options
from adaptive.benchmarks.kernel_cases import LARGE, SMALL, cases
from adaptive.benchmarks.kernels import compiled, seconds
from adaptive.errors import UserError
from kernels_pallas import sizes
from kernels_pallas.sizes import Sizes

WORTH = 0.97  # of the usual's time, at most


class Knob(NamedTuple):
    """name     that a form asks by
    case     of `kernel_cases` that it is timed on
    usual    what the form takes by itself
    others   what else is tried
    """

    name: str
    case: str
    usual: Sizes
    others: tuple[Sizes, ...]


def _tiles(kernel: str, usual: Sizes) -> Knob:
    others = [(q, k, warps, stages) for q, k in ((64, 64), (128, 64), (64, 128), (128, 128)) for warps in (4, 8)
              for stages in (2, 3)]  # fmt: skip
    return Knob(f"attention/gpu/{kernel}/128", "attention, packed documents", usual, tuple(others))


SQUARES = tuple((q, k) for q in (256, 512, 1024) for k in (256, 512, 1024))
KNOBS = {
    "cpu": (Knob("attention/xla", "attention, causal", (256,), ((128,), (512,))),),
    "tpu": tuple(
        Knob(f"attention/tpu/{which}", "attention, causal", (512, 512), SQUARES) for which in ("forward", "backward")
    ),
    "gpu": (
        _tiles("forward", (128, 64, 4, 3)),
        _tiles("d_q", (128, 64, 8, 3)),
        _tiles("d_kv", (64, 128, 8, 3)),
        Knob(
            "grouped_matmul/gpu",
            "grouped matmul",
            (128, 128, 64),
            ((128, 64, 64), (64, 128, 64), (128, 128, 32), (256, 128, 64), (128, 256, 64)),
        ),
        Knob(
            "ssd/gpu",
            "state space scan",
            (64, 2, 256),
            tuple((size, kept, programs) for size in (32, 64) for kept in (1, 2, 4) for programs in (256, 512)),
        ),
    ),
}


def best(knob: Knob, repeats: int) -> tuple[dict[Sizes, float], str]:
    """Seconds of each set of numbers, infinite where it does not compile, and why the last of these did not."""
    device = jax.devices()[0]
    dtype = jax.numpy.dtype("float32" if device.platform == "cpu" else "bfloat16")
    case = dict(cases(SMALL if device.platform == "cpu" else LARGE, dtype))[knob.case]()
    programs, why = {}, ""
    for numbers in dict.fromkeys((knob.usual, *knob.others)):
        try:
            with sizes.tried({knob.name: numbers}):
                programs[numbers] = compiled(case, case.form, case.inputs, "both")
            jax.block_until_ready(programs[numbers](case.inputs))
        except Exception as failure:  # too much shared memory, registers, or a tile that the compiler does not take
            programs.pop(numbers, None)
            why = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
    least = dict.fromkeys((knob.usual, *knob.others), math.inf)
    for _ in range(repeats):
        for numbers, program in programs.items():
            least[numbers] = min(least[numbers], seconds(program, case.inputs))
    return least, why


def chosen(knob: Knob, least: dict[Sizes, float]) -> Sizes:
    """The fastest numbers, or the usual ones where nothing is worth a change."""
    fastest = min(least, key=least.__getitem__)
    return fastest if least[fastest] <= WORTH * least[knob.usual] else knob.usual


def main(arguments: Sequence[str]) -> int:
    made = options.options("tune", __doc__ or "", 10)
    made.add_argument("--dry_run", action="store_true", help="show what is found, write nothing")
    given = made.read(arguments)
    device, console = jax.devices()[0], Console()
    table = Table("numbers of", "usual", "ms", "chosen", "ms", title=f"{device.device_kind}: sizes of blocks")
    found: dict[str, Sizes] = {}
    for knob in KNOBS[device.platform]:
        with console.status(knob.name), sizes.tried(found):
            least, why = best(knob, given.repeats)
        if not math.isfinite(min(least.values())):
            raise UserError(f"{knob.name}: nothing that was tried works here; the last: {why}")
        numbers = chosen(knob, least)
        found[knob.name] = numbers
        show = lambda n: " x ".join(map(str, n))  # noqa: E731
        table.add_row(
            knob.name, show(knob.usual), f"{1e3 * least[knob.usual]:.3g}", show(numbers), f"{1e3 * least[numbers]:.3g}"
        )
    console.print(table)
    changed = {knob.name: found[knob.name] for knob in KNOBS[device.platform] if found[knob.name] != knob.usual}
    if changed and not given.dry_run:
        try:
            sizes.write(device.device_kind, changed)
        except OSError as error:
            raise UserError(
                f"cannot write {sizes.TABLE}: {error.strerror}; --dry_run only shows what is found"
            ) from None
        console.print(f"written to {sizes.TABLE}")
    return 0
