"""Tables of the key blocks that each query block visits: made from block maps, and turned round for the backward pass.

A table is an ascending list of key blocks per query block. Whatever decides on the blocks (a window, scores of a
router, choices per token) ends in a bool map over blocks or tokens, from which `from_map` and `from_choices` make the
lists. Tables carry no gradient.

What serves which pattern (the tests have each):

    window, sinks, strided, vertical-slash   `from_map` of a map over blocks; the window's edges by `window` and `sinks`
    bi-level routed                          `from_map` with the scores of regions, those that must be kept the highest
    a choice of each query (MoBA, NSA)       `from_choices`: unions and bits; where neighbours disagree, query blocks of
                                             one query and `from_map` of the choices, with the heads of a group as rows
    clusters of tokens (k-means)             members side by side, heads as rows, their positions as q_index and
                                             k_index, and each query block visits the blocks of its own cluster
    a step of generation                     query blocks of one query, with its position as q_index
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WORD = 32  # bits of a number of `row_bits`


class BlockTable(NamedTuple):
    """Query block i visits key blocks blocks[..., i, : counts[..., i]].

    blocks  i32[..., query blocks, slots]: ascending, each at most once; past the count, the last one again (or 0)
    counts  i32[..., query blocks], 0 to slots
    """

    blocks: jax.Array
    counts: jax.Array


class Transposed(NamedTuple):
    """Which query blocks visit each key block: visits in order of the key block, then of the query block.

    keys   i32[..., visits]: the key block of a visit; past the last visit, that of the last one again (or 0)
    pairs  i32[..., visits]: query block * slots + slot in its list; likewise
    first  i32[..., key blocks + 1]: where the visits to each key block begin; the last entry is how many there are

    `visits` is query blocks * slots, so memory follows the table, not query blocks times key blocks, although all query
    blocks may visit one key block.
    """

    keys: jax.Array
    pairs: jax.Array
    first: jax.Array


def from_map(visited: jax.Array, slots: int, scores: jax.Array | None = None) -> tuple[BlockTable, jax.Array]:
    """The table of a map over blocks, and how many blocks found no place in it.

    visited  bool[..., query blocks, key blocks]
    slots    places of a list, at least 1
    scores   f32[..., query blocks, key blocks], finite: of more than `slots` blocks those with the highest scores are
             kept, the earlier of equals; None: the last ones
    returns  a table of [..., query blocks, slots], and i32[..., query blocks]: blocks that were left out
    """
    key_blocks = visited.shape[-1]
    listed = visited.sum(-1, dtype=jnp.int32)
    counts = jnp.minimum(listed, slots)
    rank = jnp.arange(key_blocks, dtype=jnp.float32) if scores is None else scores.astype(jnp.float32)
    best = jax.lax.top_k(jnp.where(visited, rank, -jnp.inf), min(slots, key_blocks))[1].astype(jnp.int32)
    kept = jnp.arange(best.shape[-1], dtype=jnp.int32) < counts[..., None]
    ascending = jnp.sort(jnp.where(kept, best, key_blocks), axis=-1)
    last = jnp.max(jnp.where(kept, best, 0), axis=-1, keepdims=True)
    blocks = jnp.where(ascending < key_blocks, ascending, last)
    more = jnp.broadcast_to(last, (*last.shape[:-1], slots - best.shape[-1]))
    return BlockTable(jnp.concatenate([blocks, more], axis=-1), counts), listed - counts


def from_choices(chosen: jax.Array, query_block: int, slots: int) -> tuple[BlockTable, jax.Array, jax.Array]:
    """The table of choices per query: each list is the union over the queries of a block, and bits say whose a tile is.

    chosen       bool[..., queries, key blocks]
    query_block  queries of a block; the last block may be cut short
    slots        places of a list: of a larger union the blocks that most of the queries chose are kept, the later of
                 equals, so that a query's own block, which all its neighbours choose too, is never left out
    returns      the table, `row_bits` u32[..., query blocks, query_block, ceil(slots / 32)], and
                 i32[..., query blocks]: choices (of a query, of a block) that were left out
    """
    *lead, queries, key_blocks = chosen.shape
    count = -(-queries // query_block)
    none = [(0, 0)] * len(lead)
    chosen = jnp.pad(chosen, [*none, (0, count * query_block - queries), (0, 0)])
    chosen = chosen.reshape(*lead, count, query_block, key_blocks)
    votes = chosen.sum(-2, dtype=jnp.int32)
    scores = votes * key_blocks + jnp.arange(key_blocks, dtype=jnp.int32)
    table, _ = from_map(votes > 0, slots, scores)
    mine = jnp.take_along_axis(chosen, table.blocks[..., None, :], axis=-1)
    mine = mine & (jnp.arange(slots, dtype=jnp.int32) < table.counts[..., None])[..., None, :]
    dropped = votes.sum(-1) - mine.sum((-2, -1), dtype=jnp.int32)
    return table, _packed(mine), dropped


def part_of(
    table: jax.Array, counts: jax.Array, row_bits: jax.Array | None, place: jax.Array, key_blocks: int
) -> tuple[BlockTable, jax.Array | None]:
    """The table, and `row_bits`, for some of the key blocks that it lists: the same order, fewer entries.

    place       i32, as table: the number of each entry's key block among them, ascending with the entries, or -1
    key_blocks  how many they are, at least 1; the lists have as many slots, or those of the table if these are fewer
    """
    kept = (place >= 0) & (jnp.arange(table.shape[-1], dtype=jnp.int32) < counts[..., None])
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., : min(table.shape[-1], key_blocks)]
    counts = kept.sum(-1, dtype=jnp.int32)
    slot = jnp.arange(order.shape[-1], dtype=jnp.int32)
    last = jnp.minimum(slot, jnp.maximum(counts[..., None] - 1, 0))
    blocks = jnp.maximum(jnp.take_along_axis(place, jnp.take_along_axis(order, last, axis=-1), axis=-1), 0)
    if row_bits is None:
        return BlockTable(blocks, counts), None
    bits = (row_bits[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    bits = bits.reshape(*row_bits.shape[:-1], row_bits.shape[-1] * WORD)
    return BlockTable(blocks, counts), _packed(jnp.take_along_axis(bits, order[..., None, :], axis=-1) > 0)


def _packed(bits: jax.Array) -> jax.Array:
    """u32[..., words] of bool[..., slots]."""
    slots = bits.shape[-1]
    words = -(-slots // WORD)
    bits = jnp.pad(bits, [*[(0, 0)] * (bits.ndim - 1), (0, words * WORD - slots)])
    bits = bits.reshape(*bits.shape[:-1], words, WORD).astype(jnp.uint32)
    return (bits << jnp.arange(WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def to_map(table: jax.Array, counts: jax.Array, key_blocks: int) -> jax.Array:
    """bool[..., query blocks, key blocks]: what `from_map` makes a table of."""
    valid = jnp.arange(table.shape[-1], dtype=jnp.int32) < counts[..., None]
    listed = jnp.where(valid, table, key_blocks)[..., None] == jnp.arange(key_blocks, dtype=jnp.int32)
    return listed.any(-2)


def transposed(table: jax.Array, counts: jax.Array, key_blocks: int) -> Transposed:
    """The same visits, key block by key block: what the gradients of keys and values go through.

    table, counts  i32[..., query blocks, slots], i32[..., query blocks]
    key_blocks     how many key blocks there are
    """
    *lead, query_blocks, slots = table.shape
    valid = jnp.arange(slots, dtype=jnp.int32) < counts[..., None]
    keys = jnp.where(valid, table, key_blocks).reshape(*lead, query_blocks * slots).astype(jnp.int32)
    pairs = jnp.argsort(keys, axis=-1, stable=True).astype(jnp.int32)
    keys = jnp.take_along_axis(keys, pairs, axis=-1)
    total = counts.sum(-1, dtype=jnp.int32)[..., None]
    visit = jnp.minimum(jnp.arange(keys.shape[-1], dtype=jnp.int32), jnp.maximum(total - 1, 0))
    bounds = jnp.arange(key_blocks + 1, dtype=jnp.int32)
    find = jnp.vectorize(lambda keys: jnp.searchsorted(keys, bounds), signature="(n)->(m)")
    first = find(keys).astype(jnp.int32)
    keys, pairs = (jnp.where(total > 0, jnp.take_along_axis(x, visit, axis=-1), 0) for x in (keys, pairs))
    return Transposed(keys, pairs, first)
