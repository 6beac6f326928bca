"""Cases that operations are measured and checked on: random inputs, the form in use, the reference, least costs."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.objectives.cross_entropy import cross_entropy_sum
from adaptive.routing.rows import add_rows, take_rows
from adaptive.routing.select import select_top
from kernels_pallas.attention import attention
from kernels_pallas.block_sparse_attention import block_sparse_attention, from_map
from kernels_pallas.block_sparse_attention import reference as block_reference
from kernels_pallas.choice import here
from kernels_pallas.ema import ema
from kernels_pallas.ema import reference as ema_reference
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul import reference as grouped_reference
from kernels_pallas.ssd import reference as ssd_reference
from kernels_pallas.ssd import ssd

Way = Callable[..., Any]


class Least(NamedTuple):
    """What a form cannot do without: FLOPs of matmuls, bytes that are read and written once."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Case:
    """operation  whose form `runs_on` of the package names; "routing" and "loss" are of adaptive
    shape      in words
    form       the operation as it is used; reference: its specification, another program
    inputs     of both; those at `wrt` get gradients
    forward    least costs of the forward pass; both: with the backward pass
    stock      a library's kernel for the same, measured beside them on GPUs
    """

    name: str
    operation: str
    shape: str
    form: Way
    reference: Way
    inputs: tuple[jax.Array, ...]
    wrt: tuple[int, ...]
    forward: Least
    both: Least
    stock: Way | None = None


class Sizes(NamedTuple):
    """Of the inputs: a row of `seq` positions in so many rows, and what a layer of the 360M shape has."""

    rows: int
    seq: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    experts: int


SMALL = Sizes(rows=1, seq=512, heads=3, kv_heads=1, width=256, vocab=2048, experts=8)
LARGE = Sizes(rows=8, seq=2048, heads=15, kv_heads=5, width=960, vocab=49152, experts=8)
HEAD_DIM, BLOCK, STATE = 64, 128, 128


def cases(sizes: Sizes, dtype: jnp.dtype) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The cases by name; making one draws its inputs."""
    of: dict[str, Callable[[Sizes, jnp.dtype], Case]] = {
        "attention, causal": causal,
        "attention, packed documents": packed,
        "attention, KV sharing": shared_keys,
        "attention, window": window,
        "block-sparse attention": block_sparse,
        "moving average": moving_average,
        "state space scan": scan,
        "grouped matmul": grouped,
        "cross-entropy": loss,
        "select": select,
        "gather": gather,
        "scatter": scatter,
    }
    for name, make in of.items():
        yield name, lambda make=make: make(sizes, dtype)  # type: ignore[misc]


def draw(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Attention


def _attention(
    name: str,
    s: Sizes,
    dtype: jnp.dtype,
    pairs: float,
    *,
    index: jax.Array | None = None,
    reach: int = 0,
    segments: jax.Array | None = None,
) -> Case:
    """Attention of all or, at the positions `index`, some queries over all keys; pairs: of a row that are attended."""
    queries = s.seq if index is None else index.shape[1]
    q = draw(0, (s.rows, queries, s.heads, HEAD_DIM), dtype)
    k, v = (draw(seed, (s.rows, s.seq, s.kv_heads, HEAD_DIM), dtype) for seed in (1, 2))

    def form(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, q_index=index, window=reach, q_segments=segments, k_segments=segments)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with here("reference"):
            return form(q, k, v)

    flops = 4.0 * s.rows * s.heads * HEAD_DIM * pairs
    moved = 2.0 * (q.nbytes + k.nbytes)
    shape = f"{s.rows} x {queries} of {s.seq}, {s.heads} heads of {HEAD_DIM} over {s.kv_heads}"
    least = Least(flops, moved), Least(3.5 * flops, 4 * moved)
    return Case(name, "attention", shape, form, reference, (q, k, v), (0, 1, 2), *least)


def causal(s: Sizes, dtype: jnp.dtype) -> Case:
    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    case = _attention("attention, causal", s, dtype, s.seq * (s.seq + 1) / 2)
    return dataclasses.replace(case, stock=cudnn)


def packed(s: Sizes, dtype: jnp.dtype) -> Case:
    """Documents of an eighth, three eighths and half of a row."""
    lengths = (s.seq // 8, 3 * s.seq // 8, s.seq // 2)
    segments = np.tile(np.repeat([1, 2, 3], lengths).astype(np.int32), (s.rows, 1))
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return _attention("attention, packed documents", s, dtype, pairs, segments=jnp.asarray(segments))


def window(s: Sizes, dtype: jnp.dtype) -> Case:
    reach = s.seq // 4
    pairs = sum(min(i + 1, reach) for i in range(s.seq))
    return _attention("attention, window", s, dtype, pairs, reach=reach)


def shared_keys(s: Sizes, dtype: jnp.dtype) -> Case:
    """A third of the positions as queries over the keys of all."""
    index = _some(s, s.seq // 3)
    pairs = float((index + 1).sum() / s.rows)
    return _attention("attention, KV sharing", s, dtype, pairs, index=jnp.asarray(index))


def _some(s: Sizes, count: int) -> np.ndarray:
    """i32[rows, count]: ascending positions."""
    rng = np.random.default_rng(0)
    return np.stack([np.sort(rng.permutation(s.seq)[:count]) for _ in range(s.rows)]).astype(np.int32)


def block_sparse(s: Sizes, dtype: jnp.dtype) -> Case:
    """Each query block visits its own key block and, of the earlier ones, a quarter of all blocks at most."""
    blocks = s.seq // BLOCK
    scores = np.random.default_rng(0).random((1, 1, blocks, blocks), np.float32)
    scores[..., np.arange(blocks), np.arange(blocks)] = 2
    table = from_map(jnp.tril(jnp.ones((1, 1, blocks, blocks), bool)), max(2, blocks // 4), jnp.asarray(scores))[0]
    q = draw(0, (s.rows, s.seq, s.heads, HEAD_DIM), dtype)
    k, v = (draw(seed, (s.rows, s.seq, s.kv_heads, HEAD_DIM), dtype) for seed in (1, 2))

    def form(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return block_sparse_attention(q, k, v, *table, query_block=BLOCK, key_block=BLOCK)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return block_reference.block_sparse_attention(q, k, v, *table, query_block=BLOCK, key_block=BLOCK)[0]

    tiles = int(table.counts.sum())
    pairs = (tiles - blocks) * BLOCK**2 + blocks * BLOCK * (BLOCK + 1) / 2
    flops = 4.0 * s.rows * s.heads * HEAD_DIM * pairs
    moved = 2.0 * (q.nbytes + k.nbytes)
    shape = f"{s.rows} x {s.seq}, {tiles} of {blocks * (blocks + 1) // 2} tiles of {BLOCK}"
    least = Least(flops, moved), Least(3.5 * flops, 4 * moved)
    return Case(
        "block-sparse attention", "block_sparse_attention", shape, form, reference, (q, k, v), (0, 1, 2), *least
    )


# Recurrences


def moving_average(s: Sizes, dtype: jnp.dtype) -> Case:
    z = draw(0, (s.rows, s.seq, s.width), dtype)
    p = jax.random.uniform(jax.random.key(1), z.shape[:2])
    moved = z.nbytes + 4.0 * z.size
    shape = f"{s.rows} x {s.seq} x {s.width}"
    least = Least(0, moved), Least(0, 3 * moved)
    return Case("moving average", "ema", shape, ema, ema_reference.ema, (z, p), (0, 1), *least)


def scan(s: Sizes, dtype: jnp.dtype) -> Case:
    """Of fewer rows than the others: gradients of the reference keep the state of every position."""
    s, heads = s._replace(rows=max(1, s.rows // 4)), 2 * s.heads
    x = draw(0, (s.rows, s.seq, heads, HEAD_DIM), dtype)
    low, high = math.log(1e-3), math.log(0.1)
    dt = jnp.exp(jax.random.uniform(jax.random.key(1), x.shape[:3], minval=low, maxval=high))
    a = -jax.random.uniform(jax.random.key(2), (heads,), minval=1, maxval=16)
    b, c = (draw(seed, (s.rows, s.seq, STATE), dtype) for seed in (3, 4))
    inner = heads * HEAD_DIM
    flops = s.rows * s.seq * ((BLOCK + 1) * (STATE + inner) + 4.0 * inner * STATE)
    moved = 2.0 * x.nbytes + b.nbytes + c.nbytes
    shape = f"{s.rows} x {s.seq}, {heads} heads of {HEAD_DIM}, state {STATE}"

    def form(*inputs: jax.Array) -> jax.Array:
        return ssd(*inputs)[0]

    def reference(*inputs: jax.Array) -> jax.Array:
        return ssd_reference.ssd(*inputs)[0]

    least = Least(flops, moved), Least(3 * flops, 3 * moved)
    return Case("state space scan", "ssd", shape, form, reference, (x, dt, a, b, c), (0, 1, 2, 3, 4), *least)


# Experts and loss


def grouped(s: Sizes, dtype: jnp.dtype) -> Case:
    """Groups of sizes like 1 / rank."""
    rows, hidden = 2 * s.rows * s.seq, 2 * s.width
    share = 1 / (np.arange(s.experts) + 1)
    groups = np.floor(share / share.sum() * rows).astype(np.int32)
    groups[0] += rows - groups.sum()
    x = draw(0, (rows, s.width), dtype)
    weights = draw(1, (s.experts, s.width, hidden), dtype) / math.sqrt(s.width)
    flops = 2.0 * rows * s.width * hidden
    moved = x.nbytes + weights.nbytes + rows * hidden * jnp.dtype(dtype).itemsize
    shape = f"{rows} x {s.width} by {s.experts} x {s.width} x {hidden}, skewed"
    sizes, least = jnp.asarray(groups), (Least(flops, moved), Least(3 * flops, 3.0 * moved))

    def form(x: jax.Array, weights: jax.Array) -> jax.Array:
        return grouped_matmul(x, weights, sizes)

    def reference(x: jax.Array, weights: jax.Array) -> jax.Array:
        return grouped_reference.grouped_matmul(x, weights, sizes)

    return Case("grouped matmul", "grouped_matmul", shape, form, reference, (x, weights), (0, 1), *least)


def loss(s: Sizes, dtype: jnp.dtype) -> Case:
    """The mean over all positions, computed in chunks, against all logits at once."""
    hidden = draw(0, (s.rows, s.seq, s.width), dtype)
    table = draw(1, (s.vocab, s.width), dtype) / math.sqrt(s.width)
    targets = jax.random.randint(jax.random.key(2), (s.rows, s.seq), 0, s.vocab)
    count = s.rows * s.seq

    def form(hidden: jax.Array, table: jax.Array) -> jax.Array:
        mask = jnp.ones(targets.shape, jnp.float32)
        return cross_entropy_sum(hidden, table, targets, mask, s.seq // 8)[0] / count

    def reference(hidden: jax.Array, table: jax.Array) -> jax.Array:
        logits = jnp.einsum("bsd,vd->bsv", hidden, table, preferred_element_type=jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()

    flops, moved = 2.0 * count * s.width * s.vocab, float(hidden.nbytes + table.nbytes)
    least = Least(flops, moved), Least(3 * flops, 3 * moved)
    shape = f"{count} x {s.width} by {s.vocab}"
    return Case("cross-entropy", "loss", shape, form, reference, (hidden, table), (0, 1), *least)


# Routing


def select(s: Sizes, dtype: jnp.dtype) -> Case:
    capacity = s.seq // 3
    scores = jax.random.normal(jax.random.key(0), (s.rows, s.seq))

    def form(scores: jax.Array) -> jax.Array:
        return select_top(scores, scores, capacity).indices.astype(jnp.float32)

    def reference(scores: jax.Array) -> jax.Array:
        return jnp.sort(jax.lax.top_k(scores, capacity)[1], axis=-1).astype(jnp.float32)

    least = Least(0, scores.nbytes)
    return Case("select", "routing", f"{s.rows} x {capacity} of {s.seq}", form, reference, (scores,), (), least, least)


def gather(s: Sizes, dtype: jnp.dtype) -> Case:
    count = s.seq // 3
    index = jnp.asarray(_some(s, count))
    x = draw(0, (s.rows, s.seq, s.width), dtype)

    def form(x: jax.Array) -> jax.Array:
        return take_rows(x, index)

    def reference(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index[..., None], axis=1)

    rows = x.nbytes / s.seq * count
    shape = f"{s.rows} x {count} of {s.seq} x {s.width}"
    least = Least(0, 2 * rows), Least(0, 3 * rows + x.nbytes)
    return Case("gather", "routing", shape, form, reference, (x,), (0,), *least)


def scatter(s: Sizes, dtype: jnp.dtype) -> Case:
    count = s.seq // 3
    index = jnp.asarray(_some(s, count))
    x, rows = draw(0, (s.rows, s.seq, s.width), dtype), draw(1, (s.rows, count, s.width), dtype)

    def form(x: jax.Array, rows: jax.Array) -> jax.Array:
        return add_rows(x, index, rows)

    def reference(x: jax.Array, rows: jax.Array) -> jax.Array:
        return x.at[jnp.arange(s.rows)[:, None], index].add(rows)

    shape = f"{s.rows} x {count} into {s.seq} x {s.width}"
    least = Least(0, 2 * x.nbytes + rows.nbytes), Least(0, 4 * x.nbytes + 3 * rows.nbytes)
    return Case("scatter", "routing", shape, form, reference, (x, rows), (0, 1), *least)
