"""Dispatch: which experts compute which tokens. The width axis's counterpart of a Selection."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

_ARRAYS = ("index", "weights", "valid", "zero_weights")
_STATIC = ("by", "experts", "seq", "most_per_sequence", "most_per_batch", "pairs_per_sequence", "shared")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """A router's decision for tokens [batch, seq], as pairs of a token and an expert with static shapes.

    by="token"    index i32[batch, seq, k]             experts of each token
    by="expert"   index i32[batch, experts, capacity]  positions in its sequence that each expert takes
    weights       f32, the shape of index: what the expert's output is multiplied by; 0 where not valid
    valid         bool, the shape of index: pairs that are computed. An index is in bounds even where it is not valid
    zero_weights  f32[batch, seq, zero_experts]: weights of experts that need no dispatch (null, copy, constant)

    A token never has the same expert twice. `most_per_sequence` and `most_per_batch` bound the tokens of one expert in
    one sequence and in all, `pairs_per_sequence` all pairs of one sequence: static buffers are sized by them. `shared`
    is, of experts that take tokens, a number of consecutive sequences and the most tokens of one expert in these; then
    the valid pairs of a sequence come first and are as many for every expert.
    """

    index: jax.Array
    weights: jax.Array
    valid: jax.Array
    zero_weights: jax.Array
    by: Literal["token", "expert"]
    experts: int
    seq: int
    most_per_sequence: int
    most_per_batch: int
    pairs_per_sequence: int
    shared: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        return self.index.shape[0]

    def mask(self) -> jax.Array:
        """bool[batch, seq, experts]: the pairs that are computed."""
        return self._dense(self.valid.astype(jnp.float32)) > 0

    def combine_matrix(self) -> jax.Array:
        """f32[batch * seq, experts + zero_experts]: the weight of every expert in every token's output."""
        dense = jnp.concatenate([self.expert_weights(), self.zero_weights], axis=-1)
        return dense.reshape(self.batch * self.seq, -1)

    def expert_weights(self) -> jax.Array:
        """f32[batch, seq, experts], the shape of `mask`: what each expert's output is multiplied by."""
        return self._dense(jnp.where(self.valid, self.weights, 0.0))

    def load(self) -> jax.Array:
        """f32[experts]: tokens that each expert computes."""
        if self.by == "expert":
            return self.valid.sum((0, 2)).astype(jnp.float32)
        ids = jnp.where(self.valid, self.index, self.experts)
        return count(ids, self.experts)

    def per_token(self) -> jax.Array:
        """i32[batch, seq]: experts that compute each token."""
        if self.by == "token":
            return self.valid.sum(-1).astype(jnp.int32)
        add = lambda i, v: jnp.zeros(self.seq, jnp.int32).at[i.reshape(-1)].add(v.reshape(-1))  # noqa: E731
        return jax.vmap(add)(self.index, self.valid.astype(jnp.int32))

    def strongest(self) -> jax.Array:
        """i32[batch, seq]: the expert with the largest weight among those that compute each token; -1 without any."""
        index, valid, weights = self.index, self.valid, self.weights
        if self.by == "expert":
            valid, weights = self.mask(), self.expert_weights()
            index = jnp.broadcast_to(jnp.arange(self.experts, dtype=jnp.int32), valid.shape)
        at = jnp.where(valid, weights, -jnp.inf).argmax(-1)[..., None]
        found = jnp.take_along_axis(index, at, -1)[..., 0]
        return jnp.where(valid.any(-1), found, -1).astype(jnp.int32)

    def capacity(self, batch: int) -> int:
        """The most tokens that one expert can have in `batch` of the sequences."""
        most = min(batch * self.most_per_sequence, self.most_per_batch)
        if self.shared is None or batch % self.shared[0]:
            return most
        sequences, rows = self.shared
        return min(most, batch // sequences * rows)

    def of_part(self, seq: int) -> "Dispatch":
        """Its arrays are of `seq` of each sequence's tokens: bounds that hold of these."""
        if seq == self.seq:
            return self
        of_expert, last = self.by == "expert", self.index.shape[-1]
        pairs = last * (self.experts if of_expert else seq)
        return dataclasses.replace(
            self,
            seq=seq,
            most_per_sequence=min(last if of_expert else seq, self.most_per_sequence),
            pairs_per_sequence=min(pairs, self.pairs_per_sequence),
        )

    def _dense(self, values: jax.Array) -> jax.Array:
        if self.by == "expert":
            put = lambda i, v: jax.vmap(lambda i, v: jnp.zeros(self.seq, jnp.float32).at[i].add(v))(i, v).T  # noqa: E731
            return jax.vmap(put)(self.index, values)
        put = lambda i, v: jnp.zeros(self.experts, jnp.float32).at[i].add(v)  # noqa: E731
        return jax.vmap(jax.vmap(put))(self.index, values)


def by_token(
    index: jax.Array,
    weights: jax.Array,
    valid: jax.Array,
    experts: int,
    *,
    zero_weights: jax.Array | None = None,
    most_per_sequence: int | None = None,
    most_per_batch: int | None = None,
    pairs_per_sequence: int | None = None,
) -> Dispatch:
    """A token-major Dispatch of index i32, weights f32, valid bool, all [batch, seq, k]; no bound: every token."""
    batch, seq, k = index.shape
    each = seq if most_per_sequence is None else min(seq, most_per_sequence)
    return Dispatch(
        index=jnp.clip(index, 0, experts - 1).astype(jnp.int32),
        weights=jnp.where(valid, weights, 0.0),
        valid=valid,
        zero_weights=jnp.zeros((batch, seq, 0), jnp.float32) if zero_weights is None else zero_weights,
        by="token",
        experts=experts,
        seq=seq,
        most_per_sequence=each,
        most_per_batch=batch * each if most_per_batch is None else most_per_batch,
        pairs_per_sequence=seq * k if pairs_per_sequence is None else min(seq * k, pairs_per_sequence),
    )


def by_mask(mask: jax.Array, weights: jax.Array, **bounds: Any) -> Dispatch:
    """A token-major Dispatch of dense mask bool and weights f32 [batch, seq, experts]: k is the number of experts."""
    experts = mask.shape[-1]
    everyone = jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32), mask.shape)
    return by_token(everyone, weights, mask, experts, **bounds)


def by_expert(
    index: jax.Array, weights: jax.Array, valid: jax.Array, seq: int, shared: tuple[int, int] | None = None
) -> Dispatch:
    """An expert-major Dispatch of index i32, weights f32, valid bool, all [batch, experts, capacity]."""
    batch, experts, capacity = index.shape
    return Dispatch(
        index=index,
        weights=jnp.where(valid, weights, 0.0),
        valid=valid,
        zero_weights=jnp.zeros((batch, seq, 0), jnp.float32),
        by="expert",
        experts=experts,
        seq=seq,
        most_per_sequence=capacity,
        most_per_batch=batch * capacity,
        pairs_per_sequence=experts * capacity,
        shared=shared,
    )


class Slots(NamedTuple):
    """Capacity-padded pairs of flat tokens: tokens i32[experts, capacity], weights f32 and valid bool alike. A slot
    that holds nothing has an index in bounds and weight 0."""

    tokens: jax.Array
    weights: jax.Array
    valid: jax.Array


class RaggedRows(NamedTuple):
    """Pairs of flat tokens sorted by expert: tokens i32[rows], weights f32[rows], group_sizes i32[experts]. Rows past
    the sum of the sizes hold nothing and have weight 0. `place` i32[tokens, k] is each token-major pair's row."""

    tokens: jax.Array
    weights: jax.Array
    group_sizes: jax.Array
    place: jax.Array | None = None


def to_slots(dispatch: Dispatch) -> Slots:
    """The pairs by expert, tokens counted through the batch (`sequence * seq + position`), ascending."""
    d, batch = dispatch, dispatch.batch
    if d.by == "expert":
        starts = (jnp.arange(batch, dtype=jnp.int32) * d.seq)[:, None, None]
        flat = lambda a: a.swapaxes(0, 1).reshape(d.experts, -1)  # noqa: E731
        slots = Slots(flat(d.index + starts), flat(d.weights), flat(d.valid))
        return slots if d.capacity(batch) == slots.tokens.shape[1] else _end_to_end(d, slots)
    rows = to_rows(d)
    capacity = d.capacity(batch)
    starts = jnp.cumsum(rows.group_sizes) - rows.group_sizes
    slot = jnp.arange(capacity, dtype=jnp.int32)
    valid = slot < rows.group_sizes[:, None]
    row = jnp.where(valid, starts[:, None] + slot, 0)
    return Slots(rows.tokens[row], jnp.where(valid, rows.weights[row], 0.0), valid)


def _end_to_end(dispatch: Dispatch, slots: Slots) -> Slots:
    """The slots of sequences that share rows, the valid ones of each group of sequences one behind another."""
    assert dispatch.shared is not None
    sequences, rows = dispatch.shared
    each = dispatch.index.shape[-1]
    counts = dispatch.valid[:, 0].sum(-1, dtype=jnp.int32).reshape(-1, sequences)
    ends = jnp.cumsum(counts, axis=-1)
    row = jnp.arange(rows, dtype=jnp.int32)
    sequence = (ends[:, None] <= row[:, None]).sum(-1, dtype=jnp.int32)  # [groups, rows]
    there = sequence < sequences
    sequence = jnp.minimum(sequence, sequences - 1)
    before = jnp.take_along_axis(ends - counts, sequence, axis=-1)
    first = jnp.arange(len(counts), dtype=jnp.int32)[:, None] * sequences
    source = jnp.where(there, (first + sequence) * each + row - before, 0).reshape(-1)
    there = there.reshape(-1)
    tokens, weights, valid = (a[:, source] for a in slots)
    return Slots(tokens, jnp.where(there, weights, 0.0), valid & there)


def to_rows(dispatch: Dispatch) -> RaggedRows:
    """The pairs sorted by expert, then by token. Expert-major dispatch keeps its empty slots as rows of weight 0."""
    d = dispatch
    if d.by == "expert":
        tokens, weights, _ = to_slots(d)
        sizes = jnp.full(d.experts, tokens.shape[1], jnp.int32)
        return RaggedRows(tokens.reshape(-1), weights.reshape(-1), sizes)
    k = d.index.shape[-1]
    ids = jnp.where(d.valid, d.index, d.experts).reshape(-1)
    number = jnp.arange(ids.size, dtype=jnp.int32)
    _, order = jax.lax.sort((ids, number), num_keys=1, is_stable=True)
    kept = min(d.batch * d.pairs_per_sequence, d.experts * d.capacity(d.batch))
    # Few of many pairs are added row by row, which moves less than gathering k rows for each token.
    few = d.pairs_per_sequence < d.seq * k
    place = None if few else jnp.zeros_like(order).at[order].set(number, unique_indices=True).reshape(-1, k)
    order = order[:kept]
    sizes = count(ids, d.experts).astype(jnp.int32)
    weights = jnp.where(d.valid, d.weights, 0.0).reshape(-1)[order]
    return RaggedRows(order // k, weights, sizes, place)


def count(ids: jax.Array, length: int) -> jax.Array:
    """f32[length]: how often each of 0..length-1 occurs in `ids` i32; others are not counted."""
    # A sum per sequence before the sum over the batch: nothing but the small result moves between devices.
    rows = ids.reshape(ids.shape[0], -1) if ids.ndim > 1 else ids[None]
    once = jax.vmap(lambda row: jnp.zeros(length + 1, jnp.float32).at[jnp.minimum(row, length)].add(1.0))
    return once(rows).sum(0)[:length]
