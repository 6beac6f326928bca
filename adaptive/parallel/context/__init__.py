"""Operations along the sequence, wherever it is: on one device, or split over the mesh's context axis."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.parallel.context import dense, recurrent
from adaptive.parallel.context.axis import active_context
from adaptive.parallel.context.halo import extended
from adaptive.parallel.rules import along
from adaptive.parallel.shard import sharded
from kernels_pallas import attention as attention_on_one
from kernels_pallas import ssd as ssd_on_one
from kernels_pallas.attention import Places

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
            dense.attention(context, q, k, v, places, **how)
            if over
            else attention_on_one.attention(q, k, v, **places._asdict(), **how)
        )

    queries, names = q.shape[1], ("batch", "seq" if over else None)
    if over:
        q, k, v, places = _filled(q, k, v, places, context.parts, how["causal"])
    arrays = (*names, "heads")
    given = [arrays] * 3 + [None if x is None else names for x in places]
    return sharded(local, given, arrays)(q, k, v, *places)[:, :queries]


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    segments: jax.Array | None,
    state: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.ssd.ssd`, each device computing its own heads of its own rows, and its own part of the sequence
    where that divides over the context axis."""
    context, seq = active_context(), along(x.shape[1])

    def local(
        x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array, segments: Any
    ) -> tuple[jax.Array, jax.Array]:
        how = {"segments": segments, "state": state, "block": block}
        if context.parts == 1 or seq is None:
            return ssd_on_one.ssd(x, dt, a, b, c, **how)
        return recurrent.ssd(context, x, dt, a, b, c, **how)

    rows, split, carried = ("batch", seq), ("batch", seq, "heads"), ("batch", "heads")
    given = [split, split, ("heads",), rows, rows, carried, None if segments is None else rows]
    return sharded(local, given, (split, carried))(x, dt, a, b, c, state, segments)


def convolved(
    local: Callable[..., jax.Array],
    x: jax.Array,
    before: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    segments: jax.Array | None,
    channels: tuple[str | None, ...],
) -> jax.Array:
    """local(inputs, weight, bias, segments), a convolution that reads `taps` - 1 earlier positions, of the part of the
    sequence that each device has; result [batch, seq, *channels].

    x, before  [batch, seq, *channels], and the positions before it [batch, taps - 1, *channels]; the inputs are those
               of both together
    segments   i32[batch, seq], which it gets with those of the earlier positions, too; before the first they are as
               the first's
    channels   logical names of the dimensions of the weights [taps, *channels]
    """
    context, seq, reach = active_context(), along(x.shape[1]), before.shape[1]
    over = context.parts > 1 and seq is not None and x.shape[1] >= context.parts * reach

    def part(x: jax.Array, before: jax.Array, weight: jax.Array, bias: jax.Array, segments: Any) -> jax.Array:
        past = functools.partial(extended, axis=context.axis, parts=context.parts, reach=reach)
        edge = None if segments is None else jnp.broadcast_to(segments[:, :1], (segments.shape[0], reach))
        return local(past(x, first=before), weight, bias, None if segments is None else past(segments, first=edge))

    if not over:
        edges = None if segments is None else jnp.pad(segments, ((0, 0), (reach, 0)), mode="edge")
        return local(jnp.concatenate([before, x], axis=1), weight, bias, edges)
    whole, rows = ("batch", None, *channels), ("batch", "seq")
    given = [(*rows, *channels), whole, (None, *channels), channels, None if segments is None else rows]
    return sharded(part, given, (*rows, *channels))(x, before, weight, bias, segments)


def _filled(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, parts: int, causal: bool
) -> tuple[jax.Array, jax.Array, jax.Array, Places]:
    """The same with lengths that divide over the axis: added keys are seen by no query of before."""

    def longer(x: jax.Array, filler: int = 0) -> jax.Array:
        more = 0 if x.shape[1] % parts == 0 else -x.shape[1] % (2 * parts)
        return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)), constant_values=filler) if more else x

    if not causal and k.shape[1] % parts and places.k_valid is None:
        places = places._replace(k_valid=jnp.ones(k.shape[:2], bool))
    fillers = (0, LATER, 0, 0, 0, 0, 0, 0)
    given = [None if x is None else longer(x, filler) for x, filler in zip(places, fillers, strict=True)]
    return longer(q), longer(k), longer(v), Places(*given)
