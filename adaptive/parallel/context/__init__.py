"""Operations along the sequence, wherever it is: on one device, or split over the mesh's context axis."""

from typing import Any

import jax
import jax.numpy as jnp

from adaptive.parallel.context import attention as over_shards
from adaptive.parallel.context.axis import active_context
from adaptive.parallel.shard import sharded
from kernels_pallas.attention import Places
from kernels_pallas.attention import attention as on_one

LATER = 2**30  # index of keys that are added: after every query


def attention(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, **how: Any) -> jax.Array:
    """`kernels_pallas.attention.attention`, each device computing its own heads of its own rows, and its own part of
    the sequence. A few queries, as in generation, are computed by every device of the context axis.

    places  as its arguments, all with the axis of rows; how: window, causal and soft_cap
    """
    context = active_context()
    over = context.parts > 1 and q.shape[1] >= context.parts

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *given: jax.Array | None) -> jax.Array:
        places = Places(*given)
        return (
            over_shards.attention(context, q, k, v, places, **how)
            if over
            else on_one(q, k, v, **places._asdict(), **how)
        )

    queries, names = q.shape[1], ("batch", "seq" if over else None)
    if over:
        q, k, v, places = _filled(q, k, v, places, context.parts, how["causal"])
    arrays = (*names, "heads")
    given = [arrays] * 3 + [None if x is None else names for x in places]
    return sharded(local, given, arrays)(q, k, v, *places)[:, :queries]


def _filled(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, parts: int, causal: bool
) -> tuple[jax.Array, jax.Array, jax.Array, Places]:
    """The same with lengths that divide over the axis: added keys are seen by no query of before."""

    def longer(x: jax.Array, filler: int = 0) -> jax.Array:
        more = 0 if x.shape[1] % parts == 0 else -x.shape[1] % (2 * parts)
        return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)), constant_values=filler) if more else x

    if not causal and k.shape[1] % parts and places.k_valid is None:
        places = places._replace(k_valid=jnp.ones(k.shape[:2], bool))
    fillers = (0, LATER, 0, 0, 0)
    given = [None if x is None else longer(x, filler) for x, filler in zip(places, fillers, strict=True)]
    return longer(q), longer(k), longer(v), Places(*given)
