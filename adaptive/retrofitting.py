"""Another run's recipe with expert choice in place of token choice, and what the change does to held-out loss."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive.data.files import write_text_atomically
from adaptive.errors import RecipeError
from adaptive.recipe import Recipe, name_from


def retrofitted(recipe: Recipe, settings: Sequence[str], name: str = "") -> Recipe:
    """The recipe with expert choice in place of token choice, and settings above that, called `name` or after the
    other. Raises RecipeError where that cannot be."""
    from adaptive.interop.retrofit import routers

    if recipe.model.low_rank is not None:
        raise RecipeError(f"{recipe.name} trains additions of low rank: there is no router to replace in those")
    given = {text.partition("=")[0] for text in settings}
    values = routers(recipe.model, causal=recipe.objective.causal)
    made = recipe.with_values({path: value for path, value in values.items() if path not in given}).with_(*settings)
    made = dataclasses.replace(made, name=name or name_from(f"{recipe.name}_ec"))
    made.validate()
    return made


def held_out(recipe: Recipe, state: Any) -> dict[str, Any]:
    """Columns "eval/..." of a metrics row for a model's state; {} where nothing is held out."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from adaptive.data.pipeline import open_data
    from adaptive.parallel.mesh import make_mesh
    from adaptive.runs.state import TrainState
    from adaptive.training.evaluation import Evaluator
    from adaptive.training.program import Program

    program = Program(recipe, make_mesh(recipe.mesh))
    data = open_data(recipe.data, batch_size=recipe.train.batch_size, vocab_size=recipe.model.vocab_size)
    into = program.shardings
    params, buffers = nnx.split_state(state, nnx.Param, ...)
    params, buffers = jax.device_put((params, buffers), (into.params, into.buffers))
    zero = jnp.zeros((), jnp.int32)
    given = TrainState(zero, zero, params, buffers, (), jax.random.key_data(jax.random.key(recipe.train.seed)))
    row, _ = Evaluator(program, data)(given)
    return row


def record(workdir: Path, told: dict[str, Any]) -> None:
    """Keeps what `adaptive.training.report.retrofit` shows, and the loss right after as the run's first row."""
    from adaptive.training.log import MetricsLog
    from adaptive.training.report.retrofit import RETROFIT_FILE

    write_text_atomically(workdir / RETROFIT_FILE, json.dumps(told) + "\n")
    if told["after"]:
        log = MetricsLog.open(workdir, 0)
        log.write({"step": 0, "tokens": 0, "flops": 0, "seconds": 0.0, **told["after"]})
        log.close()
