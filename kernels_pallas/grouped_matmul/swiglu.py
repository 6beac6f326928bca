"""The feed-forward of every group in one operation: its hidden layer never exists for all rows at once."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import blocks

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
Arrays = tuple[jax.Array, ...]


def hidden(pre: Arrays, activation: str) -> jax.Array:
    """act(gate) * up of pre-activations (gate, up), or act(up) of (up,); computed in float32, in their dtype."""
    first, *second = (x.astype(jnp.float32) for x in pre)
    value = ACTIVATIONS[activation](first)
    return (value * second[0] if second else value).astype(pre[0].dtype)


def forward_by_blocks(
    rows: jax.Array, inward: Arrays, down: jax.Array, group_sizes: jax.Array, *, activation: str, keep: bool
) -> tuple[jax.Array, Arrays]:
    """The result [R, D], and with `keep` the pre-activations [R, F] of each of the inward matrices [G, D, F]."""

    def visit(group: jax.Array, state: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
        into, back = [weights[group] for weights in inward], down[group]

        def step(block: blocks.Block, state: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
            out, kept = state
            x = block.of(rows)
            pre = tuple(blocks.dot(x, matrix, 1, 0).astype(rows.dtype) for matrix in into)
            kept = tuple(map(block.put, kept, pre)) if keep else ()
            return block.put(out, blocks.dot(hidden(pre, activation), back, 1, 0)), kept

        return blocks.over_blocks(group, group_sizes, rows.shape[0], step, state)

    kept = tuple(jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype) for weights in inward) if keep else ()
    return blocks.over_groups(visit, group_sizes, (jnp.zeros_like(rows), kept))


def backward_by_blocks(
    rows: jax.Array,
    inward: Arrays,
    down: jax.Array,
    group_sizes: jax.Array,
    pre: Arrays,
    d_out: jax.Array,
    *,
    activation: str,
) -> tuple[jax.Array, Arrays, jax.Array]:
    """Cotangents of rows, the inward matrices and down, in one pass over the blocks."""
    State = tuple[jax.Array, Arrays, jax.Array]

    def visit(group: jax.Array, state: State) -> State:
        into, back = [weights[group] for weights in inward], down[group]

        def step(block: blocks.Block, state: State) -> State:
            d_rows, d_inward, d_down = state
            x, d = block.of(rows), block.of(d_out)
            h, pull = jax.vjp(functools.partial(hidden, activation=activation), tuple(block.of(p) for p in pre))
            (d_pre,) = pull(blocks.dot(d, back, 1, 1).astype(h.dtype))
            d_x = _sum(blocks.dot(d_p, matrix, 1, 1) for d_p, matrix in zip(d_pre, into, strict=True))
            d_inward = tuple(
                blocks.add(total, group, blocks.dot(x, d_p, 0, 0)) for total, d_p in zip(d_inward, d_pre, strict=True)
            )
            return block.put(d_rows, d_x), d_inward, blocks.add(d_down, group, blocks.dot(h, d, 0, 0))

        return blocks.over_blocks(group, group_sizes, rows.shape[0], step, state)

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), (inward, down))
    d_rows, d_inward, d_down = blocks.over_groups(visit, group_sizes, (jnp.zeros_like(rows), *zeros))
    return d_rows, tuple(d.astype(down.dtype) for d in d_inward), d_down.astype(down.dtype)


def forward_by_matmuls(
    matmul: Callable[..., jax.Array],
    rows: jax.Array,
    inward: Arrays,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: str,
    keep: bool,
) -> tuple[jax.Array, Arrays]:
    """What `forward_by_blocks` gives, by one grouped matmul for each matrix."""
    pre = tuple(matmul(rows, weights, group_sizes) for weights in inward)
    return matmul(hidden(pre, activation), down, group_sizes), pre if keep else ()


def backward_by_matmuls(
    pull_matmul: Callable[..., tuple[jax.Array, jax.Array]],
    rows: jax.Array,
    inward: Arrays,
    down: jax.Array,
    group_sizes: jax.Array,
    pre: Arrays,
    d_out: jax.Array,
    *,
    activation: str,
) -> tuple[jax.Array, Arrays, jax.Array]:
    """What `backward_by_blocks` gives, by the backward pass of one grouped matmul for each matrix."""
    h, pull = jax.vjp(functools.partial(hidden, activation=activation), pre)
    d_hidden, d_down = pull_matmul(h, down, group_sizes, d_out)
    (d_pre,) = pull(d_hidden)
    pairs = [pull_matmul(rows, w, group_sizes, d) for w, d in zip(inward, d_pre, strict=True)]
    d_rows = _sum(d.astype(jnp.float32) for d, _ in pairs).astype(rows.dtype)
    return d_rows, tuple(d for _, d in pairs), d_down


def _sum(values: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)
