"""Which parameters each part of the optimizer touches: what they say of themselves (`adaptive.layers.site`).

Every answer is a tree like `params`, a tree of `nnx.Param`, with one value in place of each array.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from adaptive.layers.site import STACKING, Axes

Decay = Literal["matrices", "official"]


def decayed(params: Any, rule: Decay = "matrices") -> Any:
    """True for every parameter that weight decay reaches.

    matrices  matrices, embeddings among them, and kernels of convolutions; no scale of a norm, no bias, no vector
    official  all but what the H-Net release leaves out: biases, of convolutions and of the residual projection, and the
              scale of Mamba's gated norm. All other norms and vectors are decayed (released code, utils/train.py,
              group_params)
    """
    if rule == "matrices":
        return _asked(params, lambda about: about["role"] in ("matrix", "kernel"))
    return _asked(params, lambda about: about["role"] not in ("bias", "gated_scale"))


def rates(params: Any) -> Any:
    """Each parameter's multiple of the learning rate, float."""
    return _asked(params, lambda about: about["rate"])


def groups(params: Any) -> Any:
    """ "auxiliary" for the parameters that losses of their own train, "main" for all others."""
    return _asked(params, lambda about: about["group"])


def updated_by_muon(params: Any) -> Any:
    """ "muon" for the matrices inside the network, "adamw" for all other parameters."""
    return _asked(params, lambda about: "muon" if _dimensions(about) else "adamw")


def matrices(params: Any) -> Any:
    """Of each matrix inside the network the places of the dimensions that it reads and writes; None of all else."""
    return _asked(params, _dimensions)


def _dimensions(about: dict[str, Any]) -> MuonDimensionNumbers | None:
    axes: Axes = about["axes"]
    places = [i for i, name in enumerate(axes) if name not in STACKING]
    if about["role"] != "matrix" or "vocab" in axes:  # embedding and head
        return None
    if len(places) == 2:
        return MuonDimensionNumbers((places[0],), (places[1],))
    if axes[places[0]] == "width":  # [width, heads, head_dim]
        return MuonDimensionNumbers((places[0],), tuple(places[1:]))
    if axes[places[-1]] == "width":  # [heads, head_dim, width]
        return MuonDimensionNumbers(tuple(places[:-1]), (places[-1],))
    return None


def _asked(params: Any, answer: Callable[[dict[str, Any]], Any]) -> Any:
    def one(param: nnx.Variable) -> nnx.Variable:
        value = answer(param.get_metadata())
        return jax.tree.map(lambda _: value, param)  # of a parameter that optax has masked, nothing

    return jax.tree.map(one, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
