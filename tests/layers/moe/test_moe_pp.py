"""MoE++ against its formulas."""

import functools
import math

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
    model_of,
    output,
    router_gradients,
    run,
    softmax,
    weights_of,
)
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.routers.moe_pp import Settings

pytestmark = pytest.mark.compiles

N, CONST, COPY, ZERO = 4, 2, 1, 1
ALL = N + CONST + COPY + ZERO
WIDTH = 6


def arrays(*, gate="mlp", residual=True, zero=ZERO, spread=1.0, seed=0):
    choices = N + CONST + COPY + zero
    extra = {"constant_gate": (CONST, WIDTH, 2), "constant": (CONST, WIDTH)}
    if residual:
        extra["residual"] = (choices, choices)
    if gate == "mlp":
        extra["second"] = (8 * choices, choices)
    return weights_of(N, 8 * choices if gate == "mlp" else choices, spread=spread, seed=seed, **extra)


def reference(weights, x, *, previous=None, zero=ZERO, k=2, scale=1.0, mixtral=False, norm=0.0, tau=0.75):
    l = x @ weights["router.weight"]
    if "router.second" in weights:
        l = np.tanh(l) @ weights["router.second"]
    if previous is not None:
        l = l + previous @ weights["router.residual"]
    if norm:
        l = l / l.std(-1, ddof=1, keepdims=True) * norm
    p, chosen = softmax(l), best(l, k)
    w = np.where(chosen, p, 0)
    if zero and not mixtral:
        w[..., -zero:] = 0
    total = w.sum(-1, keepdims=True)
    w = np.divide(w, total, out=np.zeros_like(w), where=total > 0)
    rows = scale * x
    y = rows * w[..., N + CONST : N + CONST + COPY].sum(-1, keepdims=True)
    for j in range(CONST):
        a = softmax(rows @ weights["router.constant_gate"][j])
        y = y + w[..., N + j, None] * (a[..., :1] * rows + a[..., 1:] * weights["router.constant"][j])
    eta = np.where(np.arange(l.shape[-1]) < N, 1, tau)
    loss = (eta * chosen.mean((0, 1)) * p.mean((0, 1))).sum()
    return Decision(w, {"load_balancing_loss": loss}, y, scale)


@pytest.mark.parametrize(("shape", "settings", "options"), [
    ({}, {}, {}),
    ({"gate": "linear"}, {"scale": 2.0}, {"gate": "linear", "input_scale": True}),
    ({"gate": "linear"}, {"mixtral": True}, {"gate": "linear", "mixtral_gating": True, "input_scale": True}),
    ({"gate": "linear"}, {"norm": 1.5, "tau": 0.3}, {"gate": "linear", "logits_norm": 1.5, "tau": 0.3}),
    ({"gate": "linear", "zero": 3}, {"zero": 3}, {"gate": "linear", "zero": 3}),
], ids=["paper", "released", "mixtral", "normed", "three zero experts"])  # fmt: skip
def test_is_the_formula(shape, settings, options):
    weights = arrays(residual=False, spread=0.5, **shape)
    layer = build("moe_pp", weights, {"residual": False, **options})
    compare(layer, functools.partial(reference, **settings), weights, inputs())


def test_the_logits_of_the_layer_below_are_added():
    weights, x = arrays(gate="linear"), inputs()
    previous = np.random.default_rng(4).normal(size=(*x.shape[:2], ALL))
    layer = build("moe_pp", weights, {"gate": "linear"})
    expected = functools.partial(reference, previous=previous.astype(np.float32))
    context = Context(previous=jnp.asarray(previous, jnp.float32))
    compare(layer, expected, weights, x, context=context)
    _, routing = run(layer, x, previous=context.previous)
    logits = x @ weights["router.weight"] + previous @ weights["router.residual"]
    np.testing.assert_allclose(routing.logits, logits, atol=1e-5)  # what the next layer reads holds this residual
    assert layer.reads_previous
    assert layer.choices == ALL


def test_a_token_of_zero_experts_alone_gets_nothing_and_its_gradient_is_finite():
    weights = arrays(gate="linear", residual=False, zero=3)
    x = inputs()
    x[0, 0] = weights["router.weight"][:, -3:].sum(1) * 3
    decision = reference(weights, x, zero=3)
    assert not decision.combine[0, 0].any()
    layer = build("moe_pp", weights, {"gate": "linear", "residual": False, "zero": 3})
    np.testing.assert_allclose(run(layer, x)[0], output(weights, x, decision), atol=2e-5)
    sizes = router_gradients(layer, x)
    assert sizes[0, 0] == 0
    assert np.isfinite(sizes).all()


def test_a_partner_of_a_zero_expert_has_weight_one_and_gives_the_router_no_gradient():
    weights = arrays(gate="linear", residual=False)
    x = inputs(seq=16)
    combine = reference(weights, x).combine
    single = (combine > 0).sum(-1) == 1
    assert 0 < single.sum() < single.size
    layer = build("moe_pp", weights, {"gate": "linear", "residual": False})
    sizes = router_gradients(layer, x)
    assert (sizes[single] < 1e-6).all()
    assert (sizes[~single] > 1e-5).all()


def test_with_true_experts_alone_it_is_token_choice():
    weights, x = weights_of(N, N), inputs()
    options = {"gate": "linear", "residual": False, "constant": 0, "copy": 0, "zero": 0}
    y, ours = run(build("moe_pp", weights, options), x)
    same, theirs = run(build("token_choice", weights), x)
    np.testing.assert_allclose(y, same, atol=1e-6)
    np.testing.assert_array_equal(ours.dispatch.mask(), theirs.dispatch.mask())


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("of", ["token", "pair"])
def test_capacities_differ_by_kind_and_hold_in_training_alone(of, group):
    weights, x = arrays(gate="linear", residual=False), inputs(seq=24)
    options = {"gate": "linear", "residual": False, "tau": 0.5, "capacity_of": of}
    layer = build("moe_pp", weights, options, capacity_factor=0.8, drop="position", capacity_group=group)
    logits = x @ weights["router.weight"]
    chosen = best(logits, 2)
    tokens = (24 if group == "sequence" else 48) * (2 if of == "pair" else 1)
    room = math.ceil(0.8 * 0.5 * tokens / (0.5 * N + 4)), math.ceil(0.8 * tokens / (0.5 * N + 4))
    place = np.cumsum(chosen, 1)
    if group == "batch":  # tokens are numbered position by position
        place = np.cumsum(chosen.swapaxes(0, 1).reshape(-1, ALL), 0).reshape(24, -1, ALL).swapaxes(0, 1)
    kept = chosen & (place <= np.where(np.arange(ALL) < N, *room))
    _, routing = run(layer, x, training=True)
    np.testing.assert_array_equal(routing.dispatch.mask(), kept[..., :N])
    zero = np.asarray(routing.dispatch.zero_weights) > 0
    np.testing.assert_array_equal(zero[..., :-1], kept[..., N:-1])
    assert routing.stats["dropped"] == (chosen & ~kept)[..., :N].sum()
    assert routing.stats["zero_dropped"] == (chosen & ~kept)[..., N:].sum()
    _, evaluated = run(layer, x)
    np.testing.assert_array_equal(evaluated.dispatch.mask(), chosen[..., :N])


def test_a_model_carries_the_residual_from_layer_to_layer():
    settings = experts.Settings(Settings(gate="linear"), experts=4, expert_size=16, execution="dense")
    model, tokens = model_of(settings, layers=3), jnp.arange(24).reshape(2, 12) % 32
    graphdef, state = nnx.split(model)

    def loss(state):
        out = nnx.merge(graphdef, state)(tokens)
        return out.aux.total() + out.logits.std()

    grads = jax.jit(jax.grad(loss))(state)
    residual = grads["body"]["stack"]["blocks"][0]["feed_forward"]["router"]["residual"]
    by_layer = np.abs(np.asarray(residual[...])).max((1, 2))
    assert by_layer[0] == 0  # nothing below the first layer
    assert (by_layer[1:] > 0).all()


def test_every_execution_agrees():
    weights, x = arrays(spread=0.5, residual=False), inputs()
    make = lambda name: build("moe_pp", weights, {"residual": False}, execution=name)  # noqa: E731
    executions_agree(make, x)


def test_bad_settings_say_what_would_be_right():
    with pytest.raises(RecipeError, match=r"router\.tau=0\.0: must be above 0"):
        build("moe_pp", arrays(), {"tau": 0.0})
    with pytest.raises(RecipeError, match="at least 0"):
        build("moe_pp", arrays(), {"zero": -1})
    alone = build("moe_pp", arrays(), experts_per_token=1)
    assert "learns nothing" in alone.no_gradient()
