"""Caches of decoding: which positions a call computes anew, and of which it reads older keys and values. One file each,
found by its name, with a dataclass `Settings` below `Cache`."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax

from adaptive.inference.diffusion.policies import Policy
from adaptive.settings import Member


class Now(NamedTuple):
    """What a cache decides by before a call, of every row alone.

    exists  bool[rows, n]  positions of the row
    masked  bool[rows, n]  that hold the mask
    fresh   bool[rows, n]  that the call before wrote
    ago     i32[rows, n]   of how many blocks before the row's: 0: of this one
    step    i32[rows, 1]   calls that the block has had
    calls   i32[rows, 1]   calls of the row so far
    held    bool[rows, n]  whose keys and values were kept after the call before; none before the first
    next    bool[rows, n]  that the policy will write, where it can tell before the call; else None
    """

    exists: jax.Array
    masked: jax.Array
    fresh: jax.Array
    ago: jax.Array
    step: jax.Array
    calls: jax.Array
    held: jax.Array
    next: jax.Array | None


class Pass(NamedTuple):
    """What a call does.

    computes  bool[rows, n]  positions that are computed, whose keys and values are replaced
    held      bool[rows, n]  positions whose keys and values are read, those that are computed among them
    opens     bool[rows, n]  positions that may be written; None: all
    """

    computes: jax.Array
    held: jax.Array
    opens: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Cache(Member):
    """Settings of a cache, and what it does.

    exact      whether texts are those without it
    in_blocks  whether it is for models of block diffusion, which see no later block; None: for all
    together   whether the rows should begin blocks at the same call, where it computes most
    """

    door: ClassVar[str] = __name__
    exact: ClassVar[bool] = False
    in_blocks: ClassVar[bool | None] = False
    together: ClassVar[bool] = False

    def check(self, policy: Policy, most: int) -> None:
        """Raises UserError for a policy that it cannot work with, whose schedule writes at most so many positions at a
        call."""

    def computes(self, now: Now) -> Pass:
        raise NotImplementedError
