"""A pipeline: layers split over the mesh's stages, which micro-batches go through one after another.

Time is counted in ticks. In each, every stage computes one micro-batch forward and one backward, and hands on what it
has; all stages run the same program, and arrays of all stages have a leading axis for them, "stages" in the table of
logical axes. A micro-batch that goes through the stages several times (circular: groups of layers, passes of a
recursion) enters the first stage again in the tick after it left the last one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive.parallel.rules import active_placement, constrain
from adaptive.parallel.shard import sharded

STAGE = "stage"
X = ("stages", "batch", "seq")  # leading dimensions of what stages hand on


class At(NamedTuple):
    """What a stage does in a tick: its number, the round, the micro-batch, and whether there is one. i32[], bool[]."""

    stage: Any
    round: Any
    micro: Any
    valid: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which stage computes what in which tick, for `rounds` rounds of each micro-batch through the stages.

    One round is 1F1B: a stage goes backward as soon as it can, so that it keeps the inputs of at most 2 * stages - 1
    micro-batches, however many there are. Several rounds are the circular schedule.
    """

    stages: int
    rounds: int
    micro_batches: int

    @property
    def lap(self) -> int:
        """Ticks that a micro-batch takes forward: parts of the layers that it meets."""
        return self.stages * self.rounds

    @property
    def turns(self) -> int:
        """Ticks in which the first stage computes forward. With several rounds micro-batches come in groups of as many
        as there are stages, of which the last may have gaps."""
        groups = -(-self.micro_batches // self.stages)
        return self.micro_batches if self.rounds == 1 else groups * self.lap

    @property
    def forward_ticks(self) -> int:
        return self.turns + self.stages - 1

    @property
    def ticks(self) -> int:
        return self.forward_ticks + self.lap - 1

    @property
    def slots(self) -> int:
        """Inputs that a stage keeps for going backward."""
        return 2 * self.lap - 1

    def idle(self) -> float:
        """Share of the time in which a stage has nothing to do."""
        return 1 - self.micro_batches * self.rounds / self.forward_ticks

    def forward(self, tick: Any, stage: Any) -> At:
        round_, micro, valid = self._turn(tick - stage)
        return At(stage, round_, micro, valid)

    def backward(self, tick: Any, stage: Any) -> At:
        round_, micro, valid = self._turn(tick - (self.lap - 1) - (self.stages - 1 - stage))
        return At(stage, self.rounds - 1 - round_, micro, valid)

    def slot(self, tick: Any, at: At) -> Any:
        """Where the input lies that `at` goes backward from: inputs of tick t are in slot t % slots."""
        return (tick - 2 * (self.lap - 1 - at.round * self.stages - at.stage)) % self.slots

    def begins(self, first: At) -> Any:
        """Whether, in this turn of the first stage, a micro-batch is at the beginning."""
        return first.valid & (first.round == 0)

    def ends(self, last: At) -> Any:
        """Whether, in this turn of the last stage, one is at the end."""
        return last.valid & (last.round == self.rounds - 1)

    def when(self) -> np.ndarray:
        """i32[stages, rounds, micro_batches]: ticks of going forward."""
        stage, round_, micro = np.indices((self.stages, self.rounds, self.micro_batches))
        group, place = (micro, 0) if self.rounds == 1 else (micro // self.stages, micro % self.stages)
        each = 1 if self.rounds == 1 else self.lap
        return (group * each + round_ * self.stages + place + stage).astype(np.int32)

    def _turn(self, turn: Any) -> tuple[Any, Any, Any]:
        """(round, micro-batch, whether there is one) of a stage's turn of this number."""
        if self.rounds == 1:
            round_, micro = turn * 0, turn
        else:
            group, within = turn // self.lap, turn % self.lap
            round_, micro = within // self.stages, group * self.stages + within % self.stages
        valid = (turn >= 0) & (micro < self.micro_batches)
        return round_, jnp.clip(micro, 0, self.micro_batches - 1), valid


class Heard(NamedTuple):
    """What a part tells besides its result: trees of arrays, of which further losses are made and of which none are."""

    trained: Any
    counted: Any


class Own(NamedTuple):
    """What stages compute with, [stages, parts, ...]: that of round r is at r modulo their number. fixed: what has no
    gradient."""

    trained: Any
    fixed: Any


class Parts(NamedTuple):
    """What a micro-batch goes through, as pure functions of one of them.

    first  (outer, micro) -> (x, heard): what enters the stages, a tree of arrays [rows, seq, ...]
    stage  (own, x, at) -> (x, heard): a stage, with the part of its parameters that is the round's
    last   (outer, x, micro) -> (loss f32[], heard)

    own is an `Own`, of which a stage is given the part of the round.
    """

    first: Callable[[Any, Any], tuple[Any, Heard]]
    stage: Callable[[Any, Any, At], tuple[Any, Heard]]
    last: Callable[[Any, Any, Any], tuple[Any, Heard]]


class Told(NamedTuple):
    """Of all micro-batches: first and last [micro_batches, ...], stages [stages, rounds, micro_batches, ...]."""

    first: Any
    stages: Any
    last: Any


def outputs(schedule: Schedule, stage: Callable[[Any, Any, At], tuple[Any, Any]], own: Any, x: Any) -> tuple[Any, Any]:
    """The micro-batches x [micro_batches, rows, seq, ...] behind all rounds, and what the stages told: [stages, rounds,
    micro_batches, ...].

    stage, own  as of `Parts`
    """
    stages = jnp.arange(schedule.stages, dtype=jnp.int32)
    each = _every(stage)

    def tick(x_in: Any, t: jax.Array) -> tuple[Any, Any]:
        at = schedule.forward(t, stages)
        entering = _at(x, schedule.forward(t, 0).micro)
        y, told = each(_of_round(own, at.round), _entered(x_in, entering, at, 0), at)
        return _handed_on(y, 1), (_of_stage(y, -1), told)

    start = jax.tree.map(lambda a: _placed(jnp.zeros((schedule.stages, *a.shape[1:]), a.dtype)), x)
    _, (ys, told) = lax.scan(tick, start, jnp.arange(schedule.forward_ticks, dtype=jnp.int32))
    done = schedule.when()
    return jax.tree.map(lambda a: a[done[-1, -1]], ys), _by_stage(told, done)


def told_of(schedule: Schedule, parts: Parts, outer: Any, own: Own) -> Told:
    """What all parts tell (`Heard`), forward alone; arguments as of `gradients`."""
    stages = jnp.arange(schedule.stages, dtype=jnp.int32)

    def tick(x_in: Any, t: jax.Array) -> tuple[Any, Any]:
        at = schedule.forward(t, stages)
        _, y, first, told = _forward(parts, outer, own, x_in, at, schedule.forward(t, 0))
        leaves = schedule.forward(t, schedule.stages - 1)
        last = _either(schedule.ends(leaves), lambda y: parts.last(outer, _of_stage(y, -1), leaves.micro)[1], y)
        return _handed_on(y, 1), (first, told, last)

    _, told = lax.scan(tick, _nothing(schedule, parts, outer), jnp.arange(schedule.forward_ticks, dtype=jnp.int32))
    return _by_micro(schedule, told)


def gradients(
    schedule: Schedule, parts: Parts, outer: Any, own: Own, pulls: Told, stored: tuple[Callable[[Any], Any], ...]
) -> tuple[jax.Array, Told, Any, Any]:
    """(sum of the losses f32[], what was told, gradients by outer and by own.trained in float32), in one pass in which
    stages go forward and backward by turns.

    pulls   gradients of further losses by what is trained of what is told
    stored  place trees like outer and like own.trained where their gradients are summed

    What a stage computes is computed again when it goes backward: it keeps inputs alone, of `schedule.slots` ticks.
    """
    s, stages = schedule, jnp.arange(schedule.stages, dtype=jnp.int32)
    back = _Back(schedule, parts, outer, own, pulls)
    zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)  # noqa: E731

    def tick(carry: Any, t: jax.Array) -> tuple[Any, Any]:
        x_in, g_in, ring, d_outer, d_own = carry
        at, enters, leaves = (s.forward(t, stage) for stage in (stages, 0, s.stages - 1))
        x, y, first, told = _either(t < s.forward_ticks, lambda x: _forward(parts, outer, own, x, at, enters), x_in)
        ring = jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, t % s.slots, 1), ring, x)
        value, last, d_last, dy = _either(s.ends(leaves), lambda y: back.loss(y, leaves.micro), y)

        at = s.backward(t, stages)
        g = _entered(g_in, dy, at, -1, s.rounds - 1)
        dx, d_mine, d_first = _either(t >= s.lap - 1, lambda given: back.stages(given[0], given[1], t), (ring, g))
        d_outer = stored[0](jax.tree.map(lambda a, b, c: a + b + c, d_outer, d_last, d_first))
        d_own = stored[1](_added(d_own, d_mine, at.round))
        return (_handed_on(y, 1), _handed_on(dx, -1), ring, d_outer, d_own), (value, (first, told, last))

    x = _nothing(s, parts, outer)
    ring = jax.tree.map(lambda a: _placed(jnp.zeros((a.shape[0], s.slots, *a.shape[1:]), a.dtype), None), x)
    start = (x, x, ring, stored[0](zeros(outer)), stored[1](zeros(own.trained)))
    carry, (values, told) = lax.scan(tick, start, jnp.arange(s.ticks, dtype=jnp.int32))
    return values.sum(), _by_micro(s, told), carry[3], carry[4]


class _Back(NamedTuple):
    """Going backward; fields are arguments of `gradients`."""

    schedule: Schedule
    parts: Parts
    outer: Any
    own: Own
    pulls: Told

    def loss(self, y: Any, micro: Any) -> tuple[Any, Heard, Any, Any]:
        """(loss, what was told, gradients by outer and by what left the last stage)."""

        def of(outer: Any, y: Any) -> tuple[Any, Heard]:
            loss, heard = self.parts.last(outer, y, micro)
            return (loss, heard.trained), heard

        (value, _), back, heard = jax.vjp(of, self.outer, _of_stage(y, -1), has_aux=True)
        d_outer, dy = back((jnp.ones_like(value), _at(self.pulls.last, micro)))
        return value, heard, d_outer, dy

    def stages(self, ring: Any, g: Any, tick: jax.Array) -> tuple[Any, Any, Any]:
        """Gradients by what the stages read, by their parameters, and by outer."""
        s = self.schedule
        at, entered = (s.backward(tick, stage) for stage in (jnp.arange(s.stages, dtype=jnp.int32), 0))

        def one(own: Own, x: Any, at: At, g: Any, pull: Any) -> tuple[Any, Any]:
            def of(trained: Any, x: Any) -> tuple[Any, Any]:
                y, heard = self.parts.stage(Own(trained, own.fixed), x, at)
                return y, heard.trained

            d_own, dx = jax.vjp(of, own.trained, x)[1]((g, pull))
            return dx, d_own

        saved = jax.tree.map(lambda a: jax.vmap(_index)(a, s.slot(tick, at)), ring)
        pull = jax.tree.map(lambda a: jax.vmap(lambda a, r, m: a[r, m])(a, at.round, at.micro), self.pulls.stages)
        dx, d_own = _every(one)(_of_round(self.own, at.round), saved, at, g, pull)
        d_own = jax.tree.map(lambda a: jnp.where(_wide(at.valid, a), a, 0), d_own)
        return dx, d_own, _either(s.begins(entered), lambda dx: self._entered(dx, entered.micro), dx)

    def _entered(self, dx: Any, micro: Any) -> Any:
        """Gradient by outer of what entered the first stage."""

        def of(outer: Any) -> tuple[Any, Any]:
            x, heard = self.parts.first(outer, micro)
            return x, heard.trained

        return jax.vjp(of, self.outer)[1]((_of_stage(dx, 0), _at(self.pulls.first, micro)))[0]


# Parts of a tick


def _forward(
    parts: Parts, outer: Any, own: Any, x: Any, at: At, enters: At
) -> tuple[Any, Any, Heard, Heard]:  # fmt: skip
    """(What the stages read, what they gave, what was told by the first part and by them); x: what was handed on;
    enters: the first stage's turn."""
    entering, first = _either(enters.round == 0, lambda micro: parts.first(outer, micro), enters.micro)
    x = _entered(x, entering, at, 0)
    y, told = _every(parts.stage)(_of_round(own, at.round), x, at)
    return x, y, first, told


def _either(there: Any, compute: Callable[[Any], Any], given: Any) -> Any:
    """What `compute` makes of `given`, or zeros where there is nothing to do; all devices decide alike."""
    compute = jax.jit(compute, inline=True)  # traced once, for shapes and for the branch
    shapes = jax.eval_shape(compute, given)
    nothing = lambda _: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)  # noqa: E731
    return lax.cond(there, compute, nothing, given)


def _every(stage: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(stage, spmd_axis_name=_axis())


def _axis() -> str | None:
    """The mesh axis that a leading axis of stages is split by."""
    current = active_placement()
    return STAGE if current is not None and current.mesh.shape.get(STAGE, 1) > 1 else None


def _nothing(schedule: Schedule, parts: Parts, outer: Any) -> Any:
    """What stages hand on before the first micro-batch came."""
    shapes, _ = jax.eval_shape(parts.first, outer, jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda a: _placed(jnp.zeros((schedule.stages, *a.shape), a.dtype)), shapes)


def _placed(a: jax.Array, *more: None) -> jax.Array:
    """[stages, ..., rows, seq, ...] with as many further dimensions after the first as there are in `more`."""
    names = (X[0], *more, *X[1:])
    return constrain(a, *names, *(None,) * (a.ndim - len(names)))


def _at(tree: Any, micro: Any) -> Any:
    return jax.tree.map(lambda a: _index(a, micro), tree)


def _index(a: jax.Array, i: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(a, i, 0, False)


def _of_round(own: Any, round_: jax.Array) -> Any:
    """Of parameters [stages, parts, ...] those of each stage's round."""

    def one(a: jax.Array) -> jax.Array:
        return a[:, 0] if a.shape[1] == 1 else jax.vmap(_index)(a, round_ % a.shape[1])

    return jax.tree.map(one, own)


def _added(total: Any, more: Any, round_: jax.Array) -> Any:
    """The sum of gradients, each stage's added at its round."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if a.shape[1] == 1:
            return a + b[:, None]
        return jax.vmap(lambda a, b, r: a.at[r].add(b))(a, b.astype(a.dtype), round_ % a.shape[1])

    return jax.tree.map(one, total, more)


def _wide(flags: jax.Array, a: jax.Array) -> jax.Array:
    return flags.reshape(-1, *(1,) * (a.ndim - 1))


def _entered(x: Any, new: Any, at: At, stage: int, round_: int = 0) -> Any:
    """x [stages, ...], at one stage replaced by `new` where it is in a round."""
    there = (at.stage == stage % at.stage.shape[0]) & (at.round == round_)
    return jax.tree.map(lambda a, b: _placed(jnp.where(_wide(there, a), b[None].astype(a.dtype), a)), x, new)


def _by_stage(told: Any, when: np.ndarray) -> Any:
    """[ticks, stages, ...] -> [stages, rounds, micro_batches, ...]."""
    return jax.tree.map(lambda a: jax.vmap(lambda a, ticks: a[ticks], (1, 0))(a, jnp.asarray(when)), told)


def _by_micro(schedule: Schedule, told: tuple[Any, Any, Any]) -> Told:
    """What was told in each tick, by micro-batch."""
    when = schedule.when()
    first, stages, last = told
    at = lambda tree, ticks: jax.tree.map(lambda a: a[ticks], tree)  # noqa: E731
    return Told(at(first, when[0, 0]), _by_stage(stages, when), at(last, when[-1, -1]))


# Between stages


def _handed_on(x: Any, by: int) -> Any:
    """x [stages, ...] moved from every stage to the next (by = 1) or the one before (-1), in a ring."""
    if _axis() is None:
        return jax.tree.map(lambda a: jnp.roll(a, by, 0), x)

    def local(a: jax.Array) -> jax.Array:
        n = lax.axis_size(STAGE)
        return lax.ppermute(a, STAGE, [(i, (i + by) % n) for i in range(n)])

    return jax.tree.map(sharded(local, [X], X), x)


def _of_stage(x: Any, stage: int) -> Any:
    """What x [stages, ...] is at one stage, the last one being -1, on all of them."""
    if _axis() is None:
        return jax.tree.map(lambda a: a[stage], x)

    def local(a: jax.Array) -> jax.Array:
        here = lax.axis_index(STAGE) == stage % lax.axis_size(STAGE)
        return lax.psum(jnp.where(here, a[0], 0), STAGE)

    return jax.tree.map(sharded(local, [X], X[1:]), x)
