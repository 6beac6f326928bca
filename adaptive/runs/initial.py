"""A new run that begins from a checkpoint of another."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adaptive.errors import CheckpointError, RecipeError
from adaptive.layers.named import matches
from adaptive.optim.named import chosen
from adaptive.paths import absolute, bucket_scheme, local_path
from adaptive.recipe import Recipe
from adaptive.runs.checkpoint import read_part, steps_in
from adaptive.runs.config import InitConfig
from adaptive.runs.digest import named
from adaptive.runs.folder import RunFolder
from adaptive.runs.load import find
from adaptive.runs.state import TrainState


def settings_of(text: str, workdir: Path | None) -> list[str]:
    """RUN or RUN@STEP as settings of `init`. Without a step it is that of the run's newest checkpoint, or the one that
    the run in `workdir`, begun from there earlier, took.

    Raises CheckpointError where there is no such run or checkpoint, UserError for what is no path.
    """
    name, step = text, None
    if found := re.fullmatch(r"(.+)@(\d{1,18})", text):
        name, step = found[1], int(found[2])
    run = name if bucket_scheme(name) else local_path(name, "--init_from").absolute()
    before = _begun(workdir, str(run))
    if before is None or step not in (None, before.step):
        step = find(run, step).step
    elif step is None:
        step = before.step
    return [f"init.run={run}", f"init.step={step}"]


def _begun(workdir: Path | None, run: str) -> InitConfig | None:
    """What the run in `workdir`, if there is one, began from, where that is `run`."""
    file = RunFolder(workdir).recipe if workdir else None
    if file is None or not file.exists():
        return None
    try:
        init = Recipe.from_json(file.read_text(encoding="utf-8")).init
    except (OSError, UnicodeDecodeError, RecipeError):
        return None  # told of when the folder is opened
    return init if init.run == run else None


def begun(init: InitConfig, state: TrainState) -> TrainState:
    """A fresh state with the parameters and buffers of the checkpoint, and perhaps the optimizer's state; the step, the
    place in the schedule and the random key stay.

    Raises CheckpointError where the checkpoint cannot be read or holds other arrays, with their names, RecipeError for
    a pattern of `init.fresh` that no parameter has.
    """
    found = find(init.run, init.step)
    if init.fresh:
        chosen(state.params, init.fresh, "init.fresh")
    part: dict[str, Any] = {"params": state.params}
    if jax.tree.leaves(state.buffers):
        part["buffers"] = state.buffers
    if init.optimizer:
        part["opt"] = state.opt
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state.params)]
    fresh = tuple(f"/{path}" for path in paths if matches(path, init.fresh))
    places = _places_in_schedule(state.opt)

    def leave(name: str) -> bool:
        return name.endswith(fresh) or name in places  # moments have their parameter's path at the end

    try:
        read = read_part(found.checkpoints, found.step, part, leave)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\ninit.fresh=PATH,... draws parameters anew that the other run has not, or in other shapes"
        ) from None
    if jax.tree.leaves(state.ema):
        read["ema"] = jax.tree.map(jnp.copy, read["params"])  # an array of its own, as both are updated in place
    return state._replace(**read)


def weights_alone(folder: Any) -> bool:
    """Whether the newest checkpoint in a run's folder of them is of step 0 and has no state of an optimizer, as
    converted weights are kept."""
    steps = steps_in(folder)
    if not steps or steps[-1] != 0:
        return False
    import orbax.checkpoint as ocp

    try:
        about = ocp.JsonCheckpointHandler().restore(absolute(folder) / "0" / "about")
        return not any(name.startswith("opt/") for name in about["arrays"])
    except Exception:  # damaged files show as errors of many kinds; reading it whole tells which
        return False


def _places_in_schedule(opt: Any) -> set[str]:
    """Names of what counts the steps of a schedule in an optimizer's state."""
    counts = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    marks = jax.tree.map(lambda node: jax.tree.map(lambda _: counts(node), node), opt, is_leaf=counts)
    return {name for name, mark in named({"opt": marks}).items() if mark}
