"""The state space recurrence by matmuls: dense within blocks of positions, a recurrence only between blocks.

Transformers are SSMs (Dao and Gu 2024), section 6. No difference of sums that is exponentiated is positive: later minus
earlier, masked first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.ssd.blocks import Inputs, accumulator, prepared


def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    runs: jax.Array,
    state: jax.Array,
    *,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """y and the final state: `reference.ssd`, block after block.

    runs   i32[batch, seq], ascending from 0: the state restarts where it changes
    state  [batch, heads, dim, n]: belongs to run 0
    block  at most so many positions each; the blocks are equal and as few as that allows
    """
    seq = x.shape[1]
    size = block_of(seq, block)
    inputs = prepared(x, dt, a, b, c, runs, size)
    body = jax.checkpoint(one_block, prevent_cse=False)
    final, y = lax.scan(body, state.astype(accumulator(x)), _by_block(inputs, size))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(x.shape[0], -1, *x.shape[2:])[:, :seq], final


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
    block: int,
) -> tuple[jax.Array, ...]:
    """Cotangents of x, dt, a, b, c and state for those of y and the final state.

    The states before each block are computed first, then block after block from the last, its matrices again.
    """

    def run(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array) -> tuple:
        return forward(x, dt, a, b, c, runs, state, block=block)

    _, pull = jax.vjp(run, x, dt, a, b, c, state)
    return pull((d_y, d_final))


def one_block(state: jax.Array, at: Inputs) -> tuple[jax.Array, jax.Array]:
    """The state [batch, heads, dim, n] after a block and its y [batch, size, heads, dim].

    at  of one block: positions along axis 1 of x, b, c and runs and along axis 2 of the factors [batch, heads, size]
    """
    x, b, c, runs, total, dt, into, out_of = at
    dot = functools.partial(jnp.einsum, preferred_element_type=state.dtype)
    size = x.shape[1]
    sees = jnp.tril(jnp.ones((size, size), bool)) & (runs[:, :, None] == runs[:, None, :])
    decay = jnp.exp(jnp.where(sees[:, None], total[..., :, None] - total[..., None, :], -jnp.inf))
    scores = dot("btn,bsn->bts", c, b)[:, None] * decay * dt[..., None, :]
    y = dot("bhts,bshp->bhtp", scores.astype(x.dtype), x)
    y += into[..., None] * dot("btn,bhpn->bhtp", c, state.astype(c.dtype))
    written = x * out_of.transpose(0, 2, 1)[..., None]
    state = into[..., -1][..., None, None] * state + dot("bshp,bsn->bhpn", written.astype(x.dtype), b)
    return state, y.transpose(0, 2, 1, 3).astype(x.dtype)


def block_of(seq: int, most: int) -> int:
    """The length of the fewest equal blocks that hold `seq` positions, `most` each at most; whole eights if several."""
    count = -(-seq // most)
    return seq if count == 1 else min(most, -(-seq // (count * 8)) * 8)


def _by_block(inputs: Inputs, size: int) -> Inputs:
    """The inputs with the block as their leading axis."""
    positions = lambda v: jnp.moveaxis(v.reshape(v.shape[0], -1, size, *v.shape[2:]), 1, 0)  # noqa: E731
    factors = lambda v: jnp.moveaxis(v, 2, 0)  # noqa: E731
    return Inputs(*map(positions, inputs[:4]), *map(factors, inputs[4:]))
