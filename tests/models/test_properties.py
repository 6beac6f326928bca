"""Two properties of the model of every recipe, at reduced size: a batch is its rows, and generation with a cache is the
full forward pass. Recipes whose models are alike when reduced share one case."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import random_bytes, split_model

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice
from adaptive.models.bodies import Body, hnet, plain, recursive
from adaptive.recipe import list_recipes, load
from adaptive.settings import leaf_values

pytestmark = pytest.mark.compiles

ROWS, SEQ = 4, 16
LENGTHS = np.array([16, 11, 7, 13])
PIECES = np.array([[6, 4, 3, 6], [6, 3, 1, 4]])  # two pieces of a prompt; single tokens until the lengths follow
PIECE, STEPS = 6, 3
CLOSE = {"atol": 5e-4, "rtol": 1e-3}


def small(model: shapes.Model) -> shapes.Model:
    """The model reduced. What changes no program is the same for all."""
    own = {"vocab_size": 256, "tie_embeddings": True, "padding_token": -1, "norm_eps": 1e-5}
    reduced = shapes.reduced(model, layers=1)
    return dataclasses.replace(reduced, body=_alike(reduced.body), **own)


def _alike(body: Body) -> Body:
    if isinstance(body, plain.Settings):
        return dataclasses.replace(body, stack=dataclasses.replace(body.stack, repeats=2))
    if isinstance(body, recursive.Settings):
        body = dataclasses.replace(body, core=dataclasses.replace(body.core, repeats=2))
        return shapes.of_two_passes(body)
    assert isinstance(body, hnet.Settings)
    numbers = {"target": 3.0, "ratio_over": "global", "length": 3}
    names = {field.name for field in dataclasses.fields(body.chunker)}
    chunker = dataclasses.replace(body.chunker, **{name: v for name, v in numbers.items() if name in names})
    same = {"chunker": chunker, "capacity_steps": (), "rate": 1.0, "inner_rate": 1.0}
    return dataclasses.replace(body, inner=_alike(body.inner), capacities=(0.5,) if body.capacities else (), **same)


def next_token_recipes() -> list[str]:
    """Recipes of models that generate from the past."""
    return [name for name in list_recipes() if load(name).objective.causal]


@functools.cache
def models() -> dict[str, shapes.Model]:
    """Reduced models by the first recipe that has them."""
    found: dict[Any, str] = {}
    for name in next_token_recipes():
        found.setdefault(small(load(name).model), name)
    return {name: model for model, name in found.items()}


def compares_rows(model: shapes.Model) -> str:
    """Why training decides over more than one row; empty where it does not."""
    for path, value in leaf_values(model).items():
        leaf = path.rpartition(".")[2]
        if leaf == "group" and value in ("batch", "position"):
            return "experts choose among the tokens of all rows"
        if leaf == "capacity_group" and value == "batch":
            return "rows share the slots of an expert"
        if leaf == "threshold" and value == "batch":
            return "the threshold is that of the batch"
        if leaf == "packing" and value == "device":
            return "rows share the slots of chunks"
    return ""


@functools.cache
def whole(model: shapes.Model, selection: str):
    """(tokens, segments, positions, boundaries) -> (logits, depth) of the full forward pass."""
    graphdef, state = split_model(model)

    @jax.jit
    def run(state, tokens, segments, positions, given):
        out = nnx.merge(graphdef, state)(
            tokens, segment_ids=segments, positions=positions, boundaries=given, selection=selection
        )
        return out.logits, out.trace.depth

    return lambda *arrays: jax.tree.map(np.asarray, run(state, *map(jnp.asarray, arrays)))


class Rows:
    """Rows of tokens with what else comes with them."""

    def __init__(self, seed: int, lengths: np.ndarray = LENGTHS):
        self.lengths = lengths
        self.tokens = random_bytes(seed, ROWS, SEQ)
        self.given = np.random.default_rng(seed).random((ROWS, SEQ)) < 0.4
        self.valid = np.arange(SEQ) < lengths[:, None]
        self.segments = self.valid.astype(np.int32)
        self.positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (ROWS, SEQ)).copy()

    def taken(self, rows: list[int]) -> "Rows":
        new = Rows(0)
        for name, value in vars(self).items():
            setattr(new, name, value[rows])
        return new

    def joined(self, rows: list[int], others: "Rows") -> "Rows":
        """These rows first, then rows of the others."""
        new = self.taken([*rows, *range(ROWS - len(rows))])
        for name, value in vars(new).items():
            value[len(rows) :] = getattr(others, name)[len(rows) :]
        return new

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.segments, self.positions, self.given


def same(got: Any, want: Any, rows: list[int], of: list[int], valid: np.ndarray) -> None:
    """Rows of `got` are rows `of` of `want` where these are valid."""
    for row, other in zip(rows, of, strict=True):
        at = valid[other]
        np.testing.assert_array_equal(got[1][row][at], want[1][other][at])
        np.testing.assert_allclose(got[0][row][at], want[0][other][at], **CLOSE)


def rules(model: shapes.Model) -> list[str]:
    """Ways of selecting that decide each row alone."""
    differ = nnx.merge(*split_model(model)).selections()
    return [rule for rule in differ if rule == "threshold" or not compares_rows(model)]


def causal_rule(model: shapes.Model) -> str:
    """The way of selecting in which positions decide from their past alone; empty where there is none."""
    made = nnx.merge(*split_model(model))
    return "" if made.refuse_generation() else made.selections()[-1]


@pytest.mark.parametrize("name", models())
def test_a_batch_is_its_rows(name):
    """Rows in another order, with other padding behind them, among other rows: each gives what it gave. Two documents
    in one row are two rows, where positions decide from their past alone."""
    model = models()[name]
    if not rules(model):
        pytest.skip(compares_rows(model))
    for rule in rules(model):
        run, rows, others = whole(model, rule), Rows(1), Rows(2, LENGTHS[::-1].copy())
        want = run(*rows.arrays())
        assert np.isfinite(want[0]).all()
        order = [2, 0, 3, 1]
        same(run(*rows.taken(order).arrays()), want, [0, 1, 2, 3], order, rows.valid)
        other = rows.taken([0, 1, 2, 3])
        other.tokens = np.where(rows.valid, rows.tokens, 65)
        other.given = other.given ^ ~rows.valid
        same(run(*other.arrays()), want, [0, 1, 2, 3], [0, 1, 2, 3], rows.valid)
        for part in ([0, 1], [2, 3]):
            same(run(*rows.joined(part, others).arrays()), want, [0, 1], part, rows.valid)
        if rule != causal_rule(model):
            continue
        packed = rows.taken([2, 1, 0, 3])
        for field in ("tokens", "given", "positions"):
            getattr(packed, field)[0, 7:] = getattr(rows, field)[1, :9]
        packed.segments[0] = np.repeat([1, 2], [7, 9])
        got = run(*packed.arrays())
        np.testing.assert_allclose(got[0][0, :7], want[0][2, :7], **CLOSE)
        np.testing.assert_allclose(got[0][0, 7:], want[0][1, :9], **CLOSE)


@pytest.mark.parametrize("options", [{"group": "batch"}, {"group": "position"}], ids=str)
def test_what_compares_rows_is_known(options):
    """The exceptions are real: other rows change what a row gives in training."""
    chosen = experts.Settings(expert_choice.Settings(**options), experts=4, expert_size=8)
    model, rows, others = shapes.plain(2, feed_forward=chosen, vocab_size=256), Rows(1), Rows(2)
    assert rules(model) == ["threshold"] and compares_rows(model)
    run = whole(model, "topk")
    difference = np.abs(run(*rows.arrays())[0] - run(*rows.joined([0, 1], others).arrays())[0])
    assert difference[:2][rows.valid[:2]].max() > 1e-2


@pytest.mark.parametrize("name", models())
def test_generation_with_a_cache_is_the_full_forward_pass(name):
    """A prompt in two pieces, of another length in each row, and then single tokens."""
    model = models()[name]
    graphdef, state = split_model(model)
    made = nnx.merge(graphdef, state)
    if reason := made.refuse_generation() or made.refuse_cache():
        pytest.skip(reason)
    rows = Rows(1)
    want = whole(model, causal_rule(model))(*rows.arrays())
    begins = np.concatenate([np.zeros((1, ROWS), int), PIECES.cumsum(0)])
    at = begins[:2, :, None] + np.arange(PIECE)
    valid = np.arange(PIECE) < PIECES[..., None]
    steps = begins[2] + np.arange(STEPS)[:, None]
    row = np.arange(ROWS)
    prompts = lambda a: a[row[:, None], np.minimum(at, SEQ - 1)]  # noqa: E731

    @jax.jit
    def generated(state, pieces, valid, given, tokens, marks):
        def append(cache, own):
            out, cache = nnx.merge(graphdef, state).prefill(own[0], cache, own[1], boundaries=own[2])
            return cache, (out.logits, out.trace.depth)

        def step(cache, own):
            out, cache = nnx.merge(graphdef, state).decode_step(own[0], cache, boundaries=own[1])
            return cache, (out.logits, out.trace.depth)

        cache = nnx.merge(graphdef, state).init_cache(ROWS, SEQ + PIECE)
        cache, first = jax.lax.scan(append, cache, (pieces, valid, given))
        cache, then = jax.lax.scan(step, cache, (tokens, marks))
        return first, then, cache["seen"]

    tokens, given = rows.tokens, rows.given
    arrays = prompts(tokens), valid, prompts(given), tokens[row, steps], given[row, steps]
    first, then, seen = jax.tree.map(np.asarray, generated(state, *arrays))
    assert seen[0].tolist() == (begins[2] + STEPS).tolist()
    for piece in range(2):
        for r, count in enumerate(PIECES[piece]):
            places = at[piece, r, :count]
            np.testing.assert_array_equal(first[1][piece, r, :count], want[1][r, places])
            np.testing.assert_allclose(first[0][piece, r, :count], want[0][r, places], **CLOSE)
    for i, places in enumerate(steps):
        np.testing.assert_array_equal(then[1][i, :, 0], want[1][row, places])
        np.testing.assert_allclose(then[0][i, :, 0], want[0][row, places], **CLOSE)


def test_every_recipe_is_one_of_these():
    assert {small(load(name).model) for name in next_token_recipes()} == set(models().values())
    assert len(models()) < 50
