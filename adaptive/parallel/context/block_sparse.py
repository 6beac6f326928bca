"""Block-sparse attention over a split sequence: every list is cut into those of the shards that it names blocks of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from adaptive.parallel.context.axis import Context
from adaptive.parallel.context.layout import Layout, Shard, exchanged
from adaptive.parallel.context.ring import Gradients, Partial, Pulled, Ring, attend
from kernels_pallas import block_sparse_attention as kernels
from kernels_pallas.block_sparse_attention.table import part_of
from kernels_pallas.block_sparse_attention.tiles import Lists, Rule


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Attention of one shard's query blocks over the blocks of another's keys that they list: `ring.Part`. What is told
    are the lists of this shard's queries, by key blocks of the row, with the index and segments of all keys."""

    layout: Layout
    rule: Rule

    def lists(self, told: Lists, k_shard: Shard) -> Lists:
        per = self.rule.key_blocks // self.layout.held  # key blocks of a chunk
        place = jnp.full_like(told.table, -1)
        for number, chunk in enumerate(self.layout.chunks(k_shard)):
            own = told.table // per == chunk
            place = jnp.where(own, told.table - chunk * per + number * per, place)
        table, bits = part_of(told.table, told.counts, told.row_bits, place, self.rule.key_blocks)
        of_keys = [None if x is None else self.layout.own(x, k_shard) for x in (told.k_index, told.k_segments)]
        return Lists(table.blocks, table.counts, bits, told.q_index, of_keys[0], told.q_segments, of_keys[1])

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, told: Lists, q_shard: Shard, k_shard: Shard) -> Partial:
        k, v = (kernels.shared_by(told.table, x, q.shape[2]) for x in (k, v))
        out, lse = kernels.attend(self.rule, q, k, v, self.lists(told, k_shard))
        return out.astype(lse.dtype), lse

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, told: Lists, rest: Pulled, q_shard: Shard, k_shard: Shard
    ) -> Gradients:
        delta, lse, d_out = rest
        (keys, values), pull = jax.vjp(lambda *kv: [kernels.shared_by(told.table, x, q.shape[2]) for x in kv], k, v)
        # The forms make delta from the result and both cotangents, that of the log-sum-exp with a minus.
        nothing, lists = jnp.zeros_like(d_out), self.lists(told, k_shard)
        d_q, *d_kv = kernels.pulled(self.rule, q, keys, values, lists, nothing, lse, d_out, -delta)
        d_k, d_v = pull(d_kv)
        return d_q, d_k, d_v


def block_sparse_attention(
    context: Context,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    counts: jax.Array,
    *,
    query_block: int,
    key_block: int,
    k_index: jax.Array | None = None,
    row_bits: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    soft_cap: float = 0.0,
    q_index: jax.Array | None = None,
    zigzag: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.block_sparse_attention` of whole rows, with the log-sum-exp, inside `jax.shard_map` over the
    context axis, where each device has its neighbouring part of every array. Keys and values go around in a ring.

    table, counts, row_bits  of this part's query blocks, key blocks numbered as in the whole row
    segments                 of queries and of keys
    zigzag                   balance as of causal attention, where the chunks are whole blocks; otherwise, and for
                             patterns that are as dense everywhere, parts stay as they are

    Raises ValueError where a part is not whole blocks.
    """
    queries, keys, parts = q.shape[1], k.shape[1], context.parts
    if queries % query_block or keys % key_block:
        raise ValueError(
            f"parts of {queries} queries and {keys} keys: must be whole blocks of {query_block}, {key_block}"
        )
    halves = queries % (2 * query_block) == 0 and keys % (2 * key_block) == 0
    layout = Layout(parts, zigzag and causal and halves)
    rule = Rule(query_block, key_block, queries, keys, q.shape[-1], causal, window, sinks, soft_cap)
    if q_index is None:
        q_index = lax.axis_index(context.axis) * queries + jnp.arange(queries, dtype=jnp.int32)[None]
    of_all = functools.partial(lax.all_gather, axis_name=context.axis, axis=1, tiled=True)
    k_index = jnp.arange(keys * parts, dtype=jnp.int32)[None] if k_index is None else of_all(k_index)
    q_segments, k_segments = (None, None) if segments is None else (segments[0], of_all(segments[1]))

    # Arrays by query block have these along their third axis.
    turned = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), (table, counts, row_bits))
    q, k, v, turned, q_index, q_segments = exchanged((q, k, v, turned, q_index, q_segments), layout, context.axis)
    table, counts, row_bits = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), turned)
    told = Lists(table, counts, row_bits, q_index, k_index, q_segments, k_segments)
    out, lse = attend(Sparse(layout, rule), Ring(context.axis, parts, context.nodes), q, k, v, told)
    lse = exchanged(lse.swapaxes(1, 2), layout, context.axis, back=True).swapaxes(1, 2)
    return exchanged(out, layout, context.axis, back=True), lse
