"""Self-speculation: a recursion's first passes draft tokens, and all passes check them together.

Draft and check draw each token with the same noise, that of its seed and number. So a row has the tokens that it would
have without drafts, under every rule of drawing, and however many are drafted: a draft is right or wrong, and no chance
decides about it (shared noise in place of the acceptance rule of Leviathan et al., arXiv 2211.17192; it accepts what
that rule does when the likeliest token is taken, and somewhat less at high temperatures).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.inference.engine.draws import draw_rows
from adaptive.inference.engine.slots import DONE, EMPTY, Drawn, Programs, Slots, Told, here_, moved, waiting
from adaptive.layers.keys_values import without
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models.bodies.recursive import Settings as Recursion
from adaptive.models.language_model import Settings

FADING = 0.9  # what a round later still counts of the share of drafts that were right
AT_FIRST = 0.8  # that share before the first round


class Drafting(NamedTuple):
    """How tokens are drafted.

    most    tokens of a round at most
    passes  that draft
    adapts  whether a row drafts as many as its own drafts so far make worthwhile; False: always `most`
    """

    most: int
    passes: int = 1
    adapts: bool = True


def refuse(model: Settings, passes: int = 1) -> str:
    """Why so many of a model's passes cannot draft for the others; empty where they can."""
    body = model.body
    if not isinstance(body, Recursion):
        return "only a recursion can draft with its first passes"
    if not 0 < passes < body.recursions:
        return f"{passes} passes of {body.recursions} cannot draft: 1 to {body.recursions - 1} can"
    if not body.depth.capped:
        return f"depth={body.depth.kind()}: a call cannot leave out its last passes"
    if not body.policy.exact(body) or body.policy.slots(body, 1) is not None or body.keys_values == "hybrid":
        return f"cache={body.policy.kind()} cannot forget drafts; per_pass can"
    parts = [part for part in (body.prelude, body.core, body.coda) if part is not None]
    if not all(b.mixer is None or isinstance(b.mixer, Attention) for part in parts for b in part.blocks):
        return "its state cannot forget drafts: of mixers attention alone can"
    return ""


class Speculating(Programs):
    """Programs whose turns draw up to `drafting.most` + 1 tokens of every row. Raises RecipeError where the model
    cannot."""

    def __init__(self, graphdef: nnx.GraphDef, state: Any, *, drafting: Drafting, **options: Any):
        settings = nnx.merge(graphdef, state).settings
        if reason := refuse(settings, drafting.passes):
            raise RecipeError(reason)
        super().__init__(graphdef, state, **options)
        self.drafting, self.draws = drafting, drafting.most + 1
        self._worth = worth(settings, drafting)
        self._rounds = jax.jit(
            here_(self._round), static_argnames=("most",), donate_argnames=("slots", "share")
        )  # fmt: skip
        self._share = jnp.full(self.rows, AT_FIRST, jnp.float32)

    def turn(
        self, slots: Slots, keep: np.ndarray, given: np.ndarray | None, count: int, most: int
    ) -> tuple[Slots, Told]:
        assert given is None
        slots, self._share, told = self._rounds(self._state, keep, slots=slots, share=self._share, most=most)
        return slots, told

    def read(self, slots: Slots, row: int, *args: Any, first: bool, **options: Any) -> tuple[Slots, Told]:
        if first:
            self._share = self._share.at[row].set(AT_FIRST)
        return super().read(slots, row, *args, first=first, **options)

    def _round(self, state: Any, keep: Any, *, slots: Slots, share: Any, most: int) -> tuple[Slots, Any, Told]:
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        exists, n = slots.phase == DONE, self.drafting.most
        long = jnp.asarray(self._worth)[jnp.clip((share * 100).astype(jnp.int32), 0, 100)]  # of each row's draft
        window, cache, seen = self._drafted(model, slots, exists, long)
        there = exists[:, None] & (jnp.arange(n + 1) <= long[:, None])
        out, cache = model.prefill(window, cache | {"seen": slots.cache["seen"]}, there)
        drawn = self._checked(out.logits, slots, seen, most)
        right = (drawn.token[:-1] == window[:, 1:].T) & (jnp.arange(n)[:, None] < long)
        before = jnp.concatenate([exists[None], right]).astype(jnp.int32)
        alive = jnp.concatenate([jnp.ones((1, self.rows), jnp.int32), (~drawn.ended[:-1]).astype(jnp.int32)])
        valid = jnp.cumprod(before * alive, axis=0) > 0  # which of the tokens the row has: a first few
        count = valid.sum(0, dtype=jnp.int32)
        slots = self._after(slots, cache, drawn, valid, count)
        share = share_after(share, (right & valid[:-1]).sum(0), long, exists)
        begins = jnp.zeros((n + 1, 0, self.rows), bool)
        rows = jnp.broadcast_to(jnp.arange(self.rows), valid.shape)
        return slots, share, Told(waiting(slots), rows, valid, out.trace.depth.T, begins, drawn)

    def _drafted(self, model: Any, slots: Slots, exists: Any, long: Any) -> tuple[jax.Array, Any, jax.Array]:
        """(the rows' tokens and what is drafted behind them i32[rows, n + 1], the cache, tokens that were seen before
        each of these was drawn bool[n + 1, rows, vocab])."""
        n, every = self.drafting.most, jnp.arange(self.rows)
        start = jnp.zeros((self.rows, n + 1), jnp.int32).at[:, 0].set(slots.token)
        seen = jnp.broadcast_to(slots.seen, (n + 1, *slots.seen.shape))

        def more(carry: Any) -> Any:
            return carry[0] < jnp.where(exists, long, 0).max()

        def draft(carry: Any) -> Any:
            i, window, cache, seen = carry
            there = exists & (i < long)
            out, cache = model.prefill(window[:, i][:, None], cache, there[:, None], passes=self.drafting.passes)
            asked = slots.at(every, 1 + i)
            token = draw_rows(self._allowed(out.logits[:, 0]), asked.seed, asked.number, asked.how, seen[i])
            later = seen.at[:, every, token].max(jnp.arange(n + 1)[:, None] > i)
            return i + 1, window.at[:, i + 1].set(token), cache, later

        carry = jax.lax.while_loop(more, draft, (jnp.zeros((), jnp.int32), start, slots.cache, seen))
        return carry[1], carry[2], carry[3]

    def _checked(self, logits: jax.Array, slots: Slots, seen: jax.Array, most: int) -> Drawn:
        """What is drawn behind each position of the windows, [n + 1, rows, ...]."""

        def one(_: Any, scanned: Any) -> Any:
            i, own, before = scanned
            return _, self._drawn(own, slots.at(jnp.arange(self.rows), 1 + i), before, most)

        numbers = jnp.arange(logits.shape[1], dtype=jnp.int32)
        return jax.lax.scan(one, None, (numbers, jnp.moveaxis(logits, 1, 0), seen))[1]

    def _after(self, slots: Slots, cache: Any, drawn: Drawn, valid: jax.Array, count: jax.Array) -> Slots:
        every, exists, last = jnp.arange(self.rows), count > 0, jnp.maximum(count - 1, 0)
        read = slots.cache["seen"][0] + count
        ended = drawn.ended[last, every]
        own = without(cache["body"], read)
        return moved(
            slots._replace(
                cache=cache | {"seen": read[None], "body": own},
                seen=slots.seen.at[every, drawn.token].max(valid),
            ),
            every,
            exists,
            token=drawn.token[last, every],
            number=slots.number + count,
            left=slots.left - count,
            phase=jnp.where(ended, EMPTY, DONE),
        )


def share_after(share: jax.Array, right: jax.Array, long: jax.Array, exists: jax.Array) -> jax.Array:
    """The running share of drafts that are right, after a round; only those up to the first wrong one were tried."""
    tried = jnp.minimum(right + 1, long)
    own = right / jnp.maximum(tried, 1)
    weight = 1 - FADING ** tried.astype(jnp.float32)
    return jnp.where(exists, share + weight * (own - share), share)


def worth(model: Settings, drafting: Drafting) -> np.ndarray:
    """i32[101]: how many tokens to draft where so many of a hundred are right: the number with most tokens for what a
    round costs, in layers, where checking a window costs hardly more than a token (DEL; Zarch et al., 2025)."""
    if not drafting.adapts:
        return np.full(101, drafting.most, np.int32)
    body = model.body
    assert isinstance(body, Recursion)
    ends = sum(part.layers for part in body.ends)
    short, whole = ends + drafting.passes * body.core.layers, ends + body.recursions * body.core.layers
    lengths = np.arange(drafting.most + 1)
    right = np.arange(101)[:, None] / 100
    tokens = np.cumsum(right**lengths, axis=1)
    return np.argmax(tokens / (whole + lengths * (short + 0.1 * whole)), axis=1).astype(np.int32)
