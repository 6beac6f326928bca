"""Policies of decoding: which positions are written at each call of a denoiser. One file each, found by its name, with
a dataclass `Settings` below `Policy`."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.settings import Member


class Seen(NamedTuple):
    """What a policy decides by, of every row alone.

    tokens      i32[rows, n]
    open        bool[rows, n]  positions that hold the mask, stand before the end of the row's block, and were computed
    own         bool[rows, n]  positions that decoding has written
    ago         i32[rows, n]   of how many blocks before the row's a position is: 0: of this block; below 0: of a later
    begin       i32[rows]      where the row's block begins
    token       i32[rows, n]   proposed at each position
    confidence  f32[rows, n]   its probability by the denoiser; -inf where nothing was computed
    count       i32[rows]      how many positions the schedule writes at this call
    noise       f32[rows, n]   uniform from 0 to 1; None: the policy draws nothing
    """

    tokens: jax.Array
    open: jax.Array
    own: jax.Array
    ago: jax.Array
    begin: jax.Array
    token: jax.Array
    confidence: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    noise: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Policy(Member):
    """Settings of a policy, and what it does.

    scheduled  whether a block takes the calls that `steps` gives it; else it ends when nothing in it is masked
    draws      whether it needs noise
    replaces   whether it may write where something was written
    """

    door: ClassVar[str] = __name__
    scheduled: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    replaces: ClassVar[bool] = False

    def check(self, block: int) -> None:
        """Raises UserError for what cannot work on blocks of so many positions; fields have their ranges."""

    def writes(self, seen: Seen) -> jax.Array:
        """bool[rows, n]: positions that take the token proposed for them. Of a row with open positions at least one of
        these, unless the schedule writes none."""
        raise NotImplementedError


def best(score: jax.Array, among: jax.Array, count: jax.Array) -> jax.Array:
    """bool[rows, n]: the `count` i32[rows] positions of the highest score f32[rows, n] among bool[rows, n]; the earlier
    of two with the same."""
    order = jnp.argsort(jnp.where(among, -score, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    return among & (rank < count[:, None])


def likeliest(seen: Seen) -> jax.Array:
    """bool[rows, n]: of each row the open position of the highest confidence, if there is one."""
    return best(seen.confidence, seen.open, jnp.ones_like(seen.count))
