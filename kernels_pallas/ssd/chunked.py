"""The state space recurrence by matmuls: dense within blocks of positions, a recurrence only between blocks.

Transformers are SSMs (Dao and Gu 2024), section 6. No difference of sums that is exponentiated is positive: later minus
earlier, masked first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.ssd.blocks import Inputs, accumulator, prepared, whole


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
    size = block_of(x.shape[1], block)
    runs = whole(runs, size, "edge")
    blocks = _by_block(prepared(x, dt, a, b, c, runs, size), size)

    def body(state: jax.Array, at: tuple[Inputs, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state_after(state, at[0]), output(state, *at)

    final, y = lax.scan(body, state.astype(accumulator(x)), (blocks, _positions(runs, size)))
    return _joined(y)[:, : x.shape[1]], final


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

    The state before each block is computed first, then block after block from the last, its matrices again: nothing is
    kept but the inputs. With 2 rows of 1024 positions and 8 heads in blocks of 64, both passes take 46 ms of one core
    and 28 MiB of temporaries; differentiated as it stands, keeping its matrices, the forward pass needs 57 ms and 48.
    """
    size = block_of(x.shape[1], block)
    runs = whole(runs, size, "edge")
    inputs, pull_inputs = jax.vjp(lambda x, dt, a, b, c: prepared(x, dt, a, b, c, runs, size), x, dt, a, b, c)
    blocks = _by_block(inputs, size)
    _, states = lax.scan(lambda s, at: (state_after(s, at), s), state.astype(accumulator(x)), blocks)

    def body(d_after: jax.Array, at: tuple[Inputs, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, Inputs]:
        block, runs, before, d_y = at
        run = lambda state, block: (state_after(state, block), output(state, block, runs))  # noqa: E731
        return jax.vjp(run, before, block)[1]((d_after, d_y))

    over = blocks, _positions(runs, size), states, _positions(whole(d_y, size), size)
    d_state, d_blocks = lax.scan(body, d_final, over, reverse=True)
    return *pull_inputs(_sequences(d_blocks)), d_state.astype(state.dtype)


def output(state: jax.Array, at: Inputs, runs: jax.Array) -> jax.Array:
    """y [batch, size, heads, dim] of a block.

    state  [batch, heads, dim, n] before the block
    at     of the block: positions along axis 1 of x, b and c and along axis 2 of the factors [batch, heads, size]
    runs   i32[batch, size]
    """
    x, b, c, total, dt, into, _ = at
    dot = functools.partial(jnp.einsum, preferred_element_type=state.dtype)
    size = x.shape[1]
    sees = jnp.tril(jnp.ones((size, size), bool)) & (runs[:, :, None] == runs[:, None, :])
    decay = jnp.exp(jnp.where(sees[:, None], total[..., :, None] - total[..., None, :], -jnp.inf))
    scores = dot("btn,bsn->bts", c, b)[:, None] * decay * dt[..., None, :]
    y = dot("bhts,bshp->bhtp", scores.astype(x.dtype), x)
    y += into[..., None] * dot("btn,bhpn->bhtp", c, state.astype(c.dtype))
    return y.transpose(0, 2, 1, 3).astype(x.dtype)


def state_after(state: jax.Array, at: Inputs) -> jax.Array:
    """The state [batch, heads, dim, n] after a block, of the state before it; see `output`."""
    written = (at.x * at.out_of.transpose(0, 2, 1)[..., None]).astype(at.x.dtype)
    added = jnp.einsum("bshp,bsn->bhpn", written, at.b, preferred_element_type=state.dtype)
    return at.into[..., -1][..., None, None] * state + added


def block_of(seq: int, most: int) -> int:
    """The length of the fewest equal blocks that hold `seq` positions, `most` each at most; whole eights if several."""
    count = -(-seq // most)
    return seq if count == 1 else min(most, -(-seq // (count * 8)) * 8)


def _by_block(inputs: Inputs, size: int) -> Inputs:
    """The inputs with the block as their leading axis."""
    return Inputs(*(_positions(v, size) for v in inputs[:3]), *(jnp.moveaxis(v, 2, 0) for v in inputs[3:]))


def _sequences(blocks: Inputs) -> Inputs:
    """What `_by_block` was made of."""
    return Inputs(*map(_joined, blocks[:3]), *(jnp.moveaxis(v, 0, 2) for v in blocks[3:]))


def _positions(x: jax.Array, size: int) -> jax.Array:
    """[batch, blocks * size, ...] -> [blocks, batch, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """[blocks, batch, size, ...] -> [batch, blocks * size, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
