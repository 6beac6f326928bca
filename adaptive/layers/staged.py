"""States of a stack as the stages of a pipeline have them: [stages, parts, layers, ...].

Of `groups` groups of layers every stage has an equal part of each, in order. Part r of a stage is what it computes in
round r; a recursion's passes are further parts where they have parameters of their own (axis "uses").
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.site import is_variable
from adaptive.parallel.rules import constrain, whole


def spread(states: Any, stages: int, groups: int) -> Any:
    """Variables [uses,] [layers of the stack, ...] -> [stages, parts, layers of a part, ...]."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        value, at = variable[...], _axes(variable).index("stages")
        value = value.reshape(*value.shape[:at], groups, stages, -1, *value.shape[at + 1 :])
        value = jnp.moveaxis(value, at + 1, 0)
        value = value.reshape(stages, -1, *value.shape[at + 2 :])
        return variable.replace(constrain(value, "stages", None, None, *whole(_own(variable))))

    return jax.tree.map(one, states, is_leaf=is_variable)


def joined(states: Any, groups: int) -> Any:
    """The way back of `spread`."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        value, at = variable[...], _axes(variable).index("stages")
        stages, parts, layers = value.shape[:3]
        value = value.reshape(stages, *((parts // groups,) if at else ()), groups, layers, *value.shape[3:])
        value = jnp.moveaxis(value, 0, at + 1)
        value = value.reshape(*value.shape[:at], groups * stages * layers, *value.shape[at + 3 :])
        return variable.replace(constrain(value, *_axes(variable)))

    return jax.tree.map(one, states, is_leaf=is_variable)


def stored(states: Any) -> Any:
    """What `spread` gives, or gradients by it, split as the parameters are where they are stored."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(constrain(variable[...], "stages", None, None, *_own(variable)))

    return jax.tree.map(one, states, is_leaf=is_variable)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    axes: tuple[str | None, ...] = variable.get_metadata()["axes"]
    return axes


def _own(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Logical names of the dimensions of one layer."""
    return _axes(variable)[_axes(variable).index("stages") + 1 :]
