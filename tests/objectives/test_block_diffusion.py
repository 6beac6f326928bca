"""Block diffusion: what each position sees, blocks of one token, and what a pass of both versions gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from train_steps import packed_batch

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts as routed
from adaptive.layers.moe.routers import expert_choice
from adaptive.layers.reach import paired_blocks, seen_by
from adaptive.models.depth import token_choice
from adaptive.objectives import asked, block_diffusion, masked_diffusion, next_token

pytestmark = pytest.mark.compiles

ROWS, SEQ, VOCAB, MASK = 2, 12, 32, 31
MODEL = shapes.plain(2, vocab_size=VOCAB, width=16, hidden=24, heads=2, kv_heads=1)
BLOCKS = block_diffusion.Settings(block=3, mask_id=MASK)


@pytest.fixture(scope="module")
def batch():
    return packed_batch(ROWS, SEQ, MASK)


@pytest.fixture(scope="module")
def net():
    return MODEL.build(jax.random.key(0))


@pytest.fixture(scope="module")
def losses(net, batch):
    """What an objective makes of its inputs."""

    def of(aim, inputs):
        def through(tokens):
            out = net(tokens, **asked(aim, inputs, batch, segmented=True), logits=False)
            return aim.loss(net, out, inputs, 0)

        return jax.jit(through)(inputs.tokens)

    return of


@pytest.fixture(scope="module")
def alone(net):
    """f32[n, vocab]: what is said of one text that is read as it is, by earlier blocks and the own block."""
    read = jax.jit(lambda tokens, valid: jax.nn.log_softmax(net(tokens, valid=valid, sees=3).logits[0]))
    longer = lambda tokens: np.pad(tokens, (0, SEQ - len(tokens)))[None]  # noqa: E731
    return lambda tokens: np.asarray(read(longer(tokens), longer(np.ones(len(tokens), bool))))[: len(tokens)]


def sees(number, documents, block):
    """bool[2 n, 2 n], pair by pair."""
    n = len(number)
    mask = np.zeros((2 * n, 2 * n), bool)
    for i in range(2 * n):
        for j in range(2 * n):
            a, b = i % n, j % n
            before, same = number[b] // block < number[a] // block, number[b] // block == number[a] // block
            own = (i >= n) == (j >= n)
            mask[i, j] = documents[a] == documents[b] and ((j < n and before) or (own and same))
    return mask


def test_what_is_seen_is_the_rule_pair_by_pair(batch):
    reach = paired_blocks(jnp.asarray(batch.positions), 3)
    slots = np.arange(2 * SEQ)
    for row in range(ROWS):
        one = [np.asarray(a[row])[:, None] for a in reach]
        mask = ((slots >= one[0]) & (slots < one[1])) | ((slots >= one[2]) & (slots < one[3]))
        np.testing.assert_array_equal(mask, sees(batch.positions[row], batch.segment_ids[row], 3))
        index = jnp.asarray(slots)[None]
        count = seen_by(jax.tree.map(lambda a, row=row: a[row : row + 1], reach), index, jnp.ones((1, 2 * SEQ)))
        np.testing.assert_array_equal(count[0], mask.sum(1))


def test_a_block_is_said_as_it_is_decoded(net, batch, losses, alone):
    """One pass over both versions equals a pass for each block: earlier blocks as they are, and the block as hidden."""
    inputs = BLOCKS.inputs(batch, jax.random.key(3))
    nll = np.asarray(losses(BLOCKS, inputs).nll)
    shown = np.asarray(inputs.tokens)[:, SEQ:]
    for row in range(ROWS):
        for document in np.unique(batch.segment_ids[row]):
            where = np.flatnonzero(batch.segment_ids[row] == document)
            tokens = batch.tokens[row, where]
            for begin in range(0, len(where), 3):
                block = slice(begin, begin + 3)
                read = np.concatenate([tokens[:begin], shown[row, where[block]]])
                want = -np.take_along_axis(alone(read)[block], tokens[block][:, None], -1)[:, 0]
                np.testing.assert_allclose(nll[row, where[block]], want, rtol=2e-4)


def test_shifted_blocks_of_one_token_are_the_next_token_loss(batch, losses):
    plain = next_token.Settings()
    ones = block_diffusion.Settings(block=1, alignment="shifted", mask_id=MASK)
    want, got = losses(plain, plain.inputs(batch, None)), losses(ones, ones.inputs(batch, jax.random.key(1)))
    np.testing.assert_allclose(got.main, want.main, rtol=1e-6)
    np.testing.assert_allclose(got.nll, want.nll, atol=1e-5)
    assert ones.count(batch) == plain.count(batch)


def test_blocks_of_one_token_say_each_from_those_before_it(batch, losses, net):
    """Without a shift as well: a hidden token at each place reads what is before it; no draw matters."""
    ones = dataclasses.replace(BLOCKS, block=1)
    inputs = ones.inputs(batch, jax.random.key(1))
    nll = np.asarray(losses(ones, inputs).nll)
    np.testing.assert_array_equal(inputs.weights, ones.counted(batch))
    first = np.flatnonzero(batch.segment_ids[0] == 1)[:4]
    read = np.concatenate([batch.tokens[0, first[:3]], [MASK], np.zeros(SEQ - 4, np.int32)])
    logits = jax.jit(lambda tokens: net(tokens, sees="past").logits)(read[None])
    np.testing.assert_allclose(
        nll[0, first[3]], -jax.nn.log_softmax(logits[0, 3])[batch.tokens[0, first[3]]], rtol=1e-4
    )


def test_other_documents_of_a_row_change_nothing(batch, losses):
    """Of what the model reads: neither in blocks nor of whole rows does a document see another one of its row."""
    second = batch.segment_ids == 2
    other = batch._replace(tokens=np.where(second, (batch.tokens + 1) % MASK, batch.tokens))
    for aim in (BLOCKS, masked_diffusion.Settings(mask_id=MASK)):
        of = [losses(aim, aim.inputs(one, jax.random.key(4))).nll for one in (batch, other)]
        changed = np.abs(np.asarray(of[0]) - np.asarray(of[1])) > 1e-6
        assert changed[second].any() and not changed[~second].any()


def test_parts_that_compare_positions_are_refused():
    experts = routed.Settings(router=expert_choice.Settings(), experts=4, expert_size=8)
    for model, named in (
        (shapes.mor(), "model.body.depth=expert_choice"),
        (shapes.mor(depth=token_choice.Settings(execution="capacity")), "execution=capacity"),
        (shapes.plain(1, mixer="mamba2"), "model.body.stack.blocks.0.mixer=mamba2"),
        (shapes.plain(1, window=4), "window"),
        (shapes.hnet(), "H-Net"),
        (shapes.plain(1, feed_forward=experts), "expert choice"),
    ):
        with pytest.raises(RecipeError, match=named):
            BLOCKS.check_model(model)
    BLOCKS.check_model(MODEL)
    masked_diffusion.Settings(mask_id=MASK).check_model(shapes.mor())
