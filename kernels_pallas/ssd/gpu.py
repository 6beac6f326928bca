"""The state space recurrence on NVIDIA GPUs: one Pallas kernel on Triton, a program for each head of each sequence.

A program goes through the blocks of its sequence in order with the state in registers, and does all four parts of the
form by blocks; neither the states between blocks nor any matrix of a block is written to memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.ssd.blocks import prepared, whole

BLOCK = 64
LEAST = 16  # the side of a matrix that Triton's dot takes
PARAMS = plt.CompilerParams(num_warps=4, num_stages=2)


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
    size = min(BLOCK, _side(seq))
    x, b, c, state = _widened(x, 1), _widened(b, 1), _widened(c, 1), _widened(state, 2)
    runs = whole(runs, size, "edge")
    inputs = prepared(x, dt, a, b, c, runs, size)
    blocks = inputs.x.shape[1] // size
    factors = [factor.reshape(batch, heads, -1) for factor in inputs[3:]]
    like = jax.typeof(x).manual_axis_type
    y, final = pl.pallas_call(
        functools.partial(_kernel, size=size, blocks=blocks),
        out_shape=(
            jax.ShapeDtypeStruct(inputs.x.shape, x.dtype, manual_axis_type=like),
            jax.ShapeDtypeStruct(state.shape, jnp.float32, manual_axis_type=like),
        ),
        grid=(heads, batch),  # neighbouring programs share b and c
        compiler_params=PARAMS,
        interpret=interpret,
        name="ssd",
    )(inputs.x, inputs.b, inputs.c, runs, *factors, state.astype(jnp.float32))
    return y[:, :seq, :, :dim], final[:, :, :dim, :n]


def _kernel(
    x_ref, b_ref, c_ref, runs_ref, total_ref, dt_ref, into_ref, out_of_ref, state_ref, y_ref, final_ref, *, size, blocks
):
    head, row = pl.program_id(0), pl.program_id(1)
    position = jnp.arange(size, dtype=jnp.int32)
    causal = position[:, None] >= position[None, :]

    def body(k: Any, state: jax.Array) -> jax.Array:
        at = pl.ds(k * size, size)
        x, b, c, run = x_ref[row, at, head, :], b_ref[row, at, :], c_ref[row, at, :], runs_ref[row, at]
        total, dt, into, out_of = (ref[row, head, at] for ref in (total_ref, dt_ref, into_ref, out_of_ref))
        sees = causal & (run[:, None] == run[None, :])
        decay = jnp.exp(jnp.where(sees, total[:, None] - total[None, :], -jnp.inf)) * dt[None, :]
        y = plt.dot((plt.dot(c, b, trans_b=True) * decay).astype(x.dtype), x)
        y += into[:, None] * plt.dot(c, state.astype(c.dtype), trans_b=True)
        y_ref[row, at, head, :] = y.astype(y_ref.dtype)
        written = (x.astype(jnp.float32) * out_of[:, None]).astype(x.dtype)
        return into_ref[row, head, (k + 1) * size - 1] * state + plt.dot(written, b, trans_a=True)

    final_ref[row, head] = lax.fori_loop(0, blocks, body, state_ref[row, head])


def _widened(x: jax.Array, axes: int) -> jax.Array:
    """x with its last axes widened to sides that Triton takes, by zeros."""
    sizes = x.shape[x.ndim - axes :]
    return jnp.pad(x, [(0, 0)] * (x.ndim - axes) + [(0, _side(size) - size) for size in sizes])


def _side(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))
