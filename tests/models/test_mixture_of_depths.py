"""Mixture-of-Depths, and what CONTRIBUTING.md says of it: a router of depth is one file that nothing else knows of."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from shapes import recursive

from adaptive import settings
from adaptive.account import account, parameters
from adaptive.data.batch import Batch
from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.models import depth
from adaptive.models.depth import Carried, Depth, mixture_of_depths
from adaptive.recipe import Recipe
from adaptive.runs.state import abstract_model, initial_state
from adaptive.training.step import make_train_step

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[2]
SEQ, SHARE = 16, 0.25
PLAIN = recursive(layers=4, recursions=4, ends=0, shared="none")  # four blocks, each with parameters of its own


def written() -> str:
    """The file as CONTRIBUTING.md has it."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## A router of depth")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The same text as a member of another name, in a folder of its own."""
    folder = tmp_path_factory.mktemp("depth")
    (folder / "example.py").write_text(written())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "__path__", [*depth.__path__, str(folder)])
        settings._names.cache_clear()
        importlib.invalidate_caches()
        yield importlib.import_module("adaptive.models.depth.example")
    settings._names.cache_clear()
    del sys.modules["adaptive.models.depth.example"]


@pytest.fixture(scope="module")
def model(example):
    """Settings of a model whose second and fourth block are routed, as a command line would make them."""
    recipe = Recipe("", model=PLAIN).with_("model.body.depth=example", f"model.body.depth.share={SHARE}")
    assert recipe.model.body.depth == example.Settings(share=SHARE)
    return recipe.model


@pytest.fixture(scope="module")
def built(model):
    return model.build(jax.random.key(0))


def test_the_page_shows_the_file():
    assert written() == Path(mixture_of_depths.__file__).read_text()


def test_it_is_found_by_its_name(example, model, built):
    assert "example" in Depth.kinds()
    assert type(built.body.depth) is example.MixtureOfDepths
    assert model.body.family() == "example"
    assert settings.read(type(model), settings.to_tree(model), where="model") == model


def test_its_parameters_are_those_of_the_account(model, built):
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    assert parameters(model).total == count
    assert parameters(model).routers == 2 * 2 * model.width


def test_the_routed_passes_compute_their_share_and_no_more(model, built):
    tokens = jax.random.randint(jax.random.key(1), (2, SEQ), 0, model.vocab_size)
    trace = jax.jit(lambda tokens: built(tokens).trace)(tokens)
    assert [s.indices.shape for s in trace.selections] == [(2, SHARE * SEQ)] * 2
    assert all(np.all(s.valid) for s in trace.selections)
    queries = trace.told["core/blocks/0/mixer"].stats["queries"]
    np.testing.assert_array_equal(queries.ravel(), 2 * SEQ * np.array([1, SHARE, 1, SHARE]))
    np.testing.assert_array_equal(trace.depth.sum(1), SEQ * (2 + 2 * SHARE))
    assert [stage.tokens for stage in account(model, SEQ).stages] == [SEQ, SEQ * SHARE, SEQ, SEQ * SHARE, SEQ]


def test_the_loss_falls(model):
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, SEQ + 1)).astype(np.int32)
    ones = np.ones((2, SEQ), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(SEQ, dtype=np.int32) * ones, ones, ones.astype(np.float32))
    tx = optax.adam(3e-3)
    graphdef, _ = abstract_model(model.build)
    state = jax.jit(lambda key: initial_state(model.build, tx, key))(jax.random.key(0))
    step = jax.jit(make_train_step(graphdef, tx))
    losses, predicted = [], []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["ce"]))
        predicted.append(float(metrics["aux/predictor_loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert predicted[-1] < predicted[0]


def test_a_cache_is_no_cache(model, built):
    """Token by token, after a prompt of another length in each row, as in one pass over everything."""
    tokens = jax.random.randint(jax.random.key(2), (2, SEQ), 0, model.vocab_size)
    lengths = np.array([5, 3])
    whole = jax.jit(lambda tokens: built(tokens, selection="threshold"))(tokens)
    assert {2, 3, 4} & set(np.unique(whole.trace.depth)) > {2}  # the predictor takes some and leaves some
    there = np.arange(5) < lengths[:, None]
    read = jax.jit(lambda tokens, cache: built.prefill(tokens, cache, there))
    out, cache = read(tokens[:, :5], built.init_cache(2, SEQ))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(out.logits[row, :n], whole.logits[row, :n], rtol=1e-4, atol=1e-4)
    step = jax.jit(built.decode_step)
    for i in range(8):
        at = jnp.asarray(lengths + i)
        out, cache = step(tokens[jnp.arange(2), at], cache)
        np.testing.assert_allclose(out.logits[:, 0], whole.logits[np.arange(2), at], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(out.trace.depth[:, 0], whole.trace.depth[np.arange(2), at])


# Around a core of one line

WIDTH = 8


def core(r, x, where, call, carried):
    """What a pass computes of the positions it is given: each reads those before it, and the time it stands at."""
    there = np.ones(x.shape[:2]) if where.exists is None else where.exists.astype(jnp.float32)
    mean = (x * there[..., None]).cumsum(1) / jnp.maximum(there.cumsum(1), 1)[..., None]
    return x + jnp.sin(mean * (r + 1) + 0.1 * where.number[..., None]), carried, {}


def by_hand(x, router, predictor, share):
    """The same on one row in numpy, with every decision written out: (stream, positions of each routed pass, loss)."""
    taken, loss = [], 0.0
    for r in range(4):
        chosen = np.arange(len(x))
        gate = np.ones(len(x))
        if r % 2:
            logits = x @ router[r // 2, :, 0]
            chosen = np.sort(np.argsort(-logits)[: int(share * len(x))])
            gate = 1 / (1 + np.exp(-logits))
            decision = x @ predictor[r // 2, :, 0]
            target = np.isin(np.arange(len(x)), chosen)
            loss += np.mean(np.log1p(np.exp(np.where(target, -decision, decision))))
            taken.append(chosen.tolist())
        own = x[chosen]
        mean = own.cumsum(0) / np.arange(1, len(own) + 1)[:, None]
        x = x.copy()
        x[chosen] += gate[chosen, None] * np.sin(mean * (r + 1) + 0.1 * chosen[:, None])
    return x, taken, loss


def strategy():
    keys = iter(jax.random.split(jax.random.key(3)))
    return mixture_of_depths.Settings(share=0.4).build(4, Site(WIDTH, 0.5), keys)


def test_gate_and_selection_are_the_formula():
    made = strategy()
    router, predictor = (np.asarray(p[...], np.float64) for p in (made.router, made.predictor))
    x = np.random.default_rng(1).normal(size=(3, 10, WIDTH))
    run = jax.jit(lambda x: made(core, x, Where.whole(x.shape[:2]), Call(), Carried(None)))
    routed = run(jnp.asarray(x, jnp.float32))
    rows = [by_hand(row, router, predictor, 0.4) for row in x]
    np.testing.assert_allclose(routed.x, np.stack([row[0] for row in rows]), rtol=1e-4, atol=1e-4)
    for g, selection in enumerate(routed.trace.selections):
        assert selection.indices.tolist() == [row[1][g] for row in rows]
    assert float(routed.aux["predictor_loss"].value) == pytest.approx(np.mean([row[2] for row in rows]), rel=1e-4)
    assert routed.aux["predictor_loss"].separate


def test_padding_is_never_taken_and_shares_are_of_what_exists():
    made = strategy()
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 10, WIDTH)), jnp.float32)
    run = jax.jit(lambda x, where: made(core, x, where, Call(), Carried(None)))
    alone = run(x[:, :5], Where.whole((1, 5)))
    beside = run(x, Where.whole((1, 10), exists=jnp.arange(10)[None] < 5))
    np.testing.assert_allclose(beside.x[:, :5], alone.x, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(beside.trace.depth[:, :5], alone.trace.depth)
    assert [int(s.valid.sum()) for s in beside.trace.selections] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recursions": 5}, "every=2 does not divide the 5 recursions"),
        ({"keys_values": "shared"}, "keys_values=per_recursion, not shared"),
        (
            {"depth": mixture_of_depths.Settings(share=1.5)},
            "share=1.5: must be above 0 and at most 1",
        ),
    ],
)
def test_it_refuses(changes, message):
    body = dataclasses.replace(PLAIN.body, **({"depth": mixture_of_depths.Settings()} | changes))
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(PLAIN, body=body).validate()
