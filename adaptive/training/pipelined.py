"""The loss and gradients of a step whose layers are split over the stages of a pipeline."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.data.batch import Batch
from adaptive.layers.call import Call, Tales, below
from adaptive.layers.staged import joined, spread, stored
from adaptive.layers.where import Where
from adaptive.models.bodies import Line
from adaptive.objectives import Inputs, Objective, asked
from adaptive.parallel.pipeline import At, Heard, Own, Parts, Schedule, Told, gradients, told_of
from adaptive.parallel.rules import constrain_state
from adaptive.routing.types import AuxLosses, Output, Trace
from adaptive.routing.types import Told as Tale


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How layers are split: stages, and groups of layers of which each stage has an equal part; and micro-batches."""

    stages: int
    groups: int
    micro_batches: int

    def schedule(self, passes: int = 1) -> Schedule:
        """For layers that each micro-batch goes through so many times."""
        return Schedule(self.stages, self.groups * passes, self.micro_batches)


class Task(NamedTuple):
    """What a step is computed of.

    micro, keys  micro-batches [micro_batches, ...], and the key of each one's noise
    targets      f32[]: how many the whole batch has
    options      of `LanguageModel.asked`, besides what comes with a batch
    joint        whether auxiliary losses are formed over the whole batch, not over each micro-batch
    """

    graphdef: nnx.GraphDef
    params: Any
    buffers: Any
    aim: Objective
    micro: Batch
    keys: jax.Array
    targets: jax.Array
    options: dict[str, Any]
    segmented: bool
    loss_chunk: int
    joint: bool


class Computed(NamedTuple):
    """Gradients, the loss f32[] without auxiliary ones, these, scalars, and sums of what the parts told."""

    grads: Any
    loss: jax.Array
    aux: AuxLosses
    scalars: dict[str, jax.Array]
    sums: dict[str, Any]


def computed(pipeline: Pipeline, task: Task) -> Computed:
    """The step's loss and gradients: those of its micro-batches, one after another."""
    model = nnx.merge(task.graphdef, task.params, task.buffers)
    line = model.body.line()
    schedule, form = pipeline.schedule(line.passes), _Form(model, line, pipeline.groups)
    flat = dict(nnx.to_flat_state(task.params))
    inside = ("body", line.name, "blocks")
    outer = {path: value for path, value in flat.items() if path[: len(inside)] != inside}
    inner = {path: value for path, value in flat.items() if path not in outer}
    states = [nnx.split_state(state, nnx.Param, ...) for state in line.stack.ready()]
    own = Own(*spread([list(each) for each in zip(*states, strict=True)], pipeline.stages, pipeline.groups))
    given = schedule, _Parts(task, pipeline, inner).parts(), outer, own

    told = jax.eval_shape(lambda: told_of(*given))
    if any(aux.coefficient for aux in jax.eval_shape(lambda told: form.aux(_summed(told)), told).values()):
        pulls = form.pulls(told_of(*given), task.joint)
    else:
        pulls = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), _parted(told)[0])
    loss, told, d_outer, d_own = gradients(*given, pulls, (constrain_state, stored))
    total = _summed(told)
    back = enumerate(joined(d_own, pipeline.groups))
    d_inner = {(*inside, i, *path): value for i, state in back for path, value in nnx.to_flat_state(state)}
    grads = d_outer | d_inner
    return Computed(
        grads=nnx.from_flat_state([(path, grads[path]) for path in flat]),
        loss=loss,
        aux=form.aux(total),
        scalars=total.last.counted["scalars"],
        sums=Trace(jnp.zeros((), jnp.int32), told=form.tales(total)).sums(),
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a micro-batch goes through; inner: parameters of the line's layers, which the ends do not read."""

    task: Task
    pipeline: Pipeline
    inner: dict[Any, Any]

    def parts(self) -> Parts:
        # Used several times: under jit they are traced once; inlined, the program is the same.
        return Parts(*(jax.jit(part, inline=True) for part in (self.first, self.stage, self.last)))

    def first(self, outer: Any, m: Any) -> tuple[Any, Heard]:
        model, inputs, where, call = self._of_micro(outer, m)
        x, previous, told = model.body.line().enter(model.embedded(inputs.tokens, where), where, call)
        return (x, previous), _heard(told)

    def stage(self, own: Own, x: Any, at: At) -> tuple[Any, Heard]:
        model, _, where, call = self._of_micro(None, at.micro)
        line, groups = model.body.line(), self.pipeline.groups
        states = [nnx.merge_state(*each) for each in zip(own.trained, own.fixed, strict=True)]
        part = line.stack.settings.layers // (self.pipeline.stages * groups)
        before = (at.round % groups * self.pipeline.stages + at.stage) * part
        number = line.first + at.round // groups * line.stack.settings.layers + before
        call = call.replace(previous=x[1], layer=number)
        y, _, told, previous = line.stack.run(states, x[0], where, call, None)
        return (y, previous), _heard(told)

    def last(self, outer: Any, x: Any, m: Any) -> tuple[jax.Array, Heard]:
        model, inputs, where, call = self._of_micro(outer, m)
        hidden, told = model.body.line().leave(*x, where, call)
        out = Output(hidden, None, AuxLosses(), Trace(jnp.ones(where.shape, jnp.int32)))
        loss, count = self.task.aim.loss(model, out, inputs, self.task.loss_chunk), self.task.targets
        apart = {f"readout/{name}": value / count for name, value in loss.apart.items()}
        trained, counted = _heard(told)
        return loss.total / count, Heard(trained, counted | {"scalars": {"ce": loss.main / count, **apart}})

    def _of_micro(self, outer: Any, m: Any) -> tuple[Any, Inputs, Where, Call]:
        """The model, with `outer` in place of its parameters outside the line, and micro-batch number m."""
        task = self.task
        params = task.params if outer is None else nnx.from_flat_state(list((outer | self.inner).items()))
        model = nnx.merge(task.graphdef, params, task.buffers)
        batch, key = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, m, 0, False), (task.micro, task.keys))
        inputs = task.aim.inputs(batch, key)
        where, call = model.asked(
            inputs.tokens,
            **asked(task.aim, inputs, batch, segmented=task.segmented),
            deterministic=False,
            key=key,
            **task.options,
        )
        return model, inputs, where, call


def _heard(told: Tales) -> Heard:
    """What adds up over micro-batches: losses, which are trained, and statistics."""
    trained = {path: Tale(losses=one.losses, parts=one.parts) for path, one in told.items()}
    return Heard(trained, {path: Tale(stats=one.stats) for path, one in told.items()})


class _Form(NamedTuple):
    """What was told in the form that a model tells it in."""

    model: Any
    line: Line
    groups: int

    def aux(self, total: Told) -> AuxLosses:
        """Auxiliary losses of sums over micro-batches, or of one of them."""
        return self.model.expert_losses(self.tales(total))

    def tales(self, total: Told) -> Tales:
        def whole(heard: Heard) -> Tales:
            return {path: Tale(one.losses, heard.counted[path].stats, one.parts) for path, one in heard.trained.items()}

        stages = below(self.line.name, jax.tree.map(self._layers, whole(total.stages)))
        return {**whole(total.first), **stages, **whole(total.last)}

    def pulls(self, told: Told, joint: bool) -> Told:
        """Gradients of the auxiliary losses by what the parts told of each micro-batch. joint: they are formed over all
        of them."""

        def loss(trained: Told, counted: Told) -> jax.Array:
            aux = self.aux(Told(*(Heard(*each) for each in zip(trained, counted, strict=True))))
            return aux.total() + aux.separate_total()

        of, axes = jax.grad(loss), Told(first=0, stages=2, last=0)
        if not joint:
            each = jax.vmap(lambda *one: of(*one), in_axes=(axes, axes), out_axes=axes)(*_parted(told))
            micro_batches = told.last.counted["scalars"]["ce"].shape[0]
            return jax.tree.map(lambda g: g / micro_batches, each)
        total = Told(*map(_widened, of(*_parted(_summed(told))), axes))
        return jax.tree.map(lambda a, g: jnp.broadcast_to(g, a.shape), _parted(told)[0], total)

    def _layers(self, a: jax.Array) -> jax.Array:
        """[stages, rounds, layers of a part, ...] -> [passes, layers of the stack, ...]; one pass has no axis."""
        stages, rounds, layers = a.shape[:3]
        a = a.reshape(stages, rounds // self.groups, self.groups, layers, *a.shape[3:])
        a = a.transpose(1, 2, 0, 3, *range(4, a.ndim))
        a = a.reshape(-1, self.groups * stages * layers, *a.shape[4:])
        return a if self.line.passes > 1 else a[0]


def _summed(told: Told) -> Told:
    """Over micro-batches."""
    first, stages, last = told
    add = lambda tree, axis: jax.tree.map(lambda a: a.sum(axis), tree)  # noqa: E731
    return Told(add(first, 0), add(stages, 2), add(last, 0))


def _widened(tree: Any, axis: int) -> Any:
    return jax.tree.map(lambda a: jnp.expand_dims(a, axis), tree)


def _parted(told: Told) -> tuple[Told, Told]:
    """(what is trained, what is counted)."""
    return Told(*(heard.trained for heard in told)), Told(*(heard.counted for heard in told))
