"""AdaMoE against its formulas."""

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
    output,
    router_gradients,
    run,
    softmax,
    weights_of,
)

from adaptive.errors import RecipeError
from adaptive.layers.moe.routers.adamoe import with_null_columns

pytestmark = pytest.mark.compiles

N, M, K = 4, 3, 3
FORMS = ("paper", "share", "plain")


def reference(weights, x, n=N, k=K, balance="paper"):
    p = softmax(x @ weights["router.weight"])
    choices = p.shape[-1]
    chosen = best(p, k)
    true = chosen & (np.arange(choices) < n)
    weight = np.where(true, p, 0)
    weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
    f = chosen.mean((0, 1))
    if balance != "plain":
        f[n:] = f[n:].mean() if choices > n else 0
    if balance == "share":
        f = f / f.sum()
    return Decision(weight, {"load_balancing_loss": choices * (f * p.mean((0, 1))).sum()})


def with_nulls_only(weights, x):
    """The first token chooses nulls alone."""
    x = x.copy()
    x[0, 0] = 3 * weights["router.weight"][:, N:].sum(1) - weights["router.weight"][:, :N].sum(1)
    return x


def test_is_the_formula_with_tokens_that_choose_nulls_alone():
    weights = weights_of(N, N + M)
    x = with_nulls_only(weights, inputs())
    assert not reference(weights, x).combine[0, 0].any()
    layer = build("adamoe", weights, {"null_experts": M}, experts_per_token=K)
    compare(layer, reference, weights, x)
    assert not np.asarray(run(layer, x)[0])[0, 0].any()
    assert layer.coefficients()["load_balancing_loss"] == 0.01


def test_balancing_losses_of_the_releases():
    weights, x = weights_of(N, N + M), inputs()
    values = {form: reference(weights, x, balance=form).losses["load_balancing_loss"] for form in FORMS}
    assert len({round(value, 3) for value in values.values()}) == 3
    for form, value in values.items():
        layer = build("adamoe", weights, {"null_experts": M, "balance": form}, experts_per_token=K)
        np.testing.assert_allclose(run(layer, x)[1].losses["load_balancing_loss"].value, value, rtol=1e-5)
    with pytest.raises(RecipeError, match="paper, share"):
        build("adamoe", weights, {"null_experts": M, "balance": "mean"}, experts_per_token=K)


def test_normalised_over_all_that_are_chosen():
    weights, x = weights_of(N, N + M), inputs()
    p = softmax(x @ weights["router.weight"])
    expected = np.where(best(p, K), p, 0)
    layer = build("adamoe", weights, {"null_experts": M, "normalise": "all"}, experts_per_token=K)
    combine = run(layer, x)[1].dispatch.combine_matrix().reshape(p.shape)
    np.testing.assert_allclose(combine, expected / expected.sum(-1, keepdims=True), atol=1e-6)


def test_without_nulls_it_is_token_choice():
    weights, x = weights_of(N, N), inputs()
    y, ours = run(build("adamoe", weights, {"null_experts": 0}, experts_per_token=2), x)
    same, theirs = run(build("token_choice", weights, experts_per_token=2), x)
    np.testing.assert_allclose(y, same, atol=1e-6)
    np.testing.assert_array_equal(ours.dispatch.mask(), theirs.dispatch.mask())
    name = "load_balancing_loss"
    np.testing.assert_allclose(ours.losses[name].value, 2 * theirs.losses[name].value, rtol=1e-6)


def test_a_balanced_router_has_loss_k_and_unbalanced_nulls_cost_nothing():
    """Uniform probabilities; which null is chosen does not matter."""
    x = np.concatenate([np.eye(3), -np.eye(3)])[None]  # six tokens
    columns = np.zeros((3, 6))
    for token in range(3):
        columns[token, [token, 3]] += 1e-4  # true expert `token`, and always null 3
    weights = weights_of(3, 6, width=3) | {"router.weight": columns}
    layer = build("adamoe", weights, {"null_experts": 3}, experts_per_token=2)
    _, routing = run(layer, x[:, :3])
    np.testing.assert_array_equal(routing.stats["claimed"], [1, 1, 1, 3, 0, 0])
    np.testing.assert_allclose(routing.losses["load_balancing_loss"].value, 2.0, atol=1e-3)


def test_absent_tokens_count_nowhere():
    weights, x = weights_of(N, N + M), inputs(batch=1)
    layer = build("adamoe", weights, {"null_experts": M}, experts_per_token=K)
    present = np.arange(8)[None] < 5
    _, cut = run(layer, x, present=jnp.asarray(present))
    _, short = run(layer, x[:, :5])
    whole, part = (routing.losses["load_balancing_loss"].value for routing in (short, cut))
    np.testing.assert_allclose(part, whole, rtol=1e-6)
    np.testing.assert_allclose(cut.stats["claimed"], short.stats["claimed"])
    assert not np.asarray(cut.dispatch.combine_matrix())[5:].any()


def test_capacity_drops_true_pairs_alone():
    weights, x = weights_of(N, N + M), inputs(batch=1, seq=14)
    layer = build("adamoe", weights, {"null_experts": M}, experts_per_token=K, capacity_factor=0.5, drop="position")
    _, routing = run(layer, x)
    assert routing.stats["kept"].max() == 3  # ceil(14 * 3 / 7 * 0.5)
    wanted = reference(weights, x).combine[..., :N] > 0
    kept = wanted & (np.cumsum(wanted, 1) <= 3)
    np.testing.assert_array_equal(routing.dispatch.mask(), kept)
    assert routing.stats["dropped"] == wanted.sum() - kept.sum() > 0


def test_every_execution_agrees():
    weights, x = weights_of(N, N + M), inputs()
    make = lambda name: build("adamoe", weights, {"null_experts": M}, experts_per_token=K, execution=name)  # noqa: E731
    executions_agree(make, x)


def test_conversion_copies_columns_in_order():
    weight = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(with_null_columns(weight, 4), [[0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 3, 4, 5, 3]])
    weights, x = weights_of(N, N), inputs()
    converted = weights | {"router.weight": np.asarray(with_null_columns(jnp.asarray(weights["router.weight"]), N))}
    layer = build("adamoe", converted, {"null_experts": N}, experts_per_token=4)
    y, routing = run(layer, x)
    expected = reference(weights, x, k=2)  # its two best and their copies
    np.testing.assert_array_equal(routing.dispatch.mask(), expected.combine > 0)
    np.testing.assert_allclose(y, output(weights, x, expected), atol=2e-5)


def test_the_coefficient_falls_after_the_given_steps():
    weights, x = weights_of(N, N + M), inputs()
    options = {"null_experts": M, "late_after": 2, "late_coefficient": 1e-4}
    layer = build("adamoe", weights, options, experts_per_token=K, balance_coefficient=0.02)
    for coefficient in (0.02, 0.02, 1e-4):
        losses = run(layer, x)[1].losses
        trained = sum(loss.value * layer.coefficients()[name] for name, loss in losses.items())
        np.testing.assert_allclose(trained, coefficient * losses["load_balancing_loss"].value, rtol=1e-5)
        layer.update({})


def test_a_single_true_expert_among_the_choices_gives_the_router_no_gradient():
    weights, x = weights_of(N, N + M), inputs(seed=5)
    layer = build("adamoe", weights, {"null_experts": M}, experts_per_token=2)
    single = (reference(weights, x, k=2).combine > 0).sum(-1) == 1
    assert 0 < single.sum() < single.size

    size = router_gradients(layer, x)
    assert (size[single] < 1e-6).all()
    assert (size[(reference(weights, x, k=2).combine > 0).sum(-1) == 2] > 1e-4).all()
    assert build("adamoe", weights, {"null_experts": M}, experts_per_token=1).no_gradient()
    assert not layer.no_gradient()


def test_bad_settings_say_what_would_be_right():
    with pytest.raises(RecipeError, match="at least 0"):
        build("adamoe", weights_of(N, N), {"null_experts": -1})
    with pytest.raises(RecipeError, match="whole number"):
        build("adamoe", weights_of(N, N), {"null_experts": 0}, experts_per_token=1.5)
