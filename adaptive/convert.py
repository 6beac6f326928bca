"""Released weights to the folder of a run, which every other command takes, and a run's model to released names:

    adaptive convert --kind KIND --tensors FILE --config FILE --workdir DIR [setting=value ...]
    adaptive convert --kind KIND --workdir DIR --export FILE.safetensors

Settings are dotted, as those of training, and count where the model is trained further:
`adaptive train --recipe DIR/recipe.json --workdir DIR`. Exit codes: 0 done, 2 something cannot work, 130 interrupted.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.convert"))

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive import command, versions
from adaptive.errors import CheckpointError, RecipeError, UserError
from adaptive.paths import local_path
from adaptive.recipe import Recipe, name_from
from adaptive.settings import parse_json

TOKENIZERS = {"hnet": "hnet-bytes"}  # of the kinds that know theirs


def options() -> command.Options:
    made = command.Options("convert", __doc__ or "")
    add = made.add_argument
    add("--kind", default="", help="whose names the tensors have: hnet, mor, mixtral, olmoe, qwen3_moe")
    add("--tensors", default="", help="*.safetensors, a PyTorch file, an index of several, or a folder of them")
    add("--config", default="", help="the released configuration (JSON)")
    add("--workdir", default="", help="folder of the run: a new one; with --export that of a model")
    add("--export", default="", help="file to write; of hnet the configuration too, beside it as *.json")
    add("--allow_pickle", action="store_true", help="read PyTorch files with torch, which runs any code in them")
    made.add_settings()
    return made


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    from adaptive.runs.platform import start_backend

    given = options().read(arguments)
    if given.settings and given.export:
        raise UserError(f"'{given.settings[0]}': --export takes no settings")
    needed = ("kind", "workdir", "export") if given.export else ("kind", "tensors", "config", "workdir")
    if missing := [f"--{name}" for name in needed if not getattr(given, name)]:
        raise UserError(f"{', '.join(missing)} is missing (--help shows all options)")
    paths = {name: local_path(getattr(given, name), f"--{name}") for name in needed[1:]}
    print(versions.check_versions())
    start_backend()
    if given.export:
        export(given.kind, paths["workdir"], paths["export"])
    else:
        convert(given.kind, **paths, settings=given.settings, allow_pickle=given.allow_pickle)
    return 0


def convert(
    kind: str, tensors: Path, config: Path, workdir: Path, settings: Sequence[str], *, allow_pickle: bool = False
) -> None:
    """Makes `workdir` the folder of a run at step 0 whose model has the tensors."""
    from adaptive.interop import check_kind, from_official
    from adaptive.interop.files import read_tensors
    from adaptive.runs.folder import RunFolder

    check_kind(kind)
    official = read_config(config)
    if RunFolder(workdir).recipe.exists():
        raise CheckpointError(f"{workdir} holds a run already; choose another --workdir")
    if kind not in TOKENIZERS and not any(text.startswith("data.tokenizer=") for text in settings):
        raise RecipeError(f"--kind {kind} does not say how text becomes tokens: add data.tokenizer=NAME_OR_FILE")
    named = read_tensors(tensors, allow_pickle=allow_pickle)
    numbers = sum(value.size for value in named.values())
    print(f"read      {tensors}: {len(named)} tensors, {numbers:,} numbers", flush=True)
    model: Any = from_official(kind, named, official)
    del named  # as large as the model, and so is much of what follows
    recipe = Recipe(name_of(config), f"{kind} weights of {tensors.name}, converted", model.settings)
    defaults = [f"data.tokenizer={name}" for name in [TOKENIZERS.get(kind)] if name]
    given = {text.partition("=")[0] for text in settings}
    recipe = recipe.with_(*(text for text in defaults if text.partition("=")[0] not in given), *settings)
    recipe.validate()
    save(recipe, model, workdir)
    print(f"wrote     {workdir}: a run at step 0; generate with python -m adaptive.generate --workdir {workdir}")


def export(kind: str, workdir: Path, path: Path) -> None:
    """Writes the model of a run's newest checkpoint to one safetensors file, under the names of `kind`."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"--export {path}: it is written as safetensors, so its name must end in .safetensors")
    from flax import nnx

    from adaptive.interop import check_kind, to_official
    from adaptive.interop.files import write_safetensors
    from adaptive.interop.official_hnet_config import config_to_official
    from adaptive.runs.load import find, load

    check_kind(kind)
    trained = load(find(workdir))
    tensors = to_official(kind, nnx.merge(trained.graphdef, trained.state))
    write_safetensors(path, tensors)
    print(f"wrote     {path}: {len(tensors)} tensors of step {trained.step}")
    if kind == "hnet":
        beside = path.with_suffix(".json")
        beside.write_text(json.dumps(config_to_official(trained.recipe.model), indent=2) + "\n", encoding="utf-8")
        print(f"wrote     {beside}")


def save(recipe: Recipe, model: Any, workdir: Path) -> None:
    """Makes the folder of a run of `recipe`, with `model` in a checkpoint of step 0."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from adaptive.parallel.mesh import make_mesh
    from adaptive.runs.checkpoint import Checkpoints
    from adaptive.runs.folder import RunFolder
    from adaptive.runs.origin import record_start
    from adaptive.runs.state import TrainState
    from adaptive.training.program import Program

    program = Program(recipe, make_mesh(recipe.mesh))
    params, buffers = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    wanted, found = ({path: leaf.shape for path, leaf in nnx.to_flat_state(s)} for s in (
        program.abstract_state().params, params))  # fmt: skip
    if wrong := next((path for path in wanted | found if wanted.get(path) != found.get(path)), None):
        raise RecipeError(f"the settings describe another model than the tensors: {'/'.join(map(str, wrong))} differs")

    into = program.shardings
    params, buffers = jax.device_put(params, into.params), jax.device_put(buffers, into.buffers)
    zero = jnp.zeros((), jnp.int32)
    key = jax.random.key_data(jax.random.key(recipe.train.seed))
    step, skipped, key = jax.device_put((zero, zero, key), (into.step, into.skipped, into.key))
    opt = jax.jit(program.tx.init, out_shardings=into.opt)(params)
    state = TrainState(step, skipped, params, buffers, opt, key)
    with RunFolder.open(workdir, recipe) as folder:
        record_start(folder.path)
        checkpoints = Checkpoints(folder.checkpoints, recipe.checkpoint, json.loads(recipe.to_json()))
        checkpoints.save(0, state, {})
        checkpoints.close()
        if checkpoints.failed:
            raise CheckpointError(f"the checkpoint could not be written to {folder.checkpoints}")


def name_of(config: Path) -> str:
    """The model's name: that of its configuration file, or of the folder around one that is called config.json."""
    stem = config.absolute().parent.name if config.stem == "config" else config.stem
    return name_from(stem or "converted")


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read --config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"--config {path} is not JSON that can be used: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"--config {path} must be a JSON object of settings, not a {type(config).__name__}")
    return config
