"""Attention on NVIDIA GPUs: Pallas kernels on Triton that never write the scores (FlashAttention-2, Dao 2023).

Forwards, and for the cotangents of queries, a program takes a block of queries of one head and goes through the blocks
of keys that it sees; for those of keys and values, a program takes a block of keys and goes through the queries of all
heads that read it. No two programs add to the same number, so results do not depend on their order.
Scores are in units of log 2: exponentials are powers of two.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.attention.seen import Seen
from kernels_pallas.attention.tiles import ENTRIES, by_columns, by_rows, padded, tiles, visited
from kernels_pallas.grouped_matmul.varying import shape_like
from kernels_pallas.sizes import sizes

LEAST = 16  # the side of a matrix that Triton's dot takes
LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Queries and keys of a tile, and how the program that works on it is compiled."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


class Blocks(NamedTuple):
    """A tile for each kernel."""

    forward: Tile
    d_q: Tile
    d_kv: Tile


# By the bytes of a head's row, at most. Sizes are those of FlashAttention-2 on Triton for Hopper, within the registers
# of a thread (255) and the shared memory of a program (227 KiB); not measured.
BLOCKS = {
    128: Blocks(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    256: Blocks(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
    512: Blocks(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 64, 8, 2)),
    1024: Blocks(Tile(32, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 8, 2)),
}


class _Plan(NamedTuple):
    """What is the same for every program of a kernel."""

    queries: int
    keys: int
    group: int  # heads that read the same keys
    dim: int
    v_dim: int
    soft_cap: float
    tile: Tile


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    *,
    soft_cap: float = 0.0,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The result, and f32[batch, heads, queries]: the logarithm of the sum of the exponentials of a query's scores.

    q         [batch, queries, heads, head_dim]
    k, v      [batch, keys, kv_heads, head_dim] in q's dtype; head h reads key head h // (heads / kv_heads). v may have
              another number of channels than q and k
    soft_cap  scores become soft_cap * tanh(scores / soft_cap); 0: they stay
    returns   [batch, queries, heads, channels of v] in q's dtype; 0, and -inf, of a query that sees nothing
    """
    plan = _plan(q, k, v, (blocks or _blocks(q, v)).forward, soft_cap)
    visits, seen = _visits(seen, plan, q.shape[0], by_rows)
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], seen.first.shape[1]), jnp.float32)
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    out, lse = _call(_forward_kernel, plan, (visits, seen, q, k, v), (out, lse), matmuls=2, interpret=interpret)
    return out, lse[..., : plan.queries]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    delta: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    soft_cap: float = 0.0,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `blocked.backward`."""
    blocks = blocks or _blocks(q, v)
    lse, d_out = lse * LOG2E, d_out.astype(q.dtype)

    def inputs(plan: _Plan, by: Callable) -> tuple[Any, ...]:
        rest = ((0, 0), (0, 0), (0, -plan.queries % plan.tile.queries))
        return *_visits(seen, plan, q.shape[0], by), q, k, v, d_out, jnp.pad(lse, rest), jnp.pad(delta, rest)

    plan = _plan(q, k, v, blocks.d_q, soft_cap)
    (d_q,) = _call(_d_q_kernel, plan, inputs(plan, by_rows), (q,), matmuls=3, interpret=interpret)
    plan = _plan(q, k, v, blocks.d_kv, soft_cap)
    d_k, d_v = _call(_d_kv_kernel, plan, inputs(plan, by_columns), (k, v), matmuls=4, interpret=interpret, columns=True)
    return d_q, d_k, d_v


def _forward_kernel(visits_ref, seen_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, plan):
    at = pl.num_programs(1) - 1 - pl.program_id(1)  # first those that see many keys
    size, count, *_ = plan.tile
    start = at * size
    q, rows = _load(q_ref, start, size, plan.queries, plan.dim), _queries(seen_ref, start, size)

    def step(block, _, carry, masked):
        out, top, total = carry
        begin, most = block * count, plan.keys if masked else 0
        k, v = _load(k_ref, begin, count, most, plan.dim), _load(v_ref, begin, count, most, plan.v_dim)
        scores, _ = _scores(q, k, plan)
        if masked:
            scores = jnp.where(_sees(rows, *_keys(seen_ref, begin, count)), scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(axis=1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        weights, kept = jnp.exp2(scores - base[:, None]), jnp.exp2(top - base)
        out = out * kept[:, None] + plt.dot(weights.astype(v.dtype), v)
        return out, new, total * kept + weights.sum(axis=1)

    none = jnp.full((size,), -jnp.inf, jnp.float32), jnp.zeros((size,), jnp.float32)
    out, top, total = _visit(visits_ref, at, step, (jnp.zeros((size, out_ref.shape[1]), jnp.float32), *none))
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    _store(out_ref, out / divisor[:, None], start, plan.queries, plan.v_dim)
    lse_ref[pl.ds(start, size)] = jnp.where(some, (top + jnp.log2(divisor)) / LOG2E, -jnp.inf)


def _d_q_kernel(visits_ref, seen_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref, *, plan):
    at = pl.num_programs(1) - 1 - pl.program_id(1)
    size, count, *_ = plan.tile
    start = at * size
    q = _load(q_ref, start, size, plan.queries, plan.dim)
    d_out = _load(d_out_ref, start, size, plan.queries, plan.v_dim)
    lse, delta = lse_ref[pl.ds(start, size)], delta_ref[pl.ds(start, size)]
    rows = _queries(seen_ref, start, size)

    def step(block, _, d_q, masked):
        begin, most = block * count, plan.keys if masked else 0
        k, v = _load(k_ref, begin, count, most, plan.dim), _load(v_ref, begin, count, most, plan.v_dim)
        scores, slope = _scores(q, k, plan)
        weights = jnp.exp2(scores - lse[:, None])
        if masked:
            weights = jnp.where(_sees(rows, *_keys(seen_ref, begin, count)), weights, 0.0)
        d_scores = weights * (plt.dot(d_out, v, trans_b=True) - delta[:, None]) * slope
        return d_q + plt.dot(d_scores.astype(k.dtype), k)

    d_q = _visit(visits_ref, at, step, jnp.zeros((size, d_q_ref.shape[1]), jnp.float32))
    _store(d_q_ref, d_q * plan.dim**-0.5, start, plan.queries, plan.dim)


def _d_kv_kernel(visits_ref, seen_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, *, plan):
    at = pl.program_id(1)
    size, count, *_ = plan.tile
    begin = at * count
    k, v = _load(k_ref, begin, count, plan.keys, plan.dim), _load(v_ref, begin, count, plan.keys, plan.v_dim)
    slots, tags = _keys(seen_ref, begin, count)

    def step(block, head, carry, masked):
        d_k, d_v = carry
        start = block * size
        q = _load(q_ref, start, size, plan.queries, plan.dim, head)
        d_out = _load(d_out_ref, start, size, plan.queries, plan.v_dim, head)
        lse, delta = lse_ref[head, pl.ds(start, size)], delta_ref[head, pl.ds(start, size)]
        scores, slope = _scores(k, q, plan)
        weights = jnp.exp2(scores - lse[None, :])
        if masked:
            rows = _queries(seen_ref, start, size)
            weights = jnp.where(_sees(rows, slots, tags, columns=True), weights, 0.0)
        d_v = d_v + plt.dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (plt.dot(v, d_out, trans_b=True) - delta[None, :]) * slope
        return d_k + plt.dot(d_scores.astype(q.dtype), q), d_v

    zeros = tuple(jnp.zeros((count, ref.shape[1]), jnp.float32) for ref in (d_k_ref, d_v_ref))
    d_k, d_v = _visit(visits_ref, at, step, zeros, plan.group)
    _store(d_k_ref, d_k * plan.dim**-0.5, begin, plan.keys, plan.dim)
    _store(d_v_ref, d_v, begin, plan.keys, plan.v_dim)


def _visit(visits_ref: Any, at: jax.Array, step: Callable, carry: Any, group: int = 1) -> Any:
    """The carry after step(block, head, carry, masked) for each block of a row of visits, and each head of a group."""
    leading, begin, full, full_end, masked = (visits_ref[at, i] for i in range(ENTRIES))

    def split(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (lax.div(t, np.int32(group)), lax.rem(t, np.int32(group))) if group > 1 else (t, jnp.zeros_like(t))

    def plain(t: jax.Array, carry: Any) -> Any:
        block, head = split(t)
        return step(full + block, head, carry, masked=False)

    def partial(t: jax.Array, carry: Any) -> Any:
        block, head = split(t)
        return step(visited(block, leading, begin, full, full_end), head, carry, masked=True)

    carry = lax.fori_loop(0, (full_end - full) * group, plain, carry)
    return lax.fori_loop(0, masked * group, partial, carry)


def _scores(a: jax.Array, b: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array | float]:
    """Scores of queries and keys, in either order, in units of log 2; what the cap multiplies their cotangents by."""
    product, scale = plt.dot(a, b, trans_b=True), plan.dim**-0.5
    if not plan.soft_cap:
        return product * (scale * LOG2E), 1.0
    part = jnp.tanh(product * (scale / plan.soft_cap))
    return part * (plan.soft_cap * LOG2E), 1.0 - part * part


def _sees(rows: Seen, slots: jax.Array, tags: jax.Array | None, columns: bool = False) -> jax.Array:
    """bool[queries, keys], with `columns` bool[keys, queries]: which queries see which keys."""
    row = lambda x: x[None, :] if columns else x[:, None]  # noqa: E731
    column = lambda x: x[:, None] if columns else x[None, :]  # noqa: E731
    sees = row(rows.first) <= column(slots)
    if rows.sinks is not None:
        sees = sees | (column(slots) < row(rows.sinks))
    sees = sees & (column(slots) < row(rows.end))
    return sees if tags is None else sees & (row(rows.q_tags) == column(tags))


def _queries(seen_ref: Seen, start: jax.Array, size: int) -> Seen:
    """What tells of a block of queries."""
    return jax.tree.map(lambda ref: ref[pl.ds(start, size)], seen_ref._replace(k_tags=None))


def _keys(seen_ref: Seen, begin: jax.Array, count: int) -> tuple[jax.Array, jax.Array | None]:
    """Slots and tags of a block of keys."""
    tags = None if seen_ref.k_tags is None else seen_ref.k_tags[pl.ds(begin, count)]
    return begin + jnp.arange(count, dtype=jnp.int32), tags


def _load(ref: Any, start: jax.Array, size: int, total: int, dim: int, head: jax.Array | None = None) -> jax.Array:
    """[size, wide] from a row on, zeros past `total` rows (0: all are there) and `dim` channels."""
    wide = ref.shape[-1]
    at = (pl.ds(start, size), slice(None)) if head is None else (pl.ds(start, size), head, slice(None))
    mask = _inside(start, (size, wide), total, dim)
    return plt.load(ref.at[at], mask=mask, other=None if mask is None else 0.0)


def _store(ref: Any, value: jax.Array, start: jax.Array, total: int, dim: int) -> None:
    mask = _inside(start, value.shape, total, dim)
    plt.store(ref.at[pl.ds(start, value.shape[0]), :], value.astype(ref.dtype), mask=mask)


def _inside(start: jax.Array, shape: tuple[int, ...], total: int, dim: int) -> jax.Array | None:
    """Which entries of a block of rows are in an array with `total` rows of `dim` channels; None: all."""
    rows = start + jnp.arange(shape[0], dtype=jnp.int32) < total if total % shape[0] else None
    channels = jnp.arange(shape[1], dtype=jnp.int32) < dim if dim < shape[1] else None
    masks = [mask[:, None] for mask in (rows,) if mask is not None]
    masks += [mask[None, :] for mask in (channels,) if mask is not None]
    return None if not masks else jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape)


def _plan(q: jax.Array, k: jax.Array, v: jax.Array, tile: Tile, soft_cap: float) -> _Plan:
    side = lambda most, x: min(most, max(LEAST, pl.next_power_of_2(x.shape[1])))  # noqa: E731
    tile = tile._replace(queries=side(tile.queries, q), keys=side(tile.keys, k))
    return _Plan(q.shape[1], k.shape[1], q.shape[2] // k.shape[2], q.shape[3], v.shape[3], soft_cap, tile)


def _blocks(q: jax.Array, v: jax.Array) -> Blocks:
    row = pl.next_power_of_2(max(q.shape[-1], v.shape[-1])) * q.dtype.itemsize
    most = min((size for size in BLOCKS if size >= row), default=max(BLOCKS))
    usual = BLOCKS[most]._asdict().items()
    return Blocks(*(Tile(*sizes(f"attention/gpu/{kernel}/{most}", tile)) for kernel, tile in usual))


def _visits(seen: Seen, plan: _Plan, batch: int, by: Callable) -> tuple[jax.Array, Seen]:
    """The table of visits, and `seen` by whole blocks."""
    sides = plan.tile.queries, plan.tile.keys
    seen = padded(seen, batch, plan.keys, *sides)
    return by(tiles(seen, plan.queries, plan.keys, *sides)), seen


def _call(
    kernel: Callable,
    plan: _Plan,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    *,
    matmuls: int,
    interpret: bool,
    columns: bool = False,
) -> Any:
    """Runs the kernel for every (head, block, row): a head and a block of queries, or in `columns` those of keys.

    inputs   visits, seen, q, k, v; or these and d_out, lse, delta
    outputs  what is like q, or in `columns` like k; or f32[batch, heads, queries]
    """
    visits, seen, q, k, v, *rest = inputs
    group, numbers = plan.group, seen.first.shape[1]
    heads = group if columns else None  # of a program
    key_head = (lambda h: h) if columns else lambda h: lax.div(h, np.int32(group))
    wide = lambda x: max(LEAST, pl.next_power_of_2(x.shape[-1]))  # noqa: E731

    def query(x: Any) -> pl.BlockSpec:
        if x.ndim == 3:
            return pl.BlockSpec((None, heads, numbers), lambda h, i, b: (b, h, 0))
        return pl.BlockSpec((None, plan.queries, heads, wide(x)), lambda h, i, b: (b, 0, h, 0))

    def key(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, plan.keys, None, wide(x)), lambda h, i, b: (b, 0, key_head(h), 0))

    def row(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda h, i, b: (b, *[0] * (x.ndim - 1)))

    pairs = q.shape[0] * q.shape[2] * plan.queries * plan.keys // 2
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        out_shape=tuple(shape_like(q, x.shape, x.dtype) for x in outputs),
        grid=((k if columns else q).shape[2], visits.shape[1], q.shape[0]),  # neighbouring programs share their keys
        in_specs=(row(visits), jax.tree.map(row, seen), query(q), key(k), key(v), *map(query, rest)),
        out_specs=tuple(map(key if columns else query, outputs)),
        compiler_params=plt.CompilerParams(num_warps=plan.tile.warps, num_stages=plan.tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * pairs * plan.dim, transcendentals=pairs, bytes_accessed=moved
        ),
        interpret=interpret,
        name="attention" + kernel.__name__.removesuffix("_kernel").removesuffix("_forward"),
    )(*inputs)
