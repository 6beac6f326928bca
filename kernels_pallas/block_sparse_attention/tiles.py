"""What all forms by tiles share: the arguments cut into blocks, and which keys of a tile each query sees."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.block_sparse_attention.table import WORD

ALL = np.int32(np.iinfo(np.int32).max)
LEAST = -1e30  # where a maximum begins: finite, so that differences from it are numbers


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known when a program is made: sizes, and which tests apply inside a tile."""

    query_block: int
    key_block: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    window: int
    sinks: int
    soft_cap: float

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.key_block)

    def scores(self, products: jax.Array) -> jax.Array:
        """f32 scores from products of queries and keys."""
        scores = products * self.head_dim**-0.5
        return self.soft_cap * jnp.tanh(scores / self.soft_cap) if self.soft_cap else scores

    def slope(self, scores: jax.Array) -> jax.Array | float:
        """The derivative of `scores` by the products; scores finite or -inf, where it is 0 or multiplied by 0."""
        if not self.soft_cap:
            return self.head_dim**-0.5
        return self.head_dim**-0.5 * (1 - jnp.square(jnp.maximum(scores, -self.soft_cap) / self.soft_cap))


class Lists(NamedTuple):
    """What a call is given beside queries, keys and values, none of which has a gradient; shapes as there."""

    table: jax.Array
    counts: jax.Array
    row_bits: jax.Array | None
    q_index: jax.Array | None
    k_index: jax.Array | None
    q_segments: jax.Array | None
    k_segments: jax.Array | None


class Blocks(NamedTuple):
    """The arguments by blocks. The query heads of a key head are `sets` of `rows` = heads of a set * query_block rows,
    with unused rows and keys added up to the sides of a tile that a machine wants.

    q, d_out           [batch, kv_heads, sets, query blocks, rows, head_dim]
    lse, delta         f32[batch, kv_heads, sets, query blocks, rows]
    k, v               [batch, kv_heads, key blocks, keys, head_dim]
    table, counts      i32[batch or 1, kv_heads or 1, query blocks, slots] and without the last axis
    bits               i32[batch or 1, kv_heads or 1, query blocks, words, rows]; None: no choices per query
    q_index, q_segments  i32[batch or 1, query blocks, rows]; None where nothing asks for it
    k_index, k_segments  i32[batch or 1, key blocks, keys]; k_index None: the number of the key
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: jax.Array
    counts: jax.Array
    bits: jax.Array | None
    q_index: jax.Array | None
    k_index: jax.Array | None
    q_segments: jax.Array | None
    k_segments: jax.Array | None
    d_out: Any = None  # this and what follows: in the backward pass alone
    lse: Any = None
    delta: Any = None


class Cut(NamedTuple):
    """How arguments are cut into blocks, and put together again.

    sets   of query heads that share a key head, each computed apart
    rows   of a tile
    keys   of a tile
    dim    a head's dimensions from how many there are
    """

    rule: Rule
    sets: int
    rows: int
    keys: int
    dim: Callable[[int], int] = lambda size: size

    def queries(self, x: jax.Array, kv_heads: int) -> jax.Array:
        """[batch, kv_heads, sets, query blocks, rows, head_dim] of [batch, queries, heads, head_dim]."""
        batch, _, heads, dim = x.shape
        rule, heads_of_set = self.rule, heads // (kv_heads * self.sets)
        x = _to(x, 1, rule.query_blocks * rule.query_block)
        x = x.reshape(batch, rule.query_blocks, rule.query_block, kv_heads, self.sets, heads_of_set, dim)
        x = x.transpose(0, 3, 4, 1, 5, 2, 6)
        x = x.reshape(batch, kv_heads, self.sets, rule.query_blocks, heads_of_set * rule.query_block, dim)
        return _to(_to(x, 4, self.rows), 5, self.dim(dim))

    def queries_back(self, x: jax.Array, heads: int, dim: int) -> jax.Array:
        """[batch, queries, heads, head_dim] of what `queries` made."""
        rule, (batch, kv_heads) = self.rule, x.shape[:2]
        heads_of_set = heads // (kv_heads * self.sets)
        x = x[..., : heads_of_set * rule.query_block, :dim]
        x = x.reshape(batch, kv_heads, self.sets, rule.query_blocks, heads_of_set, rule.query_block, dim)
        x = x.transpose(0, 3, 5, 1, 2, 4, 6)
        return x.reshape(batch, -1, heads, dim)[:, : rule.queries]

    def keys_of(self, x: jax.Array) -> jax.Array:
        """[batch, kv_heads, key blocks, keys, head_dim] of [batch, keys, kv_heads, head_dim]."""
        batch, _, kv_heads, dim = x.shape
        rule = self.rule
        x = _to(x, 1, rule.key_blocks * rule.key_block)
        x = x.reshape(batch, rule.key_blocks, rule.key_block, kv_heads, dim).transpose(0, 3, 1, 2, 4)
        return _to(_to(x, 3, self.keys), 4, self.dim(dim))

    def keys_back(self, x: jax.Array, dim: int) -> jax.Array:
        """[batch, keys, kv_heads, head_dim] of what `keys_of` made."""
        x = x[..., : self.rule.key_block, :dim].transpose(0, 2, 3, 1, 4)
        return x.reshape(x.shape[0], -1, x.shape[3], dim)[:, : self.rule.keys]

    def rows_of(self, x: jax.Array, group: int) -> jax.Array:
        """i32[batch or 1, query blocks, rows] of i32[batch or 1, queries], the same for all heads."""
        rule = self.rule
        x = _to(x, 1, rule.query_blocks * rule.query_block).reshape(x.shape[0], rule.query_blocks, 1, rule.query_block)
        x = jnp.broadcast_to(x, (*x.shape[:2], group // self.sets, rule.query_block))
        return _to(x.reshape(*x.shape[:2], -1), 2, self.rows)

    def blocks(self, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists) -> Blocks:
        rule, kv_heads, group = self.rule, k.shape[2], q.shape[2] // k.shape[2]
        q_index, bits = lists.q_index, None
        if not (rule.causal or rule.window):
            q_index = None
        elif q_index is None:
            q_index = jnp.arange(rule.queries, dtype=jnp.int32)[None]
        if lists.row_bits is not None:
            bits = jax.lax.bitcast_convert_type(lists.row_bits, jnp.int32).swapaxes(-1, -2)[..., None, :]
            bits = jnp.broadcast_to(bits, (*bits.shape[:-2], group // self.sets, bits.shape[-1]))
            bits = _to(bits.reshape(*bits.shape[:-2], -1), 4, self.rows)
        segments = None if lists.k_segments is None else jnp.where(lists.k_segments > 0, lists.k_segments, -1)
        whole = rule.key_blocks * rule.key_block

        def keys(x: jax.Array | None, added: int) -> jax.Array | None:
            if x is None:
                return None
            x = _to(x, 1, whole, added).reshape(x.shape[0], rule.key_blocks, rule.key_block)
            return _to(x, 2, self.keys, added)

        return Blocks(
            self.queries(q, kv_heads),
            self.keys_of(k),
            self.keys_of(v),
            jnp.clip(lists.table, 0, rule.key_blocks - 1),  # no kernel may read past an end, whatever it is given
            jnp.clip(lists.counts, 0, lists.table.shape[-1]),
            bits,
            None if q_index is None else self.rows_of(q_index, group),
            keys(lists.k_index if rule.causal or rule.window else None, int(ALL)),
            None if lists.q_segments is None else self.rows_of(lists.q_segments, group),
            keys(segments, -1),
        )

    def pulled(self, blocks: Blocks, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> Blocks:
        """`blocks` with what the backward pass needs beside: a gradient of lse is one of all scores alike."""
        kv_heads = blocks.k.shape[1]
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse.swapaxes(1, 2)
        # A query that sees nothing has -inf, from which its masked scores, -inf too, cannot be subtracted.
        lse = jnp.where(jnp.isfinite(lse), lse, 0).swapaxes(1, 2)
        plain = self._replace(dim=lambda size: size)
        return blocks._replace(
            d_out=self.queries(d_out, kv_heads),
            lse=plain.queries(lse[..., None], kv_heads)[..., 0],
            delta=plain.queries(delta[..., None], kv_heads)[..., 0],
        )

    def results(self, out: jax.Array, lse: jax.Array, heads: int, dim: int) -> tuple[jax.Array, jax.Array]:
        """The result [batch, queries, heads, dim] and f32[batch, heads, queries] from blocks of both."""
        return self.queries_back(out, heads, dim), self.queries_back(lse[..., None], heads, 1)[..., 0].swapaxes(1, 2)

    @property
    def is_cut(self) -> bool:
        """Whether tiles have keys that do not exist."""
        return self.keys != self.rule.key_block or self.rule.keys % self.rule.key_block != 0

    def visible(
        self,
        block: jax.Array,
        offset: jax.Array,
        q_index: jax.Array | None,
        k_index: jax.Array | None,
        q_segments: jax.Array | None,
        k_segments: jax.Array | None,
        bit: jax.Array | None,
    ) -> jax.Array | None:
        """bool: which keys of tiles are seen; None: all.

        block   i32: numbers of key blocks; offset  i32: of keys within theirs. The others as in `Blocks`, bit 0 or 1.
        All must broadcast against each other; on accelerators offset and bit have the shape of a tile.
        """
        rule = self.rule
        terms: list[Any] = []
        if self.is_cut:
            terms.append(offset < jnp.minimum(rule.key_block, rule.keys - block * rule.key_block))
        if q_index is not None:
            k_index = block * rule.key_block + offset if k_index is None else k_index
            if rule.causal:
                terms.append(k_index <= q_index)
            if rule.window:
                near = jnp.where(k_index < rule.sinks, ALL, k_index) if rule.sinks else k_index
                terms.append(near > q_index - rule.window)
            if rule.window and not rule.causal:
                terms.append(k_index < q_index + rule.window)
        if q_segments is not None:
            terms.append(q_segments == k_segments)
        if bit is not None:
            terms.append(bit != 0)
        seen = None
        for term in terms:
            seen = term if seen is None else seen & term
        return seen


def bit_of(words: jax.Array, slot: jax.Array) -> jax.Array:
    """i32, 0 or 1: the bit of a slot in its words."""
    shift = jnp.broadcast_to(slot & (WORD - 1), words.shape)
    return jax.lax.shift_right_logical(words, shift) & 1


def cost(blocks: Blocks, matmuls: int) -> pl.CostEstimate:
    """Of a kernel with so many matmuls of a tile, over full lists: how many entries count is known when it runs."""
    batch, kv_heads, sets, query_blocks, rows, dim = blocks.q.shape
    keys, value_dim = blocks.v.shape[3:]
    visits = batch * kv_heads * sets * query_blocks // blocks.table.shape[2] * blocks.table[0, 0].size
    fetched = visits * keys * (dim + value_dim) * blocks.k.dtype.itemsize
    return pl.CostEstimate(
        flops=matmuls * visits * rows * keys * (dim + value_dim),
        transcendentals=visits * rows * keys,
        bytes_accessed=fetched + matmuls * blocks.q.size * blocks.q.dtype.itemsize,
    )


def _to(x: jax.Array, axis: int, size: int, added: Any = 0) -> jax.Array:
    """x with `added` up to `size` along an axis."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=added)
