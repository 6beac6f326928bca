"""Other people's weights to the folder of a run, which every other command takes, and a run's model back:

    adaptive convert --from FOLDER_OR_GGUF --workdir DIR [setting=value ...]
    adaptive convert --kind KIND --tensors FILE --config FILE --workdir DIR [setting=value ...]
    adaptive convert --workdir DIR --export FOLDER [--dtype bfloat16] [--push NAME/REPOSITORY]
    adaptive convert --kind KIND --workdir DIR --export FILE.safetensors
    adaptive convert --uptrain RUN --recipe NAME --workdir DIR [--sharing stepwise] [setting=value ...]
    adaptive convert --to_expert_choice RUN --workdir DIR [setting=value ...]

FOLDER is one as Hugging Face's hub has it, with config.json, safetensors and a tokenizer. --uptrain begins the
recursive model of a recipe as the plain model of a run; --to_expert_choice replaces the token-choice routers of a run,
and nothing else. Settings are dotted, as those of training, and count where the
model is trained further: `adaptive train --recipe DIR/recipe.json --workdir DIR`. Exit codes: 0 done, 2 something
cannot work, 130 interrupted.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.convert"))

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from adaptive import command, versions
from adaptive.errors import CheckpointError, RecipeError, UserError
from adaptive.exporting import export_folder
from adaptive.interop.source import Source, read_config, source
from adaptive.interop.uptraining import SHARINGS, Sharing
from adaptive.paths import local_path
from adaptive.recipe import Recipe, name_from

TOKENIZERS = {"hnet": "hnet-bytes"}  # of the kinds that know theirs


class Reading(Protocol):
    """Settings of a model, and its state of tensors that were looked at (`adaptive.interop.huggingface.Read`)."""

    @property
    def settings(self) -> Any: ...

    def state(self, shapes: Any, place: Any) -> Any: ...


def options() -> command.Options:
    made = command.Options("convert", __doc__ or "")
    add = made.add_argument
    add("--from", dest="source", default="", help="a folder as Hugging Face's hub has it, or a *.gguf file")
    add("--kind", default="", help="whose names the tensors have: hnet, mor, llama, qwen3, ...; --from finds it out")
    add("--tensors", default="", help="*.safetensors, a PyTorch file, an index of several, or a folder of them")
    add("--config", default="", help="the released configuration (JSON)")
    add("--workdir", default="", help="folder of the run: a new one; with --export that of a model")
    add("--export", default="", help="a new folder that transformers opens, or one *.safetensors file")
    add("--step", type=command.number(int, least=0), help="the checkpoint of this step of a run, not the newest")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of exported weights")
    add("--shard_mb", type=command.number(int, least=1), default=5000, help="largest exported file (default 5000)")
    add("--push", default="", metavar="REPOSITORY", help="uploads the exported folder to Hugging Face's hub")
    add("--uptrain", default="", metavar="RUN", help="the run of a plain model that a recursive one begins from")
    add("--to_expert_choice", default="", metavar="RUN", help="the run whose experts shall choose their tokens")
    add("--recipe", default="", help="with --uptrain: that of the recursive model, a name or a file")
    add("--sharing", default="stepwise", choices=SHARINGS,
        help="with --uptrain: which layers of the plain model the shared ones begin as (default stepwise)")  # fmt: skip
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
    if given.source and (given.tensors or given.config or given.export):
        raise UserError("--from says where tensors and configuration are: leave out --tensors, --config and --export")
    if given.uptrain and (given.source or given.tensors or given.config or given.export or given.kind):
        raise UserError("--uptrain takes --recipe, --workdir, --sharing, --step and settings alone")
    others = given.uptrain, given.recipe, given.source, given.tensors, given.config, given.export, given.kind
    if given.to_expert_choice and any(others):
        raise UserError("--to_expert_choice takes --workdir, --step and settings alone")
    file = given.export.endswith(".safetensors")
    if given.push and (file or not given.export):
        raise UserError("--push uploads a folder: give --export FOLDER")
    needed: tuple[str, ...] = ("kind", "tensors", "config", "workdir")
    if given.uptrain:
        needed = ("uptrain", "recipe", "workdir")
    elif given.to_expert_choice:
        needed = ("to_expert_choice", "workdir")
    elif given.source or given.export:
        needed = ("source", "workdir") if given.source else ("kind", "workdir", "export")[not file :]
    if missing := [f"--{name}" for name in needed if not getattr(given, name)]:
        raise UserError(f"{', '.join(missing)} is missing (--help shows all options)")
    paths = {name: local_path(getattr(given, name), f"--{name}") for name in needed if name not in ("kind", "recipe")}
    print(versions.check_versions())
    start_backend()
    if given.uptrain:
        uptrain(paths["uptrain"], given.recipe, paths["workdir"], given.sharing, given.settings, given.step)
        return 0
    if given.to_expert_choice:
        to_expert_choice(paths["to_expert_choice"], paths["workdir"], given.settings, step=given.step)
        return 0
    if given.export and file:
        export(given.kind, paths["workdir"], paths["export"])
        return 0
    if given.export:
        size = given.shard_mb * 10**6
        export_folder(paths["workdir"], paths["export"], given.kind, given.dtype, size, given.push, given.step)
        return 0
    if given.source:
        found = source(paths["source"], given.kind, allow_pickle=given.allow_pickle)
    else:
        found = _of_files(given.kind, paths["tensors"], paths["config"], allow_pickle=given.allow_pickle)
    convert(found, paths["workdir"], given.settings)
    return 0


def _of_files(kind: str, tensors: Path, config: Path, *, allow_pickle: bool) -> Source:
    """Tensors and configuration that lie apart."""
    from adaptive.interop import check_kind
    from adaptive.interop.files import lazy_tensors

    check_kind(kind)
    about = read_config(config)
    return Source(name_of(config), kind, about, lazy_tensors(tensors, allow_pickle=allow_pickle), {})


def convert(found: Source, workdir: Path, settings: Sequence[str]) -> None:
    """Makes `workdir` the folder of a run at step 0 whose model has the tensors. Raises UserError before anything is
    written where it cannot be."""
    from adaptive.interop import check_kind, reader
    from adaptive.runs.folder import RunFolder

    check_kind(found.kind)
    if RunFolder(workdir).recipe.exists():
        raise CheckpointError(f"{workdir} holds a run already; choose another --workdir")
    given = {text.partition("=")[0] for text in settings}
    defaults = [f"data.tokenizer={name}" for name in [TOKENIZERS.get(found.kind)] if name]
    if found.tokenizer and "data.tokenizer" not in given:
        defaults = [f"data.tokenizer={(workdir / 'tokenizer').absolute()}"]
    if not defaults and "data.tokenizer" not in given:
        raise RecipeError(f"--kind {found.kind} does not say how text becomes tokens: add data.tokenizer=NAME_OR_FILE")
    longest = [found.config.get(name) for name in ("max_position_embeddings", "n_positions")]
    defaults += [f"data.seq_len={n}" for n in longest if type(n) is int and n > 1]  # what it was trained on
    numbers = sum(math.prod(value.shape) for value in found.tensors.values())
    print(f"read      {found.name}: {found.kind}, {len(found.tensors)} tensors, {numbers:,} numbers", flush=True)
    read = reader(found.kind, found.tensors, found.config)
    recipe = Recipe(name_from(found.name), f"{found.kind} weights of {found.name}, converted", read.settings)
    recipe = recipe.with_(*(text for text in defaults if text.partition("=")[0] not in given), *settings)
    recipe.validate()
    check_tokenizer(found, recipe)
    save(recipe, read, workdir, found)
    print(f"wrote     {workdir}: a run at step 0; generate with python -m adaptive.generate --workdir {workdir}")


def uptrain(
    run: Path, name: str, workdir: Path, sharing: Sharing, settings: Sequence[str], step: int | None = None
) -> None:
    """Makes `workdir` the folder of a run at step 0 of the recursive recipe `name`, which begins as the plain model of
    a run, with its tokenizer. Raises UserError before anything is written where it cannot be."""
    from adaptive.interop.uptraining import uptrained
    from adaptive.recipe import load as load_recipe
    from adaptive.runs.folder import RunFolder
    from adaptive.runs.load import find, load

    if RunFolder(workdir).recipe.exists():
        raise CheckpointError(f"{workdir} holds a run already; choose another --workdir")
    found = find(run, step, option="--uptrain")
    given = {text.partition("=")[0] for text in settings}
    own = {"data.tokenizer": found.recipe.data.tokenizer, "data.bos": found.recipe.data.bos}
    recipe = load_recipe(name).with_values({path: value for path, value in own.items() if path not in given})
    recipe = recipe.with_(*settings)
    recipe.validate()
    trained = load(found)
    read = uptrained(recipe.model, trained.recipe.model, trained.state, sharing, recipe.train.seed)
    save(recipe, read, workdir)
    print(
        f"wrote     {workdir}: {recipe.name} at step 0, begun ({sharing}) as {found.recipe.name} at step {trained.step}"
    )
    print(f"train it  python -m adaptive.train --recipe {workdir}/recipe.json --workdir {workdir}")


def to_expert_choice(
    run: Path, workdir: Path, settings: Sequence[str], name: str = "", step: int | None = None
) -> None:  # fmt: skip
    """Makes `workdir` the folder of a run at step 0 whose model has the parameters of `run` and experts that choose,
    and scores both on what the run holds out; name: of its recipe, "": after the other. Raises UserError before
    anything is written where it cannot be."""
    from flax import nnx

    from adaptive.interop.retrofit import Retrofitted
    from adaptive.retrofitting import held_out, record, retrofitted
    from adaptive.runs.folder import RunFolder
    from adaptive.runs.load import find, load

    if RunFolder(workdir).recipe.exists():
        raise CheckpointError(f"{workdir} holds a run already; choose another --workdir")
    found = find(run, step, option="--to_expert_choice")
    recipe = retrofitted(found.recipe, settings, name)
    trained = load(found)
    before = held_out(found.recipe, trained.state)
    params = {path: leaf for path, leaf in nnx.to_flat_state(trained.state) if isinstance(leaf, nnx.Param)}
    save(recipe, Retrofitted(recipe.model, params), workdir)
    after = held_out(recipe, load(find(workdir)).state)
    record(workdir, {"run": str(run), "step": found.step, "before": before, "after": after})
    told = [f"{row['eval/loss']:.4f} nats per token" if row else "nothing is held out" for row in (before, after)]
    print(f"before    {told[0]}, with token choice: {found.recipe.name} at step {found.step}")
    print(f"after     {told[1]}, with expert choice")
    print(f"wrote     {workdir}: {recipe.name} at step 0")
    print(f"train it  python -m adaptive.train --recipe {workdir}/recipe.json --workdir {workdir}")


def check_tokenizer(found: Source, recipe: Recipe) -> None:
    """Raises RecipeError where the tokenizer has ids that the model has no embedding for."""
    import tempfile

    from adaptive.data.tokenizers import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        name = recipe.data.tokenizer
        if found.tokenizer and name.endswith("tokenizer"):
            found.write_tokenizer(Path(folder))
            name = folder
        tokenizer = load_tokenizer(name, bos=recipe.data.bos, eos=recipe.data.eos)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"the tokenizer {recipe.data.tokenizer} has ids up to {tokenizer.vocab_size - 1:,} and the model "
            f"embeddings of {recipe.model.vocab_size:,} tokens: it is that of another model; give data.tokenizer=NAME"
        )


def export(kind: str, workdir: Path, path: Path) -> None:
    """Writes the model of a run's newest checkpoint to one safetensors file, under the names of `kind`."""
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


def save(recipe: Recipe, read: Reading, workdir: Path, found: Source | None = None) -> None:
    """Makes the folder of a run of `recipe`, with the parameters that were read in a checkpoint of step 0.

    Each parameter is made by itself, where it is to live. Training begins with a new state of the optimizer.
    """
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
    abstract, shapes = program.abstract_state(), nnx.eval_shape(lambda: read.settings.build(jax.random.key(0)))
    wanted = {path: leaf for state in (abstract.params, abstract.buffers) for path, leaf in nnx.to_flat_state(state)}
    own = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(shapes))}
    if wrong := next((path for path in wanted | own if _shape(wanted.get(path)) != own.get(path)), None):
        raise RecipeError(f"the settings describe another model than the tensors: {'/'.join(map(str, wrong))} differs")

    def place(path: Any, value: Any) -> jax.Array:
        # Awaited, so that the host holds one of them and not all that are on their way.
        return jax.device_put(value.astype(wanted[path].dtype, copy=False), wanted[path].sharding).block_until_ready()

    params, buffers = nnx.split_state(read.state(nnx.state(shapes), place), nnx.Param, ...)
    zero, key = jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(recipe.train.seed))
    into = program.shardings
    step, skipped, key = jax.device_put((zero, zero, key), (into.step, into.skipped, into.key))
    state = TrainState(step, skipped, params, buffers, (), key)
    with RunFolder.open(workdir, recipe) as folder:
        if found is not None and found.tokenizer:
            found.write_tokenizer(workdir / "tokenizer")
        record_start(folder.path)
        checkpoints = Checkpoints(folder.checkpoints, recipe.checkpoint, json.loads(recipe.to_json()))
        checkpoints.save(0, state, {})
        checkpoints.close()
        if checkpoints.failed:
            raise CheckpointError(f"the checkpoint could not be written to {folder.checkpoints}")


def _shape(leaf: Any) -> Any:
    return None if leaf is None else leaf.shape


def name_of(config: Path) -> str:
    """The model's name: that of its configuration file, or of the folder around one that is called config.json."""
    stem = config.absolute().parent.name if config.stem == "config" else config.stem
    return name_from(stem or "converted")
