"""Tokens that go through a recursion one pass at a time, beside the same tokens through all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import moe_pp
from adaptive.models import steps
from adaptive.models.depth import token_choice
from adaptive.models.steps import Steps
from adaptive.recipe import load

TOKEN = shapes.mor(5, 3, token_choice.Settings(), keys_values="shared")
MIXED = shapes.recursive(6, 2, pattern=(shapes.block(mixer="mamba2"), shapes.block()))
ROWS = jnp.array([3, 0, 2])  # of four; the second of these has no token


def where(mask, new, old):
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


@pytest.mark.compiles
@pytest.mark.parametrize("model", [TOKEN, MIXED], ids=["token_choice_shared", "mixed"])
def test_passes_one_at_a_time_are_those_of_the_whole(model):
    """Rows of different lengths; the one that enters late is a pass behind the others."""
    graphdef, state = split_model(model)
    module = nnx.merge(graphdef, state)

    def jitted(step):
        return jax.jit(lambda state, *args: step(Steps(nnx.merge(graphdef, state)), *args))

    prefill = jitted(lambda own, *args: own.model.prefill(*args))
    enter, once, leave = (jitted(step) for step in (Steps.enter, Steps.once, Steps.leave))
    tokens = jnp.arange(20).reshape(4, 5) % 7
    _, cache = prefill(state, tokens, module.init_cache(4, 8), jnp.arange(5) < jnp.array([2, 5, 3, 4])[:, None])
    new, exists = jnp.array([5, 1, 2]), jnp.array([True, False, True])
    everyone = jnp.zeros(4, jnp.int32).at[ROWS].set(new)
    out, whole = prefill(state, everyone[:, None], cache, jnp.zeros(4, bool).at[ROWS].set(exists)[:, None])
    expected, depth = out.logits[ROWS, 0], out.trace.depth[ROWS, 0]

    item, passes, going = Steps(module).nothing(3), jnp.zeros(3, jnp.int32), jnp.zeros(3, bool)
    one, late = exists & jnp.array([True, True, False]), exists & jnp.array([False, False, True])
    for enters in (one, late, *[jnp.zeros(3, bool)] * (Steps(module).passes - 1)):
        new_item, cache = enter(state, new, cache, ROWS, enters)
        item, going = where(enters, new_item, item), going | enters
        after, more, cache = once(state, passes, item, cache, ROWS, going)
        item = where(going, after, item)
        passes, going = passes + going, going & more
    assert not going.any()
    logits, cache = leave(state, item, cache, ROWS, exists)
    np.testing.assert_array_equal(passes[::2], depth[::2])
    np.testing.assert_allclose(logits[::2], expected[::2], atol=2e-5)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_models_that_cannot_say_why():
    assert all(steps.refuse(model) == "" for model in (TOKEN, MIXED, shapes.plain(2)))
    assert steps.refuse(load("mor_360m").model) == ""
    assert "parameters of their own" in steps.refuse(shapes.recursive(5, 3, shared="none"))
    assert "mixture_of_depths" in steps.refuse(load("mod_tiny").model)
    assert "neither" in steps.refuse(load("hnet_tiny").model)


@pytest.mark.compiles
@pytest.mark.parametrize(("residual", "linked"), [(True, True), (False, False)])
def test_routers_that_read_from_below_link_passes(residual, linked):
    block = shapes.block(feed_forward=experts.Settings(moe_pp.Settings(residual=residual), experts=4, expert_size=8))
    graphdef, state = split_model(shapes.recursive(5, 3, pattern=(block,)))
    assert steps.linked(nnx.merge(graphdef, state)) == linked
