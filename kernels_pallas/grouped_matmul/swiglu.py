"""The feed-forward of every group in one operation, forward and backward, by several forms."""

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
# Of rows, the inward matrices, down and, for results that are multiplied by a `scale` f32[R], of the scale. That one
# needs no results: <d_out, scale (h down)> is scale <d_out down^T, h>, and the former factor is needed anyway.
Cotangents = tuple[jax.Array, Arrays, jax.Array, jax.Array | None]


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
    scale: jax.Array | None = None,
    *,
    activation: str,
) -> Cotangents:
    """`Cotangents` in one pass over the blocks."""
    State = tuple[jax.Array, Arrays, jax.Array, jax.Array | None]

    def visit(group: jax.Array, state: State) -> State:
        into, back = [weights[group] for weights in inward], down[group]

        def step(block: blocks.Block, state: State) -> State:
            d_rows, d_inward, d_down, d_scale = state
            x, d = block.of(rows), block.of(d_out)
            h, pull = jax.vjp(functools.partial(hidden, activation=activation), tuple(block.of(p) for p in pre))
            d_hidden = blocks.dot(d, back, 1, 1)
            if scale is not None and d_scale is not None:
                by = block.of(scale[:, None])
                d_scale = block.put(d_scale, _over_last(d_hidden, h))
                h, d_hidden = _scaled(h, by), d_hidden * by
            (d_pre,) = pull(d_hidden.astype(h.dtype))
            d_x = _sum(blocks.dot(d_p, matrix, 1, 1) for d_p, matrix in zip(d_pre, into, strict=True))
            d_inward = tuple(
                block.add(total, group, blocks.dot(x, d_p, 0, 0)) for total, d_p in zip(d_inward, d_pre, strict=True)
            )
            return block.put(d_rows, d_x), d_inward, block.add(d_down, group, blocks.dot(h, d, 0, 0)), d_scale

        return blocks.over_blocks(group, group_sizes, rows.shape[0], step, state)

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), (inward, down))
    d_scale = None if scale is None else jnp.zeros_like(scale[:, None])
    state = blocks.over_groups(visit, group_sizes, (jnp.zeros_like(rows), *zeros, d_scale))
    d_rows, d_inward, d_down, d_scale = state
    d_inward = tuple(d.astype(down.dtype) for d in d_inward)
    return d_rows, d_inward, d_down.astype(down.dtype), None if d_scale is None else d_scale[:, 0]


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
    scale: jax.Array | None = None,
    *,
    activation: str,
) -> Cotangents:
    """`Cotangents` by the backward pass of one grouped matmul for each matrix."""
    h, pull = jax.vjp(functools.partial(hidden, activation=activation), pre)
    by = None if scale is None else scale[:, None]
    d_hidden, d_down = pull_matmul(_scaled(h, by), down, group_sizes, d_out)
    d_scale = None if scale is None else _over_last(d_hidden, h)[:, 0]
    (d_pre,) = pull(_scaled(d_hidden, by))
    pairs = [pull_matmul(rows, w, group_sizes, d) for w, d in zip(inward, d_pre, strict=True)]
    d_rows = _sum(d.astype(jnp.float32) for d, _ in pairs).astype(rows.dtype)
    return d_rows, tuple(d for _, d in pairs), d_down, d_scale


def forward_by_slots(
    rows: jax.Array, inward: Arrays, down: jax.Array, *, activation: str, keep: bool
) -> tuple[jax.Array, Arrays]:
    """What `forward_by_blocks` gives for groups of as many rows each, [G, C, D]: batched matmuls."""
    pre = tuple(jnp.einsum("gcd,gdf->gcf", rows, weights) for weights in inward)
    return jnp.einsum("gcf,gfd->gcd", hidden(pre, activation), down), pre if keep else ()


def backward_by_slots(
    rows: jax.Array,
    inward: Arrays,
    down: jax.Array,
    pre: Arrays,
    d_out: jax.Array,
    scale: jax.Array | None = None,
    *,
    activation: str,
) -> Cotangents:
    """`Cotangents` for groups of as many rows each; scale [G, C]."""
    h, pull = jax.vjp(functools.partial(hidden, activation=activation), pre)
    by = None if scale is None else scale[..., None]
    d_hidden = jnp.einsum("gcd,gfd->gcf", d_out, down)
    d_scale = None if scale is None else _over_last(d_hidden, h)[..., 0]
    d_down = jnp.einsum("gcf,gcd->gfd", _scaled(h, by), d_out)
    (d_pre,) = pull(_scaled(d_hidden, by))
    d_inward = tuple(jnp.einsum("gcd,gcf->gdf", rows, d) for d in d_pre)
    parts = (jnp.einsum("gcf,gdf->gcd", d, weights) for d, weights in zip(d_pre, inward, strict=True))
    d_rows = _sum(d.astype(jnp.float32) for d in parts).astype(rows.dtype)
    return d_rows, d_inward, d_down, d_scale


def _over_last(a: jax.Array, b: jax.Array) -> jax.Array:
    """f32[..., 1]: the sum of the products along the last axis."""
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(-1, keepdims=True)


def _scaled(x: jax.Array, by: jax.Array | None) -> jax.Array:
    """x times f32[..., 1], in x's dtype."""
    return x if by is None else (x.astype(jnp.float32) * by).astype(x.dtype)


def _sum(values: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)
