"""Depth: who goes through a recursion's shared core again. One file each, found by its name, with a dataclass
`Settings` below `Depth` and the module that it builds."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call, Tales
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.routing.types import AuxLosses, Selection, Trace
from adaptive.settings import Member


@dataclasses.dataclass(frozen=True)
class Depth(Member):
    """Settings of a strategy."""

    door: ClassVar[str] = __name__
    equal_passes: ClassVar[bool] = False  # whether every position takes every pass, so that no router decides
    capped: ClassVar[bool] = False  # whether a call can say how many passes there are at most (`Call.passes`)
    single: ClassVar[bool] = False  # whether its module can decide for tokens one pass at a time (`Item`)
    stops: ClassVar[bool] = False  # whether a pass's score (`Trace.scores`) is for stopping there; False: for taking it

    def build(self, passes: int, site: Site, keys: Iterator[jax.Array]) -> "DepthModule":
        raise NotImplementedError

    def kernels(self) -> tuple[str, ...]:
        """Operations that it computes with, each a package of `kernels_pallas` or "routing"."""
        return () if self.equal_passes else ("routing",)

    def check(self, recursive: Any, at: str) -> None:
        """Raises RecipeError for settings that do not fit the body `recursive`; `at` is their dotted path."""

    def fractions(self, passes: int) -> tuple[float, ...]:
        """Share of the positions that each pass computes in training."""
        return (1.0,) * passes

    def paper_fractions(self, passes: int) -> tuple[float, ...]:
        """The same in the accounting of the paper, which may have more in mind than what is executed."""
        return self.fractions(passes)

    def counts(self, passes: int, positions: int) -> tuple[int, ...]:
        """Positions of a row that each pass computes in training."""
        return capacities(self.fractions(passes), positions)

    def router_flops(self, r: int, passes: int, candidates: float, width: int) -> tuple[float, float]:
        """(forward, forward and backward) matmul FLOPs of the routers that decide before pass `r` (from 0) about so
        many candidates."""
        return 0.0, 0.0

    def parameters(self, passes: int, width: int) -> int:
        """Numbers of its routers, auxiliary ones included."""
        return 0

    def warmup_steps(self) -> int:
        """Training steps during which it warms up."""
        return 0

    def rules_differ(self) -> bool:
        """Whether the rules "train" and "causal" decide otherwise."""
        return False

    def describe(self) -> str:
        """What decides, in a word or two."""
        return self.kind()


class Carried(NamedTuple):
    """What the core hands from one pass to the next: strategies hand it on and do not look into it.

    state     of generation, or keys and values that later passes read; None: nothing
    previous  logits of the last router of experts, where the next one reads them
    """

    state: Any
    previous: jax.Array | None = None


class Core(Protocol):
    """The shared block as a pure function: pass r, a number or traced, of x [rows, n, width] at `where`, which was
    taken from the whole rows."""

    def __call__(
        self, r: Any, x: jax.Array, where: Where, call: Call, carried: Carried
    ) -> tuple[jax.Array, Carried, Tales]: ...


class Routed(NamedTuple):
    """The stream [rows, n, width] after all passes, what is carried on, losses, what was decided, and what the core did
    in each pass."""

    x: jax.Array
    carried: Carried
    aux: AuxLosses
    trace: Trace
    told: Sequence[Tales]


class Item(NamedTuple):
    """Tokens of generation between two passes, each of which may be before another pass than its neighbours.

    x     [n, 1, width]: what enters the core
    kept  what the strategy keeps of them beside it: a tree of arrays [n, ...]
    """

    x: jax.Array
    kept: Any = ()


class DepthModule(nnx.Module):
    """A strategy with its routers."""

    def __call__(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        """Runs the passes over x [rows, n, width], the stream that enters the recursion."""
        raise NotImplementedError

    def entered(self, x: jax.Array) -> Item:
        """Tokens before their first pass, from the stream [n, 1, width] that enters the recursion; causally."""
        raise NotImplementedError

    def passed(self, r: jax.Array, item: Item, new: jax.Array) -> tuple[Item, jax.Array]:
        """(the tokens after pass r i32[n], in which the core made new [n, 1, width] of them; bool[n]: those that take
        another)."""
        raise NotImplementedError

    def left(self, item: Item) -> jax.Array:
        """The stream [n, 1, width] of tokens that take no more passes."""
        return item.x

    def update(self, load: jax.Array | None) -> None:
        """Moves buffers by the share f32[passes] of tokens at each depth, over a whole step."""


def capacities(fractions: tuple[float, ...], positions: int) -> tuple[int, ...]:
    """Positions of a row that each recursion computes: `max(1, int(c * positions))`, as the released code rounds."""
    return tuple(max(1, int(c * positions)) for c in fractions)


def falling(passes: int) -> tuple[float, ...]:
    """(N_r - r + 1) / N_r for r = 1 .. N_r: the shares of the MoR paper (section 2.2)."""
    return tuple((passes - r) / passes for r in range(passes))


def check_shares(shares: tuple[float, ...], recursive: Any, at: str) -> None:
    """Raises RecipeError for shares of the row that the passes of the body `recursive` cannot have; `at` is the dotted
    path of its depth."""
    if len(shares) != recursive.recursions:
        raise RecipeError(f"{at}.capacities has {len(shares)} shares for {recursive.recursions} recursions")
    if any(not 0 < x <= 1 for x in shares) or any(b > a for a, b in itertools.pairwise(shares)):
        listed = lambda values: ",".join(f"{x:g}" for x in values)  # noqa: E731
        raise RecipeError(
            f"{at}.capacities={listed(shares)}: shares must be in (0, 1] and must not increase, because a token that "
            f"left cannot come back; for example {listed(sorted(shares, reverse=True))}"
        )
    recursive.check_first_capacity(shares[0], f"{at}.capacities", at)


def replayed(call: Call, r: Any) -> jax.Array | None:
    """bool[rows, n]: who takes the r-th routed pass by what is replayed; None: a router decides."""
    if call.replay is None or call.replay.passes is None:
        return None
    return jax.lax.dynamic_index_in_dim(call.replay.passes, r, 0, keepdims=False)


def everyone(where: Where, weights: jax.Array, valid: jax.Array) -> Selection:
    """A selection of all positions of which some are held."""
    indices = jnp.broadcast_to(jnp.arange(where.shape[1], dtype=jnp.int32), where.shape)
    return Selection(indices, weights, valid)
