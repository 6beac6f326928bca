"""The state space recurrence on NVIDIA GPUs: Pallas kernels on Triton. No matrix of a block is written to memory.

Forward, a program goes through blocks of one head of one sequence in order, the state in registers. Where heads and
sequences are too few to fill a GPU, sequences are cut into parts: first the state that each part adds is computed, then
all parts at once, each beginning with what those before it add.

Backward, two such passes write states to memory in x's dtype, one the states before every second block, the other, from
the last block, the cotangents of those after. With them all blocks are independent: a program computes the gradients of
one block for a group of heads one after another, so that it sums those of b and c.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.costs import cost
from kernels_pallas.grouped_matmul.varying import shape_like
from kernels_pallas.sizes import sizes
from kernels_pallas.ssd.blocks import Inputs, prepared, whole

BLOCK = 64
KEPT = 2  # blocks from one kept state to the next; 8 x 8192 positions of 32 heads take 1.1 GiB with 1, 0.35 with 2
LEAST = 16  # the side of a matrix that Triton's dot takes
LARGEST, WIDEST = 128 * 128, 256  # numbers of a state, and its longer side: more do not fit the memory of a processor
PROGRAMS = 256  # about as many as the 132 processors of an H100 or H200 run at once
PARAMS = plt.CompilerParams(num_warps=4, num_stages=2)
BACKWARD_PARAMS = plt.CompilerParams(num_warps=8, num_stages=1)


class Plan(NamedTuple):
    """How positions are cut: `parts` parts of `chunks` chunks, each of `kept` blocks of `size` positions."""

    size: int
    kept: int
    chunks: int
    parts: int

    @property
    def blocks(self) -> int:
        return self.kept * self.chunks * self.parts

    @property
    def per_part(self) -> int:
        return self.kept * self.chunks


def plan(seq: int, batch: int, heads: int) -> Plan:
    """As many parts as there are programs to spare, of whole chunks."""
    most, every, programs = sizes("ssd/gpu", (BLOCK, KEPT, PROGRAMS))
    size = min(most, _side(seq))
    blocks = pl.cdiv(seq, size)
    kept = min(every, blocks)
    chunks = pl.cdiv(blocks, kept)
    per_part = pl.cdiv(chunks, max(1, programs // (batch * heads)))
    return Plan(size, kept, per_part, pl.cdiv(chunks, per_part))


def takes(dim: int, n: int) -> bool:
    """Whether the kernels take states of [dim, n]."""
    return _side(dim) * _side(n) <= LARGEST and max(dim, n) <= WIDEST


def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    runs: jax.Array,
    state: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y and the final state, as `chunked.forward` gives them."""
    (batch, seq, heads, dim), n = x.shape, b.shape[-1]
    cut = plan(seq, batch, heads)
    inputs, runs = _padded(cut, x, dt, a, b, c, runs)
    state = _widened(state, 2).astype(jnp.float32)
    out_of = _factors(inputs)[3]
    earlier = _earlier(cut, inputs.x, out_of, inputs.b, inputs.into[..., -1], interpret=interpret)
    shapes = shape_like(x, inputs.x.shape), shape_like(x, state.shape, jnp.float32)
    given = (inputs.x, inputs.b, inputs.c, runs, *_factors(inputs), state, *earlier)
    positions = batch * heads * cut.blocks * cut.size
    y, final = pl.pallas_call(
        functools.partial(_forward_kernel, cut=cut),
        out_shape=shapes,
        grid=(heads, cut.parts, batch),  # neighbouring programs share b and c
        compiler_params=PARAMS,
        cost_estimate=cost(2 * positions * (cut.size * (dim + n) + 2 * dim * n), positions * cut.size, *given, *shapes),
        interpret=interpret,
        name="ssd",
    )(*given)
    return y[:, :seq, :, :dim], final[:, :, :dim, :n]


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
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Cotangents of x, dt, a, b, c and state, as `chunked.backward` gives them."""
    (batch, seq, heads, dim), n = x.shape, b.shape[-1]
    cut = plan(seq, batch, heads)
    padded = lambda x, dt, a, b, c: _padded(cut, x, dt, a, b, c, runs)  # noqa: E731
    inputs, pull, runs = jax.vjp(padded, x, dt, a, b, c, has_aux=True)
    d_y = whole(_widened(d_y, 1), cut.size * cut.blocks)
    _, _, into, out_of = _factors(inputs)
    decays = inputs.into[..., -1]
    states = functools.partial(_states, cut, interpret=interpret)
    before, _ = states(inputs.x, out_of, inputs.b, decays, _widened(state, 2))
    d_after, d_state = states(d_y, into, inputs.c, decays, _widened(d_final, 2), reverse=True)
    cotangents = _within_blocks(cut, inputs, runs, d_y, before, d_after, interpret)
    return *pull(cotangents), d_state[:, :, :dim, :n].astype(state.dtype)


def _padded(
    cut: Plan, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, runs: jax.Array
) -> tuple[Inputs, jax.Array]:
    """The inputs and runs with whole parts of positions, and sides that Triton takes."""
    positions = cut.size * cut.blocks
    x, b, c = (_widened(v, 1) for v in (x, b, c))
    x, dt, b, c = (whole(v, positions) for v in (x, dt, b, c))
    runs = whole(runs, positions, "edge")
    return prepared(x, dt, a, b, c, runs, cut.size), runs


def _factors(inputs: Inputs) -> list[jax.Array]:
    return [factor.reshape(*factor.shape[:2], -1) for factor in inputs[3:]]


def _states(
    cut: Plan,
    x: jax.Array,
    weight: jax.Array,
    b: jax.Array,
    decays: jax.Array,
    state: jax.Array,
    *,
    reverse: bool = False,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """In x's dtype the state before each chunk, or with `reverse` after it; and the state after the last.

    A block adds the outer products of `weight` x and b to the state and makes what it was `decays` times as large. With
    `reverse` the blocks are gone through from the last.

    x        [batch, positions, heads, dim]
    weight   f32[batch, heads, positions]
    b        [batch, positions, n]
    decays   f32[batch, heads, blocks]
    state    [batch, heads, dim, n] before the first block
    returns  [batch, heads, chunks, dim, n] and f32[batch, heads, dim, n]
    """
    earlier = _earlier(cut, x, weight, b, decays, reverse=reverse, interpret=interpret)
    batch, _, heads, dim = x.shape
    given = x, weight, b, decays, state.astype(jnp.float32), *earlier
    kept = batch, heads, cut.chunks * cut.parts, dim, b.shape[-1]
    shapes = shape_like(x, kept), shape_like(x, state.shape, jnp.float32)
    return pl.pallas_call(
        functools.partial(_states_kernel, cut=cut, reverse=reverse),
        out_shape=shapes,
        grid=(heads, cut.parts, batch),
        compiler_params=PARAMS,
        cost_estimate=cost(2 * x.size * b.shape[-1], 0, *given, *shapes),
        interpret=interpret,
        name="ssd_states_reverse" if reverse else "ssd_states",
    )(*given)


def _earlier(
    cut: Plan,
    x: jax.Array,
    weight: jax.Array,
    b: jax.Array,
    decays: jax.Array,
    *,
    reverse: bool = False,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """What each part adds to the state, f32[batch, heads, parts, dim, n], and its decay, f32[batch, heads, parts]; in
    the order in which they are gone through, and nothing of a single part. Arguments are those of `_states`."""
    if cut.parts == 1:
        return ()
    batch, _, heads, dim = x.shape
    shape = shape_like(x, (batch, heads, cut.parts, dim, b.shape[-1]), jnp.float32)
    given = x, weight, b, decays
    added = pl.pallas_call(
        functools.partial(_parts_kernel, cut=cut, reverse=reverse),
        out_shape=shape,
        grid=(heads, cut.parts, batch),
        compiler_params=PARAMS,
        cost_estimate=cost(2 * x.size * b.shape[-1], 0, *given, shape),
        interpret=interpret,
        name="ssd_parts",
    )(*given)
    of_parts = decays.reshape(batch, heads, cut.parts, -1).prod(axis=-1)
    return added, jnp.flip(of_parts, axis=-1) if reverse else of_parts


def _within_blocks(
    cut: Plan,
    inputs: Inputs,
    runs: jax.Array,
    d_y: jax.Array,
    before: jax.Array,
    d_after: jax.Array,
    interpret: bool,
) -> Inputs:
    """The cotangents of the inputs."""
    (batch, positions, heads, dim), n = inputs.x.shape, inputs.b.shape[-1]
    groups = _groups(heads, batch * cut.blocks)
    by_head = batch, heads, positions
    shapes = [
        shape_like(inputs.x),
        *[shape_like(inputs.x, (groups, *inputs.b.shape), jnp.float32)] * 2,
        *[shape_like(inputs.x, by_head, jnp.float32)] * 4,
    ]
    given = inputs.x, d_y, inputs.b, inputs.c, runs, *_factors(inputs), before, d_after
    each = batch * heads * positions
    d_x, d_b, d_c, *d_factors = pl.pallas_call(
        functools.partial(_backward_kernel, cut=cut, heads=heads // groups),
        out_shape=shapes,
        grid=(groups, cut.blocks, batch),
        compiler_params=BACKWARD_PARAMS,
        cost_estimate=cost(
            2 * each * (2 * cut.size * dim + (4 + cut.kept - 1) * dim * n), each * cut.size, *given, *shapes
        ),
        interpret=interpret,
        name="ssd_backward",
    )(*given)
    return Inputs(
        d_x,
        d_b.sum(axis=0).astype(inputs.b.dtype),
        d_c.sum(axis=0).astype(inputs.c.dtype),
        *(d.reshape(inputs.total.shape) for d in d_factors),
    )


def _groups(heads: int, blocks: int) -> int:
    """Into how many groups heads are cut: as few as give each processor a program, each of as many heads."""
    return next(g for g in range(1, heads + 1) if heads % g == 0 and (blocks * g >= PROGRAMS or g == heads))


def _forward_kernel(
    x_ref, b_ref, c_ref, runs_ref, total_ref, dt_ref, into_ref, out_of_ref, state_ref, *rest, cut
):  # fmt: skip
    *earlier, y_ref, final_ref = rest
    head, part, row = (pl.program_id(axis) for axis in range(3))
    position = jnp.arange(cut.size, dtype=jnp.int32)
    causal = position[:, None] >= position[None, :]

    def body(k: Any, state: jax.Array) -> jax.Array:
        k += part * cut.per_part
        at = pl.ds(k * cut.size, cut.size)
        x, b, c, run = x_ref[row, at, head, :], b_ref[row, at, :], c_ref[row, at, :], runs_ref[row, at]
        total, dt, into, out_of = (ref[row, head, at] for ref in (total_ref, dt_ref, into_ref, out_of_ref))
        sees = causal & (run[:, None] == run[None, :])
        decay = jnp.exp(jnp.where(sees, total[:, None] - total[None, :], -jnp.inf)) * dt[None, :]
        y = plt.dot((plt.dot(c, b, trans_b=True) * decay).astype(x.dtype), x)
        y += into[:, None] * plt.dot(c, state.astype(c.dtype), trans_b=True)
        y_ref[row, at, head, :] = y.astype(y_ref.dtype)
        return into_ref[row, head, (k + 1) * cut.size - 1] * state + _added(x, out_of, b)

    state = _beginning(state_ref[row, head], earlier, row, head, part)
    _store_last(final_ref, row, head, lax.fori_loop(0, cut.per_part, body, state), part, cut)


def _states_kernel(x_ref, weight_ref, b_ref, decays_ref, state_ref, *rest, cut, reverse):
    *earlier, kept_ref, final_ref = rest
    head, turn, row = (pl.program_id(axis) for axis in range(3))

    def body(i: Any, state: jax.Array) -> jax.Array:
        chunk = _in_order(turn * cut.chunks + i, cut.chunks * cut.parts, reverse)
        kept_ref[row, head, chunk] = state.astype(kept_ref.dtype)
        for j in range(cut.kept):
            block = chunk * cut.kept + (cut.kept - 1 - j if reverse else j)
            state = _after(state, x_ref, weight_ref, b_ref, decays_ref, row, head, block, cut.size)
        return state

    state = _beginning(state_ref[row, head], earlier, row, head, turn)
    _store_last(final_ref, row, head, lax.fori_loop(0, cut.chunks, body, state), turn, cut)


def _parts_kernel(x_ref, weight_ref, b_ref, decays_ref, added_ref, *, cut, reverse):
    head, turn, row = (pl.program_id(axis) for axis in range(3))

    def body(i: Any, state: jax.Array) -> jax.Array:
        block = _in_order(turn * cut.per_part + i, cut.blocks, reverse)
        return _after(state, x_ref, weight_ref, b_ref, decays_ref, row, head, block, cut.size)

    nothing = jnp.zeros(added_ref.shape[3:], jnp.float32)
    added_ref[row, head, turn] = lax.fori_loop(0, cut.per_part, body, nothing)


def _backward_kernel(
    x_ref, dy_ref, b_ref, c_ref, runs_ref, total_ref, dt_ref, into_ref, out_of_ref, before_ref, after_ref,
    dx_ref, db_ref, dc_ref, d_total_ref, d_dt_ref, d_into_ref, d_out_of_ref, *, cut, heads,
):  # fmt: skip
    group, block, row = (pl.program_id(axis) for axis in range(3))
    chunk, place = block // cut.kept, block % cut.kept
    at = pl.ds(block * cut.size, cut.size)
    b, c, run = b_ref[row, at, :], c_ref[row, at, :], runs_ref[row, at]
    position = jnp.arange(cut.size, dtype=jnp.int32)
    # Matrices are [positions written at, positions that read].
    sees = (position[:, None] <= position[None, :]) & (run[:, None] == run[None, :])
    last = position == cut.size - 1

    def states(head: Any) -> tuple[jax.Array, jax.Array]:
        """The state before the block, and the cotangent of the one after it."""
        decay = lambda block: into_ref.at[row, head, (block + 1) * cut.size - 1]  # noqa: E731

        def forth(i: Any, state: jax.Array) -> jax.Array:
            at_i = pl.ds((chunk * cut.kept + i) * cut.size, cut.size)
            added = _added(x_ref[row, at_i, head, :], out_of_ref[row, head, at_i], b_ref[row, at_i, :])
            return decay(chunk * cut.kept + i)[...] * state + added

        def back(i: Any, state: jax.Array) -> jax.Array:
            block = (chunk + 1) * cut.kept - 1 - i
            at_i = pl.ds(block * cut.size, cut.size)
            added = _added(dy_ref[row, at_i, head, :], into_ref[row, head, at_i], c_ref[row, at_i, :])
            return decay(block)[...] * state + added

        before = lax.fori_loop(0, place, forth, before_ref[row, head, chunk].astype(jnp.float32))
        after = lax.fori_loop(0, cut.kept - 1 - place, back, after_ref[row, head, chunk].astype(jnp.float32))
        return before.astype(before_ref.dtype), after.astype(after_ref.dtype)

    def body(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_scores, d_b, d_c = sums
        head = group * heads + i
        before, after = states(head)
        x, dy = x_ref[row, at, head, :], dy_ref[row, at, head, :]
        total, dt, into, out_of = (ref[row, head, at] for ref in (total_ref, dt_ref, into_ref, out_of_ref))
        decayed = (before.astype(jnp.float32) * after).sum()
        d_written = plt.dot(b, after, trans_b=True)
        d_out_of_ref[row, head, at] = (x * d_written).sum(axis=1)
        d_into = (dy * plt.dot(c, before, trans_b=True)).sum(axis=1)
        d_into_ref[row, head, at] = d_into + jnp.where(last, decayed, 0)
        d_b += plt.dot(_scaled(x, out_of), after)
        d_c += plt.dot(_scaled(dy, into), before)

        decay = jnp.exp(jnp.where(sees, total[None, :] - total[:, None], -jnp.inf))
        scores = plt.dot(b, c, trans_b=True)
        weights = (scores * decay * dt[:, None]).astype(x.dtype)
        dx = plt.dot(weights, dy) + out_of[:, None] * d_written
        dx_ref[row, at, head, :] = dx.astype(dx_ref.dtype)
        d_decayed = plt.dot(x, dy, trans_b=True) * decay
        d_weighted = d_decayed * scores
        d_dt = d_weighted.sum(axis=1)
        d_dt_ref[row, head, at] = d_dt
        d_total_ref[row, head, at] = (d_weighted * dt[:, None]).sum(axis=0) - dt * d_dt
        return d_scores + d_decayed * dt[:, None], d_b, d_c

    nothing = jnp.zeros((cut.size, cut.size), jnp.float32), *[jnp.zeros(b.shape, jnp.float32)] * 2
    d_scores, d_b, d_c = lax.fori_loop(0, heads, body, nothing)
    d_scores = d_scores.astype(b.dtype)
    db_ref[group, row, at, :] = d_b + plt.dot(d_scores, c)
    dc_ref[group, row, at, :] = d_c + plt.dot(d_scores, b, trans_a=True)


def _beginning(state: jax.Array, earlier: Any, row: Any, head: Any, turn: Any) -> jax.Array:
    """The state that the part begins with."""
    if not earlier:
        return state
    added_ref, decays_ref = earlier
    step = lambda i, state: decays_ref[row, head, i] * state + added_ref[row, head, i]  # noqa: E731
    return lax.fori_loop(0, turn, step, state)


def _after(state, x_ref, weight_ref, b_ref, decays_ref, row, head, block, size):
    at = pl.ds(block * size, size)
    added = _added(x_ref[row, at, head, :], weight_ref[row, head, at], b_ref[row, at, :])
    return decays_ref[row, head, block] * state + added


def _added(x: jax.Array, weight: jax.Array, b: jax.Array) -> jax.Array:
    return plt.dot(_scaled(x, weight), b, trans_a=True)


def _scaled(x: jax.Array, weight: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * weight[:, None]).astype(x.dtype)


def _store_last(final_ref, row, head, state, turn, cut):
    @pl.when(turn == cut.parts - 1)
    def _():
        final_ref[row, head] = state


def _in_order(turn: Any, count: int, reverse: bool) -> Any:
    return count - 1 - turn if reverse else turn


def _widened(x: jax.Array, axes: int) -> jax.Array:
    """x with its last axes widened to sides that Triton takes, by zeros."""
    sizes = x.shape[x.ndim - axes :]
    return jnp.pad(x, [(0, 0)] * (x.ndim - axes) + [(0, _side(size) - size) for size in sizes])


def _side(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))
