"""Decoding with a network that can compute some positions alone: which of them, a cache says at each call."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.errors import UserError
from adaptive.inference.diffusion.caches import Cache, Now, Pass, none
from adaptive.inference.diffusion.loop import (
    Plan,
    Progress,
    Proposal,
    advance,
    noise_of,
    proposed,
    row_keys,
    scheduled,
    start,
    with_blind,
    working,
)
from adaptive.inference.diffusion.policies import best
from adaptive.settings import check_ranges

LEAST = 8  # positions that a call computes at least: fewer sizes mean fewer compilations


class Network(Protocol):
    """Computes positions of rows, and keeps keys and values of others.

    block    positions of a block, where they see their own and those before it; 0: they see everything
    shifted  whether what a position says is the token after it
    """

    block: int
    shifted: bool

    def empty(self, rows: int, n: int) -> Any:
        """The state of rows of n positions of which nothing was computed."""

    def put(self, state: Any, row: int, one: Any) -> Any:
        """The state with a row replaced by the only one of another."""

    def __call__(
        self,
        tokens: jax.Array,
        places: jax.Array,
        exists: jax.Array,
        held: jax.Array,
        share: jax.Array,
        *,
        state: Any,
    ) -> tuple[jax.Array, Any]:
        """(logits f32[rows, k, vocab], the state after it) of tokens i32[rows, k] at places i32[rows, k], ascending, of
        which those of bool[rows, k] exist. They read the keys and values of positions held bool[rows, n], their own
        among them. share f32[rows]: of all positions of the row those that hold the mask."""


class Rows(NamedTuple):
    """Rows that are being written, each by itself.

    held    bool[rows, n]  positions whose keys and values are kept
    exists  bool[rows, n]  positions of each row
    begin   i32[rows]      where its first block begins
    known   bool[rows, n]  what was given, which guidance hides
    keys    [rows]         of draws; None: nothing is drawn
    state   of the network
    heat    f64[rows]      temperature of each; None: that of the plan
    """

    progress: Progress
    held: jax.Array
    exists: jax.Array
    begin: jax.Array
    known: jax.Array
    keys: Any
    state: Any
    heat: np.ndarray | None = None


class Step(NamedTuple):
    """After a call of the network.

    progress  of all rows
    proposal  of all positions, i32 and f32[rows, n]
    computed  i32[rows]: positions that it computed
    """

    progress: Progress
    proposal: Proposal
    computed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What became of rows.

    tokens    i32[rows, n]: prompts, and what was written behind each
    lengths   i32[rows]: tokens of each row; with an end token up to it
    written   i32[rows, n]: number of the call of its row that wrote a position; -1 of prompts
    chance    f32[rows, n]: probability that the token had by that call; 0 of prompts
    calls     of the network
    row_calls i32[rows]: of these, calls that the row itself needed
    computed  i32[rows]: positions that were computed, of all calls
    """

    tokens: np.ndarray
    lengths: np.ndarray
    written: np.ndarray
    chance: np.ndarray
    calls: int
    row_calls: np.ndarray
    computed: np.ndarray

    def per_call(self) -> np.ndarray:
        """f32[rows]: tokens that a call wrote, on average."""
        return (self.written >= 0).sum(1) / np.maximum(self.row_calls, 1)


class Decoder:
    """Writes behind prompts as a plan and a cache say."""

    def __init__(self, network: Network, plan: Plan, cache: Cache | None = None, *, waits: bool = True):
        """waits: whether rows may wait for others, so that all begin blocks together, where the cache is quicker so."""
        cache = none.Settings() if cache is None else cache
        if network.block and plan.block != network.block:
            raise UserError(f"block={plan.block}: the model was trained on blocks of {network.block} positions")
        plan = dataclasses.replace(plan, aligned=network.block > 0, together=waits and cache.together).check()
        check_ranges(cache, "cache.")
        cache.check(plan.policy, -(-plan.block // plan.steps_per_block))
        if cache.in_blocks not in (None, network.block > 0):
            one, other = ("block diffusion", "masked diffusion over whole texts")[:: 1 if network.block else -1]
            raise UserError(f"cache {cache.kind()} is for {other}, and the model is of {one}")
        self.network, self.plan, self.cache = network, plan, cache

    def __call__(self, prompts: Sequence[np.ndarray], key: jax.Array | None = None) -> Decoded:
        """prompts i32[p] each; key as of `adaptive.inference.diffusion.decode`."""
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        calls, computed = 0, np.zeros(len(prompts), np.int64)
        step: Step | None = None
        for step in self.steps(prompts, key):
            calls += 1
            computed += step.computed
        assert step is not None
        return self.result(prompts, step.progress, calls, computed)

    def result(self, prompts: Sequence[np.ndarray], progress: Progress, calls: int, computed: np.ndarray) -> Decoded:
        tokens, written, chance = map(np.asarray, (progress.tokens, progress.written, progress.chance))
        lengths = np.array([len(prompt) + self.plan.length for prompt in prompts])
        if self.plan.end is not None:
            for r, prompt in enumerate(prompts):
                ends = np.flatnonzero(tokens[r, len(prompt) : lengths[r]] == self.plan.end)
                lengths[r] = len(prompt) + ends[0] + 1 if len(ends) else lengths[r]
        return Decoded(tokens, lengths, written, chance, calls, np.asarray(progress.calls), computed)

    def steps(self, prompts: Sequence[np.ndarray], key: jax.Array | None = None) -> Iterator[Step]:
        """After each call, until every row is finished."""
        rows = self.started(laid_out(prompts, self.plan, int(self.network.shifted)), key)
        while (after := self.call(rows)) is not None:
            rows, step = after
            yield step

    def started(self, layout: "Layout", key: jax.Array | None) -> Rows:
        """Rows before their first call."""
        tokens, exists, begin = layout
        count, n = tokens.shape
        known, shift = jnp.asarray(tokens != self.plan.mask), int(self.network.shifted)
        state = self.network.empty(count * (2 if self.plan.guidance else 1), n - shift)
        progress, held = start(jnp.asarray(tokens), begin, plan=self.plan), jnp.zeros((count, n), bool)
        keys = row_keys(self.plan, key, count)
        return Rows(progress, held, jnp.asarray(exists), jnp.asarray(begin), known, keys, state)

    def call(self, rows: Rows) -> tuple[Rows, Step] | None:
        """After one more call, which rows that are finished have no part in; None: all are."""
        plan, shift, n = self.plan, int(self.network.shifted), rows.held.shape[1]
        progress, held, exists, begin, known, keys, state, heat = rows
        each, most, going = _before(progress, held, begin, exists, keys, plan=plan, cache=self.cache)
        if not going:
            return None
        places, there = _places(each.computes[:, shift:], size=size_of(int(most), n - shift))
        read = with_blind(progress.tokens, known, plan=plan)
        asked = _doubled(read, places, there, each.held[:, shift:], exists, plan=plan)
        logits, state = self.network(*asked, state=state)
        places = places + shift
        proposal = proposed(plan, progress, logits, keys, places, heat)
        progress, everywhere = _after(progress, proposal, each, places, there, begin, keys, plan=plan)
        step = Step(progress, everywhere, np.asarray(each.computes.sum(1)))
        return rows._replace(progress=progress, held=each.held, state=state), step


class Layout(NamedTuple):
    """tokens i32[rows, n], masked where something is to be written; exists bool[rows, n]; begin i32[rows]: where the
    first block of each row begins."""

    tokens: np.ndarray
    exists: np.ndarray
    begin: np.ndarray


def laid_out(
    prompts: Sequence[np.ndarray], plan: Plan, shift: int, *, counts: Sequence[int] = (), n: int = 0
) -> Layout:
    """Rows of prompts and what is to be written behind them.

    shift   what a position says is the token so many after it; the first ones are never proposed
    counts  tokens behind each; (): those of the plan
    n       positions of all rows; 0: as many as the longest needs
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = lengths + (np.array(counts) if len(counts) else plan.length)
    place = np.arange(n or int(ends.max()))
    tokens = np.full((len(prompts), len(place)), 0 if plan.mask else 1, np.int32)
    for r, prompt in enumerate(prompts):
        tokens[r, : len(prompt)] = prompt
    tokens[(place >= lengths[:, None]) & (place < ends[:, None])] = plan.mask
    begin = (lengths - shift) // plan.block * plan.block + shift if plan.aligned else lengths
    exists = (place >= shift) & (place < ends[:, None])
    return Layout(tokens, exists, begin.astype(np.int32))


def size_of(count: int, n: int) -> int:
    """Positions that are computed where `count` are to be: powers of two and one and a half times these, at most n."""
    size = LEAST
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n)


@functools.partial(jax.jit, static_argnames=("plan", "cache"))
def _before(
    progress: Progress, held: jax.Array, begin: jax.Array, exists: jax.Array, keys: Any, *, plan: Plan, cache: Cache
) -> tuple[Pass, jax.Array, jax.Array]:
    """What the next call does, the most positions of a row that it computes, and whether there is one."""
    n = progress.tokens.shape[1]
    going = working(plan, progress, begin)[:, None]
    masked = progress.tokens == plan.mask
    ago = progress.block[:, None] - (jnp.arange(n) - begin[:, None]) // plan.block
    fresh = (progress.written >= 0) & (progress.written == progress.calls[:, None] - 1)
    noise = noise_of(plan, keys, progress.calls, n)
    coming = None if noise is None else best(noise, masked & (ago >= 0), scheduled(plan, progress))
    each = cache.computes(
        Now(exists, masked, fresh, ago, progress.step[:, None], progress.calls[:, None], held, coming)
    )
    each = each._replace(computes=each.computes & going, held=jnp.where(going, each.held, held))
    return each, each.computes.sum(1).max(), going.any()


@functools.partial(jax.jit, static_argnames="size")
def _places(computes: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(i32[rows, size] ascending, bool[rows, size]): the positions of bool[rows, n], and others that fill up."""
    order = jnp.sort(jnp.argsort(~computes, axis=1, stable=True)[:, :size], axis=1).astype(jnp.int32)
    return order, jnp.take_along_axis(computes, order, axis=1)


@functools.partial(jax.jit, static_argnames="plan")
def _doubled(
    read: jax.Array, places: jax.Array, there: jax.Array, held: jax.Array, exists: jax.Array, *, plan: Plan
) -> tuple[jax.Array, ...]:
    """What the network is asked: (tokens at places, places, there, held, share masked), of guided rows each twice."""
    rows = lambda a: jnp.concatenate([a] * (2 if plan.guidance else 1))  # noqa: E731
    masked = (read == plan.mask) & rows(exists)
    share = masked.sum(1) / jnp.maximum(rows(exists).sum(1), 1)
    places = rows(places)
    return jnp.take_along_axis(read, places, axis=1), places, rows(there), rows(held), share.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="plan")
def _after(
    progress: Progress,
    proposal: Proposal,
    each: Pass,
    places: jax.Array,
    there: jax.Array,
    begin: jax.Array,
    keys: Any,
    *,
    plan: Plan,
) -> tuple[Progress, Proposal]:
    """The progress with proposals [rows, k] at places, and proposals at all places."""
    rows = jnp.arange(len(places))[:, None]
    token = progress.tokens.at[rows, places].set(proposal.token)
    confidence = jnp.full(token.shape, -jnp.inf).at[rows, places].set(jnp.where(there, proposal.confidence, -jnp.inf))
    if each.opens is not None:
        confidence = jnp.where(each.opens | (progress.tokens != plan.mask), confidence, -jnp.inf)
    everywhere = Proposal(token, confidence)
    return advance(progress, everywhere, begin, keys, plan=plan), everywhere
