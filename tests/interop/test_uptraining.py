"""A recursive model begins as a plain one: which layers, and that copies compute what the plain model does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive import convert
from adaptive.errors import RecipeError
from adaptive.interop.uptraining import sources, uptrained
from adaptive.models import low_rank
from adaptive.models.bodies import recursive
from adaptive.models.depth import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import shared, transformer
from adaptive.runs.load import find, load

PLAIN = transformer(layers=8, width=16, heads=2, kv_heads=1, head_dim=8, hidden=24, vocab_size=320)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 320


def recursion(**options):
    return replace(PLAIN, body=shared(PLAIN.body.stack, 3, **options))


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ("stepwise", [(1,), (4,), (7,), (10,)]),
        ("lower", [(1,), (2,), (3,), (4,)]),
        ("upper", [(7,), (8,), (9,), (10,)]),
    ],
)
def test_a_shared_layer_begins_as_one_of_the_plain_models(sharing, expected):
    assert list(sources(sharing, range(1, 11), 4, 3)) == expected


def test_an_average_is_of_the_layers_that_a_layer_stands_for():
    assert sources("average", range(1, 7), 2, 3) == ((1, 3, 5), (2, 4, 6))
    assert sources("average", range(1, 7), 2, 3, "sequence") == ((1, 2, 3), (4, 5, 6))
    with pytest.raises(RecipeError, match="3 passes of 2 layers are 6, and 7 layers"):
        sources("average", range(1, 8), 2, 3)


def test_layers_at_random_are_distinct_and_in_their_order():
    drawn = [layer for (layer,) in sources("random", range(1, 29), 14, 2, seed=3)]
    assert drawn == sorted({*drawn}) and len(drawn) == 14 and drawn != [*range(1, 15)]
    assert sources("random", range(1, 29), 14, 2, seed=3) == sources("random", range(1, 29), 14, 2, seed=3)


def logits(settings, state):
    model = settings.build(jax.random.key(1))
    nnx.update(model, state)
    return nnx.jit(lambda model, tokens: model(tokens).logits)(model, jnp.asarray(TOKENS))


def begun(settings, state, sharing="stepwise"):
    shapes = nnx.state(nnx.eval_shape(lambda: settings.build(jax.random.key(0))))
    return uptrained(settings, PLAIN, state, sharing).state(shapes, lambda path, value: jnp.asarray(value))


@pytest.mark.compiles
def test_passes_with_parameters_of_their_own_are_the_plain_model():
    state = nnx.state(PLAIN.build(jax.random.key(0)))
    own = recursion(shared="none")
    np.testing.assert_allclose(logits(own, begun(own, state)), logits(PLAIN, state), rtol=0, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_an_average_of_equal_layers_is_the_plain_model(order):
    state = nnx.state(PLAIN.build(jax.random.key(0)))

    def repeated(path, variable):
        if path[:2] != ("body", "stack") or path[2] != "blocks":
            return variable
        # Uses of one shared layer are equal, and layers of the core are not.
        at = [0, 1, 2, 1, 2, 1, 2, 7] if order == "cycle" else [0, 1, 1, 1, 2, 2, 2, 7]
        return variable.replace(variable[...][jnp.asarray(at)])

    state = nnx.from_flat_state([(path, repeated(path, v)) for path, v in nnx.to_flat_state(state)])
    settings = recursion(order=order)
    for sharing in ("average", "lower" if order == "cycle" else "average"):
        np.testing.assert_allclose(logits(settings, begun(settings, state, sharing)), logits(PLAIN, state), atol=1e-5)


@pytest.mark.compiles
def test_the_command_begins_a_run_with_routers_of_its_own(tmp_path, capsys):
    plain_run, made = tmp_path / "plain", tmp_path / "made"
    state = nnx.state(PLAIN.build(jax.random.key(0)))

    class Made:
        settings = PLAIN

        def state(self, shapes, place):
            return nnx.from_flat_state(
                [(p, v.replace(place(p, np.asarray(v[...])))) for p, v in nnx.to_flat_state(state)]
            )

    convert.save(Recipe("plain", "", PLAIN).with_("data=embedded"), Made(), plain_run)
    recipe = tmp_path / "routed.json"
    routed = recursion(depth=expert_choice.Settings())
    recipe.write_text(Recipe("routed", "", routed).with_("data=embedded", "train.seed=4").to_json())
    asked = ["--uptrain", str(plain_run), "--recipe", str(recipe), "--workdir", str(made), "--sharing", "upper"]
    assert convert.main([*asked, "train.steps=3"]) == 0
    assert "begun (upper) as plain at step 0" in capsys.readouterr().out
    found = find(made)
    assert found.recipe.train.steps == 3
    own = dict(nnx.to_flat_state(load(found).state))
    before = dict(nnx.to_flat_state(state))
    for path in (("feed_forward", "up"), ("mixer", "q")):
        layers = before["body", "stack", "blocks", 0, *path][...]
        np.testing.assert_array_equal(own["body", "core", "blocks", 0, *path][...], layers[5:7])
        np.testing.assert_array_equal(own["body", "coda", "blocks", 0, *path][...], layers[7:])
    assert all(np.std(own["body", "depth", "routers", r, "out"][...]) > 0 for r in range(3))
    assert convert.main(asked) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (replace(recursion(), width=32), "model.width is 32, the run has 16"),
        (PLAIN, "this recipe's body is plain"),
        (
            replace(PLAIN, body=shared(transformer(layers=8, width=16, heads=4, kv_heads=1, head_dim=8, hidden=24,
                                                   vocab_size=320).body.stack, 3)),
            "a block's mixer.heads is 4, the run has 2",
        ),
        (replace(PLAIN, body=recursive.Settings(core=replace(PLAIN.body.stack, repeats=9))), "the core has 9 layers"),
    ],
)  # fmt: skip
def test_another_model_is_refused(settings, wrong):
    with pytest.raises(RecipeError, match=wrong):
        uptrained(settings, PLAIN, nnx.State({}), "stepwise")


def test_a_run_of_another_kind_is_refused():
    with pytest.raises(RecipeError, match="begins from a plain model"):
        uptrained(recursion(), recursion(), nnx.State({}), "stepwise")


@pytest.mark.compiles
def test_passes_with_additions_of_full_rank_are_the_plain_model():
    state = nnx.state(PLAIN.build(jax.random.key(0)))
    near = {}
    for rank in (2, 24):
        relaxed = replace(recursion(), low_rank=low_rank.Settings(rank=rank, scale=0.5, on=("core/*",), per_pass=True))
        near[rank] = logits(relaxed, begun(relaxed, state, "average")) - logits(PLAIN, state)
    assert abs(near[24]).max() < 1e-4 < abs(near[2]).max()
