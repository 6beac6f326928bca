"""Losses as sums: those of two halves of a batch add up to those of the batch, whatever the halves look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.layers.moe.routers.longcat import true_balance
from adaptive.routing import losses
from adaptive.routing.balance import balancing_loss, importance_and_load
from adaptive.routing.boundaries import Boundaries, ratio_losses
from adaptive.routing.masked import share_loss

pytestmark = pytest.mark.compiles

ROWS, SEQ, CHOICES = 4, 6, 3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(ROWS, SEQ, CHOICES)).astype(np.float32) + np.array([[[2, 0, 0]]] * 2 + [[[0, 0, 3]]] * 2)
P = jax.nn.softmax(jnp.asarray(LOGITS, jnp.float32))
PRESENT = np.arange(SEQ) < np.array([[SEQ], [2], [5], [0]])
INDEX = np.argsort(-LOGITS, axis=-1)[..., :2]
LOAD = lambda rows: jnp.asarray(  # noqa: E731
    [(PRESENT[rows][..., None] & (INDEX[rows] == i)).sum() for i in range(CHOICES)], jnp.float32
)


def balance(form):
    valid = jnp.ones((ROWS, SEQ, 2), bool)
    return lambda rows: balancing_loss(P[rows], jnp.asarray(INDEX[rows]), valid[rows], jnp.asarray(PRESENT[rows]), form)


def ratio(over):
    wanted = P[..., 0] > 0.5
    return lambda rows: ratio_losses(Boundaries(P[rows][..., 0], wanted[rows]), jnp.asarray(PRESENT[rows]), 3.0, 1)[
        over
    ]


CASES = {
    **{form: balance(form) for form in ("switch", "gshard", "flaxformer", "maxtext", "sequence")},
    **{f"ratio {over}": ratio(over) for over in ("global", "device")},
    "share": lambda rows: share_loss(P[rows], LOAD(rows), PRESENT[rows]),
    "true share": lambda rows: true_balance(P[rows], LOAD(rows), 2, PRESENT[rows]),
    "importance": lambda rows: importance_and_load(P[rows], P[rows], P[rows], 2, 1.0, PRESENT[rows]),
    "depth": lambda rows: losses.balancing_loss(P[rows], jnp.asarray(INDEX[rows][..., 0]), PRESENT[rows]),
    "mean": lambda rows: losses.averaged(P[rows][..., 0], PRESENT[rows]),
    "together": lambda rows: losses.together([losses.averaged(P[rows][..., i], PRESENT[rows]) for i in range(2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_of_halves_make_the_loss_of_the_whole(name):
    of = CASES[name]
    whole, halves = of(slice(None)), [of(slice(0, 2)), of(slice(2, 4))]
    assert halves[0].form == halves[1].form == whole.form
    added = jax.tree.map(jnp.add, *halves)
    np.testing.assert_allclose(added.value, whole.value, rtol=1e-5)
    assert np.isfinite(np.asarray(of(slice(3, 4)).value))  # no token at all


def test_a_loss_of_no_tokens_has_no_slope():
    slope = jax.grad(lambda p: true_balance(p, jnp.zeros(CHOICES), 2, PRESENT[3:]).value)(P[3:])
    assert not np.asarray(slope).any()
