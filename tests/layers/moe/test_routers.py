"""The family as a whole: a router is one file, and every router keeps the promises of the interface."""

import dataclasses
import functools
import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe import layer_from_weights, routers
from adaptive.layers.moe.base import Context, Noise, RoutedLayer
from adaptive.layers.moe.settings import MoESettings, RouterSettings
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.recipe import list_recipes, load
from adaptive.settings import leaf_values

pytestmark = pytest.mark.compiles

CONTRIBUTING = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"
WIDTH, SEQ, SIZE = 16, 32, 12
NEEDED = {  # of those whose defaults do not fit these experts
    "blockffn": ({}, {"gated": False}),
    "duo_llm": ({}, {"experts": 2}),
    "versatile": ({"hidden": 8 * SIZE}, {}),
}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The router of CONTRIBUTING, as a file among the routers."""
    code = re.search(r"```python\n(\"\"\"Top-1 by.*?)```", CONTRIBUTING.read_text(), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(code)
    monkeypatch.setattr(routers, "__path__", [*routers.__path__, str(tmp_path)])
    yield importlib.import_module(f"{routers.__name__}.example")
    sys.modules.pop(f"{routers.__name__}.example", None)


def settings_of(name: str, router=None, **layer) -> MoESettings:
    """A small layer's settings with a router's defaults, and what they need."""
    own, needed = NEEDED.get(name, ({}, {}))
    chosen = RouterSettings.member(name)(**own | (router or {}))
    settings = experts.Settings(chosen, **{"expert_size": SIZE} | needed | layer)
    settings.check(WIDTH, "layer")
    return settings


def layer(settings: MoESettings):
    return settings.build(Site(WIDTH, 0.5, depth=4), jax.random.key(0))


def test_the_router_of_the_guide_is_one_file(example):
    settings = experts.Settings(example.Settings(temperature=2), experts=4, expert_size=SIZE)
    moe = layer(settings)
    x = jax.random.normal(jax.random.key(1), (2, SEQ, WIDTH))
    y, aux, dispatch = moe(x)
    combine = np.asarray(dispatch.combine_matrix()).reshape(2, SEQ, 4)
    logits = np.asarray(moe.router.logits(x)) / 2
    best = logits.argmax(-1)
    np.testing.assert_array_equal(combine.argmax(-1), best)
    np.testing.assert_allclose(combine.max(-1), 1 / (1 + np.exp(-logits.max(-1))), rtol=1e-5)
    assert aux["load_balancing_loss"].coefficient == 0.01
    dense, _, _ = layer(dataclasses.replace(settings, execution="dense"))(x)
    np.testing.assert_allclose(y, dense, atol=1e-5)
    assert moe.flops(SEQ, WIDTH) == (2 * SEQ * WIDTH * 4, 6 * SEQ * WIDTH * SIZE)


def test_every_router_has_a_recipe():
    leaves = [leaf for name in list_recipes() for leaf in leaf_values(load(name)).items()]
    assert {value for path, value in leaves if path.endswith(".feed_forward.router")} == set(RouterSettings.kinds())


def test_an_unknown_router_names_the_nearest():
    with pytest.raises(RecipeError, match="nearest: expert_choice"):
        RouterSettings.member("expert_choise")


@functools.cache
def generation(name: str):
    """x -> (y, statistics) of one layer of a router, choosing as in generation; compiled once for [2, SEQ, WIDTH]."""
    moe = layer(settings_of(name))
    assert not moe.refuse_generation()
    graphdef, state = nnx.split(moe)

    @jax.jit
    def run(state, x):
        y, routing = nnx.merge(graphdef, state).routed(x, Context(selection="threshold"))
        return y, routing.stats

    return lambda x: run(state, x)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, SEQ, WIDTH))


every_router = pytest.mark.parametrize("name", RouterSettings.kinds())


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


UNREAD = [
    ("token_choice", {}, {"capacity_group", "drop", "capacity_rule", "least_slots", "bias_rate"}),
    ("token_choice", {"balance": "flaxformer"}, {"drop", "capacity_rule"}),
    ("expert_choice", {}, {"chunk", "slack", "predictor_coefficient"}),
    ("expert_choice", {"group": "chunk", "decode": "refuse"}, {"slack", "predictor_coefficient", "momentum"}),
    ("adamoe", {}, {"late_coefficient"}),
    ("moe_pp", {"mixtral_gating": True}, {"capacity_of", "input_scale"}),
    ("longcat", {"zero_experts": 0}, {"proportional", "true_experts"}),
    ("dynamoe", {"threshold": "token"}, {"momentum"}),
    ("blockffn", {"adapt": False}, {"hold_steps", "window"}),
    ("remoe", {}, {"norm_eps"}),
    ("duo_llm", {"phase": "random"}, {"tau", "random_steps"}),
    ("duo_llm", {}, {"untrained"}),
]


@pytest.mark.parametrize(("name", "router", "unread"), UNREAD)
def test_settings_that_mean_nothing_are_named(name, router, unread):
    settings = RouterSettings.member(name)(**router)
    named = set(settings.unread())
    assert unread <= named <= {field.name for field in dataclasses.fields(settings)}
    assert not named & set(router)


VARIANTS = [
    *((name, {}, {}) for name in RouterSettings.kinds()),
    ("token_choice", {"score": "cosine", "cosine_size": 5}, {"shared_size": 7}),
    ("expert_choice", {"decode": "predictor"}, {"gated": False}),
    ("moe_pp", {"gate": "linear", "residual": False, "constant": 0}, {}),
    ("remoe", {"normalise": True}, {}),
    ("acm", {"gate_depth": 1}, {}),
    ("duo_llm", {"skip": True, "small_size": 5}, {"gated": False}),
]


@pytest.mark.parametrize(("name", "router", "shape"), VARIANTS)
def test_parameters_are_counted_without_a_layer(name, router, shape):
    settings = settings_of(name, router, **shape)
    state = nnx.eval_shape(lambda: nnx.state(layer(settings), nnx.Param))
    assert settings.parameters(WIDTH) == sum(leaf.size for leaf in jax.tree.leaves(state))


@every_router
def test_a_value_that_is_told_is_one_of_the_layers(name, x):
    """What a block calls is the layer with everything it may know, and its losses are those of a call of its own; but
    for those of coefficient 0, which a model does not compute. What a call tells of tokens has one shape for all."""
    moe = layer(settings_of(name))
    segments = jnp.where(jnp.arange(SEQ) < 20, 1, 0) + jnp.zeros((2, 1), jnp.int32)
    where, call = Where.whole((2, SEQ), segments=segments), Call(training=True, key=jax.random.key(3))
    context = Context(present=segments > 0, segments=segments, training=True, key=jax.random.key(3))
    graphdef, state = nnx.split(moe)

    @jax.jit
    def both(state, x):
        own = nnx.merge(graphdef, state)
        update, told, logits = own.apply(x, where, call)
        routed, aux, dispatch = own(x, context)
        arrays = dispatch.mask(), dispatch.expert_weights(), dispatch.combine_matrix(), dispatch.strongest()
        ours = routed, dispatch.per_token(), aux
        return (update, told.per_token["experts"], own.losses([told])), ours, logits, arrays

    told, ours, logits, (mask, weights, combine, strongest) = both(state, x)
    assert mask.shape == weights.shape == (2, SEQ, moe.settings.experts)
    assert combine.shape == (2 * SEQ, moe.choices)
    np.testing.assert_array_equal(combine.reshape(2, SEQ, -1)[..., : weights.shape[-1]], weights)
    assert not np.asarray(weights)[~np.asarray(mask)].any()
    want = np.where(mask, weights, -np.inf)
    there = np.asarray(mask).any(-1)
    assert (np.asarray(strongest)[~there] == -1).all()
    best = np.take_along_axis(want, np.maximum(strongest, 0)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(best[there], want.max(-1)[there])
    for a, b in zip(told[:2], ours[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(ours[2]) >= set(told[2])
    assert all(ours[2][n].coefficient == c for n, (_, c) in told[2].items())
    assert not any(ours[2][n].coefficient for n in set(ours[2]) - set(told[2]))
    for n, (loss, _) in told[2].items():
        np.testing.assert_allclose(loss.value, ours[2][n].value, rtol=1e-6)
    assert logits.shape == (2, SEQ, moe.choices)


@pytest.mark.parametrize(("name", "router"), [("token_choice", {"balance": "hf"}), ("acm", {}), ("moe_pp", {})])
def test_losses_of_several_calls(name, router, x):
    """Means over all calls, and joint losses of all of them, whatever the axes the calls come with."""
    moe = layer(settings_of(name, router))
    where, call = Where.whole((2, SEQ)), Call()
    graphdef, state = nnx.split(moe)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).apply(x, where, call)[1])
    told = [run(state, x * f) for f in (1, -2, 0.5)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *told[:2])
    got = moe.losses([stacked, told[2]])
    parts = jax.tree.map(lambda *a: jnp.stack(a), *(one.parts for one in told))
    expected = {n: np.mean([one.losses[n].value for one in told]) for n in told[0].losses}
    expected |= {n: loss.value for n, loss in moe.joint_losses(parts).items()}
    assert set(got) == set(expected)
    for n, value in expected.items():
        np.testing.assert_allclose(got[n][0].value, value, rtol=1e-6)
    assert moe.losses([]) == {}


@pytest.mark.parametrize(("name", "router", "shape"), [*VARIANTS, ("token_choice", {"bias": True}, {})])
def test_every_array_says_what_it_is(name, router, shape):
    """Logical axes of every dimension, leading ones named, and of parameters what weight decay asks."""
    settings, site = settings_of(name, router, **shape), Site(WIDTH, 0.5, (2, 3), 0, (0, 1, 2), 6)
    state = nnx.eval_shape(lambda: nnx.state(settings.build(site, jax.random.key(0))))
    for path, leaf in nnx.to_flat_state(state):
        said = leaf.get_metadata()
        assert said["axes"][:2] == ("uses", "layers"), path
        assert len(said["axes"]) == len(leaf.shape), path
        if isinstance(leaf, nnx.Param):
            named = path[-1] in ("gain", "bias", "base", "constant") or path[-2:] == ("norm", "weight")
            vector = leaf.shape[2:] == () or named
            assert (said["role"] != "matrix") == vector, path


UNTRAINED = {  # losses that a call reads whatever their coefficients, at 0
    "token_choice": (
        {"balance_coefficient": 0.0, "noise": 1.0},
        {"load_balancing_loss", "router_z_loss", "importance_loss"},
    ),
    "expert_choice": ({}, {"router_z_loss", "popularity_loss"}),
    "longcat": ({"balance_coefficient": 0.0}, {"load_balancing_loss", "router_z_loss"}),
    "versatile": ({"balance_coefficient": 0.0}, {"load_balancing_loss", "router_z_loss"}),
    "acm": ({"budget_coefficient": 0.0}, {"budget_loss", "router_z_loss"}),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_losses_of_coefficient_0_can_be_read_and_are_in_no_model(name, x):
    router, names = UNTRAINED[name]
    moe = layer(settings_of(name, router))
    losses = jax.eval_shape(lambda x: moe(x)[1], x)
    assert {n for n, aux in losses.items() if not aux.coefficient} >= names
    told = jax.eval_shape(lambda x: moe.apply(x, Where.whole((2, SEQ)), Call())[1], x)
    assert not names & set(told.losses)


def drawing(name: str):
    """(settings of the router, Noise that its key draws) of each router that draws in training."""
    key = jax.random.key(7)
    uniform, gumbel = (lambda s: jax.random.uniform(key, (2, SEQ, WIDTH), jnp.float32, 1 - s, 1 + s)), jax.random.gumbel
    normal = lambda choices: jax.random.normal(jax.random.fold_in(key, 1), (2, SEQ, choices))  # noqa: E731
    return {
        "token_choice": ({"noise": 8.0, "jitter": 0.5}, Noise(input=uniform(0.5), logits=normal(8))),
        "expert_choice": ({"jitter": 0.5}, Noise(input=uniform(0.5))),
        "acm": ({}, Noise(logits=gumbel(key, (2, SEQ, 9)))),
        "versatile": ({}, Noise(logits=gumbel(key, (2, SEQ, 4)))),
        "duo_llm": ({"phase": "random"}, Noise(choice=jax.random.randint(key, (2, SEQ), 0, 2))),
    }[name]


@pytest.mark.parametrize("name", ["token_choice", "expert_choice", "acm", "versatile", "duo_llm"])
def test_noise_can_be_given(name, x):
    """What the key would draw, given in its place, is the same; nothing is read outside training."""
    router, noise = drawing(name)
    graphdef, state = nnx.split(layer(settings_of(name, router)))

    @jax.jit
    def each(state, x, noise):
        own, key = nnx.merge(graphdef, state), jax.random.key(7)
        contexts = Context(training=True, key=key), Context(training=True, noise=noise), Context(training=True)
        return [own(x, context)[0] for context in contexts]

    drawn, given, none = each(state, x, noise)
    np.testing.assert_allclose(given, drawn, atol=1e-6)
    assert np.abs(given - none).max() > 1e-3
    assert Context(noise=noise, key=jax.random.key(7)).drawn(noise.logits, jax.random.key_data) is None


STARTS = [
    ("blockffn", {}, {"router.gain": 1.0}),
    ("remoe", {"normalise": True}, {"router.gain": 1.0}),
    ("token_choice", {"score": "cosine", "cosine_size": 5}, {"router.temperature": np.log(1 / 0.07)}),
    ("acm", {}, {"router.bias": 0.0, "router.base": 0.0, "router.hidden.0.bias": 0.0, "router.hidden.1.bias": 0.0}),
    ("versatile", {}, {"norm.weight": 1.0}),
]


@pytest.mark.parametrize(("name", "router", "starts"), STARTS)
def test_parameters_with_a_natural_start_may_be_left_out(name, router, starts):
    settings = settings_of(name, router)
    shapes = nnx.to_flat_state(nnx.eval_shape(lambda: nnx.state(layer(settings), nnx.Param)))
    weights = {".".join(map(str, path)): np.ones(leaf.shape, np.float32) for path, leaf in shapes}
    given = {name: value for name, value in weights.items() if name not in starts}
    own = {f.name: getattr(settings.router, f.name) for f in dataclasses.fields(settings.router)}
    built = layer_from_weights(name, given, options=own, expert_size=SIZE, gated=settings.gated)
    state = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(built, nnx.Param))}
    assert set(state) == set(weights)
    for path, value in starts.items():
        np.testing.assert_allclose(state[path][...], np.full(weights[path].shape, value), rtol=1e-6)
    with pytest.raises(RecipeError, match=r"router\.weight"):
        layer_from_weights(name, {n: v for n, v in given.items() if n != "router.weight"}, options=own)


class Heard(Exception):
    """What a routed layer was told."""


class Asked(RoutedLayer):
    def routed(self, x, context):
        raise Heard(context)


def test_a_router_is_told_all_that_a_pass_is_about():
    a = {
        name: np.full((1, 4), i) for i, name in enumerate(("number", "segments", "exists", "previous", "asked", "key"))
    }
    where = Where(a["number"], a["number"], a["segments"], a["exists"])
    call = Call(training=True, key=a["key"], previous=a["previous"], experts_per_token=a["asked"])
    for rule, selection in (("train", "topk"), ("causal", "threshold")):
        with pytest.raises(Heard) as heard:
            Asked().apply(None, where, call.replace(rule=rule))
        (told,) = heard.value.args
        assert told.segments is a["segments"] and told.present is a["exists"] and told.previous is a["previous"]
        assert told.limit is a["asked"] and told.key is a["key"] and told.training and told.selection == selection
