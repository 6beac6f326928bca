"""A trained model out of the folder of its run: recipe, parameters and tokenizer, on one device."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from adaptive.data.tokenizers import Tokenizer, load_tokenizer
from adaptive.errors import CheckpointError
from adaptive.recipe import Recipe
from adaptive.runs.checkpoint import read_part, steps_in
from adaptive.runs.folder import RunFolder
from adaptive.runs.mask_token import with_mask
from adaptive.runs.platform import compute_dtype
from adaptive.runs.state import abstract_model


class Trained(NamedTuple):
    """A model as training left it at `step`: nnx.merge(graphdef, state) is the module. Additions of low rank are in the
    matrices, as the recipe's settings of the model then say."""

    recipe: Recipe
    step: int
    graphdef: nnx.GraphDef
    state: Any
    tokenizer: Tokenizer
    refuse_generation: str  # why it cannot generate; empty where it can


class Found(NamedTuple):
    """A run with a checkpoint to read, and the steps of all it has."""

    recipe: Recipe
    checkpoints: Any
    step: int
    steps: tuple[int, ...]


def find(workdir: str | Path, step: int | None = None, *, option: str = "--workdir") -> Found:
    """The run in the folder and its newest checkpoint, or that of `step`; nothing of the model is read.

    option  how the user named the folder; messages begin with it

    Raises CheckpointError where there is no run or no such checkpoint, RecipeError for a recipe that cannot be read,
    UserError for what is no path.
    """
    folder = RunFolder.at(str(workdir), option)
    if not folder.path.is_dir():
        raise CheckpointError(f"{option} {folder}: there is no such folder; give that of a run")
    try:
        text = folder.recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{option} {folder} holds no run: {folder.recipe.name}: {why}") from None
    recipe = Recipe.from_json(text, where=str(folder.recipe))
    steps = steps_in(folder.checkpoints)
    if not steps:
        raise CheckpointError(
            f"{folder} has no checkpoint yet; training saves every checkpoint.every={recipe.checkpoint.every} "
            "steps, when it is stopped and at its end"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return Found(recipe, folder.checkpoints, steps[-1] if step is None else step, tuple(steps))


def load(found: Found, *, ema: bool = False) -> Trained:
    """The model of a run with parameters alone, computing in what it was trained in on this kind of device.

    ema  their running average in place of the parameters

    Raises CheckpointError where they cannot be read, or the run keeps no average.
    """
    if ema and not found.recipe.train.ema:
        raise CheckpointError(f"{found.recipe.name} keeps no running average of its parameters: train.ema is 0")
    recipe = with_mask(found.recipe)
    tokenizer = load_tokenizer(recipe.data.tokenizer, bos=recipe.data.bos, eos=recipe.data.eos)
    graphdef, shapes = abstract_model(lambda key: recipe.model.build(key, dtype=compute_dtype(recipe)))
    model = nnx.merge(graphdef, shapes)
    refuse = recipe.objective.refuse_generation() or model.refuse_generation() or model.refuse_cache()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), shapes)
    params, buffers = nnx.split_state(placed, nnx.Param, ...)
    weights = "ema" if ema else "params"
    part = {weights: params, "buffers": buffers}
    if not jax.tree.leaves(buffers):
        del part["buffers"]
    try:
        read = read_part(found.checkpoints, found.step, part)
    except CheckpointError as error:
        others = ", ".join(f"--step {step}" for step in found.steps if step != found.step)
        raise CheckpointError(f"{error}{f'; there are also {others}' if others else ''}") from None
    state = nnx.merge_state(read[weights], read.get("buffers", buffers))
    if recipe.model.low_rank is not None:
        model = nnx.jit(lambda model: model.summed())(nnx.merge(graphdef, state))
        graphdef, state = nnx.split(model)
        recipe = dataclasses.replace(recipe, model=recipe.model.summed())
    return Trained(recipe, found.step, graphdef, state, tokenizer, refuse)
