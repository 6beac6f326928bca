"""The state of a run: born sharded, plain when saved."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from adaptive.parallel.mesh import place
from adaptive.parallel.rules import AxisRules, placement


class TrainState(NamedTuple):
    """Everything a step reads and writes.

    step     i32[]  steps taken, skipped ones included: the position in the data
    skipped  i32[]  steps whose loss or gradient was not finite, which changed nothing else
    params   nnx.State of nnx.Param
    buffers  nnx.State of variables that no gradient trains
    opt      optax state
    key      u32[2] key data of the run's PRNG key
    ema      nnx.State like params, their running average; () where the run keeps none
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    buffers: Any
    opt: optax.OptState
    key: jax.Array
    ema: Any = ()


Build = Callable[[jax.Array], nnx.Module]


def abstract_model(build: Build) -> tuple[nnx.GraphDef, Any]:
    """(graphdef, state of ShapeDtypeStructs) of the model that `build(key)` makes; no array is created."""
    return nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))


def initial_state(build: Build, tx: optax.GradientTransformation, key: jax.Array, *, ema: bool = False) -> TrainState:
    """The state at step 0, with a running average of the parameters or without; traceable. `build(key) -> nnx.Module`
    draws every parameter from the key."""
    return _at_start(build(key), tx, key, ema)


def _at_start(model: nnx.Module, tx: optax.GradientTransformation, key: jax.Array, ema: bool) -> TrainState:
    params, buffers = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if ema else ()
    return TrainState(zero, zero, params, buffers, tx.init(params), jax.random.key_data(key), average)


def abstract_state(
    graphdef: nnx.GraphDef, shapes: Any, tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Shapes of the state of an abstract model (`abstract_model`), which is not traced again."""
    start = lambda shapes: _at_start(nnx.merge(graphdef, shapes), tx, jax.random.key(0), ema)  # noqa: E731
    return jax.eval_shape(start, shapes)


def state_shardings(
    build: Build, tx: optax.GradientTransformation, mesh: Mesh, rules: AxisRules, *, ema: bool = False
) -> TrainState:
    """Where each array of the state lives. Optimizer moments follow the parameter they belong to.

    Raises MeshError where a dimension does not divide over the mesh.
    """
    return place(abstract_state(*abstract_model(build), tx, ema=ema), mesh, rules)


def fresh_state(
    build: Build,
    tx: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    rules: AxisRules,
    shardings: TrainState,
    *,
    ema: bool = False,
) -> TrainState:
    """The state at step 0, every array created on the devices that keep it (`state_shardings`)."""
    # On a CPU the compiler's full effort takes half as long again, for the same bits in the same time.
    level = "xla_backend_optimization_level"
    asked = level in os.environ.get("XLA_FLAGS", "")
    options = {level: 1} if mesh.devices.flat[0].platform == "cpu" and not asked else None
    with placement(mesh, rules):
        initial = jax.jit(
            lambda key: initial_state(build, tx, key, ema=ema), out_shardings=shardings, compiler_options=options
        )
        return initial(key)
