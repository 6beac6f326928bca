"""Schedules of attention over the shards of a row: what is where at which step, forwards and backwards.

Ring attention (Liu et al. 2023, arXiv 2310.01889), in one or two levels (MTraining, arXiv 2510.18830, section 3.3):
keys and values travel. TokenRing (arXiv 2412.20501): queries travel, partial results return to their owners.
What is sent is sent before the computation that it can hide behind. Partial results are merged by their log-sum-exp.
The backward pass uses that of the whole result in each of its parts, so that nothing of them is kept.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from adaptive.parallel.context.layout import Shard, moved
from kernels_pallas.attention import delta_of, kept_by_name

UNROLLED = 8  # steps of a ring that are written out; more of them are a loop
Partial = tuple[jax.Array, jax.Array]  # result, and log-sum-exp f32[batch, heads, queries], -inf of none
Pulled = tuple[jax.Array, jax.Array, jax.Array]  # of the whole result: delta (`delta_of`), log-sum-exp, cotangent
Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of q, k, v


class Part(Protocol):
    """Attention of one shard's queries over one shard's keys; hashable.

    told  what tells which queries see which keys, of whole rows, on every device
    """

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, told: Any, q_shard: Shard, k_shard: Shard
    ) -> Partial: ...

    def backward(self, q: jax.Array, k: jax.Array, v: jax.Array, told: Any, rest: Pulled, q_shard: Shard,
                 k_shard: Shard) -> Gradients: ...  # fmt: skip


class Schedule(Protocol):
    def forward(self, part: Part, q: jax.Array, k: jax.Array, v: jax.Array, told: Any) -> Partial: ...

    def backward(self, part: Part, q: jax.Array, k: jax.Array, v: jax.Array, told: Any, rest: Pulled) -> Gradients: ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(part: Part, schedule: Schedule, q: jax.Array, k: jax.Array, v: jax.Array, told: Any) -> Partial:
    """The result [batch, queries, heads, head_dim] in q's dtype and its log-sum-exp f32[batch, heads, queries], of
    this shard's queries over all keys. Inside `jax.shard_map`, q, k, v of this shard; with gradients."""
    return _forward(part, schedule, q, k, v, told)[0]


def _forward(part, schedule, q, k, v, told):
    out, lse = schedule.forward(part, q, k, v, told)
    out, lse = kept_by_name(out.astype(q.dtype), lse)
    return (out, lse), (q, k, v, told, out, lse)


def _backward(part, schedule, kept, cotangents):
    q, k, v, told, out, lse = kept
    d_out, d_lse = cotangents
    lse = jnp.where(jnp.isfinite(lse), lse, 0)  # of a query that sees nothing: what it would read is masked
    delta = delta_of(out, d_out) - d_lse
    d_q, d_k, d_v = schedule.backward(part, q, k, v, told, (delta, lse, d_out))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Keys and values go around; their gradients follow them home, in float32, one step behind.

    nodes  groups of neighbours: within one, shards go around at every step, between them once in a whole round, so that
           the slow links carry each shard once and have a round's time for it. 1: one ring
    step   1 or -1: the direction
    """

    axis: str
    parts: int
    nodes: int = 1
    step: int = 1

    @property
    def local(self) -> int:
        """Devices of a node."""
        return self.parts // self.nodes

    def within(self, tree: Any) -> Any:
        n = self.local
        return moved(tree, self.axis, ((i, i // n * n + (i + self.step) % n) for i in range(self.parts)))

    def between(self, tree: Any) -> Any:
        by = self.step * self.local
        return moved(tree, self.axis, ((i, (i + by) % self.parts) for i in range(self.parts)))

    def source(self, me: jax.Array, outer: int, inner: Shard) -> jax.Array:
        """Whose keys are here, after so many steps between nodes and within."""
        node, own = lax.div(me, self.local), lax.rem(me, self.local)
        return (node - self.step * outer) % self.nodes * self.local + (own - self.step * inner) % self.local

    def forward(self, part: Part, q: jax.Array, k: jax.Array, v: jax.Array, told: Any) -> Partial:
        me, at_node = lax.axis_index(self.axis), (k, v)
        result = _nothing(q, v)

        for outer in range(self.nodes):

            def visit(inner: Shard, carry: Any, last: bool = False, outer: int = outer) -> Any:
                held, result = _in_turn(carry)
                following = held if last else self.within(held)
                partial = part.forward(q, held[0], held[1], told, me, self.source(me, outer, inner))
                return following, merged(result, partial)

            following = self.between(at_node) if outer < self.nodes - 1 else at_node
            carry = _loop(0, self.local - 1, visit, (at_node, result))
            _, result = visit(self.local - 1, carry, last=True)
            at_node = following
        return result

    def backward(self, part: Part, q: jax.Array, k: jax.Array, v: jax.Array, told: Any, rest: Pulled) -> Gradients:
        me, at_node = lax.axis_index(self.axis), (k, v)
        d_q, none = _zeros(q), (_zeros(k), _zeros(v))
        d_node = none

        for outer in range(self.nodes):

            def visit(inner: Shard, carry: Any, first: bool = False, last: bool = False, outer: int = outer) -> Any:
                held, d_left, d_q = _in_turn(carry)
                following = held if last else self.within(held)
                d_held = d_left if first else self.within(d_left)  # those of `held`, from the device that it came from
                source = self.source(me, outer, inner)
                more_q, *more = part.backward(q, held[0], held[1], told, rest, me, source)
                return following, _added(d_held, more), d_q + more_q

            following = self.between(at_node) if outer < self.nodes - 1 else at_node
            carry = visit(0, (at_node, none, d_q), first=True, last=self.local == 1)
            carry = _loop(1, self.local - 1, visit, carry)
            _, d_left, d_q = visit(self.local - 1, carry, last=True) if self.local > 1 else carry
            d_node = self.between(_added(d_node, self.within(d_left)))
            at_node = following
        return d_q, *d_node


@dataclasses.dataclass(frozen=True)
class TokenRing:
    """Queries go around against the order of the shards; what each device finds for them goes straight to their owner,
    in the other direction. Keys, values and their gradients stay.

    halves  of a causal zig-zag layout: once past the end of the row, a shard's early queries see nothing of what they
            meet, and are sent no further
    """

    axis: str
    parts: int
    halves: bool

    def on(self, tree: Any, step: int) -> Any:
        """Arrays of queries [batch, queries, ...] after step `step` - 1, where they are needed for `step`."""
        all_ = [(i, (i - 1) % self.parts) for i in range(self.parts)]
        return self._in_halves(tree, all_, [(i, i - 1) for i in range(1, self.parts - step + 1)])

    def home(self, tree: Any, step: int) -> Any:
        """What was found at a step, where the queries came from."""
        all_ = [(i, (i + step) % self.parts) for i in range(self.parts)]
        return self._in_halves(tree, all_, [(i, i + step) for i in range(self.parts - step)])

    def _in_halves(self, tree: Any, late: list[tuple[int, int]], early: list[tuple[int, int]]) -> Any:
        if not self.halves:
            return moved(tree, self.axis, late)

        def one(x: jax.Array) -> jax.Array:
            first, last = jnp.split(x, 2, axis=1)
            return jnp.concatenate([moved(first, self.axis, early), moved(last, self.axis, late)], axis=1)

        return jax.tree.map(one, tree)

    def forward(self, part: Part, q: jax.Array, k: jax.Array, v: jax.Array, told: Any) -> Partial:
        me, held = lax.axis_index(self.axis), q
        found = part.forward(q, k, v, told, me, me)
        result = merged(_nothing(q, v), found)
        for step in range(1, self.parts):
            held, found = _in_turn((self.on(held, step), found))
            back = self._returned(found, step - 1, q) if step > 1 else None
            found = part.forward(held, k, v, told, (me + step) % self.parts, me)
            result = result if back is None else merged(result, back)
        return merged(result, self._returned(found, self.parts - 1, q))

    def _returned(self, found: Partial, step: int, q: jax.Array) -> Partial:
        """What other devices found at a step for the queries of this one."""
        out, lse = self.home((found[0].astype(q.dtype), found[1].swapaxes(1, 2)), step)
        if self.halves:  # nothing was sent for the early queries of shards before this one
            late = jnp.arange(q.shape[1]) >= q.shape[1] // 2
            lse = jnp.where((lax.axis_index(self.axis) >= step) | late[:, None], lse, -jnp.inf)
        return out, lse.swapaxes(1, 2)

    def backward(self, part: Part, q: jax.Array, k: jax.Array, v: jax.Array, told: Any, rest: Pulled) -> Gradients:
        delta, lse, d_out = rest
        me, held = lax.axis_index(self.axis), (q, delta.swapaxes(1, 2), lse.swapaxes(1, 2), d_out)
        d_q, *own = map(_wide, part.backward(q, k, v, told, rest, me, me))
        d_kv, found = (own[0], own[1]), d_q
        for step in range(1, self.parts):
            held, d_kv, found = _in_turn((self.on(held, step), d_kv, found))
            back = self.home(found, step - 1) if step > 1 else None
            queries, delta, lse, d_out = held
            given = delta.swapaxes(1, 2), lse.swapaxes(1, 2), d_out
            more_q, *more = part.backward(queries, k, v, told, given, (me + step) % self.parts, me)
            found, d_kv = _wide(more_q), _added(d_kv, more)
            d_q = d_q if back is None else d_q + back
        return d_q + self.home(found, self.parts - 1), *d_kv


def merged(a: Partial, b: Partial) -> Partial:
    """The result over the keys of both, which share none; in the first's dtype."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    base = jnp.where(lse == -jnp.inf, 0, lse)
    share = lambda x: jnp.exp(x - base).swapaxes(1, 2)[..., None]  # noqa: E731
    return out_a * share(lse_a) + out_b * share(lse_b), lse


def _nothing(q: jax.Array, v: jax.Array) -> Partial:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros((*q.shape[:3], v.shape[-1]), wide)
    return out, jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, wide)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(_wide(x))


def _added(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    return a[0] + b[0], a[1] + b[1]


def _in_turn(tree: Any) -> Any:
    """The arrays, once all of them are there: what is computed or sent from now on waits for what was computed before.
    Left to themselves compilers send and compute in an order that hides nothing (seen for TPUs and GPUs)."""
    return lax.optimization_barrier(tree)


def _loop(start: int, end: int, body: Callable[[Shard, Any], Any], carry: Any) -> Any:
    """body(step, carry) for each step, written out if they are few."""
    if end - start > UNROLLED:
        return lax.fori_loop(start, end, body, carry)
    for i in range(start, end):
        carry = body(i, carry)
    return carry
