"""A pass of generation that computes nothing where no row needs it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.layers.call import Tales
from adaptive.layers.state import State
from adaptive.layers.where import Where
from adaptive.models.chunks import in_groups
from adaptive.routing.types import Told

Pass = Callable[[Any, Where, Any], tuple[Any, Any, Tales]]


def where_needed(
    through: Pass,
    x: Any,
    where: Where,
    state: State,
    read: Callable[[State], Any],
    write: Callable[[State, Any], State],
    *,
    rows: int,
    skips: bool,
) -> tuple[Any, State, Tales]:
    """`through(x, where, read(state))`, whose middle result is written to the state.

    x      a tree of arrays [batch, n, ...]; what does not exist keeps its own or becomes zero
    rows   of one position each (n = 1): how many rows that exist are computed at once, until none is left; 0: all
    skips  whether a call in which no position exists computes nothing
    """
    batch, n = where.shape
    grouped = n == 1 and 0 < rows < batch

    def taken(x: Any, state: State) -> tuple[Any, State, Tales]:
        own = read(state)
        if grouped:
            x, own, told = in_groups(lambda *a: _by_rows(*through(*a)), x, where, own, rows)
            told = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -2), told)
        else:
            x, own, told = through(x, where, own)
        return x, write(state, own), told

    if not skips:
        return taken(x, state)
    assert where.exists is not None
    told = jax.eval_shape(taken, x, state)[2]

    def skipped(x: Any, state: State) -> tuple[Any, State, Tales]:
        return x, state, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), told)

    return jax.lax.cond(where.exists.any(), taken, skipped, x, state)


def by_token(told: Tales) -> Tales:
    """Of what was told the arrays by token alone."""
    return {path: Told(per_token=one.per_token) for path, one in told.items() if one.per_token}


def _by_rows(x: Any, own: Any, told: Tales) -> tuple[Any, Any, Any]:
    """The same, rows first."""
    return x, own, jax.tree.map(lambda a: jnp.moveaxis(a, -2, 0), by_token(told))
