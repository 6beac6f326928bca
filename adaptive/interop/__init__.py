"""Reading and writing other people's checkpoints.

A kind is a family of models with tensor names and a configuration of its own; one module knows each.
"""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from adaptive.errors import UserError
from adaptive.interop import official_mor

_KINDS: dict[str, ModuleType] = {"mor": official_mor}


def from_official(kind: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> nnx.Module:
    """The model that official `tensors` and `config` describe.

    kind     "mor": Mixture-of-Recursions as its authors released it (see adaptive.interop.official_mor)
    tensors  name -> array of any float dtype, under the official names; read as float32
    config   the official configuration, a plain dict

    Pure and traceable in `tensors`: gradients through `from_official(kind, tensors, config)(tokens)` come back under
    the official names, a shared tensor's summed over its uses. Raises UserError for an unknown kind, a configuration
    that cannot be built, and tensors that are missing, unknown, misshapen or in disagreement with their aliases.
    """
    return _kind(kind).from_official(tensors, config)


def to_official(kind: str, model: nnx.Module) -> dict[str, jax.Array]:
    """The tensors f32 of `model` under the official names, each distinct one once: `from_official` read backwards."""
    return _kind(kind).to_official(model)


def _kind(name: str) -> ModuleType:
    if name not in _KINDS:
        near = difflib.get_close_matches(str(name), _KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"interop: unknown kind {name!r}, known: {', '.join(_KINDS)}{hint}")
    return _KINDS[name]
