"""From chunk boundaries to a Selection with static shapes, and back to every position."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.routing.chunks import begins
from adaptive.routing.types import Selection, Summed
from kernels_pallas.ema import ema

LEAST = (
    1e-4  # a boundary's probability is clipped to [LEAST, 1 - LEAST] before it smooths (released code, modules/dc.py)
)
NEAR_HALF = 0.05


class Boundaries(NamedTuple):
    """Where chunks begin: probability f32[batch, n] and decision bool[batch, n] of every position."""

    prob: jax.Array
    wanted: jax.Array


def select_boundaries(
    boundaries: Boundaries, capacity: int, slots: int | None = None
) -> tuple[Selection, jax.Array]:  # fmt: skip
    """(the first `capacity` wanted boundaries of each row, in so many slots or more, bool[batch, n] where they are).

    The slots that hold a boundary come first. Those past the capacity are demoted: their positions join the last chunk
    that found a slot. That is causal, since whether a slot is left depends on the past alone; to keep the most probable
    ones would let a position see later ones.
    """
    wanted, n = boundaries.wanted, boundaries.wanted.shape[1]
    rank = jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - 1
    mask = wanted & (rank < capacity)
    count = mask.sum(1, keepdims=True, dtype=jnp.int32)
    others = jnp.cumsum(~mask, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(mask, rank, count + others)  # a permutation, so that no two slots share a position

    @jax.vmap
    def inverse(slot: jax.Array) -> jax.Array:
        position = jnp.arange(n, dtype=jnp.int32)
        return jnp.zeros(n, jnp.int32).at[slot].set(position, mode="promise_in_bounds", unique_indices=True)

    slots = capacity if slots is None else slots
    indices = inverse(slot)[:, :slots]
    valid = jnp.arange(slots, dtype=jnp.int32) < count
    return Selection(indices, jnp.where(valid, gather(boundaries.prob, indices), 0.0), valid), mask


@jax.vmap
def gather(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [batch, n, ...] at i32[batch, k], unique within a row but in any order -> [batch, k, ...]."""
    return x.at[indices].get(mode="promise_in_bounds", unique_indices=True)


@jax.vmap
def scatter(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x [batch, n, ...] with the positions i32[batch, k], unique within a row, replaced by rows [batch, k, ...]."""
    return x.at[indices].set(rows, mode="promise_in_bounds", unique_indices=True)


def running_sum(x: jax.Array) -> jax.Array:
    """f32 of the shape of x [batch, n, width]: the sum of each position and those before it."""
    return jnp.cumsum(x.astype(jnp.float32), axis=1)


def merged(
    x: jax.Array,
    selection: Selection,
    segments: jax.Array | None,
    initial: jax.Array | None = None,
    *,
    total: Callable[[jax.Array], jax.Array] = running_sum,
    at: Callable[[jax.Array, jax.Array], jax.Array] = gather,
) -> jax.Array:
    """[batch, capacity, width]: sums of x [batch, n, width] from behind the boundary before up to each boundary, within
    its document (ConceptMoE, section on chunking). initial f32[batch, width]: sum since a boundary before the first.
    total, at: `running_sum` and `gather`, of rows that may be split."""
    sums = total(x)
    if initial is not None:
        sums = sums + initial[:, None]
    here = at(sums, selection.indices)
    before = jnp.pad(here, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    if segments is not None:  # a document's first boundary is its first position
        own = gather(segments, selection.indices)
        before = jnp.where(begins(own)[..., None], here - at(x, selection.indices), before)
    return (here - before).astype(x.dtype)


def behind(x: jax.Array, mask: jax.Array, valid: jax.Array | None, initial: jax.Array) -> jax.Array:
    """f32[batch, width]: the sum of x [batch, n, width] behind the last boundary of `mask` bool[batch, n], of positions
    that exist; with `initial` f32[batch, width], that of a call before, in rows without a boundary."""
    last = jnp.cumsum(mask, axis=1) == mask.sum(1, keepdims=True)
    own = last & ~mask if valid is None else last & ~mask & valid
    total = jnp.where(own[..., None], x, 0).sum(1, dtype=jnp.float32)
    return total + jnp.where(mask.any(1, keepdims=True), 0.0, initial)


def dechunk(
    z: jax.Array,
    selection: Selection,
    mask: jax.Array,
    *,
    smooth: bool,
    segments: jax.Array | None = None,
    initial: jax.Array | None = None,
    average: Callable[..., jax.Array] = ema,
    fill: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Every position reads the moving average of chunk vectors up to its own chunk (H-Net paper, equations 5 to 9).

    z         [batch, capacity, width]  chunk vectors in the slots of `selection`
    mask      bool[batch, n]            where chunks begin
    smooth    average with the boundaries' probabilities as weights; False: each chunk's own vector
    segments  i32[batch, n]             documents; a position none of whose document's boundaries found a slot reads 0
    initial   f32[batch, width]         the average so far, which positions before the first boundary read; None: 0
    average   computes the moving average, as `kernels_pallas.ema.ema` does
    fill      gives every position the vector of its chunk, as `filled` does, which it is unless given
    returns   f32[batch, n, width]
    """
    own = None if segments is None else gather(segments, selection.indices)
    if smooth:
        starts = None if own is None else begins(own)
        z = average(z, jnp.clip(selection.weights, LEAST, 1 - LEAST), starts=starts, initial=initial)
    chunk = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    there = jnp.maximum(chunk, 0)
    out = (filled if fill is None else fill)(z.astype(jnp.float32), selection, mask)
    none = chunk < 0
    if segments is not None and own is not None:
        none = none | (_repeat(own, there) != segments)
    before = 0.0 if initial is None else initial[:, None]
    return jnp.where(none[..., None], before, out)


def filled(z: jax.Array, selection: Selection, mask: jax.Array) -> jax.Array:
    """z [batch, slots, width], of which those of `mask` bool[batch, n] are the first -> [batch, n, width]: at each
    position what the last slot at or before it has; at positions before the first, what that has."""
    return _repeat(z, jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0))


@jax.vmap
def _repeat(z: jax.Array, chunk: jax.Array) -> jax.Array:
    return z.at[chunk].get(mode="promise_in_bounds", indices_are_sorted=True)


def straight_through(confidence: jax.Array) -> jax.Array:
    """1, with the derivative of `confidence` (H-Net paper, section 2.2)."""
    return 1.0 + (confidence - jax.lax.stop_gradient(confidence))


def ratio_losses(boundaries: Boundaries, valid: jax.Array, target: float, shards: int) -> dict[str, Summed]:
    """The ratio loss (H-Net paper, equation 10) over all of the batch ("global") and as the mean of each device's
    own ("device"), of which there are `shards`. Demoted boundaries count as boundaries, so that the loss pushes back.

    N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)), F the share of boundaries, G their mean probability, N the target.
    """

    def sums(values: jax.Array) -> jax.Array:
        return jnp.where(valid, values, 0.0).astype(jnp.float32).reshape(shards, -1).sum(1)

    tokens = sums(jnp.ones(valid.shape, jnp.float32))
    parts = {"wanted": sums(boundaries.wanted), "prob": sums(boundaries.prob), "tokens": tokens}
    return {"global": Summed(parts, _Ratio(target, True)), "device": Summed(parts, _Ratio(target, False))}


@dataclasses.dataclass(frozen=True)
class _Ratio:
    target: float
    over_all: bool

    def __call__(self, sums: dict[str, jax.Array]) -> jax.Array:
        n, own = self.target, jax.tree.map(jnp.sum, sums) if self.over_all else sums
        count = jnp.maximum(own["tokens"], 1.0)
        f, g = own["wanted"] / count, own["prob"] / count
        return (n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))).mean()


def chunk_statistics(boundaries: Boundaries, mask: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """Of one stage, f32[] each: the share of positions that begin a chunk, mean and spread of the probabilities, the
    share of them within 0.05 of one half, and the share of boundaries that found no slot."""
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1)
    mean = lambda values: jnp.where(valid, values, 0).sum(dtype=jnp.float32) / count  # noqa: E731
    prob, kept = mean(boundaries.prob), mean(mask)
    wanted = jnp.maximum(mean(boundaries.wanted), 1e-9)
    return {
        "kept": kept,
        "probability": prob,
        "probability_std": jnp.sqrt(jnp.maximum(mean(jnp.square(boundaries.prob - prob)), 0.0)),
        "near_half": mean(jnp.abs(boundaries.prob - 0.5) < NEAR_HALF),
        "overflow": mean(boundaries.wanted & ~mask) / wanted,
    }
