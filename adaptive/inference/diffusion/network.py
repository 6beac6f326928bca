"""A language model as a network that decoding asks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import UserError
from adaptive.inference.diffusion.caches import Cache
from adaptive.inference.diffusion.caches import none as without
from adaptive.layers import state as states
from adaptive.layers.keys_values import KeyValues
from adaptive.models.bodies import plain
from adaptive.objectives import Denoising
from kernels_pallas.choice import here


class Model:
    """A model that was trained to fill in hidden tokens, on one device.

    graphdef, state  of the model
    how              it denoises
    cached           whether keys and values are kept; else every call computes all positions
    """

    def __init__(self, graphdef: nnx.GraphDef, state: Any, how: Denoising, *, cached: bool):
        self.block, self.shifted, self._cached = how.block, how.shifted, cached
        self._graphdef, self._state, self._sees = graphdef, state, how.block or "all"
        self._empty = jax.jit(self._made_empty, static_argnums=(0, 1))
        self._put = jax.jit(states.put, donate_argnums=0)
        self._whole = jax.jit(self._all)
        self._part = jax.jit(self._some, donate_argnames="cache")

    def empty(self, rows: int, n: int) -> Any:
        return self._empty(rows, n) if self._cached else None

    def put(self, state: Any, row: int, one: Any) -> Any:
        return None if state is None else self._put(state, np.array([row]), one)

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
        with here():
            if self._cached:
                return self._part(self._state, tokens, places, exists, held, share, cache=state)
            return self._whole(self._state, tokens, exists, share), None

    def _made_empty(self, rows: int, n: int) -> Any:
        return nnx.merge(self._graphdef, self._state).init_cache(rows, n)

    def _all(self, state: Any, tokens: jax.Array, exists: jax.Array, share: jax.Array) -> jax.Array:
        model = nnx.merge(self._graphdef, state)
        return model(tokens, valid=exists, sees=self._sees, mask_ratio=share).logits

    def _some(
        self,
        state: Any,
        tokens: jax.Array,
        places: jax.Array,
        exists: jax.Array,
        held: jax.Array,
        share: jax.Array,
        *,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        model, kept = nnx.merge(self._graphdef, state), {**cache, "body": forget(cache["body"], held)}
        out, after = model.revise(tokens, places, kept, exists, sees=self._sees, mask_ratio=share)
        return out.logits, after


def forget(state: Any, held: jax.Array) -> Any:
    """A state whose slots hold something at held bool[rows, slots] alone."""

    def one(own: Any) -> Any:
        return own._replace(index=jnp.where(held, own.index, -1)) if isinstance(own, KeyValues) else own

    return jax.tree.map(one, state, is_leaf=lambda own: isinstance(own, KeyValues))


def check_cache(settings: Any, cache: Cache) -> None:
    """Raises UserError for a model, by its settings, that computes no position alone."""
    if isinstance(cache, without.Settings) or isinstance(settings.body, plain.Settings):
        return
    raise UserError(
        f"cache {cache.kind()} computes some positions alone, and a {settings.body.title()} decides about all of them "
        "together: take cache none"
    )


def starved(settings: Any, positions: int) -> str:
    """What to know of experts that choose among so few positions as a call computes; empty where nothing is."""
    few = [
        each
        for each in settings.facts().experts
        if (per_token := getattr(each.settings.router, "experts_per_token", 0))
        and each.settings.router.kind() == "expert_choice"
        and positions * per_token < 4 * each.settings.experts
    ]
    if not few:
        return ""
    each = few[0].settings
    taken = max(positions * each.router.experts_per_token // each.experts, 1) * each.experts / positions
    return (
        f"{each.experts} experts choose among the {positions} positions of a call, and take {taken:.3g} of each token "
        f"rather than {each.router.experts_per_token}"
    )
