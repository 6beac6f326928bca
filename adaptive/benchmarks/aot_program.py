"""Compiles one train step for a machine that is not here and prints what the compiler tells, as a line of JSON.

A process of its own: compilers for TPUs end it where they fail, and what is to be compiled for must not be found as a
device of this machine. Used by `adaptive.benchmarks.aot`.
"""

import dataclasses
import json
import re
import sys
from typing import Any

import jax
from flax import nnx

from adaptive import targets
from adaptive.benchmarks.compiled_text import Text
from adaptive.errors import NoRoomError, UserError
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, load
from adaptive.training.fitting import fitted
from adaptive.training.program import Program

LARGEST = 5  # temporaries that are told

# "Used 19.9G of 15.75G hbm", or of temporaries alone "(19.9G) exceeds available HBM (15.75G)".
_OVERFLOW = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|\(([\d.]+)([KMG])\) exceeds available HBM")
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30}


def facts(recipe: Recipe, target: str, devices: int) -> dict[str, Any]:
    """What the compiled step needs and holds; of one that does not fit, how much it would need."""
    program = Program(recipe, make_mesh(recipe.mesh, targets.devices(target, devices)))
    try:
        if recipe.train.remat == "auto":
            program, steps, _ = fitted(program)
            compiled = steps.first
        else:
            compiled = program.compile_train_step()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, **overflow(str(error))}
    except NoRoomError as error:
        return {"fits": False, "needs": None, "says": str(error)}
    memory, needs = compiled.call.memory_analysis(), compiled.needs()
    text = Text(compiled.call.as_text())
    rows = recipe.train.batch_size // (program.shards * program.accumulation)
    square = text.largest_square(positions(recipe), parameters(program), recipe.model.vocab_size, rows)
    return {
        "fits": needs <= targets.TARGETS[target].memory,
        "needs": needs,
        "remat": program.remat,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "compile_s": round(compiled.seconds, 1),
        "collectives": {kind: dataclasses.asdict(count) for kind, count in text.collectives().items()},
        "custom_calls": {kind: dataclasses.asdict(count) for kind, count in text.kernels().items()},
        "largest": [{"array": str(array), "bytes": array.bytes, "number": n} for array, n in text.largest(LARGEST)],
        "square": square and {"array": str(square), "bytes": square.bytes},
        "unknown_loops": text.unknown_loops,
    }


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
    jax.config.update("jax_exec_time_optimization_effort", float(order["effort"]))
    recipe = load(order["recipe"]).with_(*order["settings"])
    print(json.dumps(facts(recipe, order["target"], order["devices"])))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
