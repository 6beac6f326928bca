"""A model as a folder that `transformers.AutoModelForCausalLM.from_pretrained` opens.

Families of the library are written under its names. All else is written for `modeling_adaptive.py`, which goes into
the folder and runs with trust_remote_code=True: config.json then has the settings tree and says of which tensors each
parameter is made. What was written is read back, and must give the same logits, before anybody is told that it is
there.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop import custom, huggingface, official_hnet, official_mor
from adaptive.interop.families import families
from adaptive.interop.files import lazy_tensors
from adaptive.interop.stored import write_tensors
from adaptive.interop.tensors import Layout, taken_apart
from adaptive.models.language_model import LanguageModel, Settings

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MODELING = ("modeling_adaptive.py", "layers_adaptive.py", "routers_adaptive.py")
_TOKENS = 16  # of the text whose logits are compared
_CLOSE = 1e-4  # of logits that are computed from the same numbers twice


class About(NamedTuple):
    """What is written beside the weights: longest text in tokens, ids of begin and end, files of the tokenizer and the
    model card by their names."""

    longest: int
    begin: int | None
    end: int
    tokenizer: Mapping[str, str]
    card: str


class Plan(NamedTuple):
    """How a model is written: its kind, config.json, and where each parameter lies."""

    kind: str
    config: dict[str, Any]
    layout: Layout


def check_kind(kind: str) -> None:
    """Raises CheckpointError for a kind that no folder is written of; "" is none yet."""
    if kind and kind not in families():
        raise CheckpointError(
            f"--kind {kind}: a folder is written of {', '.join(families())}; of mor and hnet give --export "
            "FILE.safetensors"
        )


def planned(settings: Settings, kind: str = "") -> Plan:
    """kind "": the first family of the library that has such a model, else `adaptive`.

    Raises CheckpointError, which says why, for what `kind` has no names for and for what no modelling file computes.
    """
    check_kind(kind)
    refused = {}
    for name in (kind,) if kind else families():
        if name == custom.KIND:
            continue
        try:
            return Plan(name, huggingface.config_of(name, settings), families()[name].layout(settings))
        except CheckpointError as error:
            refused[name] = str(error)
    if kind and kind != custom.KIND:
        raise CheckpointError(refused[kind])
    if why := custom.refused(settings):
        raise CheckpointError(f"no model in PyTorch is written of this one: {why}")
    layout = _official(settings) or custom.layout(settings)
    return Plan(custom.KIND, custom.config(settings, layout), layout)


def _official(settings: Settings) -> Layout | None:
    """Where parameters lie under the names of the authors' own code; None where these have none for such a model."""
    for authors in (official_mor, official_hnet):
        if not authors.foreign(settings):
            return authors.official_layout(settings)
    return None


def export(
    folder: Path,
    model: LanguageModel,
    plan: Plan,
    about: About,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
) -> float:
    """Writes `folder`, which is made; gives the largest difference between the logits of the model and of what was
    written, which comes of the dtype alone.

    Raises CheckpointError where it cannot be written, holds something already, or does not read back as the same model.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(f"--export {folder} holds files already; choose a new folder")
        tensors = taken_apart(plan.kind, model, plan.layout)
        _write_weights(folder, tensors, np.dtype(DTYPES[dtype]), shard_bytes)
        for name, text in _texts(plan, about, dtype).items():
            (folder / name).write_text(text, encoding="utf-8")
        if plan.kind == custom.KIND:
            for name in MODELING:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from None
    return _read_back(folder, model, plan, np.dtype(DTYPES[dtype]))


def _texts(plan: Plan, about: About, dtype: str) -> dict[str, str]:
    """Every file of text."""
    ids = {"bos_token_id": about.begin, "eos_token_id": about.end}
    places = {"max_position_embeddings": about.longest} if plan.kind != "gpt2" else {}
    config = places | plan.config | ids | {"torch_dtype": dtype, "use_cache": plan.kind != custom.KIND}
    generation = {"_from_model_config": True, **ids, "use_cache": plan.kind != custom.KIND}
    shown = lambda tree: json.dumps(tree, indent=2) + "\n"  # noqa: E731
    return {
        "config.json": shown(config),
        "generation_config.json": shown(generation),
        "README.md": about.card,
        **about.tokenizer,
    }


def _write_weights(folder: Path, tensors: Mapping[str, Any], dtype: np.dtype, shard_bytes: int) -> None:
    shards = list(_shards(tensors, dtype, shard_bytes))
    total, weight_map = 0, dict[str, str]()
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: (dtype, tuple(tensors[name].shape)) for name in names}
        write_tensors(folder / file, ((name, np.asarray(tensors[name])) for name in names), shapes)
        weight_map |= dict.fromkeys(names, file)
        total += sum(dtype.itemsize * math.prod(shape) for _, shape in shapes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Any], dtype: np.dtype, most: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, none of which is larger than `most` bytes unless one tensor is."""
    names: list[str] = []
    size = 0
    for name, value in tensors.items():
        own = dtype.itemsize * math.prod(value.shape)
        if names and size + own > most:
            yield names
            names, size = [], 0
        names, size = [*names, name], size + own
    yield names


def _read_back(folder: Path, model: LanguageModel, plan: Plan, dtype: np.dtype) -> float:
    """See `export`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    again = huggingface.from_official(plan.kind, lazy_tensors(folder), config)
    rounded = jax.tree.map(lambda a: jnp.asarray(a.astype(dtype), jnp.float32), nnx.state(model))
    exact = nnx.merge(nnx.graphdef(model), rounded)
    tokens = jnp.arange(_TOKENS, dtype=jnp.int32)[None] % model.settings.vocab_size
    rule = "threshold" if "threshold" in model.selections() else "topk"
    logits = jax.jit(lambda m: m(tokens, selection=rule).logits)
    found, wanted, first = (np.asarray(logits(m)) for m in (again, exact, model))
    off = float(np.abs(found - wanted).max())
    if not off <= _CLOSE * max(1.0, float(np.abs(wanted).max())):
        raise CheckpointError(
            f"{folder} does not read back as the same model: logits differ by {off:.3g}. It was left for you to look at"
        )
    return float(np.abs(found - first).max())
