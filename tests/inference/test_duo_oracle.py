"""The oracle against passes over models whose paths are forced one by one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.inference.duo_oracle import paths, search
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import duo_llm, token_choice

pytestmark = pytest.mark.compiles

LAYERS = 2


DUO = duo_llm.Settings(skip=True, small_size=4)


def model(router=DUO, kind=shapes.plain, **shape):
    feed_forward = experts.Settings(router, experts=2, expert_size=32, execution="dense")
    small = {"vocab_size": 32, "width": 16, "heads": 2, "kv_heads": 1, "init_std": 0.3}
    return kind(**({"layers": LAYERS} | shape | small), feed_forward=feed_forward).build(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens, selection="threshold").logits


def losses(built, tokens, targets, path) -> np.ndarray:
    """Losses where a router of huge logits, the same for all tokens, takes each layer's choice."""
    # Behind the norm no input is constant, so the choice is put into the weights: the others' matrices become zero
    # and the one that is left is what every choice gives.
    graphdef, state = nnx.split(built)
    other = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    ff = other.body.stack.blocks[0].feed_forward
    hidden = ff.big.up[...].shape[-1]
    for part in ("gate", "up", "down"):
        big, small = getattr(ff.big, part), getattr(ff.small, part)
        axis = 2 if part == "down" else 3
        pad = [(0, 0)] * 4
        pad[axis] = (0, hidden - small[...].shape[axis])
        alike = [big[...], jnp.pad(small[...], pad), jnp.zeros_like(big[...])]
        big[...] = jnp.stack([alike[choice][layer] for layer, choice in enumerate(path)])
    ff.router.weight[...] = jnp.zeros_like(ff.router.weight[...])  # equal logits: the first choice, which is big
    logits = logits_of(*nnx.split(other), tokens)
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1)[..., 0]


def test_the_best_of_all_paths_is_found():
    built = model()
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 32)
    targets = jax.random.randint(jax.random.key(2), (2, 5), 0, 32)
    found = search(built, tokens, targets)
    every = {path: losses(built, tokens, targets, path) for path in itertools.product(range(3), repeat=LAYERS)}
    best = np.min(list(every.values()), axis=0)
    np.testing.assert_allclose(found.loss, best, atol=1e-5)
    np.testing.assert_allclose(found.small, every[1, 1], atol=1e-5)
    np.testing.assert_allclose(found.difficulty, every[1, 1] - best, atol=2e-5)
    assert (found.difficulty >= 0).all() and len(np.unique(found.path.reshape(-1, LAYERS), axis=0)) > 1
    for index in np.ndindex(2, 5):
        np.testing.assert_allclose(every[tuple(map(int, found.path[index]))][index], best[index], atol=1e-5)
    limited = search(built, tokens, targets, big=[1])
    np.testing.assert_array_equal(limited.big, 1)
    within = [loss for path, loss in every.items() if path.count(0) == 1]
    np.testing.assert_allclose(limited.loss, np.min(within, axis=0), atol=1e-5)


def test_paths_begin_with_those_that_cost_least():
    every = paths(2, 3)
    assert every.shape == (9, 2)
    assert every[0].tolist() == [2, 2] and every[-1].tolist() == [0, 0]
    assert len(paths(12, 2)) == 4096
    assert len(paths(12, 2, big=[6])) == 924
    with pytest.raises(RecipeError, match="no path of 2 layers has 3"):
        paths(2, 2, big=[3])


def test_another_kind_of_model_is_refused():
    loops = {"kind": shapes.recursive, "layers": 4, "recursions": 2}
    for other in (model(token_choice.Settings()), model(**loops), model(**loops, shared="none")):
        with pytest.raises(RecipeError, match="duo_llm and without recursions"):
            search(other, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32))
