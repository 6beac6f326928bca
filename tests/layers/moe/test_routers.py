"""The family as a whole: a router is one file, and every router keeps the promises of the interface."""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.moe import routers
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.layer import routed_layer
from adaptive.layers.moe_config import MoEConfig
from adaptive.layers.site import Site
from adaptive.recipe import list_recipes, load

CONTRIBUTING = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"
WIDTH, SEQ, HIDDEN = 16, 32, 352
CONFIGS = {load(name).model.moe.router: load(name).model.moe for name in list_recipes() if name.startswith("moe_")}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The router of CONTRIBUTING, as a file among the routers."""
    code = re.search(r"```python\n(\"\"\"Top-1 by.*?)```", CONTRIBUTING.read_text(), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(code)
    monkeypatch.setattr(routers, "__path__", [*routers.__path__, str(tmp_path)])
    yield MoEConfig("example", experts=4, expert_size=12, experts_per_token=1, options=("temperature=2",))
    sys.modules.pop("adaptive.layers.moe.routers.example", None)


def layer(config: MoEConfig):
    return routed_layer(config, HIDDEN, Site(WIDTH, 0.5, depth=4), jax.random.key(0))


def test_the_router_of_the_guide_is_one_file(example):
    moe = layer(example)
    x = jax.random.normal(jax.random.key(1), (2, SEQ, WIDTH))
    y, aux, dispatch = moe(x)
    combine = np.asarray(dispatch.combine_matrix()).reshape(2, SEQ, 4)
    logits = np.asarray(moe.router.logits(x)) / 2
    best = logits.argmax(-1)
    np.testing.assert_array_equal(combine.argmax(-1), best)
    np.testing.assert_allclose(combine.max(-1), 1 / (1 + np.exp(-logits.max(-1))), rtol=1e-5)
    assert aux["load_balancing_loss"].coefficient == example.balance_coefficient
    dense, _, _ = layer(MoEConfig("example", 4, 12, 1, execution="dense", options=("temperature=2",)))(x)
    np.testing.assert_allclose(y, dense, atol=1e-5)


def test_every_router_has_a_recipe():
    assert set(CONFIGS) == set(routers.names())


def test_an_unknown_router_names_the_nearest():
    with pytest.raises(RecipeError, match="nearest: expert_choice"):
        layer(MoEConfig("expert_choise"))


@functools.cache
def generation(name: str):
    """x -> (y, statistics) of one layer of a router, choosing as in generation; compiled once for [2, SEQ, WIDTH]."""
    moe = layer(CONFIGS[name])
    assert not moe.refuse_generation()
    graphdef, state = nnx.split(moe)

    @quick.jit
    def run(state, x):
        y, routing = nnx.merge(graphdef, state).routed(x, Context(selection="threshold"))
        return y, routing.stats

    return lambda x: run(state, x)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, SEQ, WIDTH))


every_router = pytest.mark.parametrize("name", routers.names())


@every_router
def test_the_choice_of_generation_is_blind_to_the_future(name, x):
    changed = x.at[:, 20:].set(-3 * x[:, 20:])
    before, after = generation(name)(x)[0], generation(name)(changed)[0]
    np.testing.assert_allclose(after[:, :20], before[:, :20], atol=1e-5)
    assert np.abs(after[:, 20:] - before[:, 20:]).max() > 1e-3


@every_router
def test_a_router_that_is_not_a_number_is_not_hidden(name, x):
    """Its layer's output is not a number either, so the step is skipped and counted."""
    y, _ = generation(name)(x.at[0, 5].set(jnp.nan))
    assert not np.isfinite(np.asarray(y)[0, 5]).any()


@every_router
def test_statistics_are_sums_over_tokens(name, x):
    """Where tokens do not compete, two sequences have together what each has alone."""
    whole, one, two = (generation(name)(rows)[1] for rows in (x, x[jnp.array([0, 0])], x[jnp.array([1, 1])]))
    for stat in ("tokens", "claimed", "kept", "experts_per_token", "dropped", "z", "entropy", "top"):
        np.testing.assert_allclose(2 * whole[stat], one[stat] + two[stat], rtol=1e-4, atol=1e-3, err_msg=stat)
    assert whole["tokens"] == 2 * SEQ
    assert whole["experts_per_token"].sum() == 2 * SEQ
