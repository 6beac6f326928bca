"""The state space recurrence on TPUs: Pallas kernels that keep the states of a sequence's heads in fast memory.

A grid visits the blocks of a sequence in order, or in reverse, and in each block groups of heads, which share b and c.
Positions are along lanes, as XLA has them around a convolution: nothing is laid out anew, and heads are whole rows.
No matrix of a block is written to memory. The forward pass writes no states either. The backward pass first computes
the state before each block again, in x's dtype, then goes through the blocks from the last with the cotangents of the
states in fast memory. The states are 2 * dim * n / BLOCK bytes per position and head in bfloat16, as many as x with
dim 64 and n 128: kept from the forward pass they would save a tenth of what the three kernels move, but double what a
layer keeps of its scan.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.costs import cost
from kernels_pallas.grouped_matmul.varying import shape_like
from kernels_pallas.ssd.blocks import Inputs, prepared, whole

BLOCK, HEADS, LANES = 128, 8, 128  # positions and heads of a visit; the width of a register
FAST_BYTES, VISIT_BYTES = 2**24, 12 * 2**20  # of fast memory: what every TPU has, what is kept for all but the states
Interpret = bool | pltpu.InterpretParams


def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    runs: jax.Array,
    state: jax.Array,
    *,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """y and the final state, as `chunked.forward` gives them."""
    size = min(BLOCK, x.shape[1])
    runs = whole(runs, size, "edge")
    inputs = prepared(x, dt, a, b, c, runs, size)
    visits = _Visits(inputs)
    shapes = visits.shape(visits.channels, x.dtype), visits.shape(visits.carried, jnp.float32)
    given = (
        visits.channels_first(inputs.x),
        inputs.b,
        inputs.c,
        runs[:, None],
        *visits.factors(inputs),
        visits.joined(state),
    )
    y, final = pl.pallas_call(
        functools.partial(_forward_kernel, dim=visits.dim),
        out_shape=shapes,
        grid=visits.grid,
        in_specs=[
            visits.of_channels(),
            *[visits.of_positions()] * 2,
            visits.of_runs(),
            *[visits.of_factors()] * 4,
            visits.of_first(),
        ],
        out_specs=(visits.of_channels(), visits.of_last()),
        scratch_shapes=[visits.states()],
        compiler_params=visits.params,
        cost_estimate=cost(visits.flops(1, 2), visits.exponentials, *given, *shapes),
        interpret=interpret,
        name="ssd",
    )(*given)
    return visits.positions_first(y)[:, : x.shape[1]], final.reshape(state.shape)


def backward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    runs: jax.Array,
    state: jax.Array,
    d_y: jax.Array,
    d_final: jax.Array,
    *,
    interpret: Interpret = False,
) -> tuple[jax.Array, ...]:
    """Cotangents of x, dt, a, b, c and state, as `chunked.backward` gives them."""
    size = min(BLOCK, x.shape[1])
    runs = whole(runs, size, "edge")
    inputs, pull = jax.vjp(lambda x, dt, a, b, c: prepared(x, dt, a, b, c, runs, size), x, dt, a, b, c)
    visits = _Visits(inputs, reverse=True)
    before = _states_before(inputs, state, interpret)
    kinds = [
        visits.shape(visits.channels, x.dtype),
        *[visits.shape(inputs.b.shape, jnp.float32)] * 2,
        *[visits.shape(visits.by_head, jnp.float32)] * 4,
        visits.shape(visits.carried, jnp.float32),
    ]
    given = (
        visits.channels_first(inputs.x),
        visits.channels_first(whole(d_y, size)),
        inputs.b,
        inputs.c,
        runs[:, None],
        *visits.factors(inputs),
        before,
        visits.joined(d_final),
    )
    d_x, d_b, d_c, *d_factors, d_state = pl.pallas_call(
        functools.partial(_backward_kernel, dim=visits.dim),
        out_shape=kinds,
        grid=visits.grid,
        in_specs=[
            *[visits.of_channels()] * 2,
            *[visits.of_positions()] * 2,
            visits.of_runs(),
            *[visits.of_factors()] * 4,
            visits.of_kept(),
            visits.of_first(),
        ],
        out_specs=[
            visits.of_channels(),
            *[visits.of_positions()] * 2,
            *[visits.of_factors()] * 4,
            visits.of_last(),
        ],
        scratch_shapes=[visits.states()],
        compiler_params=visits.params,
        cost_estimate=cost(visits.flops(2, 5), visits.exponentials, *given, *kinds),
        interpret=interpret,
        name="ssd_backward",
    )(*given)
    cotangents = Inputs(
        visits.positions_first(d_x),
        d_b.astype(b.dtype),
        d_c.astype(c.dtype),
        *(d.reshape(inputs.total.shape) for d in d_factors),
    )
    return *pull(cotangents), d_state.reshape(state.shape).astype(state.dtype)


def _states_before(inputs: Inputs, state: jax.Array, interpret: Interpret) -> jax.Array:
    """[batch, blocks, heads * dim, n] in x's dtype: the state before each block."""
    visits = _Visits(inputs)
    kept = visits.shape((visits.grid[0], visits.grid[1], *visits.carried[1:]), inputs.x.dtype)
    _, _, into, out_of = visits.factors(inputs)
    given = visits.channels_first(inputs.x), inputs.b, into, out_of, visits.joined(state)
    return pl.pallas_call(
        functools.partial(_states_kernel, dim=visits.dim),
        out_shape=kept,
        grid=visits.grid,
        in_specs=[visits.of_channels(), visits.of_positions(), *[visits.of_factors()] * 2, visits.of_first()],
        out_specs=visits.of_kept(),
        scratch_shapes=[visits.states()],
        compiler_params=visits.params,
        cost_estimate=cost(visits.flops(0, 1), 0, *given, kept),
        interpret=interpret,
        name="ssd_states",
    )(*given)


class _Visits:
    """The grid: rows, their blocks in order or in reverse, and in each the groups of heads; and what each visit sees.

    What does not change from one visit to the next is not copied again, so that b and c are read once a block, and a
    state that is only of the first visits to the groups, or only of the last, once a row.
    """

    def __init__(self, inputs: Inputs, reverse: bool = False):
        batch, positions, self.heads, self.dim = inputs.x.shape
        self.n, self.size, self.reverse, self.like = inputs.b.shape[-1], inputs.total.shape[-1], reverse, inputs.x
        whole_registers = self.heads % HEADS == 0 and HEADS * self.dim % LANES == 0
        self.group = HEADS if whole_registers else self.heads
        self.blocks, self.groups = positions // self.size, self.heads // self.group
        self.grid = batch, self.blocks, self.groups
        self.channels = batch, self.heads * self.dim, positions
        self.by_head = batch, self.heads, positions
        self.carried = batch, self.heads * self.dim, self.n
        self.exponentials = batch * self.heads * positions * self.size
        self.params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(FAST_BYTES, VISIT_BYTES + 4 * self.heads * self.dim * self.n),
        )

    def of_channels(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.group * self.dim, self.size), lambda i, k, j: (i, j, self._at(k)))

    def of_positions(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.size, self.n), lambda i, k, j: (i, self._at(k), 0))

    def of_runs(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, self.size), lambda i, k, j: (i, 0, self._at(k)))

    def of_factors(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.group, self.size), lambda i, k, j: (i, j, self._at(k)))

    def of_kept(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.group * self.dim, self.n), lambda i, k, j: (i, self._at(k), j, 0))

    def of_first(self) -> pl.BlockSpec:
        last = self.groups - 1
        return pl.BlockSpec((None, self.group * self.dim, self.n), lambda i, k, j: (i, jnp.where(k == 0, j, last), 0))

    def of_last(self) -> pl.BlockSpec:
        last = self.blocks - 1
        return pl.BlockSpec((None, self.group * self.dim, self.n), lambda i, k, j: (i, jnp.where(k == last, j, 0), 0))

    def states(self) -> Any:
        return pltpu.VMEM((self.groups, self.group * self.dim, self.n), jnp.float32)

    def shape(self, shape: Sequence[int], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return shape_like(self.like, shape, dtype)

    def channels_first(self, x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 3, 1).reshape(self.channels)

    def positions_first(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], self.heads, self.dim, -1).transpose(0, 3, 1, 2)

    def factors(self, inputs: Inputs) -> list[jax.Array]:
        return [factor.reshape(self.by_head) for factor in inputs[3:]]

    def joined(self, state: jax.Array) -> jax.Array:
        return state.reshape(self.carried).astype(jnp.float32)

    def flops(self, within: int, through: int) -> int:
        """Of so many products with matrices of a block and so many with states, for each head."""
        each = 2 * math.prod(self.channels)
        return each * (within * self.size + through * self.n)

    def _at(self, turn: int) -> int:
        return self.blocks - 1 - turn if self.reverse else turn


def _forward_kernel(
    x_ref,
    b_ref,
    c_ref,
    runs_ref,
    total_ref,
    dt_ref,
    into_ref,
    out_of_ref,
    first_ref,
    y_ref,
    last_ref,
    state_ref,
    *,
    dim,
):
    group = pl.program_id(2)
    _begin(state_ref, first_ref)
    x, b, c, state = x_ref[...], b_ref[...], c_ref[...], state_ref[group]
    total, into, dt = total_ref[...], into_ref[...], dt_ref[...]
    total_column, dt_column = total.T, dt.T  # columns from rows
    sees, scores = _sees(runs_ref, b.shape[0]), _dot(b, c, 1, 1)
    y = _spread(into, dim) * _dot(state.astype(c.dtype), c, 1, 1)
    for head in range(total.shape[0]):
        own, row = slice(head * dim, (head + 1) * dim), slice(head, head + 1)
        decay = jnp.exp(jnp.where(sees, total[row] - total_column[:, row], -jnp.inf)) * dt_column[:, row]
        y_ref[own] = (y[own] + _dot(x[own], (scores * decay).astype(x.dtype), 1, 0)).astype(y_ref.dtype)
    _step(state_ref, _scaled(x, out_of_ref[...], dim), b, into, dim)
    last_ref[...] = state_ref[group]


def _states_kernel(x_ref, b_ref, into_ref, out_of_ref, first_ref, kept_ref, state_ref, *, dim):
    _begin(state_ref, first_ref)
    kept_ref[...] = state_ref[pl.program_id(2)].astype(kept_ref.dtype)
    _step(state_ref, _scaled(x_ref[...], out_of_ref[...], dim), b_ref[...], into_ref[...], dim)


def _backward_kernel(
    x_ref, dy_ref, b_ref, c_ref, runs_ref, total_ref, dt_ref, into_ref, out_of_ref, before_ref, first_ref,
    dx_ref, db_ref, dc_ref, d_total_ref, d_dt_ref, d_into_ref, d_out_of_ref, last_ref, state_ref, *, dim,
):  # fmt: skip
    group = pl.program_id(2)
    _begin(state_ref, first_ref)

    @pl.when(group == 0)
    def _():
        db_ref[...] = jnp.zeros_like(db_ref)
        dc_ref[...] = jnp.zeros_like(dc_ref)

    x, dy, b, c, before = x_ref[...], dy_ref[...], b_ref[...], c_ref[...], before_ref[...]
    d_after = state_ref[group]
    d_after_low = d_after.astype(x.dtype)
    into, out_of = into_ref[...], out_of_ref[...]
    # What passes through the state before the block and the one after it, for all heads of the group at once.
    reads, writes = _scaled(dy, into, dim), _scaled(x, out_of, dim)
    dc_ref[...] += _dot(reads, before, 0, 0)
    db_ref[...] += _dot(writes, d_after_low, 0, 0)
    d_written = _dot(d_after_low, b, 1, 1)
    d_out_of_ref[...] = _by_head(x * d_written, dim)
    d_into = _by_head(dy * _dot(before, c, 1, 1), dim)
    last = lax.broadcasted_iota(jnp.int32, d_into.shape, 1) == d_into.shape[1] - 1
    d_into_ref[...] = d_into + jnp.where(last, _decayed(d_after, before, dim), 0)
    _step(state_ref, reads, c, into, dim)
    last_ref[...] = state_ref[group]
    d_x = _spread(out_of, dim) * d_written
    _within(x, dy, b, c, d_x, runs_ref, total_ref, dt_ref, dx_ref, db_ref, dc_ref, d_total_ref, d_dt_ref, dim)


def _within(x, dy, b, c, d_x, runs_ref, total_ref, dt_ref, dx_ref, db_ref, dc_ref, d_total_ref, d_dt_ref, dim):
    """What passes within the block; d_x is what does not."""
    total, dt = total_ref[...], dt_ref[...]
    total_column, dt_column = total.T, dt.T
    sees, scores = _sees(runs_ref, b.shape[0]), _dot(b, c, 1, 1)
    d_scores, d_dt = jnp.zeros_like(scores), []
    for head in range(total.shape[0]):
        own, row = slice(head * dim, (head + 1) * dim), slice(head, head + 1)
        decay = jnp.exp(jnp.where(sees, total[row] - total_column[:, row], -jnp.inf))
        weight = dt_column[:, row]
        through = _dot(dy[own], (scores * (decay * weight)).astype(x.dtype), 1, 1)
        dx_ref[own] = (d_x[own] + through).astype(dx_ref.dtype)
        d_decayed = _dot(x[own], dy[own], 0, 0) * decay
        d_scores += d_decayed * weight
        d_weighted = d_decayed * scores
        d_dt.append(d_weighted.sum(axis=1, keepdims=True))
        d_total_ref[row] = (d_weighted * weight).sum(axis=0, keepdims=True)
    d_dt_ref[...] = jnp.concatenate(d_dt, axis=1).T
    d_total_ref[...] -= dt * d_dt_ref[...]
    d_scores = d_scores.astype(b.dtype)
    db_ref[...] += _dot(d_scores, c, 1, 0)
    dc_ref[...] += _dot(d_scores, b, 0, 0)


def _begin(state_ref, first_ref):
    turn, group = pl.program_id(1), pl.program_id(2)

    @pl.when(turn == 0)
    def _():
        state_ref[group] = first_ref[...]


def _step(state_ref, written, b, into, dim):
    """The state of the group after the block; what is written is [group * dim, size], scaled already."""
    group, size = pl.program_id(2), into.shape[1]
    added = _dot(written, b, 1, 0)
    for head in range(into.shape[0]):
        own = slice(head * dim, (head + 1) * dim)
        state_ref[group, own] = into[head : head + 1, size - 1 :] * state_ref[group, own] + added[own]


def _sees(runs_ref, size):
    """bool[size, size]: whether the position along the second axis reads what that along the first wrote."""
    # The run of a position is a whole number that float32 holds exactly.
    run = jnp.broadcast_to(runs_ref[...].astype(jnp.float32), (8, size))
    first, second = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return (second >= first) & (run.T[:, :1] == run[:1])


def _scaled(x, factors, dim):
    return (x.astype(jnp.float32) * _spread(factors, dim)).astype(x.dtype)


def _spread(factors, dim):
    """[heads, size] -> [heads * dim, size]: each for all channels of its head."""
    size = factors.shape[1]
    return jnp.concatenate([jnp.broadcast_to(row, (dim, size)) for row in jnp.split(factors, factors.shape[0])], axis=0)


def _by_head(x, dim):
    """f32[heads * dim, size] -> f32[heads, size]: sums over the channels of each head."""
    heads = [x[first : first + dim].sum(axis=0, keepdims=True) for first in range(0, x.shape[0], dim)]
    return jnp.concatenate(heads, axis=0)


def _decayed(d_after, before, dim):
    """f32[heads, 1]: the cotangent of the decay over the whole block."""
    return _by_head((d_after * before).sum(axis=1, keepdims=True), dim)


def _dot(a, b, a_axis, b_axis):
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
