"""Objectives in the step: what is read, what is predicted, further predictions, noise of evaluation, and causality."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from train_steps import packed_batch

from adaptive.data.tokenizers import ByteCounts
from adaptive.objectives import Inputs, Objective, next_token
from adaptive.routing.types import Readout
from adaptive.runs.state import abstract_model
from adaptive.training.step import make_eval_step

pytestmark = pytest.mark.compiles

ROWS, SEQ, VOCAB = 2, 8, 32
MODEL = shapes.plain(1, vocab_size=VOCAB, width=16, hidden=24, heads=2, kv_heads=1)


@dataclasses.dataclass(frozen=True)
class Noisy(next_token.Settings):
    """Reads tokens of which noise has replaced some, and predicts what they were, from both sides."""

    causal: ClassVar[bool] = False

    def inputs(self, batch, key):
        replaced = jax.random.bernoulli(key, 0.5, batch.tokens.shape)
        tokens = jnp.where(replaced, 0, batch.tokens)
        return Inputs(tokens, jnp.asarray(batch.tokens), replaced.astype(jnp.float32))


def model():
    return MODEL.build(jax.random.key(0))


def test_the_loss_is_the_mean_of_targets_that_count():
    batch, net = packed_batch(ROWS, SEQ, VOCAB), model()
    aim = next_token.Settings()
    inputs = aim.inputs(batch, None)

    @jax.jit
    def of(net):
        out = net(inputs.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        return aim.loss(net, out, inputs, 4), out.logits

    loss, logits = of(net)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.asarray(batch.targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(loss.main, (nll * batch.mask).sum(), rtol=1e-5)
    assert loss.total == loss.main and not loss.apart
    assert aim.count(batch) == batch.mask.sum()


def test_further_predictions_count_with_their_coefficient():
    batch, net = packed_batch(ROWS, SEQ, VOCAB), model()
    aim = next_token.Settings()
    inputs = aim.inputs(batch, None)

    @jax.jit
    def of(net):
        out = net(inputs.tokens, logits=False)
        early = out._replace(readouts=(Readout("early", 0.5 * out.hidden, 0.25),))
        alone = out._replace(hidden=0.5 * out.hidden)
        return aim.loss(net, early, inputs, 0), aim.loss(net, alone, inputs, 0)

    both, alone = of(net)
    np.testing.assert_allclose(both.apart["early"], alone.main, rtol=1e-6)
    np.testing.assert_allclose(both.total, both.main + 0.25 * alone.main, rtol=1e-6)


@pytest.fixture(scope="module")
def evaluated():
    graphdef, _ = abstract_model(lambda key: MODEL.build(key))
    params, buffers = nnx.state(model(), nnx.Param), nnx.state(model(), nnx.Not(nnx.Param))
    counts = ByteCounts(jnp.ones(VOCAB, jnp.int32))
    step = jax.jit(make_eval_step(graphdef, counts, selection="topk", objective=Noisy()))
    return lambda batch, number: jax.device_get(step(params, buffers, batch, jax.random.key(number)))


def test_evaluation_has_noise_of_its_own(evaluated):
    batch = packed_batch(ROWS, SEQ, VOCAB)
    first, again, other = evaluated(batch, 0), evaluated(batch, 0), evaluated(batch, 1)
    assert first.nll == again.nll and first.tokens == again.tokens
    assert first.nll != other.nll
    assert 0 < first.tokens < ROWS * SEQ and first.bytes == first.tokens


def test_an_objective_that_is_not_causal_reads_both_ways(evaluated):
    batch = packed_batch(ROWS, SEQ, VOCAB)
    batch = batch._replace(segment_ids=np.ones_like(batch.segment_ids))
    changed = batch._replace(tokens=np.where(np.arange(SEQ) == SEQ - 1, 1 + batch.tokens % 7, batch.tokens))
    assert isinstance(Noisy(), Objective)
    keys = [n for n in range(20) if not jax.random.bernoulli(jax.random.key(n), 0.5, (ROWS, SEQ))[:, -1].any()]
    before, after = evaluated(batch, keys[0]), evaluated(changed, keys[0])
    assert (before.token_nll[:, 0] != after.token_nll[:, 0]).all()
