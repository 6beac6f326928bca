"""Generation one pass at a time: some rows of a cache enter a recursion's core, go through it once, leave it. Rows of
one call may be before different passes, because passes share their parameters.

A plain stack has no passes: its rows go through all of it at once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adaptive.layers.call import Call
from adaptive.layers.state import Within
from adaptive.layers.where import Where
from adaptive.models.bodies import plain
from adaptive.models.bodies.recursive import Recursive
from adaptive.models.bodies.recursive import Settings as Recursion
from adaptive.models.depth import Item
from adaptive.models.language_model import LanguageModel, Settings


def refuse(model: Settings) -> str:
    """Why rows of a model cannot be computed so, but only all together; empty where they can."""
    body = model.body
    if model.low_rank is not None:
        return "its additions of low rank are not in its matrices"
    if isinstance(body, plain.Settings):
        return "" if type(body) is plain.Settings else "it is no plain stack"
    if not isinstance(body, Recursion):
        return "it is neither a plain stack nor a recursion"
    if not body.depth.single:
        return f"depth={body.depth.kind()} does not decide for one pass at a time"
    if getattr(body.depth, "random", False):
        return "its depths are random"
    if body.shared != "all":
        return f"its passes have parameters of their own (shared={body.shared})"
    if body.order == "sequence":
        return "order=sequence repeats each layer in place"
    if body.keys_values == "hybrid":
        return "keys_values=hybrid renews keys in every pass"
    if body.policy.slots(body, 1) is not None:
        return f"cache={body.policy.kind()} has other slots in every pass"
    return ""


def linked(model: LanguageModel) -> bool:
    """Whether a recursion's routers of experts read logits from below, which would have to go from pass to pass."""
    return isinstance(model.body, Recursive) and any(layer.reads_previous for layer in model.routed().values())


class Steps:
    """The steps of a model, for some of the rows of a cache of `LanguageModel.init_cache`.

    rows i32[n], all different; exists bool[n]: those for which anything is done. What the others give means nothing,
    and their cache stays as it is.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.body = model, model.body

    @property
    def passes(self) -> int:
        """Passes that a token can take one at a time; 0: it takes all at once."""
        return self.body.settings.recursions if isinstance(self.body, Recursive) else 0

    def nothing(self, rows: int) -> Item:
        """An item of so many rows, for `enter` to fill."""
        if not isinstance(self.body, Recursive):
            return Item(jnp.zeros((rows, 0)))
        x = jnp.zeros((rows, 1, self.model.settings.width), self.body.core.stream)
        return jax.tree.map(jnp.zeros_like, self.body.depth.entered(x))

    def enter(self, tokens: jax.Array, cache: Any, rows: jax.Array, exists: jax.Array) -> tuple[Item, Any]:
        """(items before their first pass, cache) of tokens i32[n], which follow what the rows have read."""
        where = self._where(cache, rows, exists)
        x = self.model.embedded(tokens[:, None], where)
        body = self.body
        assert isinstance(body, Recursive)
        if body.prelude is not None:
            x, after, _, _ = body.prelude(x, where, self._call(), within(cache["body"]["prelude"], rows))
            cache = _with(cache, "prelude", after)
        return body.depth.entered(x.astype(body.core.stream)), cache

    def once(
        self, r: jax.Array, item: Item, cache: Any, rows: jax.Array, exists: jax.Array
    ) -> tuple[Item, jax.Array, Any]:
        """(items after their pass r i32[n], bool[n]: those that take another, cache)."""
        body = self.body
        assert isinstance(body, Recursive)
        policy, where = body.settings.policy, self._where(cache, rows, exists)
        r = jnp.minimum(r, body.settings.recursions - 1)  # of rows that have taken all, for which nothing is done
        first = jnp.broadcast_to(jnp.asarray(policy.cache(r), jnp.int32), r.shape)
        caches = policy.caches(body.settings.recursions)
        own = within(cache["body"]["core"], rows, first, caches, r == 0 if policy.first_alone else None)
        states = body.core.at_pass(body.core.ready(), 0)
        new, after, _, _ = body.core.run(states, item.x, where, self._call(), own)
        item, goes = body.depth.passed(r, item, new)
        return item, goes, _with(cache, "core", after)

    def leave(self, item: Item, cache: Any, rows: jax.Array, exists: jax.Array) -> tuple[jax.Array, Any]:
        """(logits f32[n, vocab] of the tokens behind, cache) of items that take no more passes."""
        where, body = self._where(cache, rows, exists), self.body
        assert isinstance(body, Recursive)
        x = body.depth.left(item)
        if body.coda is not None:
            x, after, _, _ = body.coda(x, where, self._call(), within(cache["body"]["coda"], rows))
            cache = _with(cache, "coda", after)
        return self._ended(body.norm(x).astype(body.making.dtype), cache, rows, exists)

    def through(self, tokens: jax.Array, cache: Any, rows: jax.Array, exists: jax.Array) -> tuple[jax.Array, Any]:
        """(logits f32[n, vocab] behind tokens i32[n], cache) of a model without passes."""
        where, body = self._where(cache, rows, exists), self.body
        assert isinstance(body, plain.Plain)
        x = self.model.embedded(tokens[:, None], where)
        hidden, after, _, _ = body.stack(x, where, self._call(), within(cache["body"], rows))
        cache = cache | {"body": _wholes(after)}
        return self._ended(hidden, cache, rows, exists)

    def _where(self, cache: Any, rows: jax.Array, exists: jax.Array) -> Where:
        return Where.after(cache["seen"][0][rows], 1, exists[:, None])

    def _call(self) -> Call:
        return Call(rule="causal", limited=False, counts=False)

    def _ended(self, hidden: jax.Array, cache: Any, rows: jax.Array, exists: jax.Array) -> tuple[jax.Array, Any]:
        seen = cache["seen"].at[0, rows].add(exists.astype(jnp.int32), unique_indices=True)
        return self.model._logits(hidden)[:, 0], cache | {"seen": seen}


def within(
    state: Any, rows: jax.Array, cache: jax.Array | None = None, caches: int = 1, writes: jax.Array | None = None
) -> Any:
    """The state of a stack, of which some rows i32[n] are computed. cache i32[n]: which of so many caches that stand
    one after another each of them reads; writes: as of `Within`."""

    def one(own: Any) -> Any:
        if own is None:
            return None
        count = jax.tree.leaves(own)[0].shape[0] // caches
        return Within(own, jnp.zeros((), jnp.int32) if cache is None else cache * count, rows, writes)

    return tuple(one(own) for own in state)


def _wholes(after: Any) -> Any:
    return tuple(None if own is None else own.whole for own in after)


def _with(cache: Any, name: str, after: Any) -> Any:
    return cache | {"body": cache["body"] | {name: _wholes(after)}}
