"""From what a pass told of its routers to what another one can be given in place of its own decisions."""

from typing import Any

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import STRAYED
from adaptive.models.facts import Facts
from adaptive.routing.replay import Replay
from adaptive.routing.rows import membership
from adaptive.routing.stages import at_bytes, outwards
from adaptive.routing.types import Output, Told, Trace


def recorded(trace: Trace, facts: Facts, shape: tuple[int, int]) -> Replay:
    """What was decided about tokens of this shape [rows, n]; facts: of the model.

    Raises RecipeError where the trace does not say it: in training, and where an H-Net leaves rows out, parts do not.
    """
    views = at_bytes(trace.stages, shape)
    chunks = jnp.stack([view.mask for view in views]) if views else jnp.zeros((0, *shape), bool)
    inner = _positions(trace, len(facts.chunking), shape)
    passes = None
    if facts.depth != "none":
        if not trace.selections:
            raise RecipeError("the trace says nothing of who took which pass: generate with rows=0 to record it")
        taken = jnp.stack([membership(own, inner[1]) for own in trace.selections])
        passes = _outwards(trace, len(facts.chunking), taken, False, shape)
    levels = len(facts.chunking) + 1
    return Replay(chunks, passes, tuple(_experts(trace, facts, level, shape) for level in range(levels)))


def unless_strayed(out: Output) -> Output:
    """The output, or NaN where a router did not follow the replay: it must not pass for one that did."""
    strayed = sum((one.stats[STRAYED].sum() for one in out.trace.told.values() if STRAYED in one.stats), jnp.zeros(()))
    only = lambda a: jnp.where(strayed == 0, a, jnp.nan)  # noqa: E731
    return out._replace(hidden=only(out.hidden), logits=None if out.logits is None else only(out.logits))


def by_layer(trace: Trace, facts: Facts, name: str, nothing: Any, shape: tuple[int, int]) -> jax.Array:
    """[layers with experts, rows, n]: what they told under `name` about each token, `nothing` where they say nothing;
    all bodies after one another, from the outermost inwards."""
    levels = range(len(facts.chunking) + 1)
    told = [layers for level in levels for _, layers in _told(trace, facts, level, [name], nothing, shape)]
    return jnp.concatenate([own[:, 0] for own in told]) if told else jnp.zeros((0, *shape), jnp.int32)


def _experts(trace: Trace, facts: Facts, level: int, shape: tuple[int, int]) -> jax.Array | None:
    """u32[layers, words, rows, n] of the body `level` stages inside."""
    mine = [one for one in facts.experts if one.path.count("inner/") == level]
    if not mine:
        return None
    names = sorted({n for one in mine if one.path in trace.told for n in _chosen(trace.told[one.path])})
    if not names:
        raise RecipeError("the trace does not say which experts were chosen: record=True in generation, or no training")
    found = _told(trace, facts, level, names, 0, shape)
    out = jnp.zeros((1 + max(max(layers) for layers, _ in found), len(names), *shape), jnp.uint32)
    for layers, words in found:
        out = out.at[jnp.array(layers)].set(words.astype(jnp.uint32))
    return out


def _chosen(told: Told) -> list[str]:
    return [name for name in told.per_token if name.startswith("chosen_")]


def _told(
    trace: Trace, facts: Facts, level: int, names: list[str], nothing: Any, shape: tuple[int, int]
) -> list[tuple[tuple[int, ...], jax.Array]]:
    """(numbers of layers, [layers, names, rows, n]) of each kind of experts of the body `level` stages inside."""
    n = _positions(trace, level, shape)[1]
    out = []
    for one in facts.experts:
        if one.path.count("inner/") != level:
            continue
        told = trace.told[one.path].per_token
        found = [told[name] for name in names if name in told]
        found += [jnp.full_like(found[0], nothing)] * (len(names) - len(found))  # fewer words than others have
        whole = jnp.stack(found)
        whole = whole.reshape(len(names), -1, *whole.shape[-2:]).swapaxes(0, 1)  # [calls, names, rows, m]
        if "core/" in one.path and trace.selections:
            whole = _at_places(trace, whole, facts.recursions, n, nothing)
        out.append((one.layers, _outwards(trace, level, whole, nothing, shape)))
    return out


def _at_places(trace: Trace, values: jax.Array, passes: int, n: int, nothing: Any) -> jax.Array:
    """[calls, names, rows, n] of what was told of those that each pass took: [calls, names, rows, m], pass by pass."""
    every = passes // len(trace.selections)  # of which the last one is routed
    placed = []
    for r, own in enumerate(values.reshape(passes, -1, *values.shape[1:])):
        if r % every != every - 1:
            placed.append(own)
            continue
        selection = trace.selections[r // every]
        taken = jnp.where(selection.valid, own[..., : selection.indices.shape[-1]], nothing)
        put = lambda row, i, v: jnp.full(n, nothing, row.dtype).at[i].set(row, unique_indices=True)  # noqa: E731
        each = jax.vmap(jax.vmap(lambda one, s=selection, put=put: jax.vmap(put)(one, s.indices, s.valid)))
        placed.append(each(taken))
    return jnp.stack(placed).reshape(*values.shape[:-1], n)


def _positions(trace: Trace, level: int, shape: tuple[int, int]) -> tuple[int, int]:
    """[rows, n] of the body `level` stages inside."""
    if level == 0:
        return shape
    rows, n = trace.stages[level - 1].selection.indices.shape
    return rows, n


def _outwards(trace: Trace, level: int, values: jax.Array, nothing: Any, shape: tuple[int, int]) -> jax.Array:
    """[..., rows, n] at the tokens, of values [..., rows, m] at the positions of the body `level` stages inside."""
    flat = values.reshape(-1, *values.shape[-2:])
    own = jax.vmap(lambda one: outwards(trace.stages[:level], one, nothing).reshape(shape))(flat)
    return own.reshape(*values.shape[:-2], *shape)
