"""The rows of an engine as the device has them, and the programs that move them on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.inference.drawing import Drawing
from adaptive.inference.engine.draws import Rules, draw_rows, rules_of, usual
from adaptive.layers.state import put, take
from adaptive.routing.stages import at_bytes
from kernels_pallas.choice import here

LIKELIEST = 20  # of the likeliest tokens that can be told with each


class Slots(NamedTuple):
    """All rows.

    cache   of the model
    live    bool[rows]         rows with a token that is to be read
    token   i32[rows]          that token
    number  i32[rows]          its number among those made
    left    i32[rows]          tokens that may follow it
    end     i32[rows]          the token that ends the row; -1: none does
    seed    u32[rows]
    how     of each row
    seen    bool[rows, vocab]  tokens that the row has
    """

    cache: Any
    live: jax.Array
    token: jax.Array
    number: jax.Array
    left: jax.Array
    end: jax.Array
    seed: jax.Array
    how: Rules
    seen: jax.Array


class Asked(NamedTuple):
    """What a row is to do, scalars; `number` is that of the first token to draw, `left` how many may follow it."""

    number: Any
    left: Any
    end: Any
    seed: Any
    how: Rules


class Told(NamedTuple):
    """What a launch did, for `n` rows.

    rows      i32[n]
    valid     bool[n]          whether it did anything for the row
    depth     i32[n]           passes of the token that was read
    begins    bool[stages, n]  whether it begins a chunk
    token     i32[n]           drawn behind it
    logprob   f32[n]
    ids, logs [n, k]           the likeliest tokens and their logprobs
    ended     bool[n]          whether that token is the row's last
    """

    rows: Any
    valid: Any
    depth: Any
    begins: Any
    token: Any
    logprob: Any
    ids: Any
    logs: Any
    ended: Any


class Programs:
    """Compiled programs over `rows` rows with room for `room` tokens each.

    vocab  ids from here on are never drawn; None: all may be
    group  rows with a new chunk that the network inside an H-Net computes at once; 0: all rows
    """

    def __init__(self, graphdef: nnx.GraphDef, state: Any, *, rows: int, room: int, vocab: int | None, group: int):
        self._graphdef, self._state, self._vocab = graphdef, state, vocab
        self.rows, self.room = rows, room
        self._options = {"rows": group} if group else {}
        self._empty = jax.jit(self._make)
        self._reads = jax.jit(_here(self._read), static_argnames=("most",), donate_argnames=("slots",))
        self._turns = jax.jit(_here(self._turn), static_argnames=("most",), donate_argnames=("slots",))

    def empty(self) -> Slots:
        return self._empty(self._state)

    def read(self, slots: Slots, row: int, tokens: np.ndarray, valid: np.ndarray, *, first: bool, last: bool,
             asked: Asked, given: np.ndarray | None, most: int) -> tuple[Slots, Told]:  # fmt: skip
        """Reads tokens i32[n], of which those of valid bool[n] exist, in a row, which begins anew with the `first` of
        them; behind the `last` a token is drawn."""
        return self._reads(
            self._state, np.int32(row), tokens, valid, np.bool_(first), np.bool_(last), asked, given,
            slots=slots, most=most,
        )  # fmt: skip

    def turn(self, slots: Slots, keep: np.ndarray, given: np.ndarray | None, most: int) -> tuple[Slots, Told]:
        """Reads the next token of every live row of keep bool[rows], and draws one behind it. given: bool[rows]: where
        a chunk begins, for models that are told."""
        return self._turns(self._state, keep, given, slots=slots, most=most)

    # Compiled

    def _make(self, state: Any) -> Slots:
        model, rows = nnx.merge(self._graphdef, state), self.rows
        zeros = jnp.zeros(rows, jnp.int32)
        return Slots(
            cache=model.init_cache(rows, self.room),
            live=jnp.zeros(rows, bool),
            token=zeros,
            number=zeros,
            left=zeros,
            end=zeros - 1,
            seed=jnp.zeros(rows, jnp.uint32),
            how=usual(rows),
            seen=jnp.zeros((rows, model.head_weight().shape[0]), bool),
        )

    def _read(self, state: Any, row: Any, tokens: Any, valid: Any, first: Any, last: Any, asked: Asked, given: Any,
              *, slots: Slots, most: int) -> tuple[Slots, Told]:  # fmt: skip
        model, one = nnx.merge(self._graphdef, state), row[None]
        kept = jax.tree.map(lambda a, new: jnp.where(first, new, a), take(slots.cache, one),
                            model.init_cache(1, self.room))  # fmt: skip
        options = {} if given is None else {"boundaries": given[None]}
        out, kept = model.prefill(tokens[None], kept, valid[None], **options)
        end = jnp.maximum(valid.sum(dtype=jnp.int32) - 1, 0)
        seen = slots.seen[row] & ~first
        seen = seen.at[tokens].max(valid)
        each = jax.tree.map(lambda a: a[None], asked)
        token, told = self._drawn(out.logits[0, end][None], each, seen[None], most)
        ended = told["ended"]
        told |= {"depth": out.trace.depth[0, end][None], "begins": boundaries(out.trace, tokens[None].shape)[:, :, end]}
        set_ = lambda a, new: a.at[row].set(jnp.asarray(new, a.dtype).reshape(a.shape[1:]))  # noqa: E731
        after = slots._replace(
            cache=put(slots.cache, one, kept),
            live=set_(slots.live, last & ~ended),
            token=set_(slots.token, token),
            number=set_(slots.number, asked.number),
            left=set_(slots.left, asked.left),
            end=set_(slots.end, asked.end),
            seed=set_(slots.seed, asked.seed),
            how=jax.tree.map(set_, slots.how, asked.how),
            seen=slots.seen.at[row].set(seen.at[token[0]].max(last)),
        )
        return after, Told(rows=one, valid=last[None], token=token, **told)

    def _turn(self, state: Any, keep: Any, given: Any, *, slots: Slots, most: int) -> tuple[Slots, Told]:
        model, live = nnx.merge(self._graphdef, state), slots.live & keep
        options = dict(self._options) | ({} if given is None else {"boundaries": given[:, None]})
        out, cache = model.prefill(slots.token[:, None], slots.cache, live[:, None], **options)
        asked = Asked(slots.number + 1, slots.left - 1, slots.end, slots.seed, slots.how)
        token, told = self._drawn(out.logits[:, 0], asked, slots.seen, most)
        told |= {"depth": out.trace.depth[:, 0], "begins": boundaries(out.trace, (self.rows, 1))[..., 0]}
        every = jnp.arange(self.rows)
        after = slots._replace(
            cache=cache,
            live=live & ~told["ended"],
            token=jnp.where(live, token, slots.token),
            number=slots.number + live,
            left=slots.left - live,
            seen=slots.seen.at[every, token].max(live),
        )
        return after, Told(rows=every, valid=live, token=token, **told)

    def _drawn(self, logits: Any, asked: Asked, seen: Any, most: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The tokens drawn from logits [n, vocab], and what is told of them."""
        if self._vocab is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self._vocab, logits, -jnp.inf)
        token = draw_rows(logits, asked.seed, asked.number, asked.how, seen)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        values, ids = jax.lax.top_k(logs, min(most, logs.shape[-1]))
        told = {
            "logprob": jnp.take_along_axis(logs, token[:, None], -1)[:, 0],
            "ids": ids,
            "logs": values,
            "ended": (asked.left <= 0) | (token == asked.end),
        }
        return token, told


def asked_of(how: Drawing, seed: int, number: int, left: int, end: int | None) -> Asked:
    """The same as numpy scalars, which a program takes without being compiled anew."""
    return Asked(np.int32(number), np.int32(left), np.int32(-1 if end is None else end), np.uint32(seed), rules_of(how))


def boundaries(trace: Any, shape: tuple[int, ...]) -> jax.Array:
    """bool[stages, *shape]."""
    views = at_bytes(trace.stages, shape)
    return jnp.stack([view.mask for view in views]) if views else jnp.zeros((0, *shape), bool)


def _here(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with here():
            return fn(*args, **options)

    return call
