"""DynaMoE's thresholds and schedules, and top-p, against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from expert_oracle import (
    Decision,
    blind_to_the_future,
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
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers.dynamoe import Router, Settings, limits
from adaptive.layers.moe.settings import MoESettings
from adaptive.layers.site import Site

pytestmark = pytest.mark.compiles

E = 6


def reference(weights, x, *, quantile, limit, over="token", threshold=None):
    l = x @ weights["router.weight"]
    if over == "token":
        threshold = np.quantile(l, quantile, axis=-1, keepdims=True)
    if over == "batch":
        threshold = np.quantile(l, quantile)
    rank = np.argsort(np.argsort(-l, axis=-1, kind="stable"), axis=-1)
    wanted = (l >= threshold) | (rank == 0)
    active = wanted & (rank < limit)
    e = np.where(active, np.exp(l - l.max(-1, keepdims=True)), 0)
    share = active.sum((0, 1)) / active.sum()
    loss = E * (share * softmax(l).mean((0, 1))).sum()
    return Decision(e / e.sum(-1, keepdims=True), {"load_balancing_loss": loss})


@pytest.mark.parametrize(("over", "quantile"), [("token", 0.5), ("token", 0.2), ("batch", 0.45), ("ema", 0.5)])
def test_is_the_formula(over, quantile):
    weights, x = weights_of(E, E), inputs()
    if over == "ema":
        weights["router.threshold"] = np.array(0.8)
    options = {"threshold": over, "quantile": quantile, "schedule": "descending", "most": 2}
    layer = build("dynamoe", weights, options)
    expected = lambda weights, x: reference(weights, x, quantile=quantile, limit=2, over=over, threshold=0.8)  # noqa: E731
    compare(layer, expected, weights, x)
    _, routing = run(layer, x)
    loose = reference(weights, x, quantile=quantile, limit=E, over=over, threshold=0.8).combine > 0
    assert routing.stats["dropped"] == 0  # the limit is part of the method
    assert routing.stats["truncated"] == loose.sum() - np.asarray(routing.dispatch.mask()).sum() > 0
    assert (np.asarray(routing.dispatch.per_token()) >= 1).all()


@pytest.mark.parametrize("quantile", [0, 0.2, 0.4, 0.5, 0.8, 0.95])
def test_a_quantile_of_a_tokens_own_logits_gives_a_fixed_number_of_experts(quantile):
    options = {"threshold": "token", "quantile": quantile, "schedule": "ascending", "least": E, "most": E}
    layer = build("dynamoe", weights_of(E, E), options)
    count = E - math.ceil(round(quantile * (E - 1), 9))
    assert (np.asarray(run(layer, inputs())[1].dispatch.per_token()) == count).all()
    assert layer.flops(10, 6)[1] == 10 * count * 6 * 6 * 5


def test_the_running_threshold_follows_the_quantile_of_the_batch():
    weights, x = weights_of(E, E), inputs()
    layer = build("dynamoe", weights, {"most": E, "quantile": 0.7, "momentum": 0.5})
    logits = x @ weights["router.weight"]
    present = np.arange(8)[None] < np.array([[8], [5]])
    first = np.quantile(logits[present], 0.7)
    _, routing = run(layer, x, present=jnp.asarray(present))
    layer.update(routing.stats)
    np.testing.assert_allclose(layer.router.threshold[...], first, rtol=1e-5)
    _, routing = run(layer, x)
    layer.update({name: 3 * value for name, value in routing.stats.items()})  # sums of three micro-batches
    second = first + 0.5 * (np.quantile(logits, 0.7) - first)
    np.testing.assert_allclose(layer.router.threshold[...], second, rtol=1e-5)
    _, nobody = run(layer, x, present=jnp.zeros((2, 8), bool))
    layer.update(nobody.stats)
    np.testing.assert_allclose(layer.router.threshold[...], second, rtol=1e-5)
    taken = np.asarray(run(layer, x)[1].dispatch.per_token())
    assert len(set(taken.reshape(-1))) > 1  # it adapts


@pytest.mark.parametrize(("schedule", "expected"), [
    ("descending", [5, 4, 3, 2, 1]), ("ascending", [1, 2, 3, 4, 5]), ("pyramid_up", [1, 3, 5, 3, 1]),
    ("pyramid_down", [5, 3, 1, 3, 5]), ("wave", [3, 5, 3, 1, 3]), ("uniform", [3, 3, 3, 3, 3]),
])  # fmt: skip
def test_schedules(schedule, expected):
    assert limits(schedule, 1, 5, 5) == expected


@pytest.mark.parametrize(("stack", "uses", "layers", "expected"), [
    ((3,), 0, (0, 2, 3), [5, 3, 2]),
    ((2,), 2, (0, 1), [[5, 4], [3, 2]]),  # a shared block of two layers, applied twice
    ((2, 2), 0, (1, 2), [[4, 3], [2, 1]]),
    ((), 0, (4,), 1),
])  # fmt: skip
def test_each_stacked_layer_has_its_own_limit(stack, uses, layers, expected):
    config = MoESettings(Settings(schedule="descending", most=5))
    router = Router(config, Site(4, 0.02, stack, uses, layers, 5), jax.random.key(0))
    np.testing.assert_array_equal(router.limit[...], expected)
    assert len(router.limit.get_metadata()["axes"]) == router.limit.ndim


@pytest.mark.parametrize("shared", ["all", "none"])
def test_passes_of_a_core_of_several_blocks_go_on_where_the_last_one_ended(shared):
    """Ten layers: one, twice the four of the core, where dense and routed ones alternate, and one."""
    router = Settings(schedule="descending", most=8, threshold="token", quantile=0)
    pattern = (shapes.block(), shapes.block(feed_forward=experts.Settings(router, experts=8)))
    model = shapes.recursive(10, 2, pattern=pattern, shared=shared)
    assert model.body.core.layers == 4 and model.body.prelude.layers == 1
    (layer,) = nnx.eval_shape(lambda: model.build(jax.random.key(0))).routed().values()
    every = limits("descending", 1, 8, 10)
    assert layer.router.limits == (every[2], every[4], every[6], every[8])
    assert layer.router.limit.shape == (2, 2)
    # The account computes each pass by its own limits.
    first, second = (cost.experts for cost in model.body.cost(32, 16) if cost.recursion)
    assert first / second == (every[2] + every[4]) / (every[6] + every[8])


def top_p_reference(weights, x, *, p, most):
    q = softmax(x @ weights["router.weight"])
    keep, wanted = np.zeros(q.shape), np.zeros(q.shape)
    for token in np.ndindex(q.shape[:2]):
        total = 0.0
        for place, e in enumerate(np.argsort(-q[token], kind="stable")):
            if total > p:
                break
            wanted[token][e] = 1
            keep[token][e] = place < most
            total += q[token][e]
    weight = keep * q
    share = wanted.sum((0, 1)) / wanted.sum()
    losses = {
        "load_balancing_loss": E * (share * q.mean((0, 1))).sum(),
        "router_entropy_loss": -(q * np.log(q)).sum(-1).mean(),
    }
    return Decision(weight / weight.sum(-1, keepdims=True), losses), int(wanted.sum() - keep.sum())


@pytest.mark.parametrize(("p", "most"), [(0.4, 0), (0.6, 2)])
def test_top_p_is_the_formula(p, most):
    weights, x = weights_of(E, E, spread=0.5), inputs()
    layer = build("top_p", weights, {"p": p, "most": most})
    reference = lambda weights, x: top_p_reference(weights, x, p=p, most=most or E)[0]  # noqa: E731
    compare(layer, reference, weights, x)
    assert layer.coefficients()["router_entropy_loss"] == 1e-4
    _, routing = run(layer, x)
    cut = top_p_reference(weights, x, p=p, most=most or E)[1]
    assert routing.stats["truncated"] == routing.stats["dropped"] == cut
    assert (cut > 0) == bool(most)
    assert len(set(np.asarray(routing.dispatch.per_token()).reshape(-1))) > 1


@pytest.mark.parametrize(("router", "options"), [("dynamoe", {}), ("top_p", {"p": 0.5})])
def test_every_execution_agrees(router, options):
    weights, x = weights_of(E, E, spread=0.5), inputs()
    executions_agree(lambda name: build(router, weights, options, execution=name), x)


@pytest.mark.parametrize("threshold", ["batch", "token"])
def test_generation_is_causal(threshold):
    blind_to_the_future(build("dynamoe", weights_of(E, E, spread=0.5), {"threshold": threshold}), inputs(), 3)


@pytest.mark.parametrize(("router", "options", "settings", "message"), [
    ("dynamoe", {"most": 9}, {}, "must stay within 1 and settings.experts=6"),
    ("dynamoe", {"least": 0}, {}, "router.least=0: must be at least 1"),
    ("dynamoe", {"least": 3, "most": 2}, {}, "least not exceed most"),
    ("dynamoe", {"quantile": 1.0}, {}, "below 1"),
    ("dynamoe", {}, {"capacity_factor": 1.0}, "has no setting 'capacity_factor'"),
    ("top_p", {"p": 0.0}, {}, "above 0"),
    ("top_p", {"most": 7}, {}, "1 to settings.experts=6"),
])  # fmt: skip
def test_bad_settings_say_what_would_be_right(router, options, settings, message):
    with pytest.raises(RecipeError, match=message):
        build(router, weights_of(E, E), options, **settings)


def test_one_expert_per_token_would_teach_the_router_nothing():
    assert "learns nothing" in build("dynamoe", weights_of(E, E), {"most": 1}).no_gradient()
    assert "learns nothing" in build("top_p", weights_of(E, E), {"most": 1}).no_gradient()
    assert not build("dynamoe", weights_of(E, E)).no_gradient()
