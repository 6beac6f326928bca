"""Expert choice whose capacity follows the masked share: who gets how many rows, at what compiled cost."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_oracle import inputs, weights_of
from flax import nnx
from oracle import moe as oracle

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts as of_experts
from adaptive.layers.moe import layer_from_weights
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.routers.expert_choice import Settings
from adaptive.layers.moe.scheduled import fitted
from adaptive.layers.site import Site

B, S, D, F, E = 4, 32, 8, 12, 8
WEIGHTS = weights_of(E, E, width=D, hidden=F, seed=5)
X = inputs(B, S, D)
LOGITS = oracle.linear_logits(X, WEIGHTS["router.weight"])
FFN = [WEIGHTS[f"experts.{name}"] for name in ("gate", "up", "down")]
SPREAD = np.array([0.9, 0.1, 0.4, 0.6], np.float32)  # budgets of 3 to 1: 1, 3, 2, 2
RANGE = {"score": "selected", "decode": "refuse", "schedule": "linear_reverse", "k_min": 1, "k_max": 3}


def layer_of(options=RANGE, **settings):
    return layer_from_weights("expert_choice", WEIGHTS, options=options, **{"experts_per_token": 2} | settings)


@pytest.fixture(scope="module")
def computed():
    """y, its gradient by x, and the decision of one layer, compiled once for whatever the ratios."""
    layer = layer_of()

    def run(x, ratio):
        def total(x):
            y, routing = layer.routed(x, Context(mask_ratio=ratio, training=True))
            return (y * MIX).sum(), (y, routing)

        (_, (y, routing)), slope = jax.value_and_grad(total, has_aux=True)(x)
        return y, routing, slope

    run = jax.jit(run)
    return lambda ratio: run(jnp.asarray(X, jnp.float32), jnp.asarray(ratio))


MIX = np.random.default_rng(4).normal(size=X.shape)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("ratio", "rows"),
    [
        (SPREAD, (4, 12, 8, 8)),  # S k // E of each
        ([1, 1, 1, 1], (4, 4, 4, 4)),
        # 36 rows are shared. What is wanted beyond goes to a level, the first getting what is left.
        ([0, 0, 0, 0], (9, 9, 9, 9)),
        ([0, 1, 0, 0.1], (11, 4, 11, 10)),
        ([0.05, 0.5, 0.1, 0.5], (10, 8, 10, 8)),
    ],
)
def test_every_text_by_its_masked_share(computed, ratio, rows):
    y, routing, slope = computed(np.array(ratio, np.float32))
    dispatch = routing.dispatch
    assert dispatch.shared == (4, 36)
    assert dispatch.capacity(B) == 36
    assert dispatch.capacity(2) == 24  # a device with half of those that share has room for the most
    pairs = oracle.expert_choice(LOGITS, lambda n, b: rows[b], weights="softmax over pickers")
    np.testing.assert_array_equal(dispatch.mask(), oracle.dense_mask(pairs, E))
    np.testing.assert_allclose(y, oracle.combine(X, pairs, *FFN), atol=2e-5, rtol=2e-5)
    wanted = E * np.array([max(S * k // E, 1) for k in np.round(3 - 2 * np.array(ratio))]).sum()
    assert routing.stats["dropped"] == wanted - E * sum(rows)
    np.testing.assert_allclose(routing.stats["rows_over_average"], wanted / (E * B * 8), rtol=1e-6)
    weights = jnp.asarray(oracle.dense_weights(pairs, E), jnp.float32)
    np.testing.assert_allclose(slope.sum(), by_mask(weights), atol=1e-3)


def by_mask(gate):
    """The sum of the gradient by x, of all experts on all tokens under the gates of a decision."""

    def total(x):
        logits = x @ jnp.asarray(WEIGHTS["router.weight"], jnp.float32)
        own = jnp.where(gate > 0, jnp.exp(logits), 0.0)
        own = own / (own.sum(-1, keepdims=True) + 1e-20)
        hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, FFN[0])) * jnp.einsum("bsd,edf->bsef", x, FFN[1])
        return (jnp.einsum("bsef,efd,bse->bsd", hidden, FFN[2], own) * MIX).sum()

    return jax.jit(jax.grad(total))(jnp.asarray(X, jnp.float32)).sum()


@pytest.mark.compiles
def test_outside_training_nobody_shares():
    """Every text has what its share says, whoever else is in the batch."""
    layer = layer_of()
    decide = jax.jit(lambda ratio: layer.router(jnp.asarray(X, jnp.float32), Context(mask_ratio=ratio)))
    routing = decide(jnp.zeros(B))
    np.testing.assert_array_equal(routing.dispatch.mask().sum(1), np.full((B, E), 12))
    assert not routing.stats["dropped"]
    # No share is known: the average.
    plain = jax.jit(lambda: layer.router(jnp.asarray(X, jnp.float32), Context(training=True)))()
    np.testing.assert_array_equal(plain.dispatch.mask().sum(1), np.full((B, E), 8))


@pytest.mark.compiles
def test_compiled_flops_are_those_of_the_average():
    """A schedule's step costs what the static one does, times the rows that it has room for over the average."""

    def flops(options, **context):
        layer = layer_of(options)
        graphdef, state = nnx.split(layer)
        call = lambda state, x, ratio: nnx.merge(graphdef, state).routed(x, Context(mask_ratio=ratio, **context))[0]  # noqa: E731
        lowered = jax.jit(call).lower(state, jnp.zeros((B, S, D)), jnp.zeros(B))
        return hlo.matmul_flops(lowered.compile().as_text())

    router = 2 * B * S * D * E
    static = flops({"score": "selected", "decode": "refuse"}, training=True)
    scheduled = flops(RANGE, training=True)
    assert static == router + 6 * B * E * 8 * D * F  # 8 rows of each text
    assert scheduled == router + 6 * E * 36 * D * F  # 36 of four texts, whose average is 32
    account = lambda **own: Settings(**own).pairs(of_experts.Settings(Settings(), experts=E), S, Site(D))  # noqa: E731
    assert account(**RANGE) == account() == E * 8


@pytest.mark.compiles
def test_fitting_against_a_loop():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 13, (40, 5))
    with jax.ensure_compile_time_eval():
        for rows in (0, 7, 23, 60):
            found = np.asarray(fitted(jnp.asarray(wanted), rows, 12))
            for group, got in zip(wanted, found, strict=True):
                left = group.copy()
                while left.sum() > rows:
                    left[len(left) - 1 - left[::-1].argmax()] -= 1  # of those with most the last
                np.testing.assert_array_equal(got, left)


def refused(**options):
    settings = Settings(**{"score": "selected", "decode": "refuse"} | options)
    with pytest.raises(RecipeError) as told:
        settings.check(of_experts.Settings(settings, experts=E), "at")
    return str(told.value)


def test_refusals():
    some = {"schedule": "linear", "k_min": 1, "k_max": 3}
    assert "at.router.k_min=3 and at.router.k_max=1" in refused(schedule="linear", k_min=3, k_max=1)
    assert "1 <= k_min" in refused(schedule="linear")
    assert "at most at.experts=8" in refused(schedule="linear", k_min=1, k_max=9, experts_per_token=5)
    assert "set at.router.experts_per_token=3" in refused(schedule="linear", k_min=1, k_max=5)
    beyond = refused(**some, rows_of=1)
    assert "by at.router.rows_of=1 can need 1.5 times" in beyond
    assert "set at.router.row_slack=1.5" in beyond
    assert "set at.router.row_slack=1.123" in refused(**some | {"schedule": "gaussian"}, row_slack=1.01)
    assert "group=sequence" in refused(**some, group="batch")
    assert "group=sequence" in refused(**some, select="threshold")
    Settings(**some, rows_of=1, row_slack=1.5).check(of_experts.Settings(Settings(), experts=E), "at")
    assert {"k_min", "rows_of", "sigma"} <= set(Settings().unread())
    assert set(Settings(**some, decode="refuse").unread()) & {"k_min", "row_slack", "sigma"} == {"sigma"}


@pytest.mark.compiles
def test_a_limit_beyond_the_room_is_refused():
    layer = layer_from_weights("expert_choice", WEIGHTS, options={"score": "selected", "decode": "refuse"})
    with pytest.raises(RecipeError, match=r"router\.most_per_token"):
        layer.router(jnp.asarray(X, jnp.float32), Context(limit=np.full(B, 3)))
