"""Duo-LLM's layer against numpy, written from the paper's formulas."""

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
from adaptive.layers.moe.routers.duo_llm import Settings

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH, HIDDEN, NARROW = 2, 6, 8, 16, 3


def arrays(choices: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape, scale=0.5).astype(np.float32)  # noqa: E731
    sizes = {"big": HIDDEN, "small": NARROW}
    weights = {"router.weight": normal(WIDTH, choices), "tau": np.float32(0.7)}
    for name, hidden in sizes.items():
        weights |= {f"{name}.gate": normal(1, WIDTH, hidden), f"{name}.up": normal(1, WIDTH, hidden)}
        weights[f"{name}.down"] = normal(1, hidden, WIDTH)
    return weights


def inputs(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ffn(w, name, x):
    gate, up = x @ w[f"{name}.gate"][0], x @ w[f"{name}.up"][0]
    return (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.down"][0]


def outputs(w, x):
    """[batch, seq, choices, width]: what each choice gives."""
    parts = [ffn(w, "big", x), ffn(w, "small", x), np.zeros_like(x)]
    return np.stack(parts[: w["router.weight"].shape[1]], axis=2)


def duo(w, **options):
    return layer_from_weights("duo_llm", w, options=options)


def hard(choice, w, x):
    return np.take_along_axis(outputs(w, x), choice[..., None, None], axis=2)[:, :, 0]


@pytest.mark.parametrize("choices", [2, 3])
def test_training_mixes_the_outputs_by_the_tempered_softmax(choices):
    w, x = arrays(choices), inputs()
    p = softmax(x @ w["router.weight"] / 0.7)
    y, aux, dispatch = duo(w, budget=0.3)(x)
    np.testing.assert_allclose(y, np.einsum("bsc,bscd->bsd", p, outputs(w, x)), atol=2e-5)
    np.testing.assert_allclose(dispatch.combine_matrix(), p.reshape(-1, choices), atol=1e-6)
    np.testing.assert_allclose(aux["budget_loss"].value, np.mean((p[..., 0].mean(1) - 0.3) ** 2), atol=1e-6)


@pytest.mark.parametrize("execution", ["auto", "ragged", "capacity", "dense"])
@pytest.mark.parametrize("choices", [2, 3])
def test_generation_takes_the_largest_logit_however_it_is_computed(choices, execution):
    w, x = arrays(choices), inputs()
    layer = layer_from_weights("duo_llm", w, execution=execution)
    choice = (x @ w["router.weight"]).argmax(-1)
    assert len(np.unique(choice)) == choices
    y, _, dispatch = layer(x, Context(selection="threshold"))
    np.testing.assert_allclose(y, hard(choice, w, x), atol=2e-5)
    np.testing.assert_array_equal(dispatch.combine_matrix(), np.eye(choices)[choice.reshape(-1)])
    np.testing.assert_array_equal(dispatch.per_token(), (choice < 2).astype(int))


def test_a_suffix_changes_nothing_before_it():
    w, x = arrays(3), inputs()
    other = np.concatenate([x[:, :4], inputs(9)[:, 4:]], axis=1)
    layer, context = duo(w, slack=1.0), Context(selection="threshold")
    np.testing.assert_array_equal(layer(x, context)[0][:, :4], layer(other, context)[0][:, :4])


def test_stage_one_draws_each_choice_equally_often_and_computes_it_alone():
    w = arrays(3)
    x = np.random.default_rng(1).normal(size=(4, 300, WIDTH)).astype(np.float32)
    layer = duo(w, phase="random")
    y, aux, dispatch = layer(x, Context(training=True, key=jax.random.key(3)))
    drawn = np.asarray(dispatch.combine_matrix()).reshape(4, 300, 3)
    np.testing.assert_array_equal(drawn.sum(-1), 1)
    np.testing.assert_allclose(drawn.mean((0, 1)), 1 / 3, atol=0.06)
    np.testing.assert_allclose(y, hard(drawn.argmax(-1), w, x), atol=2e-5)
    assert not aux
    np.testing.assert_allclose(layer(x)[0], ffn(w, "big", x), atol=2e-5)
    np.testing.assert_allclose(duo(w, phase="random", untrained="small")(x)[0], ffn(w, "small", x), atol=2e-5)


def test_stage_one_comes_first_where_steps_are_given():
    w, x = arrays(), inputs()
    context = Context(training=True, key=jax.random.key(0))
    early = duo(w | {"steps": np.float32(3)}, random_steps=4)(x, context)[2].combine_matrix()
    assert set(np.unique(early)) == {0.0, 1.0}
    late = duo(w | {"steps": np.float32(4)}, random_steps=4)(x, context)[2].combine_matrix()
    np.testing.assert_allclose(late, softmax(x @ w["router.weight"] / 0.7).reshape(-1, 2), atol=1e-6)


def test_tau_falls_once_the_router_is_in_use():
    layer = duo(arrays() | {"tau": np.float32(1.0)}, random_steps=2, tau_decay=0.5, tau_last=0.2)
    seen = []
    for _ in range(6):
        layer.update({})
        seen.append(float(layer.tau[...]))
    np.testing.assert_allclose(seen, [1, 1, 0.5, 0.25, 0.2, 0.2])


@pytest.mark.parametrize("execution", ["ragged", "capacity", "dense"])
def test_slack_bounds_big_first_come_first_served(execution):
    w, x = arrays(), inputs()
    w["router.weight"] = w["router.weight"] * 0
    w["router.weight"][:, 0] = 1.0
    choice = (x.sum(-1) <= 0).astype(int)  # big where the sum is positive
    bound = 1  # ceil(0.5 * 0.25 * 6)
    for b in range(BATCH):
        had = 0
        for t in range(SEQ):
            had += choice[b, t] == 0
            choice[b, t] = 1 if had > bound else choice[b, t]
    moved = int((x.sum(-1) > 0).sum() - (choice == 0).sum())
    assert moved > 0
    layer = layer_from_weights("duo_llm", w, execution=execution, options={"slack": 0.5, "budget": 0.25})
    y, routing = layer.routed(jnp.asarray(x), Context(selection="threshold"))
    np.testing.assert_allclose(y, hard(choice, w, x), atol=2e-5)
    assert int(routing.stats["overflow"]) == moved
    assert int(routing.stats["dropped"]) == 0


def test_padding_counts_nowhere():
    w, x = arrays(), inputs()
    present = np.arange(SEQ) < np.array([[4], [6]])
    p = softmax(x @ w["router.weight"] / 0.7)[..., 0]
    means = [p[0, :4].mean(), p[1].mean()]
    layer = duo(w)
    y, aux, _ = layer(x, Context(present=jnp.asarray(present)))
    np.testing.assert_allclose(aux["budget_loss"].value, np.mean((np.array(means) - 0.5) ** 2), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(y)[0, 4:], 0)
    _, routing = layer.routed(jnp.asarray(x), Context(present=jnp.asarray(present), selection="threshold"))
    assert float(routing.stats["kept"].sum()) == present.sum()


def test_every_parameter_learns():
    layer, x = duo(arrays(3)), inputs()
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        y, aux, _ = nnx.merge(graphdef, params, rest)(x)
        return jnp.square(y).mean() + aux.total()

    grads = jax.tree.leaves(jax.grad(loss)(params))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)


def test_the_router_gradient_is_that_of_the_formula():
    w, x = arrays(), inputs()

    def reference(weight):
        p = softmax(x.astype(float) @ weight / 0.7)
        out = np.einsum("bsc,bscd->bsd", p, outputs(w, x.astype(float)))
        return np.square(out).sum() + (np.square(p[..., 0].mean(1) - 0.5)).mean()

    def loss(weight):
        layer = duo(w)
        layer.router.weight[...] = weight
        y, aux, _ = layer(x)
        return jnp.square(y).sum() + aux.total()

    got = np.asarray(jax.grad(loss)(jnp.asarray(w["router.weight"])))
    want = np.zeros_like(got)
    for i in np.ndindex(*got.shape):
        d = np.zeros(got.shape)
        d[i] = 1e-5
        base = w["router.weight"].astype(float)
        want[i] = (reference(base + d) - reference(base - d)) / 2e-5
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def compiled_flops(layer, x, context):
    graphdef, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, context)[0])
    return run.lower(state, x).compile().cost_analysis()["flops"]


def test_small_tokens_do_not_pay_the_big_feed_forward():
    rng = np.random.default_rng(0)
    width, hidden, x = 32, 256, rng.normal(size=(1, 128, 32)).astype(np.float32)
    w = {"router.weight": rng.normal(size=(width, 2))}
    for name, size in (("big", hidden), ("small", 16)):
        w |= {f"{name}.gate": rng.normal(size=(1, width, size)), f"{name}.up": rng.normal(size=(1, width, size))}
        w[f"{name}.down"] = rng.normal(size=(1, size, width))
    cost = lambda execution, **options: compiled_flops(  # noqa: E731
        layer_from_weights("duo_llm", w, execution=execution, options=options), x, Context(selection="threshold")
    )
    assert cost("capacity", slack=1.0, budget=0.25) < 0.45 * cost("dense")


def test_flops_count_what_training_computes():
    both = 6 * 10 * WIDTH * (HIDDEN + NARROW)
    assert duo(arrays()).flops(10, WIDTH) == (2 * 10 * WIDTH * 2, both)
    assert duo(arrays(), phase="random").flops(10, WIDTH)[1] == both / 2
    assert duo(arrays(3), phase="random").flops(10, WIDTH)[1] == pytest.approx(both / 3)


@pytest.mark.parametrize("settings", [{"experts": 3}, {"shared_size": 4}, {"options": {"budget": 2}}])
def test_what_does_not_fit_is_refused(settings):
    with pytest.raises(RecipeError, match="settings"):
        layer_from_weights("duo_llm", arrays(), **settings)


def model(**own):
    return model_of(experts.Settings(Settings(**own), experts=2, expert_size=32))


def test_the_budget_is_that_of_all_layers_together():
    built, tokens = model(), jnp.arange(12).reshape(2, 6)
    out = built(tokens)
    (told,) = out.trace.experts().values()
    share = told.parts["big"] / 6  # [layers, batch]
    assert not np.allclose(share[0], share[1])
    np.testing.assert_allclose(out.aux["budget_loss"].value, np.mean((np.mean(share, 0) - 0.5) ** 2), atol=1e-7)


def test_the_small_one_is_a_sixteenth_unless_said():
    (layer,) = model().routed().values()
    assert layer.small_size == 2
