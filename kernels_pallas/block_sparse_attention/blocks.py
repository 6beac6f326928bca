"""Block-sparse attention in plain jax.numpy: the listed tiles of one query block after another.

Time follows the tiles that are visited, memory the arguments. A step takes several tiles of a query block at once, for
all rows and heads; how many steps there are is the longest list's affair.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.block_sparse_attention.tiles import LEAST, Blocks, Cut, Lists, Rule, bit_of
from kernels_pallas.grouped_matmul.varying import like

KEYS = 512  # of a step: of as many tiles as have so many


class Row(NamedTuple):
    """What a query block has of its own; every leaf without the axis of query blocks, as in `Blocks` for the rest."""

    q: jax.Array
    table: jax.Array
    counts: jax.Array
    bits: jax.Array | None
    q_index: jax.Array | None
    q_segments: jax.Array | None
    d_out: Any  # this and what follows: in the backward pass alone
    lse: Any
    delta: Any


class Step(NamedTuple):
    """Tiles of a query block side by side.

    at      i32[batch, kv_heads, tiles]: where they lie in the keys of all rows and heads
    k, v    f32[batch, kv_heads, tiles * key_block, head_dim]
    scores  f32[batch, kv_heads, rows, tiles * key_block], -inf where not seen
    """

    at: jax.Array
    k: jax.Array
    v: jax.Array
    scores: jax.Array


def forward(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists) -> tuple[jax.Array, jax.Array]:
    """The result [batch, queries, heads, head_dim] in q's dtype and f32[batch, heads, queries]."""
    cut = _cut(rule, q, k)
    blocks = cut.blocks(q, k, v, lists)

    def query_block(_: None, row: Row) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most, total, out = carry
            tiles = _tiles(cut, blocks, row, j)
            new = jnp.maximum(most, tiles.scores.max(-1, keepdims=True))
            p, fade = jnp.exp(tiles.scores - new), jnp.exp(most - new)
            out = fade * out + jnp.einsum("bhrn,bhnd->bhrd", p, tiles.v)
            return new, fade * total + p.sum(-1, keepdims=True), out

        column = jnp.zeros((*row.q.shape[:3], 1), jnp.float32)
        out = jnp.zeros((*row.q.shape[:3], v.shape[-1]), jnp.float32)
        most, total, out = lax.fori_loop(0, _steps(rule, row), step, like(q, (column + LEAST, column, out)))
        lse = jnp.where(total > 0, most + jnp.log(total), -jnp.inf)
        return None, ((out / jnp.where(total > 0, total, 1)).astype(q.dtype), lse[..., 0])

    _, (out, lse) = lax.scan(query_block, None, _rows(blocks))
    out, lse = (jnp.moveaxis(x, 0, 2)[:, :, None] for x in (out, lse))
    return cut.results(out, lse, q.shape[2], v.shape[-1])


def backward(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and v. One after another, query blocks may add to the gradients of their keys as they come."""
    cut = _cut(rule, q, k)
    blocks = cut.pulled(cut.blocks(q, k, v, lists), out, lse, d_out, d_lse)
    zeros = lambda x: jnp.zeros((x.shape[0] * x.shape[1] * x.shape[2], x.shape[3] * x.shape[4]), jnp.float32)  # noqa: E731

    def query_block(d_keys: tuple[jax.Array, ...], row: Row) -> tuple[tuple[jax.Array, ...], jax.Array]:
        q_row, d_row = row.q.astype(jnp.float32), row.d_out.astype(jnp.float32)

        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            tiles = _tiles(cut, blocks, row, j)
            p = jnp.exp(tiles.scores - row.lse[..., None])
            d_p = jnp.einsum("bhrd,bhnd->bhrn", d_row, tiles.v)
            d_s = p * (d_p - row.delta[..., None]) * rule.slope(tiles.scores)
            to = lambda d, x: d.at[tiles.at.reshape(-1)].add(  # noqa: E731
                x.reshape(tiles.at.size, -1), mode="promise_in_bounds"
            )
            return (
                d_q + jnp.einsum("bhrn,bhnd->bhrd", d_s, tiles.k),
                to(d_k, jnp.einsum("bhrn,bhrd->bhnd", d_s, q_row)),
                to(d_v, jnp.einsum("bhrn,bhrd->bhnd", p, d_row)),
            )

        d_q, *d_keys = lax.fori_loop(0, _steps(rule, row), step, (like(q, jnp.zeros_like(q_row)), *d_keys))
        return tuple(d_keys), d_q.astype(q.dtype)

    (d_k, d_v), d_q = lax.scan(query_block, like(q, (zeros(blocks.k), zeros(blocks.v))), _rows(blocks))
    d_q = cut.queries_back(jnp.moveaxis(d_q, 0, 2)[:, :, None], q.shape[2], q.shape[-1])
    d_k, d_v = d_k.reshape(blocks.k.shape), d_v.reshape(blocks.v.shape)
    return d_q, cut.keys_back(d_k, k.shape[-1]).astype(k.dtype), cut.keys_back(d_v, v.shape[-1]).astype(v.dtype)


def _cut(rule: Rule, q: jax.Array, k: jax.Array) -> Cut:
    return Cut(rule, 1, q.shape[2] // k.shape[2] * rule.query_block, rule.key_block)


def _tiles_of_step(rule: Rule, slots: int) -> int:
    return min(slots, max(1, KEYS // rule.key_block))


def _steps(rule: Rule, row: Row) -> jax.Array:
    size = _tiles_of_step(rule, row.table.shape[-1])
    return lax.div(row.counts.max() + (size - 1), jnp.int32(size))


def _rows(blocks: Blocks) -> Row:
    """The rows of all query blocks, for a scan over them."""

    def front(x: Any, axis: int) -> Any:
        return None if x is None else jnp.moveaxis(x, axis, 0)

    def of_set(x: Any) -> Any:
        return None if x is None else front(x[:, :, 0], 2)

    return Row(
        of_set(blocks.q),
        front(blocks.table, 2),
        front(blocks.counts, 2),
        front(blocks.bits, 2),
        front(blocks.q_index, 1),
        front(blocks.q_segments, 1),
        of_set(blocks.d_out),
        of_set(blocks.lse),
        of_set(blocks.delta),
    )


def _tiles(cut: Cut, blocks: Blocks, row: Row, j: jax.Array) -> Step:
    """Step j of a query block."""
    rule, (batch, kv_heads, key_blocks, size, _) = cut.rule, blocks.k.shape
    tiles, slots = _tiles_of_step(rule, row.table.shape[-1]), row.table.shape[-1]
    slot = j * tiles + jnp.arange(tiles, dtype=jnp.int32)
    some = jnp.minimum(slot, slots - 1)
    block = row.table[..., some]
    head = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, kv_heads, 1)
    at = head * key_blocks + block
    take = lambda x: x.reshape(-1, size * x.shape[-1]).at[at].get(mode="promise_in_bounds").astype(jnp.float32)  # noqa: E731
    k, v = (take(x).reshape(batch, kv_heads, tiles * size, -1) for x in (blocks.k, blocks.v))

    column = lambda x: None if x is None else x[:, None, :, None, None]  # noqa: E731
    of_block = lambda x: None if x is None else _of_blocks(x, block)[:, :, None]  # noqa: E731
    bit = None
    if row.bits is not None:
        bit = bit_of(row.bits[..., some // 32, :], some[:, None]).swapaxes(-1, -2)[..., None]
    seen = cut.visible(
        block[:, :, None, :, None],
        jnp.arange(size, dtype=jnp.int32),
        column(row.q_index),
        of_block(blocks.k_index),
        column(row.q_segments),
        of_block(blocks.k_segments),
        bit,
    )
    listed = (slot < row.counts[..., None])[:, :, None, :, None]
    seen = listed if seen is None else seen & listed
    products = jnp.einsum("bhrd,bhnd->bhrn", row.q.astype(jnp.float32), k)
    scores = rule.scores(products).reshape(*row.q.shape[:3], tiles, size)
    return Step(at, k, v, jnp.where(seen, scores, -jnp.inf).reshape(products.shape))


def _of_blocks(x: jax.Array, block: jax.Array) -> jax.Array:
    """i32[batch or 1, kv_heads or 1, tiles, keys]: of x [batch or 1, key blocks, keys] those of the blocks."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None, None]
    return x[rows, block]
