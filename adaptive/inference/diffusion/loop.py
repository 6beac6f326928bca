"""One step of decoding: what a denoiser proposes, and what a policy writes of it. Arrays alone, every row by itself."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.errors import UserError
from adaptive.inference.diffusion.policies import Policy, Seen, confidence
from adaptive.settings import check_ranges, divisors


@dataclasses.dataclass(frozen=True)
class Plan:
    """How `length` positions behind a prompt are written.

    mask         id that stands for what is not written yet; the denoiser's logits of it are not read
    steps        calls of all blocks together, where the policy goes by a schedule
    block        positions of a block; blocks are written from left to right
    guidance     of a denoiser that does not see what was given: logits move away from its by this factor; 0: none
    temperature  tokens are drawn from logits divided by it; 0: the likeliest
    together     whether a row whose block is finished waits for the others
    """

    mask: int
    length: int
    steps: int
    block: int
    guidance: float = 0.0
    temperature: float = 0.0
    policy: Policy = confidence.Settings()
    together: bool = False

    @property
    def blocks(self) -> int:
        return self.length // self.block

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at random."""
        return self.policy.draws or self.temperature > 0

    def check(self) -> "Plan":
        """Itself. Raises UserError for numbers that cannot work, with those that would."""
        if self.mask is None or self.mask < 0:
            raise UserError(f"the mask has no token (mask_id={self.mask}): give the id that the model was trained with")
        for name in ("length", "steps", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.length % self.block:
            fits = ", ".join(map(str, divisors(self.length)))
            raise UserError(f"block={self.block} does not divide the length {self.length}; these do: {fits}")
        for name in ("guidance", "temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)}: must be a number of at least 0")
        check_ranges(self.policy, "policy.")
        if self.policy.scheduled:
            self._check_steps()
        return self

    def _check_steps(self) -> None:
        if self.steps > self.length:
            raise UserError(
                f"steps={self.steps} are more than the {self.length} positions to write: {self.length} write one at "
                "each call"
            )
        if self.steps % self.blocks:
            below, least = self.steps - self.steps % self.blocks, self.blocks
            fits = f"{below} or {below + least}" if below else f"{least}"
            raise UserError(
                f"steps={self.steps} are not as many for each of the {self.blocks} blocks of {self.block} positions: "
                f"{fits} would be"
            )


class Proposal(NamedTuple):
    """token i32[rows, n] for each position, and its probability confidence f32[rows, n]; -inf: none was computed."""

    token: jax.Array
    confidence: jax.Array


class Progress(NamedTuple):
    """How far rows are.

    tokens   i32[rows, n]
    block    i32[rows]     number of the block that is written; as many as there are blocks: the row is finished
    step     i32[rows]     calls that its block has had
    due      i32[rows]     positions that were masked when it began
    calls    i32[rows]     calls while something in its block was to be written
    written  i32[rows, n]  number of the call that wrote a position last, counted from 0 in its row; -1: none
    """

    tokens: jax.Array
    block: jax.Array
    step: jax.Array
    due: jax.Array
    calls: jax.Array
    written: jax.Array


@functools.partial(jax.jit, static_argnames="plan")
def start(tokens: jax.Array, begin: jax.Array, *, plan: Plan) -> Progress:
    """Before the first call. tokens i32[rows, n], masked where something is to be written; begin i32[rows]: where the
    first block does."""
    nothing = jnp.zeros(len(tokens), jnp.int32)
    masked = (tokens == plan.mask) & within(plan, nothing, begin, tokens.shape[1])
    written = jnp.full(tokens.shape, -1, jnp.int32)
    return Progress(tokens, nothing, nothing, masked.sum(1, dtype=jnp.int32), nothing, written)


def within(plan: Plan, block: jax.Array, begin: jax.Array, n: int) -> jax.Array:
    """bool[rows, n]: positions of block number i32[rows]; none of one after the last."""
    place = jnp.arange(n) - begin[:, None]
    return (place // plan.block == block[:, None]) & (block < plan.blocks)[:, None]


@functools.partial(jax.jit, static_argnames="plan")
def propose(logits: jax.Array, *, plan: Plan) -> Proposal:
    """The likeliest tokens of logits f32[rows, n, vocab]; under guidance of twice as many rows, of which the second
    half does not see what was given."""
    logits = guided(logits, plan)
    return chosen(logits, logits.argmax(-1).astype(jnp.int32))


def guided(logits: jax.Array, plan: Plan) -> jax.Array:
    """f32[rows, n, vocab] with guidance, and without the mask."""
    logits = logits.astype(jnp.float32)
    if plan.guidance:
        seeing, blind = jnp.split(logits, 2)
        logits = blind + (plan.guidance + 1) * (seeing - blind)
    return logits.at[..., plan.mask].set(-jnp.inf, mode="drop")


def chosen(logits: jax.Array, token: jax.Array) -> Proposal:
    """The tokens i32[rows, n] as proposals."""
    share = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), token[..., None], -1)[..., 0]
    return Proposal(token, share)


@functools.partial(jax.jit, static_argnames="plan")
def drawn(logits: jax.Array, keys: jax.Array, calls: jax.Array, *, plan: Plan) -> Proposal:
    """As `propose`, drawn by keys [rows]. To be called under `jax.enable_x64`: in float32 unlikely tokens would come
    too seldom (Zheng et al. 2024, arXiv 2409.02908)."""
    logits = guided(logits, plan)

    def noise(key: jax.Array, call: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 1), call), logits.shape[1:], jnp.float64)

    gumbel = -plan.temperature * jnp.log(-jnp.log(jax.vmap(noise)(keys, calls)))
    return chosen(logits, (logits.astype(jnp.float64) + gumbel).argmax(-1).astype(jnp.int32))


@functools.partial(jax.jit, static_argnames="plan")
def advance(progress: Progress, proposal: Proposal, begin: jax.Array, keys: Any, *, plan: Plan) -> Progress:
    """After a call: what the policy writes is written, and blocks that are finished make room for the next ones.

    keys  [rows], or None where nothing is drawn
    """
    tokens, n = progress.tokens, progress.tokens.shape[1]
    masked, own = tokens == plan.mask, within(plan, progress.block, begin, n)
    place, end = jnp.arange(n), begin + (progress.block + 1) * plan.block
    going = progress.block < plan.blocks
    if not plan.policy.scheduled:
        going &= (masked & own).any(1)
    steps = plan.steps // plan.blocks
    count = progress.due // steps + (progress.step < progress.due % steps)
    noise = None
    if plan.policy.draws:
        draw = lambda key, call: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 0), call), (n,))  # noqa: E731
        noise = jax.vmap(draw)(keys, progress.calls)
    allowed = masked & (place < end[:, None]) & going[:, None]
    writes = plan.policy.writes(Seen(tokens, allowed, own, *proposal, count, noise)) & going[:, None]
    tokens = jnp.where(writes, proposal.token, tokens)
    step = progress.step + 1
    done = step >= steps if plan.policy.scheduled else ~((tokens == plan.mask) & own).any(1)
    if plan.together:
        done = jnp.broadcast_to((done | (progress.block >= plan.blocks)).all(), done.shape)
    block = jnp.minimum(progress.block + done, plan.blocks)
    next_due = ((tokens == plan.mask) & within(plan, block, begin, n)).sum(1, dtype=jnp.int32)
    return Progress(
        tokens,
        block,
        jnp.where(done, 0, step),
        jnp.where(done, next_due, progress.due),
        progress.calls + going,
        jnp.where(writes, progress.calls[:, None], progress.written),
    )
