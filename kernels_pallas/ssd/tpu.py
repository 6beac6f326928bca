"""The state space recurrence on TPUs: one Pallas kernel that keeps the state of a group of heads in fast memory.

The grid visits the blocks of a sequence in order. Each visit does all four parts of the form by blocks for a few heads,
which share the product of c and b; neither the states between blocks nor any matrix of a block is written to memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.ssd.blocks import prepared, whole

BLOCK, HEADS, LANES = 128, 8, 128  # positions and heads of a visit; the width of a register
FACTORS = 4


def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    runs: jax.Array,
    state: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """y and the final state, as `chunked.forward` gives them."""
    (batch, seq, heads, dim), n = x.shape, b.shape[-1]
    size = min(BLOCK, seq)
    runs = whole(runs, size, "edge")
    inputs = prepared(x, dt, a, b, c, runs, size)
    blocks = inputs.x.shape[1] // size
    group = HEADS if heads % HEADS == 0 and HEADS * dim % LANES == 0 else heads

    factors = [factor.reshape(batch, heads, -1) for factor in inputs[3:]]
    per_head = pl.BlockSpec((None, group, size), lambda i, j, k: (i, j, k))
    shared = pl.BlockSpec((None, size, n), lambda i, j, k: (i, k, 0))
    channels = pl.BlockSpec((None, size, group * dim), lambda i, j, k: (i, k, j))
    carried = pl.BlockSpec((None, group, dim, n), lambda i, j, k: (i, j, 0, 0))
    y, final = pl.pallas_call(
        functools.partial(_kernel, dim=dim),
        out_shape=(_shape((batch, blocks * size, heads * dim), x.dtype, x), _shape(state.shape, jnp.float32, x)),
        grid=(batch, heads // group, blocks),
        in_specs=[
            channels,
            shared,
            shared,
            pl.BlockSpec((None, 1, size), lambda i, j, k: (i, 0, k)),
            *[per_head] * FACTORS,
            carried,
        ],
        out_specs=(channels, carried),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ssd",
    )(
        inputs.x.reshape(batch, -1, heads * dim),
        inputs.b,
        inputs.c,
        runs[:, None],
        *factors,
        state.astype(jnp.float32),
    )
    return y[:, :seq].reshape(x.shape), final


def _kernel(
    x_ref, b_ref, c_ref, runs_ref, total_ref, dt_ref, into_ref, out_of_ref, state_ref, y_ref, final_ref, *, dim
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        final_ref[...] = state_ref[...]

    b, c, size = b_ref[...], c_ref[...], b_ref.shape[0]
    total, into, dt = total_ref[...], into_ref[...], dt_ref[...]
    # Columns from rows; the run of a position is a whole number that float32 holds exactly.
    total_column, into_column, out_of_column = total.T, into.T, out_of_ref[...].T
    run = jnp.broadcast_to(runs_ref[...].astype(jnp.float32), (8, size))
    later, earlier = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    sees = (later >= earlier) & (run.T[:, :1] == run[:1])
    scores = _dot(c, b, 1, 1)

    for head in range(total.shape[0]):
        own = slice(head * dim, (head + 1) * dim)
        x, state = x_ref[:, own], final_ref[head]
        difference = total_column[:, head : head + 1] - total[head : head + 1]
        decay = jnp.exp(jnp.where(sees, difference, -jnp.inf)) * dt[head : head + 1]
        y = _dot((scores * decay).astype(x.dtype), x, 1, 0)
        y += into_column[:, head : head + 1] * _dot(c, state.astype(c.dtype), 1, 1)
        y_ref[:, own] = y.astype(y_ref.dtype)
        written = (x.astype(jnp.float32) * out_of_column[:, head : head + 1]).astype(x.dtype)
        final_ref[head] = into[head : head + 1, size - 1 :] * state + _dot(written, b, 0, 0)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _shape(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
