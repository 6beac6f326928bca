"""What the best path of each token would be in a Duo-LLM, by trying all paths (arXiv 2410.10846, the oracle).

A path says for every layer whether the big feed-forward, the small one, or neither computes. Every token of a sequence
takes the path that is being tried, so its context has gone the same way; the paper leaves the context's path open.
"""

import itertools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.moe.routers.duo_llm import BIG, SMALL, Forced, Layer
from adaptive.objectives.cross_entropy import chunk_length, cross_entropy_sum
from adaptive.parallel.rules import device_kind


class Oracle(NamedTuple):
    """The cheapest among the best paths of every token.

    loss   f32[batch, seq]          negative log-likelihood in nats on the best path
    path   i32[batch, seq, layers]  0 big, 1 small, 2 skip
    small  f32[batch, seq]          the same loss with small in every layer
    """

    loss: jax.Array
    path: jax.Array
    small: jax.Array

    @property
    def difficulty(self) -> jax.Array:
        """f32[batch, seq]: how much loss more compute can take away (the paper's token difficulty). Without a bound
        on big layers it is at least 0, because small everywhere is among the paths."""
        return self.small - self.loss

    @property
    def big(self) -> jax.Array:
        """i32[batch, seq]: layers of the best path that are big."""
        return (self.path == BIG).sum(-1)


def paths(layers: int, choices: int, big: Collection[int] | None = None) -> np.ndarray:
    """All paths i32[paths, layers], those with few big and many skipped layers first.

    big  numbers of big layers that are allowed; None: all. Raises RecipeError where no path has such a number.
    """
    every = np.array(list(itertools.product(range(choices), repeat=layers)), np.int32)
    kept = every if big is None else every[np.isin((every == BIG).sum(1), list(big))]
    if not len(kept):
        raise RecipeError(f"no path of {layers} layers has {', '.join(map(str, big or ()))} big ones")
    return kept[np.lexsort(((kept == SMALL).sum(1), (kept == BIG).sum(1)))]


def search(
    model: Any,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    big: Collection[int] | None = None,
) -> Oracle:
    """The oracle of tokens and targets, both i32[batch, seq]; other arguments as the model and `paths` take them.

    One forward pass per path, 2^layers of them, or 3^layers with skipping. Raises RecipeError for another kind of model
    and for one with recursions.
    """
    routed = model.routed()
    path, layer = next(iter(routed.items()), ("", None))
    if not isinstance(layer, Layer) or len(routed) > 1 or layer.site.uses or len(layer.site.stack) > 1:
        raise RecipeError("the oracle needs a model of one kind of block, with router=duo_llm and without recursions")
    layers = layer.site.stack[0]
    steered = nnx.merge(*nnx.split(model))
    steered.routed()[path].forced = nnx.data(Forced(jnp.zeros(layers, jnp.int32)))
    graphdef, forced, state = nnx.split(steered, Forced, ...)  # type: ignore[misc]  # flax types three alone

    @jax.jit
    def run(state: Any, tried: jax.Array) -> Oracle:
        def losses(path: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, jax.tree.map(lambda _: path, forced), state)
            out = model(tokens, positions=positions, segment_ids=segment_ids, logits=False)
            weight = model.head_weight().astype(out.hidden.dtype)
            chunk = chunk_length(tokens.shape[1], tokens.shape[0], len(weight), device_kind())
            everywhere, cap = jnp.ones(tokens.shape, jnp.float32), model.settings.logit_soft_cap
            return cross_entropy_sum(out.hidden, weight, targets, everywhere, chunk, cap)[1]

        def better(best: tuple[jax.Array, jax.Array], path: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            least, chosen = best
            loss = losses(path)
            wins = loss < least
            return (jnp.where(wins, loss, least), jnp.where(wins[..., None], path, chosen)), None

        start = jnp.full(tokens.shape, jnp.inf, jnp.float32), jnp.zeros((*tokens.shape, layers), jnp.int32)
        (loss, path), _ = jax.lax.scan(better, start, tried)
        return Oracle(loss, path, losses(jnp.full(layers, SMALL, jnp.int32)))

    return run(state, jnp.asarray(paths(layers, layer.choices, big)))
