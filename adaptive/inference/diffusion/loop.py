"""One step of decoding: what a denoiser proposes, and what a policy writes of it. Arrays alone, every row by itself."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    aligned      whether blocks begin at multiples of `block`, as in a model of block diffusion, and not where the
                 prompt ends. Then `length` may be any number, and steps are shared out to blocks, at least one to each
    end          token that ends a row: what is behind it is not written; None: none does
    vocab        ids from here on are never proposed (rows that pad the embedding); None: all may be
    """

    mask: int
    length: int
    steps: int
    block: int
    guidance: float = 0.0
    temperature: float = 0.0
    policy: Policy = confidence.Settings()
    together: bool = False
    aligned: bool = False
    end: int | None = None
    vocab: int | None = None

    @property
    def blocks(self) -> int:
        """Blocks that a row has at most."""
        return -(-self.length // self.block) + self.aligned

    @property
    def steps_per_block(self) -> int:
        return max(1, self.steps * self.block // self.length)

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
        if self.length % self.block and not self.aligned:
            fits = ", ".join(map(str, divisors(self.length)))
            raise UserError(f"block={self.block} does not divide the length {self.length}; these do: {fits}")
        for name in ("guidance", "temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)}: must be a number of at least 0")
        check_ranges(self.policy, "policy.")
        self.policy.check(self.block)
        if self.policy.scheduled:
            self._check_steps()
        return self

    def _check_steps(self) -> None:
        if self.steps > self.length:
            raise UserError(
                f"steps={self.steps} are more than the {self.length} positions to write: {self.length} write one at "
                "each call"
            )
        least = self.length // self.block
        if self.aligned:
            return
        if rest := self.steps % least:
            fits = f"{self.steps - rest} or {self.steps - rest + least}" if self.steps > least else f"{least}"
            raise UserError(
                f"steps={self.steps} are not as many for each of the {least} blocks of {self.block} positions: "
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
    chance   f32[rows, n]  probability that the token had by that call; 0: none
    """

    tokens: jax.Array
    block: jax.Array
    step: jax.Array
    due: jax.Array
    calls: jax.Array
    written: jax.Array
    chance: jax.Array


@functools.partial(jax.jit, static_argnames="plan")
def start(tokens: jax.Array, begin: jax.Array, *, plan: Plan) -> Progress:
    """Before the first call. tokens i32[rows, n], masked where something is to be written; begin i32[rows]: where the
    first block does."""
    nothing = jnp.zeros(len(tokens), jnp.int32)
    masked = (tokens == plan.mask) & within(plan, nothing, begin, tokens.shape[1])
    written = jnp.full(tokens.shape, -1, jnp.int32)
    chance = jnp.zeros(tokens.shape, jnp.float32)
    return Progress(tokens, nothing, nothing, masked.sum(1, dtype=jnp.int32), nothing, written, chance)


def within(plan: Plan, block: jax.Array, begin: jax.Array, n: int) -> jax.Array:
    """bool[rows, n]: positions of block number i32[rows]; none of one after the last."""
    place = jnp.arange(n) - begin[:, None]
    return (place // plan.block == block[:, None]) & (block < plan.blocks)[:, None]


def row_keys(plan: Plan, key: jax.Array | None, rows: int) -> jax.Array | None:
    """Keys [rows] of what each row draws; None where nothing is drawn. Raises UserError where they are missing."""
    if not plan.draws:
        return None
    if key is None:
        what = f"temperature={plan.temperature}" if plan.temperature else f"policy {plan.policy.kind()}"
        raise UserError(f"{what} draws at random: give a key, such as jax.random.key(0)")
    if key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return key


@functools.partial(jax.jit, static_argnames="plan")
def with_blind(tokens: jax.Array, known: jax.Array, *, plan: Plan) -> jax.Array:
    """What a denoiser reads: tokens i32[rows, n], under guidance the same rows again, masked at known bool[rows, n]."""
    return jnp.concatenate([tokens, jnp.where(known, plan.mask, tokens)]) if plan.guidance else tokens


def proposed(
    plan: Plan, progress: Progress, logits: jax.Array, keys: Any, places: Any, heat: np.ndarray | None = None
) -> Proposal:
    """What logits of the positions `places` i32[rows, k] propose; heat: temperature of each row, f64[rows]; None: that
    of the plan."""
    heat = np.full(len(progress.calls), plan.temperature) if heat is None else heat
    if not heat.any():
        return propose(logits, plan=plan)
    with jax.enable_x64(True):
        return drawn(logits, keys, progress.calls, places, heat, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def propose(logits: jax.Array, *, plan: Plan) -> Proposal:
    """The likeliest tokens of logits f32[rows, n, vocab]; under guidance of twice as many rows, of which the second
    half does not see what was given."""
    logits = guided(logits, plan)
    return chosen(logits, logits.argmax(-1).astype(jnp.int32))


def guided(logits: jax.Array, plan: Plan) -> jax.Array:
    """f32[rows, n, vocab] with guidance, and without what is never proposed."""
    logits = logits.astype(jnp.float32)
    if plan.guidance:
        seeing, blind = jnp.split(logits, 2)
        logits = blind + (plan.guidance + 1) * (seeing - blind)
    if plan.vocab is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < plan.vocab, logits, -jnp.inf)
    return logits.at[..., plan.mask].set(-jnp.inf, mode="drop")


def chosen(logits: jax.Array, token: jax.Array) -> Proposal:
    """The tokens i32[rows, n] as proposals."""
    share = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), token[..., None], -1)[..., 0]
    return Proposal(token, jnp.where(jnp.isnan(share), 0.0, share))  # so that decoding ends whatever a model says


@functools.partial(jax.jit, static_argnames="plan")
def drawn(
    logits: jax.Array, keys: jax.Array, calls: jax.Array, places: jax.Array, heat: jax.Array, *, plan: Plan
) -> Proposal:
    """As `propose`, drawn by keys [rows], numbers of calls i32[rows] and places i32[rows, n]. To be called under
    `jax.enable_x64`: in float32 unlikely tokens would come too seldom (Zheng et al. 2024, arXiv 2409.02908)."""
    logits = guided(logits, plan)

    def noise(key: jax.Array, call: jax.Array, place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, 1), call)
        draw = lambda at: jax.random.uniform(jax.random.fold_in(key, at), logits.shape[-1:], jnp.float64)  # noqa: E731
        return jax.vmap(draw)(place)

    gumbel = -jnp.log(-jnp.log(jax.vmap(noise)(keys, calls, places)))
    warm = heat[:, None, None] > 0
    gumbel = jnp.where(warm, heat[:, None, None] * gumbel, 0.0)  # of a draw of exactly 0 it is infinite
    return chosen(logits, (logits.astype(jnp.float64) + gumbel).argmax(-1).astype(jnp.int32))


@functools.partial(jax.jit, static_argnames="plan")
def advance(progress: Progress, proposal: Proposal, begin: jax.Array, keys: Any, *, plan: Plan) -> Progress:
    """After a call: what the policy writes is written, and blocks that are finished make room for the next ones.

    keys  [rows], or None where nothing is drawn
    """
    going = working(plan, progress, begin)
    seen = _seen(plan, progress, proposal, begin, keys, going)
    writes = plan.policy.writes(seen) & going[:, None]
    tokens = jnp.where(writes, proposal.token, progress.tokens)
    left = ((tokens == plan.mask) & (seen.ago == 0)).any(1)
    done = ~left
    if plan.policy.scheduled:
        done |= progress.step + 1 >= plan.steps_per_block
    if plan.together:
        done = jnp.broadcast_to((done | (progress.block >= plan.blocks)).all(), done.shape)
    block = jnp.minimum(progress.block + done, plan.blocks)
    due = _masked(plan, tokens, block, begin).sum(1, dtype=jnp.int32)
    ended = (done & (due == 0)) | _ended(plan, tokens, progress.written >= 0, writes)
    return Progress(
        tokens,
        jnp.where(ended, plan.blocks, block),
        jnp.where(done, 0, progress.step + 1),
        jnp.where(done, due, progress.due),
        progress.calls + going,
        jnp.where(writes, progress.calls[:, None], progress.written),
        jnp.where(writes, proposal.confidence, progress.chance),
    )


def working(plan: Plan, progress: Progress, begin: jax.Array) -> jax.Array:
    """bool[rows]: rows whose block has something to be written."""
    return _masked(plan, progress.tokens, progress.block, begin).any(1)


def _masked(plan: Plan, tokens: jax.Array, block: jax.Array, begin: jax.Array) -> jax.Array:
    return (tokens == plan.mask) & within(plan, block, begin, tokens.shape[1])


def _seen(plan: Plan, progress: Progress, proposal: Proposal, begin: jax.Array, keys: Any, going: jax.Array) -> Seen:
    tokens, n = progress.tokens, progress.tokens.shape[1]
    ago = progress.block[:, None] - (jnp.arange(n) - begin[:, None]) // plan.block
    may = (tokens == plan.mask) & (ago >= 0) & going[:, None] & (proposal.confidence >= 0)
    noise = noise_of(plan, keys, progress.calls, n)
    first = begin + progress.block * plan.block
    return Seen(tokens, may, progress.written >= 0, ago, first, *proposal, scheduled(plan, progress), noise)


def scheduled(plan: Plan, progress: Progress) -> jax.Array:
    """i32[rows]: how many positions the schedule writes at the next call."""
    steps = plan.steps_per_block
    return progress.due // steps + (progress.step < progress.due % steps)


def noise_of(plan: Plan, keys: Any, calls: jax.Array, n: int) -> jax.Array | None:
    """f32[rows, n] for the policy at the call of this number i32[rows]; None where it draws nothing."""
    if not plan.policy.draws:
        return None
    draw = lambda key, call: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 0), call), (n,))  # noqa: E731
    return jax.vmap(draw)(keys, calls)


def _ended(plan: Plan, tokens: jax.Array, own: jax.Array, writes: jax.Array) -> jax.Array:
    """bool[rows]: rows that an end token ends, behind nothing that is still masked."""
    if plan.end is None:
        return jnp.zeros(len(tokens), bool)
    ends = (tokens == plan.end) & (own | writes)
    return ends.any(1) & ~((tokens == plan.mask) & (jnp.cumsum(ends, axis=1) == 0)).any(1)
