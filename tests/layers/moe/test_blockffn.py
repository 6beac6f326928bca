"""BlockFFN and ReMoE against their formulas, and their adaptive coefficients against a plain simulation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_oracle import (
    Decision,
    blind_to_the_future,
    build,
    compare,
    executions_agree,
    inputs,
    router_gradients,
    run,
    weights_of,
)

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.routers.blockffn import sparsity

pytestmark = pytest.mark.compiles

E = 6


def relu_rms(a, eps=1e-5):
    a = np.maximum(a, 0)
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + eps)


def documents(x, present, segments):
    """Positions of each document of each row, in order."""
    for b in range(x.shape[0]):
        where = np.ones(x.shape[1], bool) if present is None else present[b]
        names = np.zeros(x.shape[1]) if segments is None else segments[b]
        for name in dict.fromkeys(names[where]):
            yield b, np.flatnonzero(where & (names == name))


def chunks(x, length, present, segments):
    for b, positions in documents(x, present, segments):
        for start in range(0, len(positions), length):
            yield b, positions[start : start + length]


def reference(weights, x, *, chunk=4, sharpness=3.0, present=None, segments=None):
    a = x @ weights["router.weight"]
    plain = relu_rms(a)
    where = np.ones(x.shape[:2]) if present is None else present
    z, bce = sharpness * a, []
    for b, positions in documents(x, present, segments):
        for t, later in itertools.pairwise(positions):
            target = 1 / (1 + np.exp(-z[b, later]))
            bce.append(np.maximum(z[b, t], 0) - z[b, t] * target + np.log1p(np.exp(-np.abs(z[b, t]))))
    p = plain / (plain.sum(-1, keepdims=True) + 1e-5)
    spared = []
    for b, positions in chunks(x, chunk, present, segments):
        padded = np.concatenate([p[b, positions], np.zeros((chunk - len(positions), E))])
        spared.append(np.exp(np.log(1 - padded + 1e-5).sum(0)))
    losses = {"activation_locality_loss": np.mean(bce), "chunk_sparsity_loss": 1 - np.mean(spared)}
    return Decision(plain * weights["router.gain"] * where[..., None], losses)


def arrays():
    gain = {"router.gain": 1 + 0.3 * np.random.default_rng(9).normal(size=E)}
    return weights_of(E, E, gated=False, spread=0.7) | gain


def layer_of(weights, **options):
    return build("blockffn", weights, {"chunk": 4, "sharpness": 3.0, **options})


def with_a_token_of_nothing(weights, x):
    x = x.copy()
    x[0, 2] = -np.linalg.pinv(weights["router.weight"]).sum(0)  # all logits -1
    return x


PACKED = np.array([[1] * 5 + [2] * 3 + [0], [4] * 9])


@pytest.mark.parametrize("packed", [False, True])
def test_is_the_formula(packed):
    weights, x = arrays(), inputs(seq=9)
    settings, context = {}, Context()
    if packed:
        settings = {"present": PACKED > 0, "segments": PACKED}
        context = Context(present=jnp.asarray(PACKED > 0), segments=jnp.asarray(PACKED))
    compare(layer_of(weights), functools.partial(reference, **settings), weights, x, context=context)


def test_padding_at_the_end_is_as_if_it_were_not_there():
    weights, x = arrays(), inputs(batch=1, seq=9)
    present = jnp.arange(9)[None] < 6
    padded, short = run(layer_of(weights), x, present=present)[1], run(layer_of(weights), x[:, :6])[1]
    for name, loss in short.losses.items():
        np.testing.assert_allclose(padded.losses[name].value, loss.value, rtol=1e-6)
    for name in ("touched_8", "chunks_8", "reused", "reusable", "claimed"):
        np.testing.assert_allclose(padded.stats[name], short.stats[name])


def test_the_locality_loss_trains_its_target_too_and_is_finite_at_the_papers_sharpness():
    weights, x = arrays(), inputs(batch=1, seq=2)
    layer = layer_of(weights, sharpness=100.0)

    def loss(x):
        return layer.routed(x, Context())[1].losses["activation_locality_loss"].value

    grad = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(x, jnp.float32)))
    assert np.isfinite(grad).all()
    assert np.abs(grad[0, 1]).max() > 0  # the last token is a target alone


def test_a_token_that_activates_nobody_passes_with_a_finite_gradient():
    weights = weights_of(E, E, gated=False, width=8, spread=0.7) | {"router.gain": np.ones(E)}
    x = with_a_token_of_nothing(weights, inputs(width=8))
    layer = layer_of(weights)
    y, routing = run(layer, x)
    assert routing.dispatch.per_token()[0, 2] == 0
    assert not np.asarray(y)[0, 2].any()
    sizes = router_gradients(layer, x)
    assert sizes[0, 2] == 0
    assert np.isfinite(sizes).all()
    compare(layer, reference, weights, x)


def test_metrics_are_the_papers():
    weights, x = arrays(), inputs(batch=3, seq=20)
    _, routing = run(layer_of(weights), x)
    active = x @ weights["router.weight"] > 0
    ours = sparsity({name: jnp.stack([value, value]) for name, value in routing.stats.items()})  # two layers alike
    np.testing.assert_allclose(ours["tls"], 1 - active.mean(), rtol=1e-5)
    for n in (8, 64):
        any_active = [active[b, at].any(0) for b, at in chunks(x, n, None, None)]
        np.testing.assert_allclose(ours[f"cls_{n}"], 1 - np.mean(any_active), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["reuse"], (active[:, 1:] & active[:, :-1]).sum() / active[:, 1:].sum(), rtol=1e-5)


def simulated(losses, start, hold, window):
    """The coefficient before each step, by the rule as told."""
    value, before, values, ramp = start, None, [], []
    for step in range(len(losses)):
        if step >= window and step % window == 0:
            last = np.mean(losses[step - window : step])
            if ramp:
                value = ramp[-1]
            ramp = []
            if step >= hold:
                ratio = last / before
                if ratio > 1:
                    ratio = max(1.025, ratio)
                ramp = list(np.linspace(value, min(4 * start, value * ratio), window + 1)[1:])
            before = last
        values.append(ramp[step % window] if ramp else value)
    return values


def test_the_sparsity_coefficient_follows_its_loss():
    rng = np.random.default_rng(2)
    losses = rng.uniform(0.5, 1.0, 90) * np.repeat([1, 1, 1, 1, 1, 2, 9, 0.2, 1], 10)
    losses[40:50] = losses[30:40] * 1.004  # rises by less than 1.025
    layer = layer_of(arrays(), hold_steps=20, window=10)
    ours = []
    for loss in losses:
        ours.append(float(layer.router.coefficient[...]))
        layer.update({"chunk_sparsity": jnp.float32(3 * loss), "calls": jnp.float32(3)})  # three micro-batches
    expected = simulated(losses, 5e-2, 20, 10)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert max(ours) == pytest.approx(0.2)  # four times the start
    assert ours[:20] == [pytest.approx(0.05)] * 20  # all the steps that it is held for
    whole = np.mean(losses[10:20]) / np.mean(losses[:10])
    way = max(1.025, whole) if whole > 1 else whole
    np.testing.assert_allclose(ours[20], 0.05 * (1 + (way - 1) / 10), rtol=1e-4)  # the next takes the first tenth
    np.testing.assert_allclose(ours[29], 0.05 * way, rtol=1e-4)  # the window's last is there
    assert ours[-1] < ours[-10]


def test_what_is_trained_is_the_weighted_sparsity_loss():
    weights = arrays() | {"router.coefficient": np.array(0.3)}
    layer = layer_of(weights)
    losses = {name: loss.value for name, loss in run(layer, inputs())[1].losses.items()}
    np.testing.assert_allclose(losses["weighted_chunk_sparsity_loss"], 0.3 * losses["chunk_sparsity_loss"], rtol=1e-6)
    assert layer.coefficients() == {
        "activation_locality_loss": 2e-3, "chunk_sparsity_loss": 0.0, "weighted_chunk_sparsity_loss": 1.0,
    }  # fmt: skip
    fixed = layer_of(arrays(), adapt=False)
    assert fixed.coefficients()["chunk_sparsity_loss"] == 5e-2
    assert "weighted_chunk_sparsity_loss" not in run(fixed, inputs())[1].losses


@pytest.mark.parametrize("router", ["blockffn", "remoe"])
def test_a_bound_on_rows_drops_the_smallest_weights_of_a_sequence(router):
    weights = arrays() if router == "blockffn" else weights_of(E, E)
    make = lambda name: build(router, weights, {"row_slack": 1.25}, experts_per_token=1.5, execution=name)  # noqa: E731
    x, rows = inputs(seq=8), 15  # 8 tokens * 1.5 * 1.25
    logits = x @ weights["router.weight"]
    weight = reference(weights, x).combine if router == "blockffn" else np.maximum(logits, 0)
    layer = make("dense")
    _, routing = run(layer, x)
    kept = np.zeros(weight.shape, bool)
    for b in range(2):
        kept[b].reshape(-1)[np.argsort(-weight[b].reshape(-1), kind="stable")[:rows]] = True
    np.testing.assert_array_equal(routing.dispatch.mask(), kept & (weight > 0))
    assert routing.stats["dropped"] == (weight > 0).sum() - (kept & (weight > 0)).sum() > 0
    assert routing.dispatch.pairs_per_sequence == rows
    executions_agree(make, x)
    _, alone = run(layer, x, selection="threshold")
    assert alone.stats["dropped"] == 0


@pytest.mark.parametrize("router", ["blockffn", "remoe"])
def test_every_execution_agrees_and_generation_is_causal(router):
    weights, x = arrays() if router == "blockffn" else weights_of(E, E), inputs()
    make = lambda name: build(router, weights, execution=name)  # noqa: E731
    executions_agree(make, x)
    blind_to_the_future(build(router, weights, {"row_slack": 1.0}, experts_per_token=1), x, 3)


def remoe_reference(weights, x, *, k=2.0):
    a = x @ weights["router.weight"]
    g = relu_rms(a) * weights["router.gain"] if "router.gain" in weights else np.maximum(a, 0)
    tokens = a.shape[0] * a.shape[1]
    l1 = E / (tokens**2 * k) * (g.sum((0, 1)) * (a > 0).sum((0, 1))).sum()
    return Decision(g, {"l1_loss": l1})


@pytest.mark.parametrize("normalise", [False, True])
def test_remoe_is_the_formula(normalise):
    weights = weights_of(E, E) | ({"router.gain": np.linspace(0.5, 1.5, E)} if normalise else {})
    compare(build("remoe", weights, {"normalise": normalise}), remoe_reference, weights, inputs())


def test_remoes_coefficient_seeks_the_target():
    layer = build("remoe", weights_of(E, E))
    share = lambda pairs: {"claimed": jnp.full(E, pairs / E), "tokens": jnp.float32(10)}  # noqa: E731
    expected = 1e-8
    for pairs, factor in [(25, 1.2), (21, 1.2), (20, 1 / 1.2), (5, 1 / 1.2), (5, 1 / 1.2), (30, 1.2)]:
        layer.update(share(pairs))
        expected = max(expected * factor, 1e-8)
        np.testing.assert_allclose(layer.router.coefficient[...], expected, rtol=1e-5)
    losses = {name: loss.value for name, loss in run(layer, inputs())[1].losses.items()}
    np.testing.assert_allclose(losses["weighted_l1_loss"], 1.2e-8 * losses["l1_loss"], rtol=1e-5)


@pytest.mark.parametrize(("options", "settings", "message"), [
    ({}, {"capacity_factor": 1.0}, "blockffn has no setting 'capacity_factor'"),
    ({"row_slack": 0.5}, {}, "at least 1"),
    ({"hold_steps": 150}, {}, "multiple of settings.router.window=100"),
    ({"chunk": 0}, {}, "at least 1"),
])  # fmt: skip
def test_bad_settings_say_what_would_be_right(options, settings, message):
    with pytest.raises(RecipeError, match=message):
        build("blockffn", arrays(), options, **settings)


def test_gated_experts_are_refused():
    with pytest.raises(RecipeError, match=r"set settings\.gated=false"):
        build("blockffn", weights_of(E, E))
    with pytest.raises(RecipeError, match=r"router\.rise=1\.0: must be above 1"):
        build("remoe", weights_of(E, E), {"rise": 1.0})
