"""The recurrence of the moving average on NVIDIA GPUs: a Pallas kernel on Triton.

Each program goes through the positions of some columns. It reads a group of positions while it computes the group
before, so that many reads are under way at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.grouped_matmul.varying import shape_like

ROWS, COLUMNS = 16, 64  # positions of a group, columns of a program
PARAMS = plt.CompilerParams(num_warps=1, num_stages=1)


def recurrence(
    x: jax.Array,
    gain: jax.Array,
    keep: jax.Array,
    initial: jax.Array,
    *,
    reverse: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """f32[batch, n, width]: out_k = gain_k x_k + keep_k out_{k-1}; with `reverse` k counts from the last position.

    x [batch, n, width], gain and keep f32[batch, n], initial f32[batch, width]
    """
    batch, _, width = x.shape
    columns = min(COLUMNS, pl.next_power_of_2(width))
    return pl.pallas_call(
        functools.partial(_kernel, columns=columns, reverse=reverse),
        out_shape=shape_like(x, dtype=jnp.float32),
        grid=(pl.cdiv(width, columns), batch),
        compiler_params=PARAMS,
        interpret=interpret,
        name="ema_reverse" if reverse else "ema",
    )(gain, keep, x, initial)


def _kernel(gain_ref, keep_ref, x_ref, initial_ref, out_ref, *, columns, reverse):
    _, n, width = x_ref.shape
    row, column = pl.program_id(1), pl.ds(pl.program_id(0) * columns, columns)
    inside = pl.program_id(0) * columns + jnp.arange(columns, dtype=jnp.int32) < width

    def position(i):
        return n - 1 - i if reverse else i

    def read(group):
        """(added, kept) of each position of the group; nothing past the last."""
        added, kept = [], []
        for i in range(ROWS):
            step = group * ROWS + i
            k = position(jnp.minimum(step, n - 1))
            x = plt.load(x_ref.at[row, k, column], mask=inside & (step < n), other=0.0)
            added.append(gain_ref[row, k] * x.astype(jnp.float32))
            kept.append(keep_ref[row, k])
        return tuple(added), tuple(kept)

    def compute(group, carry):
        past, (added, kept) = carry
        ahead = read(group + 1)
        for i in range(ROWS):
            step = group * ROWS + i
            past = added[i] + kept[i] * past
            plt.store(out_ref.at[row, position(jnp.minimum(step, n - 1)), column], past, mask=inside & (step < n))
        return past, ahead

    first = plt.load(initial_ref.at[row, column], mask=inside, other=0.0)
    lax.fori_loop(0, pl.cdiv(n, ROWS), compute, (first, read(0)))
