"""The recurrence of the moving average on TPUs: blocks of positions pass through fast memory, in order."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.varying import shape_like

ROWS, COLUMNS = 256, 1024  # of a block


def recurrence(
    x: jax.Array,
    gain: jax.Array,
    keep: jax.Array,
    initial: jax.Array,
    *,
    reverse: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """f32[batch, n, width]: out_k = gain_k x_k + keep_k out_{k-1}; with `reverse` k counts from the last position.

    x [batch, n, width], gain and keep f32[batch, n], initial f32[batch, width]
    """
    batch, n, width = x.shape
    rows, columns = min(ROWS, n), min(COLUMNS, width)
    blocks = pl.cdiv(n, rows)
    at = lambda i: blocks - 1 - i if reverse else i  # noqa: E731
    scalar = pl.BlockSpec((None, rows, 1), lambda b, j, i: (b, at(i), 0))
    tile = pl.BlockSpec((None, rows, columns), lambda b, j, i: (b, at(i), j))
    return pl.pallas_call(
        functools.partial(_kernel, n=n, reverse=reverse),
        out_shape=shape_like(x, dtype=jnp.float32),
        grid=(batch, pl.cdiv(width, columns), blocks),
        in_specs=[scalar, scalar, tile, pl.BlockSpec((None, 1, columns), lambda b, j, i: (b, 0, j))],
        out_specs=tile,
        scratch_shapes=[pltpu.VMEM((1, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ema_reverse" if reverse else "ema",
    )(gain[..., None], keep[..., None], x, initial[:, None])


def _kernel(gain_ref, keep_ref, x_ref, initial_ref, out_ref, past_ref, *, n, reverse):
    turn, rows = pl.program_id(2), out_ref.shape[0]

    @pl.when(turn == 0)
    def _():
        past_ref[...] = initial_ref[...]

    out_ref[...] = gain_ref[...] * x_ref[...].astype(jnp.float32)
    block = pl.num_programs(2) - 1 - turn if reverse else turn
    count = jnp.minimum(rows, n - block * rows)  # what is past the last position must not reach the sum

    def step(i, past):
        row = pl.ds(count - 1 - i if reverse else i, 1)
        past = out_ref[row, :] + keep_ref[row, :] * past
        out_ref[row, :] = past
        return past

    past_ref[...] = lax.fori_loop(0, count, step, past_ref[...])
