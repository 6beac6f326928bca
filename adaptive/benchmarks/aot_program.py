"""Compiles one train step for a machine that is not here and prints what the compiler tells, as a line of JSON.

A process of its own: compilers for TPUs end it where they fail, and what is to be compiled for must not be found as a
device of this machine. Used by `adaptive.benchmarks.aot`.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from adaptive import targets
from adaptive.benchmarks import traffic
from adaptive.benchmarks.compiled_text import Text
from adaptive.benchmarks.scopes import Scopes
from adaptive.errors import NoRoomError, UserError
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, load
from adaptive.runs.platform import start_backend
from adaptive.training.fitting import fitted
from adaptive.training.program import Compiled, Program, Steps
from adaptive.training.saved import save

LARGEST = 5  # temporaries that are told

# "Used 19.9G of 15.75G hbm", or of temporaries alone "(19.9G) exceeds available HBM (15.75G)".
_OVERFLOW = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|\(([\d.]+)([KMG])\) exceeds available HBM")
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30}


def facts(recipe: Recipe, topology: targets.Topology, folder: Path | None = None) -> dict[str, Any]:
    """What the compiled step of the last phase needs and holds; of one that does not fit, how much it would need.

    folder  the steps of all phases are kept there; None: nothing is
    """
    program = Program(recipe, make_mesh(recipe.mesh, targets.devices_of(topology)))
    of_program = {
        "mesh": dict(program.mesh.shape),
        "accumulation": program.accumulation,
        "least": [part._asdict() for part in traffic.least(program)],
    }
    try:
        if recipe.train.remat == "auto":
            program, steps, _ = fitted(program)
            phase, compiled = 0, steps.first
        else:
            phase = Steps.phases_of(program)[-1]
            compiled = program.compile_train_step(phase)
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, **of_program, **overflow(str(error))}
    except NoRoomError as error:
        return {"fits": False, **of_program, "needs": None, "says": str(error)}
    if folder is not None:
        keep(folder, program, {phase: compiled})
    return of_program | of_compiled(recipe, program, compiled, topology)


def of_compiled(recipe: Recipe, program: Program, compiled: Compiled, topology: targets.Topology) -> dict[str, Any]:
    """What a compiled step needs and holds."""
    memory, needs, written = compiled.call.memory_analysis(), compiled.needs(), compiled.call.as_text()
    text, scopes = Text(written), Scopes(written)
    rows = recipe.train.batch_size // (program.shards * program.accumulation)
    square = text.largest_square(positions(recipe), parameters(program), recipe.model.vocab_size, rows)
    room = None if topology.target == "cpu" else targets.TARGETS[topology.target].memory
    moved = traffic.received(text.exchanges(), traffic.slices_of(program.mesh, topology.slices))
    return {
        "fits": room is None or needs <= room,
        "needs": needs,
        "remat": program.remat,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "in_place": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "compile_s": round(compiled.seconds, 1),
        "collectives": {kind: dataclasses.asdict(count) for kind, count in text.collectives().items()},
        "received": {kind: one._asdict() for kind, one in moved.items()},
        "unknown_groups": text.unknown_groups,
        "custom_calls": {kind: dataclasses.asdict(count) for kind, count in text.kernels().items()},
        "largest": [
            {"array": str(array), "bytes": array.bytes, "number": len(lines), "scope": scopes.of(lines)}
            for array, lines in text.writers(LARGEST).items()
        ],
        "square": square and {"array": str(square), "bytes": square.bytes},
        "unknown_loops": text.unknown_loops,
    }


def keep(folder: Path, program: Program, compiled: dict[int, Compiled]) -> None:
    """Writes the steps of all phases; compiled: those that are, by the step that their phase begins with."""
    for begin in Steps.phases_of(program):
        save(folder, program, begin, compiled.get(begin) or program.compile_train_step(begin))


def overflow(message: str) -> dict[str, Any]:
    """What a compiler says of a program that does not fit: `needs` bytes, its temporaries at least, or None where it
    does not tell. Raises RuntimeError for any other failure."""
    if "RESOURCE_EXHAUSTED" not in message:
        raise RuntimeError(message)
    found = _OVERFLOW.search(message)
    number, unit = (found[1] or found[3], found[2] or found[4]) if found else (None, "K")
    needs = float(number) * _SIZES[unit] if number else None
    return {"needs": needs, "says": " ".join(message.split())[:300]}


def positions(recipe: Recipe) -> set[int]:
    """How many positions of a row the levels of a model compare with each other."""
    seq, body = recipe.data.seq_len, recipe.model.body
    return {seq, *body.pass_counts(seq), *body.chunk_counts(seq)}


def parameters(program: Program) -> list[tuple[int, ...]]:
    """Their shapes, over all devices."""
    return [leaf.shape for leaf in jax.tree.leaves(nnx.to_pure_dict(program.abstract_state().params))]


def main(order: dict[str, Any]) -> None:
    topology = targets.Topology(**order["topology"])
    if topology.target == "cpu":
        start_backend()
    else:
        jax.config.update("jax_exec_time_optimization_effort", float(order["effort"]))
    recipe = load(order["recipe"]).with_(*order["settings"])
    folder = Path(order["save"]) if order["save"] else None
    print(json.dumps(facts(recipe, topology, folder)))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
