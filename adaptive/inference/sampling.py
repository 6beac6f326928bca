"""Continuations of prompts, drawn with a cache: one loop for samples of training and for `adaptive.generate`."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import DataError, RecipeError
from adaptive.inference.drawing import Drawing, draw
from adaptive.models import kept
from adaptive.models.replay import by_layer
from adaptive.recipe import Recipe
from adaptive.routing.replay import Replay
from adaptive.routing.stages import at_bytes
from kernels_pallas.choice import here

PIECE = 256  # positions of a prompt that are computed at once; shorter ones are padded to a power of two
SHORTEST = 16
ROOM = 256  # caches grow by so many positions: fewer lengths mean fewer compilations
_USUAL = Drawing()


class Marker(Protocol):
    """Decides byte by byte where chunks begin, for models that are told (the chunker `words`)."""

    def push(self, byte: int) -> bool:
        """Whether a chunk begins at this byte, which follows those pushed before."""
        ...


class Piece(NamedTuple):
    """Some tokens of every row, of the prompts first and then of what continues them.

    tokens      i32[batch, n]
    valid       bool[batch, n]          tokens that belong to the row; none follows one that does not
    boundaries  bool[stages, batch, n]  where a chunk of each stage of an H-Net begins; no stages in other models
    prompt      whether these are the prompts' own
    logprobs    f32[batch, n]           logarithm of each token's probability by the model, before any rule of drawing;
                                        None of prompts
    depth       i32[batch, n]           passes that each token took, as in Trace
    experts     i32[layers, batch, n]   the strongest expert of each token in each layer that has experts, as they run;
                                        -1: none computed it. None: nobody asked
    record      what routers decided, for `LanguageModel(..., replay=...)`; None: nobody asked
    """

    tokens: np.ndarray
    valid: np.ndarray
    boundaries: np.ndarray
    prompt: bool
    logprobs: np.ndarray | None = None
    depth: np.ndarray | None = None
    experts: np.ndarray | None = None
    record: Replay | None = None


class Drawn(NamedTuple):
    """The next token of every row, which the model has not read yet.

    token    i32[batch]
    alive    bool[batch]         rows that it belongs to
    logprob  f32[batch]
    seen     bool[batch, vocab]  tokens that the rows have so far; None: nobody asks
    """

    token: jax.Array
    alive: jax.Array
    logprob: jax.Array
    seen: jax.Array | None


class Sampler:
    """Draws continuations from a model with the generation contract (`init_cache`, `prefill`).

    graphdef, state  of the model
    how              tokens are drawn from logits
    vocab            ids from here on are never drawn (rows that pad the embedding); None: all may be
    end              the token that ends a row; None: nothing does
    rows             as `decode_step` of an H-Net takes it
    marker           makes a Marker for a row; None: the model decides where chunks begin
    record           whether pieces tell experts and what routers decided; an H-Net then computes all rows together

    Routed models decide each token's depth causally, as their routers learned to.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        state: Any,
        *,
        how: Drawing = _USUAL,
        vocab: int | None = None,
        end: int | None = None,
        rows: int = 0,
        marker: Callable[[], Marker] | None = None,
        record: bool = False,
    ):
        self._graphdef, self._state, self._vocab, self._end = graphdef, state, vocab, end
        self._how = how
        self._options = {"record": True} if record else {"rows": rows} if rows else {}
        self._record = record
        self._longest = getattr(nnx.merge(graphdef, state).settings, "positions", 0)
        self._marker = marker
        self._empty = jax.jit(self._make_cache, static_argnums=(1, 2))
        self._read = jax.jit(_here(self._read_piece), donate_argnames=("cache",))
        self._first = jax.jit(self._first_tokens)
        self._write = jax.jit(_here(self._write_tokens), static_argnames=("count",), donate_argnames=("cache",))

    def __call__(
        self, prompts: Sequence[np.ndarray], length: int, key: jax.Array, *, at_once: int = 32
    ) -> Iterator[Piece]:
        """Pieces of the prompts, then of at most `length` tokens after each, until every row has ended.

        prompts  i32[n] each, n at least 1
        key      row r draws its i-th token with a key made of i and r, whatever else is drawn
        at_once  tokens per call of the compiled step; more make fewer round trips, fewer make a stream smoother
        """
        at_once = 1 if self._marker else max(1, min(at_once, length))
        markers = None if self._marker is None else [self._marker() for _ in prompts]
        tokens, valid = _padded(prompts)
        if 0 < self._longest < tokens.shape[1] + length:
            raise RecipeError(
                f"the model reads at most {self._longest} tokens (model.positions); {tokens.shape[1]} of the prompt "
                f"and {length} to write are more"
            )
        room = -(-(tokens.shape[1] + length + at_once) // ROOM) * ROOM
        cache, last, seen = self._empty(self._state, len(prompts), room)
        for begin in range(0, tokens.shape[1], PIECE):
            part = slice(begin, begin + PIECE)
            cache = _with_room(cache, tokens[:, part].shape[1])
            given = None if markers is None else _marked(markers, tokens[:, part], valid[:, part])
            cache, last, seen, stages, depth, told = self._read(
                self._state, tokens[:, part], valid[:, part], given, seen, cache=cache, last=last
            )
            stages, depth, told = jax.tree.map(np.asarray, (stages, depth, told))
            yield Piece(tokens[:, part], valid[:, part], stages, True, None, depth, *told)
        yield from self._continued(self._first(last, seen, key), cache, length, key, at_once, markers)

    def _continued(
        self,
        drawn: Drawn,
        cache: Any,
        length: int,
        key: jax.Array,
        at_once: int,
        markers: list[Marker] | None,
    ) -> Iterator[Piece]:
        waiting: tuple[Any, ...] | None = None  # computed while the piece before is shown
        for begin in range(0, length, at_once):
            token, alive = np.asarray(drawn.token)[:, None], np.asarray(drawn.alive)[:, None]
            given = None if markers is None else _marked(markers, token, alive)
            cache = _with_room(cache, at_once)
            drawn, cache, made = self._write(
                self._state, drawn, given, key, np.int32(begin), count=at_once, cache=cache
            )
            if waiting is not None:
                yield _piece(waiting, at_once)
                if not waiting[1][:, -1].any():
                    return
            waiting = made
        if waiting is not None:
            yield _piece(waiting, length - begin)

    # Compiled

    def _make_cache(self, state: Any, batch: int, room: int) -> tuple[Any, jax.Array, jax.Array | None]:
        """(an empty cache, logits f32[batch, vocab] before any token, which tokens were seen)."""
        model = nnx.merge(self._graphdef, state)
        vocab = model.head_weight().shape[0]
        seen = None if self._how.repetition_penalty == 1 else jnp.zeros((batch, vocab), bool)
        return model.init_cache(batch, room), jnp.zeros((batch, vocab), jnp.float32), seen

    def _read_piece(
        self,
        state: Any,
        tokens: jax.Array,
        valid: jax.Array,
        given: jax.Array | None,
        seen: jax.Array | None,
        *,
        cache: Any,
        last: Any,
    ) -> tuple[Any, jax.Array, jax.Array | None, jax.Array, jax.Array, Any]:
        """(cache, logits f32[batch, vocab] after each row's last token so far, which tokens were seen, boundaries
        bool[stages, batch, n], depth i32[batch, n], what else is told)."""
        model = nnx.merge(self._graphdef, state)
        options: dict[str, Any] = {} if given is None else {"boundaries": given}
        options |= {"record": True} if self._record else {}
        out, cache = model.prefill(tokens, cache, valid, **options)
        count = valid.sum(1)
        logits = jax.vmap(lambda row, i: row[jnp.maximum(i - 1, 0)])(out.logits, count)
        logits = jnp.where((count > 0)[:, None], logits, last)
        boundaries, told = _boundaries(out.trace, tokens.shape), self._told(model, out.trace, tokens.shape)
        return cache, logits, _with_tokens(seen, tokens, valid), boundaries, out.trace.depth, told

    def _told(self, model: Any, trace: Any, shape: tuple[int, ...]) -> Any:
        """`experts` and `record` of a piece."""
        if not self._record:
            return None, None
        facts, shape = model.settings.facts(), (shape[0], shape[1])
        return by_layer(trace, facts, "strongest", -1, shape), model.recorded(trace, shape)

    def _first_tokens(self, logits: jax.Array, seen: jax.Array | None, key: jax.Array) -> Drawn:
        return self._next(logits, seen, jnp.ones(len(logits), bool), key, jnp.int32(0))

    def _write_tokens(
        self,
        state: Any,
        drawn: Drawn,
        given: jax.Array | None,
        key: jax.Array,
        begin: jax.Array,
        *,
        count: int,
        cache: Any,
    ) -> tuple[Drawn, Any, tuple[Any, ...]]:
        """Reads `drawn` and `count - 1` tokens that follow it, `drawn` being number `begin`: what is drawn after them,
        the cache, and (tokens, valid, boundaries, logprobs, depth, (experts, record)) as in Piece."""
        model = nnx.merge(self._graphdef, state)
        options: dict[str, Any] = dict(self._options)
        if given is not None:
            options["boundaries"] = given

        def step(carry: Any, number: jax.Array) -> tuple[Any, Any]:
            (token, alive, logprob, seen), cache = carry
            # Of several rows those that have ended stay as they are, so that no chunk is computed for them.
            exists = alive[:, None] if len(token) > 1 else None
            out, cache = model.prefill(token[:, None], cache, exists, **options)
            new = self._next(out.logits[:, -1], seen, alive, key, number + 1)
            shape = len(token), 1
            told = jax.tree.map(lambda a: a[..., 0], self._told(model, out.trace, shape))
            made = token, alive, _boundaries(out.trace, shape)[..., 0], logprob, out.trace.depth[:, 0], told
            return (new, cache), made

        numbers = begin + jnp.arange(count, dtype=jnp.int32)
        (drawn, cache), made = jax.lax.scan(step, (drawn, cache), numbers)
        return drawn, cache, jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), made)

    def _next(
        self, logits: jax.Array, seen: jax.Array | None, alive: jax.Array, key: jax.Array, number: jax.Array
    ) -> Drawn:
        """The tokens that are number `number` of their rows, of those that were alive."""
        if self._vocab is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self._vocab, logits, -jnp.inf)
        rows = jnp.arange(len(logits))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), rows)
        token = jax.vmap(functools.partial(draw, how=self._how))(logits, keys, seen=seen)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), token[:, None], -1)[:, 0]
        alive = alive if self._end is None else alive & (token != self._end)
        return Drawn(token, alive, logprob, _with_tokens(seen, token[:, None], alive[:, None]))


def _with_tokens(seen: jax.Array | None, tokens: jax.Array, valid: jax.Array) -> jax.Array | None:
    """bool[batch, vocab]: seen, and those of the tokens [batch, n] that exist."""
    return seen if seen is None else seen.at[jnp.arange(len(tokens))[:, None], tokens].max(valid)


def sample(
    graphdef: nnx.GraphDef, state: Any, prompt: np.ndarray, length: int, key: jax.Array, **options: Any
) -> np.ndarray:
    """i32[length] tokens that continue `prompt` i32[n], fewer where one ends it; `options` are those of Sampler."""
    pieces = Sampler(graphdef, state, **options)([prompt], length, key)
    made = [piece.tokens[0, piece.valid[0]] for piece in pieces if not piece.prompt]
    return np.concatenate(made) if made else np.zeros(0, np.int32)


def prompt_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """i32[n] of a prompt: the begin token of the tokenizer's convention, where it has one, and the text's.

    Raises DataError where that is nothing at all.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = np.concatenate([np.array(begin, np.int32), tokenizer.encode(text)])
    if not len(ids):
        raise DataError(f"the prompt is empty, and {tokenizer.name} has no token that begins a text: give some text")
    return ids


def marker_of(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[], Marker] | None:
    """What tells a model where chunks begin, as it was told in training; None where it decides itself."""
    if not any(stage.chunker.reads == "boundaries" for _, stage in recipe.model.facts().chunking):
        return None
    from adaptive.data.words import WordMarker

    return lambda: WordMarker(tokenizer.token_bytes)


def _here(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function with operations in the forms for this machine."""

    @functools.wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        with here():
            return fn(*args, **options)

    return call


def _with_room(cache: Any, positions: int) -> Any:
    """The cache, where its passes have slots of their own with room for so many more positions in each."""
    return kept.with_room(cache, positions, ROOM) if kept.lacking(cache, positions) else cache


def _padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(i32[batch, n], bool[batch, n]): n a power of two, or a multiple of PIECE, that holds the longest."""
    longest = max(len(prompt) for prompt in prompts)
    n = SHORTEST
    while n < min(longest, PIECE):
        n *= 2
    n = n if longest <= n else -(-longest // PIECE) * PIECE
    tokens, valid = np.zeros((len(prompts), n), np.int32), np.zeros((len(prompts), n), bool)
    for r, prompt in enumerate(prompts):
        tokens[r, : len(prompt)], valid[r, : len(prompt)] = prompt, True
    return tokens, valid


def _marked(markers: Sequence[Marker], tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """bool[batch, n]: where chunks begin, as each row's marker says of the tokens [batch, n] that exist."""
    out = np.zeros(tokens.shape, bool)
    for r, marker in enumerate(markers):
        for i in np.flatnonzero(valid[r]):
            out[r, i] = marker.push(int(tokens[r, i]))
    return out


def _boundaries(trace: Any, shape: tuple[int, ...]) -> jax.Array:
    """bool[stages, batch, n]."""
    views = at_bytes(trace.stages, shape)
    return jnp.stack([view.mask for view in views]) if views else jnp.zeros((0, *shape), bool)


def _piece(made: tuple[Any, ...], count: int) -> Piece:
    own = jax.tree.map(lambda a: np.asarray(a)[..., :count], jax.device_get(made))
    tokens, valid, stages, logprobs, depth, told = own
    return Piece(tokens, valid, stages, False, logprobs, depth, *told)
