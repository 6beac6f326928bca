"""The rows of an engine as the device has them, and what moves them on: a piece of a prompt, or a token of each row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.inference.engine.draws import Rules, draw_rows, rules_of, usual
from adaptive.inference.requests import Request
from adaptive.layers.state import put, take
from adaptive.routing.stages import at_bytes
from kernels_pallas.choice import here

LIKELIEST = 20  # of the likeliest tokens that can be told with each
EMPTY, CORE, DONE = range(
    3
)  # phases: no token; one that takes another pass; one that has taken all and waits for a turn


class Slots(NamedTuple):
    """All rows.

    cache   of the model
    phase   i32[rows]
    order   i32[rows]          the least has been in its phase, or before another pass, for the longest
    passes  i32[rows]          that its token has taken
    item    of the model (`models.steps`): what its token is between two passes
    token   i32[rows]          that is being computed
    number  i32[rows]          its number among those made
    left    i32[rows]          tokens that may follow it
    end     i32[rows]          the token that ends the row; -1: none does
    seed    u32[rows, 2]       and stream
    how     of each row
    seen    bool[rows, vocab]  tokens that the row has
    """

    cache: Any
    phase: jax.Array
    order: jax.Array
    passes: jax.Array
    item: Any
    token: jax.Array
    number: jax.Array
    left: jax.Array
    end: jax.Array
    seed: jax.Array
    how: Rules
    seen: jax.Array

    def kept(self, keep: jax.Array) -> "Slots":
        """Without the rows that keep bool[rows] leaves out."""
        return self._replace(phase=jnp.where(keep, self.phase, EMPTY))

    def at(self, rows: jax.Array, number: int) -> "Asked":
        """What rows i32[n] are asked for their next token but `number`."""
        how = jax.tree.map(lambda a: a[rows], self.how)
        return Asked(self.number[rows] + number, self.left[rows] - number, self.end[rows], self.seed[rows], how)


class Asked(NamedTuple):
    """What a row is to do; `number` is that of the next token to draw, `left` how many may follow it."""

    number: Any
    left: Any
    end: Any
    seed: Any
    how: Rules


class Drawn(NamedTuple):
    """Tokens behind rows.

    token     i32[n]
    logprob   f32[n]
    ids, logs [n, k]   the likeliest tokens and their logprobs
    ended     bool[n]  whether the token is the row's last
    """

    token: Any
    logprob: Any
    ids: Any
    logs: Any
    ended: Any


class Told(NamedTuple):
    """What a launch did. Where it can draw several tokens of a row, all but `waiting` have an axis for them before.

    waiting  i32[2]           rows in the phases CORE and DONE behind it
    rows     i32[n]           for which it drew tokens
    valid    bool[n]          whether it did
    depth    i32[n]           passes of the token that was read before
    begins   bool[stages, n]  whether that one begins a chunk
    drawn    the tokens, [n, ...]
    """

    waiting: Any
    rows: Any
    valid: Any
    depth: Any
    begins: Any
    drawn: Any


class Store(NamedTuple):
    """What was read of prompts: the state [layers, places, ...], and the tokens that were seen bool[places, vocab]."""

    cache: Any
    seen: jax.Array


class Programs:
    """Compiled programs over `rows` rows with room for `room` tokens each, which compute all rows at once.

    vocab  ids from here on are never drawn; None: all may be
    group  rows that the network inside an H-Net, or a pass of a recursion, computes at once; 0: all rows
    """

    passes = 0  # that a token takes one at a time
    draws = 1  # tokens of a row that a turn draws at most

    def __init__(self, graphdef: nnx.GraphDef, state: Any, *, rows: int, room: int, vocab: int | None, group: int = 0):
        self._graphdef, self._state, self._vocab = graphdef, state, vocab
        self.rows, self.room = rows, room
        self.turns: tuple[int, ...] = (rows,)  # how many rows a turn can compute
        self.batches: tuple[int, ...] = ()  # and a pass
        self.tokens: tuple[int, ...] = ()  # and all that a token needs
        self._options = {"rows": group} if group else {}
        self._empty = jax.jit(here_(self._make))
        self._reads = jax.jit(here_(self._read), static_argnames=("most",), donate_argnames=("slots",))
        self._put_away = jax.jit(_stored, donate_argnames=("store",))
        self._fetch = jax.jit(_fetched, donate_argnames=("slots",))
        self._turns = jax.jit(here_(self._turn), static_argnames=("count", "most"), donate_argnames=("slots",))

    def empty(self) -> Slots:
        return self._empty(self._state)

    def read(self, slots: Slots, row: int, tokens: np.ndarray, valid: np.ndarray, *, first: bool, last: bool,
             asked: Asked, given: np.ndarray | None, most: int) -> tuple[Slots, Told]:  # fmt: skip
        """Reads tokens i32[n], of which those of valid bool[n] exist, in a row, which begins anew with the `first` of
        them; behind the `last` a token is drawn. most: of the likeliest tokens that are told."""
        return self._reads(
            self._state, np.int32(row), tokens, valid, np.bool_(first), np.bool_(last), asked, given,
            slots=slots, most=most,
        )  # fmt: skip

    def turn(
        self, slots: Slots, keep: np.ndarray, given: np.ndarray | None, count: int, most: int
    ) -> tuple[Slots, Told]:
        """Draws a token behind `count` rows in the phase DONE, or fewer where there are fewer, of those of keep
        bool[rows]. given: bool[rows]: where a chunk begins, for models that are told."""
        return self._turns(self._state, keep, given, slots=slots, count=count, most=most)

    def once(self, slots: Slots, keep: np.ndarray, count: int) -> tuple[Slots, Told]:
        """A pass of `count` rows in the phase CORE, or fewer."""
        raise NotImplementedError

    def token(self, slots: Slots, keep: np.ndarray, count: int, most: int) -> tuple[Slots, Told]:
        """All passes that `count` rows, or fewer, have before them, and their turn."""
        raise NotImplementedError

    def store(self, places: int) -> "Store":
        """Room for the states of so many beginnings of prompts."""
        return jax.jit(here_(self._make_store), static_argnums=1)(self._state, places)

    def put_away(self, store: "Store", slots: Slots, row: int, place: int) -> "Store":
        """The store with what a row has read so far at a place."""
        return self._put_away(slots.cache, slots.seen, np.int32(row), np.int32(place), store=store)

    def fetch(self, slots: Slots, store: "Store", row: int, place: int) -> Slots:
        """The slots with a row that has read what is at a place, and has no token."""
        return self._fetch(store, np.int32(row), np.int32(place), slots=slots)

    # Compiled

    def _make_store(self, state: Any, places: int) -> "Store":
        model = nnx.merge(self._graphdef, state)
        return Store(model.init_cache(places, self.room), jnp.zeros((places, model.head_weight().shape[0]), bool))

    def _make(self, state: Any) -> Slots:
        model, rows = nnx.merge(self._graphdef, state), self.rows
        zeros = jnp.zeros(rows, jnp.int32)
        return Slots(
            cache=model.init_cache(rows, self.room),
            phase=zeros,
            order=jnp.arange(rows, dtype=jnp.int32),
            passes=zeros,
            item=self._items(model, rows),
            token=zeros,
            number=zeros,
            left=zeros,
            end=zeros - 1,
            seed=jnp.zeros((rows, 2), jnp.uint32),
            how=usual(rows),
            seen=jnp.zeros((rows, model.head_weight().shape[0]), bool),
        )

    def _items(self, model: Any, rows: int) -> Any:
        return ()

    def _entered(self, model: Any, slots: Slots, rows: jax.Array, tokens: jax.Array, exists: jax.Array) -> Slots:
        """The slots with tokens i32[n] of rows i32[n] on their way, those that exist."""
        return ranked(moved(slots, rows, exists, phase=DONE), rows, exists)

    def _read(self, state: Any, row: Any, tokens: Any, valid: Any, first: Any, last: Any, asked: Asked, given: Any,
              *, slots: Slots, most: int) -> tuple[Slots, Told]:  # fmt: skip
        model, one = nnx.merge(self._graphdef, state), row[None]
        kept = jax.tree.map(lambda a, new: jnp.where(first, new, a), take(slots.cache, one),
                            model.init_cache(1, self.room))  # fmt: skip
        options = {} if given is None else {"boundaries": given[None]}
        end = jnp.maximum(valid.sum(dtype=jnp.int32) - 1, 0)
        out, kept = model.prefill(tokens[None], kept, valid[None], at=end[None], **options)
        seen = (slots.seen[row] & ~first).at[tokens].max(valid)
        asked = jax.tree.map(lambda a: a[None], asked)
        drawn = self._drawn(out.logits[:, 0], asked, seen[None], most)
        goes = last & ~drawn.ended
        set_ = lambda a, new: a.at[one].set(jnp.asarray(new, a.dtype))  # noqa: E731
        slots = slots._replace(
            cache=put(slots.cache, one, kept),
            phase=set_(slots.phase, EMPTY),
            token=set_(slots.token, drawn.token),
            number=set_(slots.number, asked.number),
            left=set_(slots.left, asked.left),
            end=set_(slots.end, asked.end),
            seed=set_(slots.seed, asked.seed),
            how=jax.tree.map(set_, slots.how, asked.how),
            seen=slots.seen.at[row].set(seen.at[drawn.token].max(last)),
        )
        slots = self._entered(model, slots, one, drawn.token, goes)
        begins = boundaries(out.trace, tokens[None].shape)[:, :, end]
        return slots, Told(waiting(slots), one, last[None], out.trace.depth[:, end], begins, drawn)

    def _turn(self, state: Any, keep: Any, given: Any, *, slots: Slots, count: int, most: int) -> tuple[Slots, Told]:
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        rows, exists = jnp.arange(self.rows), slots.phase == DONE
        options = self._options | ({} if given is None else {"boundaries": given[:, None]})
        out, cache = model.prefill(slots.token[:, None], slots.cache, exists[:, None], **options)
        begins = boundaries(out.trace, (self.rows, 1))[..., 0]
        told = out.trace.depth[:, 0], begins
        return self._moved_on(model, slots._replace(cache=cache), rows, exists, out.logits[:, 0], told, most)

    def _moved_on(
        self, model: Any, slots: Slots, rows: Any, exists: Any, logits: Any, told: tuple[Any, Any], most: int
    ) -> tuple[Slots, Told]:
        """Draws tokens behind rows i32[n] from logits [n, vocab] and sets them on their way."""
        drawn = self._drawn(logits, slots.at(rows, 1), slots.seen[rows], most)
        goes = exists & ~drawn.ended
        slots = moved(slots, rows, exists & drawn.ended, phase=EMPTY)
        slots = moved(slots, rows, exists, token=drawn.token, number=slots.number[rows] + 1,
                      left=slots.left[rows] - 1)  # fmt: skip
        slots = slots._replace(seen=slots.seen.at[rows, drawn.token].max(exists))
        slots = self._entered(model, slots, rows, drawn.token, goes)
        return slots, Told(waiting(slots), rows, exists, *told, drawn)

    def _drawn(self, logits: Any, asked: Asked, seen: Any, most: int) -> Drawn:
        logits = self._allowed(logits)
        token = draw_rows(logits, asked.seed, asked.number, asked.how, seen)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        values, ids = jax.lax.top_k(logs, min(most, logs.shape[-1]))
        own = jnp.take_along_axis(logs, token[:, None], -1)[:, 0]
        return Drawn(token, own, ids, values, (asked.left <= 0) | (token == asked.end))

    def _allowed(self, logits: jax.Array) -> jax.Array:
        if self._vocab is None:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self._vocab, logits, -jnp.inf)


def moved(slots: Slots, rows: jax.Array, which: jax.Array, **fields: Any) -> Slots:
    """The slots with fields of rows i32[n], all different, replaced where `which` bool[n] says so."""

    def one(old: jax.Array, new: Any) -> jax.Array:
        new = jnp.broadcast_to(jnp.asarray(new, old.dtype), (len(rows), *old.shape[1:]))
        mask = which.reshape(-1, *(1,) * (new.ndim - 1))
        return old.at[rows].set(jnp.where(mask, new, old[rows]), unique_indices=True)

    return slots._replace(**{name: jax.tree.map(one, getattr(slots, name), new) for name, new in fields.items()})


def _stored(cache: Any, seen: jax.Array, row: jax.Array, place: jax.Array, *, store: Store) -> Store:
    cache = put(store.cache, place[None], take(cache, row[None]))
    return Store(cache, store.seen.at[place].set(seen[row]))


def _fetched(store: Store, row: jax.Array, place: jax.Array, *, slots: Slots) -> Slots:
    cache = put(slots.cache, row[None], take(store.cache, place[None]))
    phase = slots.phase.at[row].set(EMPTY)
    return slots._replace(cache=cache, phase=phase, seen=slots.seen.at[row].set(store.seen[place]))


def picked(slots: Slots, phase: int | None, count: int) -> tuple[jax.Array, jax.Array]:
    """(i32[count] rows, bool[count]): those of a phase (None: of any with a token) that have waited longest, in that
    order, and then others."""
    own = slots.phase != EMPTY if phase is None else slots.phase == phase
    rows = jnp.argsort(jnp.where(own, slots.order, slots.order + len(slots.order)))[:count]
    return rows, own[rows]


def ranked(slots: Slots, rows: jax.Array, behind: jax.Array) -> Slots:
    """The slots with those of rows i32[n] that are `behind` bool[n] behind all others."""
    n = len(slots.order)
    late = slots.order.at[rows].add(jnp.where(behind, n, 0), unique_indices=True)
    return slots._replace(order=jnp.argsort(jnp.argsort(late)).astype(jnp.int32))


def waiting(slots: Slots) -> jax.Array:
    """i32[2], as in Told."""
    return jnp.stack([(slots.phase == phase).sum(dtype=jnp.int32) for phase in (CORE, DONE)])


def asked_of(request: Request, number: int) -> Asked:
    """What a row is to do from token `number` on, as numpy scalars: nothing is compiled anew for them."""
    end = -1 if request.end is None else request.end
    return Asked(
        number=np.int32(number),
        left=np.int32(request.tokens - number - 1),
        end=np.int32(end),
        seed=np.array([request.seed, request.stream], np.uint32),
        how=rules_of(request.how),
    )


def boundaries(trace: Any, shape: tuple[int, ...]) -> jax.Array:
    """bool[stages, *shape]."""
    views = at_bytes(trace.stages, shape)
    return jnp.stack([view.mask for view in views]) if views else jnp.zeros((0, *shape), bool)


def here_(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function with operations in the forms for this machine."""

    def call(*args: Any, **options: Any) -> Any:
        with here():
            return fn(*args, **options)

    return call
