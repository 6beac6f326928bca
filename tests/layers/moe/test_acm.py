"""Adaptive computation modules against numpy, written from the paper's formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_oracle import model_of
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe import layer_from_weights
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.routers import acm as router

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH, SIZE, N = 2, 6, 8, 5, 4
TRAINING = Context(training=True)


def arrays(seed: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape, scale=0.6).astype(np.float32)  # noqa: E731
    return {
        "experts.gate": normal(N, WIDTH, SIZE),
        "experts.up": normal(N, WIDTH, SIZE),
        "experts.down": normal(N, SIZE, WIDTH),
        "router.hidden.0.weight": normal(WIDTH, 16),
        "router.hidden.0.bias": normal(16),
        "router.hidden.1.weight": normal(16, 16),
        "router.hidden.1.bias": normal(16),
        "router.weight": normal(16, N + 1),
        "router.bias": normal(N + 1),
        "router.base": normal(WIDTH),
    }


def inputs(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)


def acm(w, **settings):
    return layer_from_weights("acm", w, **settings)


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(a):
    return a * 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))


def gate(w, x):
    for i in range(2):
        x = gelu(x @ w[f"router.hidden.{i}.weight"] + w[f"router.hidden.{i}.bias"])
    return x @ w["router.weight"] + w["router.bias"]


def prefixes(w, x):
    """[N + 1, batch, seq, width]."""
    total = np.zeros_like(x) + w["router.base"]
    out = [total]
    for i in range(N):
        g = x @ w["experts.gate"][i]
        total = total + (g / (1 + np.exp(-g)) * (x @ w["experts.up"][i])) @ w["experts.down"][i]
        out.append(total)
    return np.stack(out)


def at(k, w, x):
    return np.take_along_axis(prefixes(w, x), k[None, ..., None], axis=0)[0]


@pytest.mark.parametrize(
    ("context", "execution"),
    [(TRAINING, "auto"), (Context(), "ragged"), (Context(), "dense"), (Context(selection="threshold"), "capacity")],
)
def test_a_token_gets_the_prefix_that_its_gate_picks(context, execution):
    w, x = arrays(), inputs()
    k = gate(w, x).argmax(-1)
    assert len(np.unique(k)) == N + 1
    y, _, dispatch = acm(w, execution=execution)(x, context)
    np.testing.assert_allclose(y, at(k, w, x), atol=2e-5)
    combine = np.concatenate([np.arange(N) < k.reshape(-1, 1), k.reshape(-1, 1) == 0], axis=1)
    np.testing.assert_array_equal(dispatch.combine_matrix(), combine)
    np.testing.assert_array_equal(dispatch.per_token(), np.full(k.shape, N) if context.training else k)


@pytest.mark.parametrize("k", range(N + 1))
def test_the_highest_learner_that_is_picked_does_compute(k):
    w, x = arrays(), inputs()
    w["router.bias"] = np.float32([100.0 * (i == k) for i in range(N + 1)])
    np.testing.assert_allclose(acm(w)(x)[0], prefixes(w, x)[k], atol=2e-5)


def test_no_token_has_fewer_than_the_least():
    w, x = arrays(), inputs()
    logits = gate(w, x)
    assert (logits.argmax(-1) < 2).any()
    k = logits[..., 2:].argmax(-1) + 2
    np.testing.assert_allclose(acm(w, options={"least": 2})(x)[0], at(k, w, x), atol=2e-5)


def test_training_samples_with_the_noise_of_its_key():
    w, x, key = arrays(), inputs(), jax.random.key(3)
    k = (gate(w, x) + np.asarray(jax.random.gumbel(key, (BATCH, SEQ, N + 1)))).argmax(-1)
    assert (k != gate(w, x).argmax(-1)).any()
    for train in ("all", "taken"):
        layer = acm(w, options={"train": train})
        np.testing.assert_allclose(layer(x, Context(training=True, key=key))[0], at(k, w, x), atol=2e-5)


def reference_losses(w, xs, counts, target):
    """Losses of modules' counts [layers, batch, seq, N + 1], which may be fractional."""
    k = (counts * np.arange(N + 1)).sum(-1)
    budget = abs(k.mean() / N - target)
    usage = counts.mean(2)
    entropy = -(usage * np.log(np.maximum(usage, 1e-9))).sum(-1) / math.log(N + 1)
    each = k.mean((0, 2)) / N
    differences = [abs(a - b) for i, a in enumerate(each) for j, b in enumerate(each) if i != j]
    return {
        "budget_loss": budget,
        "usage_entropy_loss": -entropy.mean(),
        "diversity_loss": -2 * np.mean(differences),
    }


def test_losses_follow_their_formulas():
    w, x = arrays(), inputs()
    counts = np.eye(N + 1)[gate(w, x).argmax(-1)]
    want = reference_losses(w, x, counts[None], 1.5 / N)
    _, aux, _ = acm(w, experts_per_token=1.5)(x)
    assert {name: a.coefficient for name, a in aux.items()} == {
        "budget_loss": 0.1, "usage_entropy_loss": 0.05, "diversity_loss": 0.05, "router_z_loss": 0.0,
    }  # fmt: skip
    for name, value in want.items():
        assert abs(value) > 1e-3
        np.testing.assert_allclose(aux[name].value, value, atol=1e-5)


def test_the_gates_gradient_is_that_of_the_soft_sample_through_all_learners():
    w, x = arrays(), inputs()
    hard = np.eye(N + 1)[gate(w, x).argmax(-1)]
    every = prefixes(w, x.astype(float))

    def soft_difference(weight):
        soft = lambda m: softmax(gate(w | {"router.weight": m}, x.astype(float)) / 0.8)  # noqa: E731
        counts = hard + soft(weight) - soft(w["router.weight"].astype(float))
        losses = reference_losses(w, x, counts[None], 1.5 / N)
        total = 0.1 * losses["budget_loss"] + 0.05 * losses["diversity_loss"]
        return np.einsum("bsk,kbsd->", counts, every) + total

    def loss(weight):
        # The entropy of a choice that nobody takes has no slope to compare with.
        layer = acm(w, experts_per_token=1.5, options={"entropy_coefficient": 0})
        layer.router.weight[...] = weight
        y, aux, _ = layer(x, TRAINING)
        return y.sum() + aux.total()

    got = np.asarray(jax.grad(loss)(jnp.asarray(w["router.weight"])))
    want = np.zeros_like(got)
    base = w["router.weight"].astype(float)
    for i in np.ndindex(*got.shape):
        d = np.zeros(got.shape)
        d[i] = 1e-6
        want[i] = (soft_difference(base + d) - soft_difference(base - d)) / 2e-6
    np.testing.assert_allclose(got, want, atol=5e-4 * np.abs(want).max())


def test_every_parameter_learns():
    layer, x = acm(arrays()), inputs()
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        y, aux, _ = nnx.merge(graphdef, params, rest)(x, TRAINING._replace(key=jax.random.key(0)))
        return jnp.square(y).mean() + aux.total()

    grads = jax.tree.leaves(jax.grad(loss)(params))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)


def test_padding_counts_nowhere():
    w, x = arrays(), inputs()
    present = np.arange(SEQ) < np.array([[4], [6]])
    k = gate(w, x).argmax(-1)
    _, routing = acm(w).routed(jnp.asarray(x), Context(present=jnp.asarray(present)))
    assert float(routing.stats["learners"]) == k[present].sum()
    assert float(routing.stats["kept"].sum()) == k[present].sum()
    shares = [k[0, :4].mean() / N, k[1].mean() / N]
    _, aux, _ = acm(w)(x, Context(present=jnp.asarray(present)))
    np.testing.assert_allclose(aux["diversity_loss"].value, -2 * abs(shares[0] - shares[1]), atol=1e-6)


def test_the_budget_is_that_of_all_layers_together():
    settings = experts.Settings(router.Settings(), experts=4, expert_size=8, execution="dense")
    out = model_of(settings)(jnp.arange(12).reshape(2, 6))
    (told,) = out.trace.experts().values()
    k = np.asarray(told.per_token["experts"])  # [layers, batch, seq]
    want = reference_losses(None, None, np.eye(5)[k], 0.5)
    for name, value in want.items():
        np.testing.assert_allclose(out.aux[name].value, value, atol=1e-5)


def test_flops_count_what_training_computes():
    gates = 2 * 10 * (WIDTH * 16 + 16 * 16 + 16 * (N + 1))
    assert acm(arrays()).flops(10, WIDTH) == (gates, 6 * 10 * N * WIDTH * SIZE)
    taken = acm(arrays(), experts_per_token=1.5, options={"train": "taken"})
    assert taken.flops(10, WIDTH)[1] == 6 * 10 * 1.5 * WIDTH * SIZE


@pytest.mark.parametrize("settings", [{"options": {"least": 4}}, {"capacity_factor": 1.0}])
def test_what_does_not_fit_is_refused(settings):
    with pytest.raises(RecipeError, match="settings"):
        acm(arrays(), **settings)
