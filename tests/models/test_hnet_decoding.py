"""Generation with a cache equals the full forward pass: in pieces, by rows of any lengths, however rows are grouped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hnet_models import composed, forward, hnet, random_bytes, split_model

from adaptive.errors import RecipeError
from adaptive.layers.keys_values import ByHead, KeyValues
from adaptive.models.depth import expert_choice, token_choice

pytestmark = pytest.mark.compiles

BATCH, SEQ, ROOM = 3, 16, 20
LENGTHS = np.array([10, 4, 7])
EXPERT, TOKEN = expert_choice.Settings(alpha=1.0), token_choice.Settings()
CASES = {
    "one stage": hnet(1),
    "one stage, windows": hnet(1, window=4),
    "two stages": hnet(2),
    "two stages, capacities": hnet(2, capacities=(0.3, 0.5)),
    "sum": hnet(2, merge="sum"),
    "expert choice": composed(EXPERT, hidden=32),
    "expert choice, shared keys": composed(EXPERT, keys_values="shared"),
    "expert choice, cycle": composed(EXPERT, ends=0, layers=3),
    "token choice, shared keys": composed(TOKEN, keys_values="shared"),
}


@functools.cache
def appended(config, rows=0):
    """(tokens, cache, valid) -> (logits, depth, the stages' boundaries, cache)."""
    graphdef, state = split_model(config)

    def run(state, tokens, cache, valid):
        out, cache = nnx.merge(graphdef, state).prefill(tokens, cache, valid, rows=rows)
        masks = tuple((stage.boundary_mask, stage.boundary_prob) for stage in out.trace.stages)
        return out.logits, out.trace.depth, masks, cache

    compiled = jax.jit(run)
    return lambda tokens, cache, valid=None: compiled(state, jnp.asarray(tokens), cache, valid)


def empty(config):
    return nnx.merge(*split_model(config)).init_cache(BATCH, ROOM)


def stages_of(cache) -> list[dict]:
    """The states of the chunking stages, from the bytes inwards."""
    found, own = [], cache["body"]
    while "chunks" in own:
        found.append(own)
        own = own["inner"] if isinstance(own["inner"], dict) else {}
    return found


TOKENS = random_bytes(batch=BATCH, seq=SEQ)


@functools.cache
def at_once(name):
    return forward(CASES[name], selection="threshold")(TOKENS)


# Chunkers, merges and models inside that no recipe has, whose models tests/models/test_properties.py generates with.
@pytest.mark.parametrize("name", [
    "one stage, windows", "two stages, capacities", "expert choice, shared keys", "expert choice, cycle",
    "token choice, shared keys",
])  # fmt: skip
def test_pieces_equal_the_full_forward_pass(name):
    """A prompt of 6 bytes, one of 6 more, and single bytes."""
    full, cache, logits, depth = at_once(name), empty(CASES[name]), [], []
    for start, stop in [(0, 6), (6, 12), *((i, i + 1) for i in range(12, SEQ))]:
        y, d, masks, cache = appended(CASES[name])(TOKENS[:, start:stop], cache)
        logits.append(y)
        depth.append(d)
        if masks:
            np.testing.assert_array_equal(masks[0][0], full.trace.stages[0].boundary_mask[:, start:stop])
            np.testing.assert_allclose(masks[0][1], full.trace.stages[0].boundary_prob[:, start:stop], atol=1e-4)
    np.testing.assert_array_equal(np.concatenate(depth, 1), full.trace.depth)
    np.testing.assert_allclose(np.concatenate(logits, 1), full.logits, atol=2e-4)
    for stage, own in zip(full.trace.stages, stages_of(cache), strict=True):
        assert own["seen"][0].tolist() == np.asarray(stage.valid).sum(1).tolist()
        assert own["chunks"][0].tolist() == np.asarray(stage.boundary_mask).sum(1).tolist()
    if "choice" in name:
        assert len(np.unique(full.trace.depth)) > 2, "the example should use several depths"


@pytest.mark.parametrize(
    ("name", "rows"),
    [("sum", 2), ("expert choice", 0), ("token choice, shared keys", 1)],
)
def test_rows_of_different_lengths(name, rows):
    """Prompts of 10, 4 and 7 bytes and six single ones: each row as if alone, its chunks begin when they do."""
    config, full = CASES[name], at_once(name)
    valid = np.arange(10) < LENGTHS[:, None]
    y, d, _, cache = appended(config)(np.where(valid, TOKENS[:, :10], 0), empty(config), valid)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(y[row, :n], full.logits[row, :n], atol=2e-4)
        np.testing.assert_array_equal(d[row, :n], full.trace.depth[row, :n])
        assert not np.any(np.asarray(d)[row, n:])
    began = []
    for step in range(6):
        at = (np.arange(BATCH), LENGTHS + step)
        y, d, masks, cache = appended(config, rows)(TOKENS[at][:, None], cache)
        np.testing.assert_allclose(y[:, 0], full.logits[at], atol=2e-4)
        np.testing.assert_array_equal(d[:, 0], np.asarray(full.trace.depth)[at])
        began.append(np.asarray(masks[0][0])[:, 0])
    assert cache["seen"][0].tolist() == stages_of(cache)[0]["seen"][0].tolist() == (LENGTHS + 6).tolist()
    assert len({tuple(row) for row in began}) > 1 and not all(len(set(row)) == 1 for row in began)


@pytest.mark.parametrize("name", ["two stages", "expert choice"])
def test_groups_of_rows_leave_the_same_cache(name):
    """All rows at once, two at a time, more than there are: logits and what is remembered agree."""
    _, _, _, cache = appended(CASES[name])(TOKENS[:, :8], empty(CASES[name]))
    want = None
    for rows in (0, 2, 9):
        y, depth, _, after = appended(CASES[name], rows)(TOKENS[:, 8:9], cache)
        got = y, depth, _meaningful(after)
        if want is not None:
            assert jax.tree.structure(got) == jax.tree.structure(want)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)
        want = got


def _meaningful(cache):
    """The cache without keys and values that no position owns, which nothing reads."""

    def one(node):
        if not isinstance(node, KeyValues):
            return node
        held = (node.index >= 0)[..., None, None]
        held = held.swapaxes(-3, -2) if isinstance(node, ByHead) else held
        return node._replace(k=jnp.where(held, node.k, 0), v=jnp.where(held, node.v, 0))

    return jax.tree.map(one, cache, is_leaf=lambda node: isinstance(node, KeyValues))


def test_a_row_without_new_bytes_keeps_its_state():
    config = CASES["two stages"]
    _, _, _, cache = appended(config)(TOKENS[:, :10], empty(config))
    valid = np.zeros((BATCH, 10), bool)
    valid[1] = True
    _, _, _, after = appended(config)(TOKENS[:, :10], cache, valid=valid)
    assert after["seen"][0].tolist() == [10, 20, 10]
    for before, now in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(now[:, [0, 2]], before[:, [0, 2]])


def test_one_step_at_a_time_is_decode_step():
    config = CASES["one stage"]
    model = nnx.merge(*split_model(config))
    step = jax.jit(lambda token, cache: model.decode_step(token, cache))
    cache = empty(config)
    for t in range(3):
        out, cache = step(TOKENS[:, t], cache)
        np.testing.assert_allclose(out.logits[:, 0], at_once("one stage").logits[:, t], atol=2e-4)


def test_what_cannot_generate_says_so():
    model = nnx.merge(*split_model(composed(order="sequence", ends=0, layers=3)))
    assert "order=cycle" in model.refuse_cache() and model.selections() == ("topk",)
    with pytest.raises(RecipeError, match="order=cycle"):
        model.prefill(jnp.zeros((1, 4), jnp.int32), {})
