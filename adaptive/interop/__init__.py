"""Reading and writing other people's checkpoints.

A kind is a family of models with tensor names and a configuration of its own; one module knows each.
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from adaptive.errors import UserError
from adaptive.interop import huggingface, official_hnet, official_mor
from adaptive.interop.families import families
from adaptive.interop.huggingface import Read
from adaptive.interop.tensors import Place
from adaptive.models.language_model import LanguageModel


class _Kind(NamedTuple):
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], LanguageModel]
    write: Callable[[nnx.Module], dict[str, jax.Array]]


_KINDS = {
    "mor": _Kind(official_mor.from_official, official_mor.to_official),
    "hnet": _Kind(official_hnet.from_official, official_hnet.to_official),
} | {
    kind: _Kind(functools.partial(huggingface.from_official, kind), functools.partial(huggingface.to_official, kind))
    for kind in families()
}


def from_official(kind: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> LanguageModel:
    """The model that official `tensors` and `config` describe.

    kind     "mor": Mixture-of-Recursions as its authors released it (see adaptive.interop.official_mor); "hnet":
             H-Net (see adaptive.interop.official_hnet); "llama", "qwen3", "mixtral", ...: the families of
             adaptive.interop.families, under the names of Hugging Face's library
    tensors  name -> array of float16, bfloat16, float32 or float64, under the official names; read as float32
    config   the official configuration (of Hugging Face models config.json), a plain dict

    Pure and traceable in `tensors`: gradients through `from_official(kind, tensors, config)(tokens)` come back under
    the official names, a shared tensor's summed over its uses. Raises UserError for an unknown kind, a configuration
    that cannot be built, and tensors that are missing, unknown, misshapen, quantised, not finite or in disagreement
    with their aliases.
    """
    return _kind(kind).read(tensors, config)


def reader(kind: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> "Read | Whole":
    """As `from_official`, of tensors that may lie in files: looked at one by one, and made parameters one by one.

    Of "mor" and "hnet", whose checkpoints are PyTorch's, all tensors are in memory.
    """
    if kind in families():
        return huggingface.read(kind, tensors, config)
    model = from_official(kind, {name: np.asarray(value) for name, value in tensors.items()}, config)
    return Whole(model.settings, model)


class Whole(NamedTuple):
    """A model that is in memory as a whole."""

    settings: Any
    model: LanguageModel

    def state(self, shapes: Any, place: Place) -> Any:
        """Its parameters where `place` puts them."""
        leaves = nnx.to_flat_state(nnx.state(self.model))
        return nnx.from_flat_state([(path, leaf.replace(place(path, np.asarray(leaf[...])))) for path, leaf in leaves])


def to_official(kind: str, model: nnx.Module) -> dict[str, jax.Array]:
    """The tensors f32 of `model` under the official names, each distinct one once: `from_official` read backwards.

    Raises CheckpointError for a model that no official configuration describes, and for numbers that are not finite.
    """
    return _kind(kind).write(model)


def check_kind(name: str) -> None:
    """Raises UserError for a kind that is unknown."""
    if name not in _KINDS:
        near = difflib.get_close_matches(str(name), _KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"interop: unknown kind {name!r}, known: {', '.join(_KINDS)}{hint}")


def _kind(name: str) -> _Kind:
    check_kind(name)
    return _KINDS[name]
