"""Expert compute on a mesh: who sends what, around the local code that multiplies.

Slots are pairs padded to a capacity for each expert, [experts, capacity, D]; rows are sorted by expert, [rows, D] with
group sizes. Strategies are those of `ExpertParallel`; with one device on the expert axis all are the local code.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from adaptive.parallel.config import ExpertParallel
from adaptive.parallel.exchange import Communicator, by_expert, communicator, ragged_all_to_all, routes, truncated
from adaptive.parallel.pairs import before, combine, every, permute, segments, strided, take
from adaptive.parallel.rows import added, taken
from adaptive.parallel.rules import TOKENS_TRAVEL, active_placement, even, seq_shards
from adaptive.parallel.shard import Lent, lent, sharded
from adaptive.routing.dispatch import Dispatch, RaggedRows, Slots
from adaptive.routing.dispatch import by_expert as dispatched_by_expert

SEQ = "expert_seq"
Weights = dict[str, jax.Array]
Done = tuple[jax.Array, jax.Array | None]  # a device's outputs [T, D], and the pairs it lost where any can be lost


class FeedForward(Protocol):
    """Local code: each expert on its own rows. Where the hidden units are split over devices it yields a part of a sum.

    Of slots, rows are [experts, capacity, D] and group_sizes None; else rows are [rows, D] sorted by expert and
    group_sizes i32[experts], those past their sum holding nothing.
    """

    def rows(self, weights: Weights, rows: jax.Array, group_sizes: jax.Array | None) -> jax.Array:
        """The outputs, in the shape of rows."""

    def summed(
        self,
        weights: Weights,
        x: jax.Array,
        tokens: jax.Array,
        scale: jax.Array,
        place: jax.Array | None,
        group_sizes: jax.Array | None,
    ) -> jax.Array:
        """f32[T, D]: for each token of x [T, D] the sum of `scale` times the outputs of its rows, x[tokens]; `place` is
        that of `pairs.take`."""


def run(
    x: jax.Array,
    dispatch: Dispatch,
    weights: Weights,
    axes: Mapping[str, tuple[str | None, ...]],
    arrange: Callable[[Dispatch], Slots | RaggedRows],
    feed_forward: FeedForward,
) -> tuple[jax.Array, jax.Array]:
    """x [batch, seq, D] -> (y f32[batch, seq, D], the experts' outputs times their weights, summed; lost f32[]).

    weights  each [experts, ...], gathered for use
    axes     the logical names of each one's dimensions ("experts", "width", "expert_ff"); axes of a stack may lead
    arrange  local code: a device's part of the dispatch as slots or as rows sorted by expert
    lost     pairs that found no room in a receive buffer, of the whole batch; 0 unless `buffer_factor` bounds it

    Sums over a token's experts are float32; what devices send each other, parts of sums too, has the type of x. Raises
    MeshError where the batch or the experts do not divide over the mesh.
    """
    comm, current = communicator(), active_placement()
    settings = TOKENS_TRAVEL if current is None else current.experts
    if settings.strategy == "auto":
        raise ValueError("the strategy of the active placement is auto; settle it first")

    seq = x.shape[1]
    x, dispatch = _filled(x), _filled_dispatch(dispatch)
    whole, position, repeats = x.shape, None, dispatch.experts
    if dispatch.by == "expert" and seq_shards(SEQ) > 1:
        position, dispatch = _spread(dispatch, x.shape[1])
        x = taken(x, position, repeats, SEQ)

    def local(x: jax.Array, dispatch: Dispatch, weights: Weights) -> tuple[jax.Array, jax.Array]:
        tokens, dispatch = x.reshape(-1, x.shape[-1]), dispatch.of_part(x.shape[1])
        own = {name: w[0] for name, w in weights.items()}
        task = Task(tokens, dispatch, own, feed_forward, comm, settings)
        strategy = settings.strategy if comm.size > 1 else "data"
        arranged = arrange(dispatch)
        if isinstance(arranged, Slots):
            y, lost = _SLOTS[strategy](task, arranged), None
        else:
            y, lost = _ROWS[strategy](task, arranged)
        if comm.hidden_parts > 1:
            y = comm.sum_hidden(y.astype(x.dtype))
        total = jnp.zeros((), jnp.float32) if lost is None else comm.sum_batch(lost)
        return y.astype(jnp.float32).reshape(x.shape), total

    names = {name: axes[name][-w.ndim :] for name, w in weights.items()}
    copies = {name: lent(w, names[name]) for name, w in weights.items()}
    where = {name: Lent(own) for name, own in names.items()}
    rows = ("batch", SEQ)
    pairs = ("batch", None, SEQ) if dispatch.by == "expert" else rows
    y, lost = sharded(local, [rows, _names(dispatch, pairs, rows), where], (rows, ()))(x, dispatch, copies)
    if position is not None:
        y = added(jnp.zeros(whole, jnp.float32), position, y, repeats, SEQ)
    return y[:, :seq], lost


def _filled(x: jax.Array) -> jax.Array:
    """x [batch, seq, D] with as many tokens as divide over the devices, the added ones zeros."""
    more = even(x.shape[1], SEQ) - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, more), (0, 0))) if more else x


def _filled_dispatch(dispatch: Dispatch) -> Dispatch:
    """The dispatch of as many tokens as divide over the devices, of which the added ones have no expert."""
    more = even(dispatch.seq, SEQ) - dispatch.seq
    if not more or dispatch.by == "expert":
        return dispatch
    longer = lambda a: jnp.pad(a, ((0, 0), (0, more), (0, 0)))  # noqa: E731
    return dataclasses.replace(
        dispatch,
        seq=dispatch.seq + more,
        index=longer(dispatch.index),
        weights=longer(dispatch.weights),
        valid=longer(dispatch.valid),
        zero_weights=longer(dispatch.zero_weights),
    )


def _names(dispatch: Dispatch, pairs: tuple[str | None, ...], tokens: tuple[str | None, ...]) -> Dispatch:
    """Logical names of a dispatch's arrays: those by pair, and that by token."""
    return dataclasses.replace(dispatch, index=pairs, weights=pairs, valid=pairs, zero_weights=tokens)  # type: ignore[arg-type]


def _spread(dispatch: Dispatch, seq: int) -> tuple[jax.Array, Dispatch]:
    """Of experts that take positions of split sequences: the position i32[batch, slots] of every slot, of which each
    device has as many of each expert, `seq` where there is none, and the dispatch of these slots as tokens."""
    parts, (batch, experts, capacity) = seq_shards(SEQ), dispatch.index.shape
    each = even(capacity, SEQ) // parts
    absent = ((0, 0), (0, 0), (0, each * parts - capacity))
    fill = lambda a, nothing: jnp.pad(a, absent, constant_values=nothing)  # noqa: E731
    index = fill(jnp.where(dispatch.valid, dispatch.index, seq), seq)
    position = index.reshape(batch, experts, parts, each).swapaxes(1, 2).reshape(batch, -1)
    slot = jnp.arange(experts, dtype=jnp.int32)[:, None] * each + jnp.arange(each, dtype=jnp.int32)
    index = jnp.broadcast_to(jnp.tile(slot, (1, parts)), (batch, experts, each * parts))
    weights, valid = fill(dispatch.weights, 0.0), fill(dispatch.valid, False)
    return position, dispatched_by_expert(index, weights, valid, position.shape[1])


class Task(NamedTuple):
    """What one device has to do: its tokens x [T, D], their experts, and its part of the weights."""

    x: jax.Array
    dispatch: Dispatch
    weights: Weights
    feed_forward: FeedForward
    comm: Communicator
    settings: ExpertParallel

    @property
    def whole(self) -> bool:
        """Whether the device holds a slice of every expert, rather than some experts."""
        return self.settings.strategy == "tensor"

    @property
    def held(self) -> int:
        """Experts that the device holds, or a slice of them."""
        return self.dispatch.experts // (1 if self.whole else self.comm.size)


# Every device on its own tokens


def _local_slots(task: Task, slots: Slots) -> jax.Array:
    return task.feed_forward.summed(_all_experts(task), task.x, slots.tokens, slots.weights, None, None)


def _local_rows(task: Task, rows: RaggedRows) -> Done:
    where = rows.tokens, rows.weights, rows.place, rows.group_sizes
    return task.feed_forward.summed(_all_experts(task), task.x, *where), None


def _all_experts(task: Task) -> Weights:
    return {name: task.comm.gather(value) for name, value in task.weights.items()}


# Tokens travel to their experts


def _sent_slots(task: Task, slots: Slots) -> jax.Array:
    comm, parts, held = task.comm, task.settings.overlap, task.held
    capacity = slots.tokens.shape[1]
    each = -(-capacity // parts)
    padded = jnp.pad(slots.tokens, ((0, 0), (0, each * parts - capacity)))

    def send(part: int) -> jax.Array:
        rows = take(task.x, padded[:, part * each : (part + 1) * each], None)
        return comm.all_to_all(rows.reshape(comm.size, held, each, -1))

    def give_back(out: jax.Array) -> jax.Array:
        return comm.all_to_all(out.reshape(held, comm.size, each, -1).swapaxes(0, 1))

    def compute(rows: jax.Array) -> jax.Array:
        return task.feed_forward.rows(task.weights, rows.swapaxes(0, 1).reshape(held, comm.size * each, -1), None)

    outs = [out.reshape(len(padded), each, -1) for out in _pipelined(parts, send, compute, give_back)]
    out = jnp.concatenate(outs, axis=1)[:, :capacity]
    return combine(out, slots.weights, slots.tokens, None, len(task.x))


def _pipelined(
    parts: int,
    send: Callable[[int], Any],
    compute: Callable[[Any], Any],
    give_back: Callable[[Any], Any],
) -> list[Any]:
    """Each part sent, computed and given back; the next is under way while one is computed (Tutel, section 3.3)."""
    outs, arrived = [], send(0)
    for part in range(parts):
        following = send(part + 1) if part + 1 < parts else None
        outs.append(give_back(compute(arrived)))
        arrived = following
    return outs


def _sent_rows(task: Task, rows: RaggedRows) -> Done:
    count, parts = len(rows.tokens), task.settings.overlap
    numbers = strided(count, parts)
    sizes = every(rows.group_sizes, parts)
    trips = [_Trip(task, part, numbers.shape[1]) for part in sizes]

    def send(part: int) -> tuple[_Trip, jax.Array]:
        place = rows.place if parts == 1 else None
        return trips[part], trips[part].send(take(task.x, rows.tokens[numbers[part]], place))

    def compute(arrived: tuple[_Trip, jax.Array]) -> tuple["_Trip", jax.Array]:
        trip, received = arrived
        return trip, trip.compute(task, received)

    def give_back(done: tuple[_Trip, jax.Array]) -> jax.Array:
        trip, out = done
        return trip.give_back(out)

    out = jnp.stack(_pipelined(parts, send, compute, give_back), axis=1).reshape(-1, task.x.shape[-1])[:count]
    losses = [trip.lost for trip in trips if trip.lost is not None]
    lost = jnp.stack(losses).sum() if losses else None
    return combine(out, rows.weights, rows.tokens, rows.place, len(task.x)), lost


class _Trip:
    """Rows sorted by expert to their experts' devices and back (MaxText's ragged all-to-all)."""

    def __init__(self, task: Task, group_sizes: jax.Array, count: int):
        self.comm, self.count = task.comm, count
        size, me = task.comm.size, task.comm.index()
        self.most = min(count, task.held * -(-_most_per_expert(task) // task.settings.overlap))
        self.room = receive_rows(count, size, self.most, task.settings.buffer_factor)
        wanted = task.comm.gather(group_sizes[None]).reshape(size, size, task.held)
        between = wanted.sum(-1, dtype=jnp.int32)
        sent = truncated(between, self.room)
        self.there, self.back = routes(between, sent, me)
        come = _first(wanted[:, me], sent[:, me])
        self.sizes = come.sum(0, dtype=jnp.int32)
        self.index, self.inverse = by_expert(come, self.room)
        self.lost = _lost(task, between[me] - sent[me])

    def send(self, rows: jax.Array) -> jax.Array:
        return ragged_all_to_all(rows, self.there, self.back, self.count, self.room, self.most, self.comm)

    def compute(self, task: Task, received: jax.Array) -> jax.Array:
        out = task.feed_forward.rows(task.weights, permute(received, self.index, self.inverse), self.sizes)
        return permute(out, self.inverse, self.index)

    def give_back(self, out: jax.Array) -> jax.Array:
        return ragged_all_to_all(out, self.back, self.there, self.room, self.count, self.most, self.comm)


def _most_per_expert(task: Task) -> int:
    """Bound on one device's rows for one expert."""
    return min(len(task.x), task.dispatch.capacity(task.dispatch.batch))


def receive_rows(sent: int, devices: int, most: int, factor: float) -> int:
    """Rows of a device's receive buffer: `factor` times those that it sends, never more than can come; -1: those.

    most  bound on the rows that one device has for another
    """
    worst = devices * most
    return worst if factor == -1 else max(1, min(worst, int(sent * factor)))


def _lost(task: Task, pairs: jax.Array) -> jax.Array | None:
    return None if task.settings.buffer_factor == -1 else pairs.sum().astype(jnp.float32)


def _first(wanted: jax.Array, sent: jax.Array) -> jax.Array:
    """Of i32[sources, experts] rows in the order of the experts, those among the first `sent` i32[sources]."""
    return jnp.clip(sent[:, None] - before(wanted, 1), 0, wanted)


# Every device sees all tokens of the axis, and computes the experts that it holds


def _seen_slots(task: Task, slots: Slots) -> jax.Array:
    comm = task.comm
    held = lambda a: _held(task, a).swapaxes(0, 1).reshape(task.held, -1)  # noqa: E731
    tokens = held(comm.gather(slots.tokens[None]) + _first_token(task)[:, None])
    scale = held(comm.gather(slots.weights[None]))
    return _sent_back(task, task.feed_forward.summed(task.weights, comm.gather(task.x), tokens, scale, None, None))


def _seen_rows(task: Task, rows: RaggedRows) -> Done:
    comm, count, me = task.comm, len(rows.tokens), task.comm.index()
    wanted = comm.gather(rows.group_sizes[None])
    # rows that each source has for each set of experts held
    between = wanted.reshape(comm.size, -1, task.held).sum(-1, dtype=jnp.int32)
    most = min(count, task.held * _most_per_expert(task))
    room = receive_rows(count, comm.size, most, -1 if task.whole else task.settings.buffer_factor)
    sent = truncated(between, room)
    to_me = 0 if task.whole else me
    come = _first(_held(task, wanted), sent[:, to_me])
    source_starts = _held(task, before(wanted, 1)) + count * jnp.arange(comm.size, dtype=jnp.int32)[:, None]
    absent = count * comm.size
    index = segments(source_starts.T.reshape(-1), come.T.reshape(-1), room, absent)
    pick = lambda a: a.reshape(-1).at[index].get(mode="fill", fill_value=0)  # noqa: E731
    tokens = pick(comm.gather(rows.tokens[None]) + _first_token(task))
    scale = pick(comm.gather(rows.weights))
    sizes = come.sum(0, dtype=jnp.int32)
    y = task.feed_forward.summed(task.weights, comm.gather(task.x), tokens, scale, None, sizes)
    return _sent_back(task, y), _lost(task, (between - sent)[me])


def _sent_back(task: Task, y: jax.Array) -> jax.Array:
    """Each device's tokens, of parts of a sum f32[all tokens, D] that each device has."""
    return task.comm.scatter_sum(y.astype(task.x.dtype))


def _held(task: Task, a: jax.Array) -> jax.Array:
    """Of [sources, experts, ...] the experts that this device holds."""
    return a if task.whole else jax.lax.dynamic_slice_in_dim(a, task.comm.index() * task.held, task.held, axis=1)


def _first_token(task: Task) -> jax.Array:
    """i32[sources, 1]: where each device's tokens begin among all."""
    return (len(task.x) * jnp.arange(task.comm.size, dtype=jnp.int32))[:, None]


_SLOTS = {"expert": _sent_slots, "gather": _seen_slots, "tensor": _seen_slots, "data": _local_slots}
_ROWS = {"expert": _sent_rows, "gather": _seen_rows, "tensor": _seen_rows, "data": _local_rows}
