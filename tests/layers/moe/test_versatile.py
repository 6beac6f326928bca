"""VersatileFFN's layer against numpy, written from the paper's formulas."""

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
from adaptive.layers.moe.routers.versatile import Settings, hidden_units

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS, LOOPS = 2, 6, 8, 24, 8, 4
TRAINING = Context(training=True)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape, scale=0.4).astype(np.float32)  # noqa: E731
    return {
        "norm.weight": 1 + normal(WIDTH),
        "feed_forward.gate": normal(WIDTH, HIDDEN),
        "feed_forward.up": normal(WIDTH, HIDDEN),
        "feed_forward.down": normal(HIDDEN, WIDTH),
        "router.weight": normal(WIDTH, EXPERTS),
        "loops.weight": 3 * normal(WIDTH, LOOPS),
        "tau": np.float32(1.5),
    }


def inputs(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(w, x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * w["norm.weight"]


def ffn(w, h, units=slice(None)):
    n = norm(w, h)
    gate, up = n @ w["feed_forward.gate"][:, units], n @ w["feed_forward.up"][:, units]
    return (gate / (1 + np.exp(-gate)) * up) @ w["feed_forward.down"][units]


def reference(w, x, p, units, k=2):
    """(Y - x, the dense combine matrix) for loop weights p [batch, seq, loops] and hidden units of every expert."""
    states, h = [], x
    for _ in range(p.shape[-1]):
        h = h + ffn(w, h)
        states.append(h)
    deep = np.einsum("bsl,lbsd->bsd", p, np.stack(states))
    logits = x @ w["router.weight"]
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    combine = np.zeros(logits.shape)
    wide = np.zeros_like(x)
    for b, s in np.ndindex(*x.shape[:2]):
        g = softmax(logits[b, s, chosen[b, s]])
        for weight, e in zip(g, chosen[b, s], strict=True):
            combine[b, s, e] = weight
            wide[b, s] += weight * (x[b, s] + ffn(w, x[b, s], units[e]))
    mean = (p * np.arange(1, p.shape[-1] + 1)).sum(-1)
    share = ((p.shape[-1] - mean) / p.shape[-1])[..., None]
    return (1 - share) * deep + share * wide - x, combine.reshape(-1, combine.shape[-1])


def equal_units():
    size = HIDDEN // EXPERTS
    return [np.arange(e * size, (e + 1) * size) for e in range(EXPERTS)]


def one_hot(x, w):
    return np.eye(LOOPS)[(x @ w["loops.weight"]).argmax(-1)]


@pytest.mark.parametrize(
    ("context", "execution"),
    [(TRAINING, "auto"), (Context(), "auto"), (Context(), "dense"), (Context(selection="threshold"), "capacity")],
)
def test_the_layer_is_the_mix_of_both_paths(context, execution):
    w, x = arrays(), inputs()
    p = one_hot(x, w)
    assert len(np.unique(p.argmax(-1))) == LOOPS
    want, combine = reference(w, x, p, equal_units())
    y, _, dispatch = layer_from_weights("versatile", w, execution=execution)(x, context)
    np.testing.assert_allclose(y, want, atol=2e-5)
    if not context.training:
        combine = combine * (p.argmax(-1) < LOOPS - 1).reshape(-1, 1)
    np.testing.assert_allclose(dispatch.combine_matrix(), combine, atol=1e-6)


def test_slices_of_the_paper_are_evenly_spread():
    w, x = arrays(), inputs()
    size = 6
    stride = (HIDDEN - size) / (EXPERTS - 1)
    units = [np.arange(int(e * stride), int(e * stride) + size) for e in range(EXPERTS)]
    np.testing.assert_array_equal(hidden_units(EXPERTS, size, HIDDEN), units)
    layer = layer_from_weights("versatile", w, expert_size=size, options={"slices": "strided"})
    np.testing.assert_allclose(layer(x)[0], reference(w, x, one_hot(x, w), units)[0], atol=2e-5)


def test_training_samples_loops_with_the_noise_of_its_key():
    w, x = arrays(), inputs()
    layer = layer_from_weights("versatile", w)
    key = jax.random.key(7)
    noisy = x @ w["loops.weight"] + np.asarray(jax.random.gumbel(key, (BATCH, SEQ, LOOPS)))
    p = np.eye(LOOPS)[noisy.argmax(-1)]
    assert (p != one_hot(x, w)).any()
    y, _, _ = layer(x, Context(training=True, key=key))
    np.testing.assert_allclose(y, reference(w, x, p, equal_units())[0], atol=2e-5)
    np.testing.assert_allclose(
        layer(x, Context(key=key))[0], reference(w, x, one_hot(x, w), equal_units())[0], atol=2e-5
    )


def test_the_gradient_of_the_loop_logits_is_that_of_the_soft_sample():
    w, x = arrays(), inputs()
    hard = one_hot(x, w)

    def soft_difference(weight):
        """sum Y with p = hard + soft - soft at the given weights, whose gradient is the straight-through one."""
        p = hard + softmax(x.astype(float) @ weight / 1.5) - softmax(x.astype(float) @ w["loops.weight"] / 1.5)
        return reference(w, x.astype(float), p, equal_units())[0].sum()

    def loss(weight):
        layer = layer_from_weights("versatile", w)
        layer.loops.weight[...] = weight
        return layer(x, TRAINING)[0].sum()

    got = np.asarray(jax.grad(loss)(jnp.asarray(w["loops.weight"])))
    want = np.zeros_like(got)
    for i in np.ndindex(*got.shape):
        d = np.zeros(got.shape)
        d[i] = 1e-5
        want[i] = (soft_difference(w["loops.weight"] + d) - soft_difference(w["loops.weight"] - d)) / 2e-5
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_balancing_loss_is_one_when_balanced_and_follows_the_formula():
    w, x = arrays(), inputs()
    _, aux, dispatch = layer_from_weights("versatile", w, balance_coefficient=5e-5)(x, TRAINING)
    taken = (np.asarray(dispatch.combine_matrix()) > 0).mean(0)
    probability = softmax((x @ w["router.weight"]).reshape(-1, EXPERTS)).mean(0)
    np.testing.assert_allclose(
        aux["load_balancing_loss"].value, EXPERTS * (taken * probability).sum() / 2, rtol=1e-5
    )  # fmt: skip
    assert aux["load_balancing_loss"].coefficient == 5e-5


def test_tau_falls_with_every_step():
    layer = layer_from_weights("versatile", {k: v for k, v in arrays().items() if k != "tau"})
    assert float(layer.tau[...]) == 5.0
    layer.update({})
    np.testing.assert_allclose(layer.tau[...], 5 * 0.99984, rtol=1e-6)
    layer.tau[...] = jnp.array(0.1)
    layer.update({})
    np.testing.assert_allclose(layer.tau[...], 0.1, rtol=1e-6)


def test_every_parameter_learns():
    layer, x = layer_from_weights("versatile", arrays()), inputs()
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        y, aux, _ = nnx.merge(graphdef, params, rest)(x, TRAINING._replace(key=jax.random.key(0)))
        return jnp.square(y).mean() + aux.total()

    grads = jax.tree.leaves(jax.grad(loss)(params))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)


def test_padding_counts_nowhere():
    w, x = arrays(), inputs()
    present = np.arange(SEQ) < np.array([[4], [6]])
    layer = layer_from_weights("versatile", w)
    y, routing = layer.routed(jnp.asarray(x), Context(present=jnp.asarray(present)))
    whole, _ = layer.routed(jnp.asarray(x), Context())
    np.testing.assert_allclose(np.asarray(y)[present], np.asarray(whole)[present], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(y)[~present], 0)
    np.testing.assert_array_equal(routing.stats["loops"], one_hot(x, w)[present].sum(0))
    assert float(routing.stats["claimed"].sum()) == 2 * present.sum()


def test_flops_count_what_training_computes():
    router, experts = layer_from_weights("versatile", arrays()).flops(10, WIDTH)
    assert router == 2 * 10 * WIDTH * (EXPERTS + LOOPS)
    assert experts == 6 * 10 * WIDTH * (4 * HIDDEN + 2 * HIDDEN // EXPERTS)


@pytest.mark.parametrize("settings", [{"expert_size": 5}, {"experts_per_token": 1.5}, {"activation": "gelu"}])
def test_what_does_not_fit_is_refused(settings):
    with pytest.raises(RecipeError, match="settings"):
        layer_from_weights("versatile", arrays(), **settings)


def test_no_norm_stands_before_it():
    built = nnx.eval_shape(lambda: model_of(experts.Settings(Settings(hidden=32), expert_size=4)))
    assert built.body.stack.blocks[0].feed_forward_norm is None
