"""LongCat's identity experts against their formulas, and the controller that holds the mean of true experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_oracle import (
    Decision,
    best,
    build,
    compare,
    executions_agree,
    inputs,
    run,
    softmax,
    weights_of,
)
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context

pytestmark = pytest.mark.compiles

N, Z, K = 4, 3, 3


def reference(weights, x):
    p = softmax(x @ weights["router.weight"])
    chosen = best(p + weights.get("router.bias", 0), K)
    combine = np.where(chosen, 6.0 * p, 0)
    share, mean = chosen[..., :N].sum((0, 1)), p[..., :N].mean((0, 1))
    loss = N * (share / share.sum() * mean / mean.sum()).sum()
    return Decision(combine, {"load_balancing_loss": loss}, x * combine[..., N:].sum(-1, keepdims=True))


def layer_of(weights, **options):
    return build("longcat", weights, {"zero_experts": Z, **options}, experts_per_token=K)


@pytest.mark.parametrize("biased", [False, True])
def test_is_the_formula(biased):
    bias = {"router.bias": np.array([0.1, 0, -0.1, 0, 0.05, 0, 0])} if biased else {}
    weights = weights_of(N, N + Z, spread=0.3) | bias
    compare(layer_of(weights), reference, weights, inputs())


def test_without_zero_experts_it_is_token_choice_that_is_not_renormalised():
    weights, x = weights_of(N, N), inputs()
    ours, _ = run(build("longcat", weights, {"zero_experts": 0}, experts_per_token=K), x)
    options = {"normalise": False, "route_scale": 6.0}
    theirs, _ = run(build("token_choice", weights, options, experts_per_token=K), x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_one_update_of_the_bias():
    weights = weights_of(N, N + Z)
    layer = layer_of(weights, true_experts=2, proportional=0.7, integral=0.35, derivative=1.4)
    stats = {"claimed": jnp.array([10.0, 6, 8, 8, 20, 9, 3]), "tokens": jnp.float32(32)}  # mean 1: error 0.5
    layer.update(stats)
    common = (0.7 * 0.5 + 0.35 * 0.5 + 1.4 * 0.5) / 7
    balance = np.array([-1, 1, 0, 0]) * 1e-3
    np.testing.assert_allclose(layer.router.bias[...], [*(common + balance), 0, 0, 0], atol=1e-7)
    layer.update(stats)
    common += (0.35 * 0.5 - 1.4 * 0.5) / 7
    np.testing.assert_allclose(layer.router.bias[...], [*(common + 2 * balance), 0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("target", [0.8, 2.2])
def test_the_controller_holds_the_mean_of_true_experts(target):
    weights, x = weights_of(N, N + Z, spread=0.3), jnp.asarray(inputs(8, 32), jnp.float32)
    graphdef, state = nnx.split(layer_of(weights, true_experts=target))

    @jax.jit
    def step(state):
        layer = nnx.merge(graphdef, state)
        stats = layer.router(x, Context()).stats
        layer.update(stats)
        return nnx.state(layer), stats["claimed"][:N] / stats["tokens"]

    loads = []
    for _ in range(600):
        state, load = step(state)
        loads.append(load)
    late = np.mean(loads[-100:], axis=0)
    assert abs(late.sum() - target) < 0.05
    assert late.max() / late.mean() < 1.1


def test_absent_tokens_get_nothing():
    weights, x = weights_of(N, N + Z), inputs()
    present = jnp.arange(8)[None] < jnp.array([[8], [3]])
    y, routing = run(layer_of(weights), x, present=present)
    assert not np.asarray(y)[1, 3:].any()
    assert routing.stats["tokens"] == 11
    assert routing.stats["claimed"].sum() == 11 * K


def test_every_execution_agrees():
    weights, x = weights_of(N, N + Z), inputs()
    make = lambda name: build("longcat", weights, {"zero_experts": Z}, experts_per_token=K, execution=name)  # noqa: E731
    executions_agree(make, x)


def test_bad_settings_say_what_would_be_right():
    with pytest.raises(RecipeError, match="at most"):
        layer_of(weights_of(N, N + Z), true_experts=4)
    with pytest.raises(RecipeError, match="at least 0"):
        build("longcat", weights_of(N, N), {"zero_experts": -1})
