"""A stack whose layers are split over the stages of a pipeline.

Stages have states [stages, parts, layers, ...]. Of `groups` groups of layers every stage has an equal part of each, in
order. Part r of a stage is what it computes in round r; a recursion's passes are further parts where they have
parameters of their own (axis "uses").
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.call import Call, Tales, Told
from adaptive.layers.site import is_variable
from adaptive.layers.where import Where
from adaptive.parallel.micro_batches import collected, dealt
from adaptive.parallel.pipeline import At, Schedule, outputs
from adaptive.parallel.rules import batch_shards, constrain, whole
from adaptive.settings import divisors

MOST = 4  # micro-batches for each stage: with so many, stages are idle for a fifth of the time at most
Run = Callable[[Any, jax.Array, Where, Call, None], tuple[jax.Array, Any, Tales, jax.Array | None]]


def spread(states: Any, stages: int, groups: int) -> Any:
    """Variables [uses,] [layers of the stack, ...] -> [stages, parts, layers of a part, ...]."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        value, at = variable[...], _stages_at(variable)
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


def forward(
    run: Run, states: list[Any], stages: int, x: jax.Array, where: Where, call: Call, previous: jax.Array | None
) -> tuple[jax.Array, Tales, jax.Array | None]:
    """A stack once, the rows of x [rows, n, width] as micro-batches that go through its stages: (the stream behind it,
    what was done, logits of its last router).

    run       of a stack with states of whole layers: (states, x, where, call, None) -> (x, state, told, previous)
    states    of all of its layers
    previous  logits of the router of the layer below, where the first one reads them
    """
    own = spread(states, stages, 1)
    layers = sum(jax.tree.leaves(state)[0].shape[2] for state in own)
    shards = batch_shards()
    n = max(d for d in divisors(x.shape[0] // shards) if d <= MOST * stages) if x.shape[0] % shards == 0 else 1
    deal = lambda tree: jax.tree.map(lambda a: dealt(a, n), tree)  # noqa: E731
    by_row = deal((where, call.given, call.experts_per_token, call.mask_ratio))

    def stage(own: Any, x: Any, at: At) -> tuple[Any, Tales]:
        here, given, wanted, ratio = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at.micro, 0, False), by_row)
        key = call.key if call.key is None or n == 1 else jax.random.fold_in(call.key, at.micro)
        mine = call.replace(given=given, experts_per_token=wanted, mask_ratio=ratio, key=key, previous=x[1])
        y, _, told, previous = run(own, x[0], here, mine.replace(layer=call.layer + at.stage * layers), None)
        return (y, previous), told

    out, told = outputs(Schedule(stages, 1, n), stage, own, deal((x, previous)))
    y, previous = jax.tree.map(collected, out)
    return y, {path: _whole(one) for path, one in told.items()}, previous


def _whole(told: Told) -> Told:
    """What layers told of micro-batches, [stages, 1, micro_batches, layers, ...] -> [layers of all stages, ...]."""
    add = lambda a: a[:, 0].sum(1).reshape(-1, *a.shape[4:])  # noqa: E731
    sums = Told(*(jax.tree.map(add, tree) for tree in (told.losses, told.stats, told.parts)))

    def rows(a: jax.Array) -> jax.Array:
        by_layer = a[:, 0].swapaxes(1, 2)
        return jax.vmap(collected)(by_layer.reshape(-1, *by_layer.shape[2:]))

    return sums._replace(per_token={name: rows(a) for name, a in told.per_token.items()})


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    axes: tuple[str | None, ...] = variable.get_metadata()["axes"]
    return axes


def _stages_at(variable: nnx.Variable) -> int:
    """Which dimension the layers are; passes of a recursion may have taken their part of the leading one."""
    axes = _axes(variable)
    return axes.index("stages") - (len(axes) - variable[...].ndim)


def _own(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Logical names of the dimensions of one layer."""
    return _axes(variable)[_axes(variable).index("stages") + 1 :]
