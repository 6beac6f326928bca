"""Attention over listed key blocks: each query block visits its own list, and time and memory follow the lists.

`reference` is the specification. On TPUs `tpu`, on NVIDIA GPUs `gpu`, elsewhere `blocks` (`kernels_pallas.choice`).
`table` makes the lists.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import blocks, gpu, tpu
from kernels_pallas.block_sparse_attention.table import WORD, BlockTable, from_choices, from_map, to_map, transposed
from kernels_pallas.block_sparse_attention.tiles import Lists, Rule
from kernels_pallas.checks import checking, require
from kernels_pallas.choice import by_platform
from kernels_pallas.grouped_matmul.varying import alike

__all__ = ["BlockTable", "block_sparse_attention", "from_choices", "from_map", "runs_on", "to_map", "transposed"]

DTYPES = ("float32", "bfloat16")
MOST = 2**18  # scores of a tile: a few such matrices in float32 fit the fast memory of a TPU's core


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    own = {"tpu": "Pallas for TPUs", "gpu": "Pallas through Triton"}
    return own.get(platform, "listed tiles in XLA: Pallas kernels are for TPUs and NVIDIA GPUs")


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    counts: jax.Array,
    *,
    query_block: int,
    key_block: int,
    q_index: jax.Array | None = None,
    k_index: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    row_bits: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    soft_cap: float = 0.0,
    with_lse: bool = False,
) -> Any:
    """softmax(q k^T / sqrt(head_dim)) v over the keys of the listed blocks that pass every test below.

    q           [batch, queries, heads, head_dim]; query head h reads key head h // (heads / kv_heads)
    k           [batch, keys, kv_heads, head_dim] in q's dtype: float32 or bfloat16
    v           [batch, keys, kv_heads, value_dim] in q's dtype
    table       i32[batch or 1, kv_heads or heads or 1, query blocks, slots]: the key blocks that each query block
                visits, ascending, each at most once; heads: a list for each query head, at the price of keys and values
                repeated for each
    counts      i32[batch or 1, likewise, query blocks]: how many entries of a list count, 0 to slots; those after them
                should repeat the last one, which costs no copy
    query_block, key_block   positions of a block; the last block may be cut short. One query to a block: a choice per
                query, or a step of generation. query_block * key_block is at most 2^18
    q_index, k_index  i32[batch or 1, queries], i32[batch or 1, keys]: positions in the row; None: 0, 1, 2, ...
    q_segments, k_segments  i32[batch or 1, ...], both or neither: a query sees keys of its own number; 0 is padding,
                which sees nothing and is not seen
    row_bits    u32[batch or 1, as table, query blocks, query_block, ceil(slots / 32)]: bit j % 32 of word j // 32 of a
                query says whether it sees slot j of its block's list (`from_choices`); None: all of them
    causal      whether a query sees no later key than its own position
    window      how many positions a query sees, its own the last of them; 0: all. Not causal: as many on either side
    sinks       positions from 0 that are seen past the window, too
    soft_cap    scores become soft_cap * tanh(scores / soft_cap); 0: they stay
    returns     [batch, queries, heads, value_dim] in q's dtype; with `with_lse` also f32[batch, heads, queries], the
                log of the sum of the exponentials of the scores. A query that sees nothing has 0 and -inf

    Softmax and sums are float32. Gradients are those of q, k and v, also through the log-sum-exp, so that results over
    disjoint keys can be merged; the backward pass keeps the arguments and both results, and no scores. On several TPUs
    or GPUs it must be called inside `jax.shard_map`, as every kernel. A TPU holds the lists of a call in scalar memory:
    past 98,304 slots each row and key head is a call of its own, and a single head with more is computed in XLA.

    Raises ValueError for shapes, dtypes and sizes that do not match. That lists are ascending, without repetition and
    in range is looked at where ADAPTIVE_CHECKS is set.
    """
    lists = Lists(table, counts, row_bits, q_index, k_index, q_segments, k_segments)
    rule = Rule(query_block, key_block, *_sizes(q, k, v), q.shape[-1], causal, int(window), int(sinks), float(soft_cap))
    _check(rule, q, k, v, lists)
    if checking():
        _check_lists(rule, table, counts)
    k, v = (shared_by(table, x, q.shape[2]) for x in (k, v))
    leaves, form = jax.tree.flatten((q, k, v, lists))
    out, lse = _attention(rule, *jax.tree.unflatten(form, alike(*leaves)))
    return (out, lse) if with_lse else out


def attend(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists) -> tuple[jax.Array, jax.Array]:
    """The result and its log-sum-exp, without a gradient; k and v as of `shared_by`."""
    of = lambda form: functools.partial(form.forward, rule)  # noqa: E731
    return by_platform(q, k, v, lists, tpu=of(tpu), cuda=of(gpu), default=of(blocks))


def pulled(
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
    """What these keys contribute to the cotangents of q, k and v, for `attend` over these and others.

    out, lse, d_out, d_lse  of all of them: the result, its log-sum-exp, and the cotangents of both
    """
    of = lambda form: functools.partial(form.backward, rule)  # noqa: E731
    return by_platform(q, k, v, lists, out, lse, d_out, d_lse, tpu=of(tpu), cuda=of(gpu), default=of(blocks))


def shared_by(table: jax.Array, x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [batch, keys, kv_heads, d], once for each query head if these have lists of their own."""
    return x if table.shape[1] in (1, x.shape[2]) else jnp.repeat(x, heads // x.shape[2], axis=2)


_attention = jax.custom_vjp(attend, nondiff_argnums=(0,))


def _attention_forward(rule, q, k, v, lists):
    out, lse = attend(rule, q, k, v, lists)
    return (out, lse), (q, k, v, lists, out, lse)


def _attention_backward(rule, kept, cotangents):
    return *pulled(rule, *kept, *cotangents), None


_attention.defvjp(_attention_forward, _attention_backward)


def _sizes(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[int, int]:
    """How many queries and keys there are."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} is {x.shape}: must be [batch, positions, heads, head_dim], none of them 0")
        if x.dtype != q.dtype or x.dtype.name not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}, q {q.dtype}: must be the same, {' or '.join(DTYPES)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3] or q.shape[2] % k.shape[2]:
        need = (
            "[batch, keys, kv_heads, head_dim], kv_heads a divisor of q's heads, and v likewise but for its last axis"
        )
        raise ValueError(f"k is {k.shape}, v {v.shape}, q {q.shape}: k must be {need}")
    return q.shape[1], k.shape[1]


def _check(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists) -> None:
    for name, least in (("query_block", 1), ("key_block", 1), ("window", 0), ("sinks", 0), ("soft_cap", 0)):
        if getattr(rule, name) < least:
            raise ValueError(f"{name} is {getattr(rule, name)}: must be at least {least}")
    if rule.query_block * rule.key_block > MOST:
        raise ValueError(f"query_block {rule.query_block} * key_block {rule.key_block}: must be at most {MOST}")
    (batch, _, heads, _), kv_heads, given = q.shape, k.shape[2], lists.table
    if given.ndim != 4 or 0 in given.shape:
        raise ValueError(
            f"table is {given.shape}: must be [batch or 1, heads or 1, query blocks, slots], none of them 0"
        )
    any_heads = sorted({1, kv_heads, heads})
    if given.shape[0] not in (1, batch) or given.shape[1] not in any_heads or given.shape[2] != rule.query_blocks:
        need = f"[{batch} or 1, {' or '.join(map(str, any_heads))}, {rule.query_blocks}, slots]"
        sizes = f"{rule.queries} queries in blocks of {rule.query_block}"
        raise ValueError(f"table is {given.shape}: must be {need} for q {q.shape}, {sizes}, and k {k.shape}")
    words = -(-given.shape[3] // WORD)
    row = lambda n: ((batch, n), (1, n))  # noqa: E731
    expected = {
        "table": ("int32", (given.shape,)),
        "counts": ("int32", (given.shape[:3],)),
        "row_bits": ("uint32", ((*given.shape[:3], rule.query_block, words),)),
        "q_index": ("int32", row(rule.queries)),
        "k_index": ("int32", row(rule.keys)),
        "q_segments": ("int32", row(rule.queries)),
        "k_segments": ("int32", row(rule.keys)),
    }
    for name, (dtype, shapes) in expected.items():
        x = getattr(lists, name)
        if x is not None and (x.dtype.name != dtype or x.shape not in shapes):
            need = " or ".join(dict.fromkeys(f"{dtype}{[*shape]}" for shape in shapes))
            raise ValueError(f"{name} is {x.dtype}{[*x.shape]}: must be {need}")
    if (lists.q_segments is None) != (lists.k_segments is None):
        raise ValueError("q_segments and k_segments: must both be given, or neither")
    if rule.sinks and not rule.window:
        raise ValueError(f"sinks is {rule.sinks} and window 0, with which all positions are seen: must be 0")


def _check_lists(rule: Rule, table: jax.Array, counts: jax.Array) -> None:
    slots = table.shape[-1]
    listed = jnp.arange(slots, dtype=jnp.int32) < counts[..., None]
    rising = (table[..., 1:] > table[..., :-1]) | ~listed[..., 1:]
    require(((counts >= 0) & (counts <= slots)).all(), f"counts: must be 0 to {slots}, the slots of table")
    within = (table >= 0) & (table < rule.key_blocks)
    require((within | ~listed).all(), f"table: entries must be 0 to {rule.key_blocks - 1}, key blocks of the keys")
    require(rising.all(), "table: the entries of a list must be ascending, each at most once")
