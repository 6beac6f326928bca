"""Expert choice against loops over tokens: who is taken in every kind of group, causality, thresholds, predictor."""

import itertools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from expert_oracle import blind_to_the_future, close, executions_agree, inputs, router_gradients, run, weights_of
from flax import nnx
from hnet_models import forward
from oracle import moe as oracle

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts as of_experts
from adaptive.layers.moe import layer_from_weights
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.routers.expert_choice import Settings
from adaptive.routing import scale

pytestmark = pytest.mark.compiles

B, S, D, F, E, K = 2, 16, 8, 12, 4, 2
WEIGHTS = weights_of(E, E, width=D, hidden=F, seed=5) | {"router.threshold": np.full(E, 0.25), "router.updates": 0.0}
X = inputs(B, S, D)
FFN = [WEIGHTS[f"experts.{name}"] for name in ("gate", "up", "down")]
LOGITS = oracle.linear_logits(X, WEIGHTS["router.weight"])
PRESENT = np.arange(S) < np.array([[16], [11]])
HOLES = np.arange(S) % 5 != 1
KINDS = {"softmax": "probability", "selected": "softmax over pickers", "sigmoid": "sigmoid"}


def layer_of(options=None, weights=WEIGHTS, **settings):
    settings = {"experts_per_token": K, "execution": "dense"} | settings
    return layer_from_weights("expert_choice", weights, options=options or {}, **settings)


def decide(layer, x=X, **context):
    """The router alone, compiled."""
    return jax.jit(lambda x: layer.router(x, Context(**context)))(jnp.asarray(x, jnp.float32))


def chooses(routing, pairs, experts=E):
    """Selections exactly, weights within 1e-6."""
    np.testing.assert_array_equal(routing.dispatch.mask(), oracle.dense_mask(pairs, experts))
    weights = np.asarray(routing.dispatch.combine_matrix()).reshape(*routing.logits.shape)
    np.testing.assert_allclose(weights, oracle.dense_weights(pairs, experts), rtol=1e-6, atol=1e-6)


def agrees(y, routing, pairs, x=X, ffn=FFN):
    """The same, and outputs within 2e-5."""
    chooses(routing, pairs, ffn[0].shape[0])
    np.testing.assert_allclose(y, oracle.combine(x, pairs, *ffn), atol=2e-5, rtol=2e-5)


def zhou(n, _):
    return oracle.rows_zhou(n, K, E)


# --- who is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", KINDS)
@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_every_expert_takes_its_share(group, score):
    y, routing = run(layer_of({"score": score, "group": group}), X)
    pairs = oracle.expert_choice(LOGITS, zhou, weights=KINDS[score], group=group)
    agrees(y, routing, pairs)
    per_expert = np.asarray(routing.dispatch.mask()).sum(1)
    if group == "sequence":
        np.testing.assert_array_equal(per_expert, S * K // E)
    np.testing.assert_array_equal(per_expert.sum(0), B * S * K // E)
    total = np.asarray(routing.dispatch.combine_matrix()).sum(-1)
    none = np.asarray(routing.dispatch.per_token()).reshape(-1) == 0
    assert none.any() or score == "softmax"
    assert not total[none].any()
    if score != "softmax":
        np.testing.assert_allclose(total[~none], 1, rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "selected"])
@pytest.mark.parametrize("group", ["sequence", "batch", "position", "chunk"])
def test_padding_is_chosen_by_nobody_and_counts_for_nothing(group, score):
    batch = 5  # present tokens of a position: 5, 4, 3, ...
    x = inputs(batch, S, D, seed=3)
    present = np.arange(S) < np.array([[16], [11], [5], [1], [16]])
    present[4, ::3] = False
    options = {"score": score, "group": group, "chunk": 6}
    layer = layer_of(options, z_coefficient=1)
    routing = decide(layer, x, present=present)
    logits = oracle.linear_logits(x, WEIGHTS["router.weight"])
    if group == "chunk":  # the last chunk is short
        cut = [slice(i, i + 6) for i in range(0, S, 6)]
        parts = [oracle.expert_choice(logits[:, c], zhou, weights=KINDS[score], present=present[:, c]) for c in cut]
        pairs = [list(itertools.chain(*(part[b] for part in parts))) for b in range(batch)]
    else:
        pairs = oracle.expert_choice(logits, zhou, weights=KINDS[score], group=group, present=present)
    chooses(routing, pairs)
    assert not np.asarray(routing.dispatch.mask())[~present].any()
    np.testing.assert_allclose(routing.losses["router_z_loss"].value, oracle.z_loss(logits, present), rtol=1e-5)
    assert routing.stats["dropped"] == 0
    assert routing.stats["experts_per_token"].sum() == present.sum()


@pytest.mark.parametrize("group", ["position", "chunk"])
def test_positions_and_chunks(group):
    x = inputs(4, 8, D, seed=3)
    layer = layer_of({"group": group, "chunk": 4}, experts_per_token=1.5)
    y, routing = run(layer, x)
    logits = oracle.linear_logits(x, WEIGHTS["router.weight"])
    rows = lambda n, _: oracle.rows_zhou(n, 1.5, E)  # noqa: E731
    pairs = oracle.expert_choice(logits, rows, weights="probability", group=group, chunk=4)
    agrees(y, routing, pairs, x)
    least = oracle.expert_choice(logits, rows, weights="probability", group=group, chunk=4)
    if group == "position":
        np.testing.assert_allclose(
            routing.stats["least"], oracle.lowest_selected(logits, least, "probability", group), rtol=1e-6
        )


def test_flaxformers_rounding_and_minimum():
    layer = layer_of({"rounding": "nearest", "minimum": 4, "decode": "refuse"}, experts_per_token=1.25)
    call = jax.jit(lambda present: layer.router(jnp.asarray(X, jnp.float32), Context(present=present)))
    for n in (2, 7, 10, 14, 18):  # 4 of 2, 2.19, 3.13, 4.38, 5.63
        rows = lambda n, _: oracle.capacity_flaxformer(n, E, 1.25)  # noqa: E731
        present = np.broadcast_to(np.arange(S) < n, (B, S))
        chooses(call(present), oracle.expert_choice(LOGITS, rows, weights="probability", present=present))
    halves = layer_of({"rounding": "nearest"}, experts_per_token=1)
    assert [halves.router.capacity(n) for n in (6, 10, 14)] == [2, 2, 4]  # 1.5, 2.5, 3.5
    assert [layer_of(experts_per_token=1).router.capacity(n) for n in (1, 3, 7, 8)] == [1, 1, 1, 2]


def test_each_sequence_by_its_own_number():
    """EC-DLM's dynamic k: a sample's experts take max(S k_b // E, 1)."""
    weights = weights_of(8, 8, width=D, hidden=F, seed=5)
    x = inputs(2, 32, D)
    logits = oracle.linear_logits(x, weights["router.weight"])
    layer = layer_of({"score": "selected", "most_per_token": 3, "decode": "refuse"}, weights)
    call = jax.jit(lambda limit: layer.router(jnp.asarray(x, jnp.float32), Context(limit=limit)))
    for numbers, taken in (([1, 3], [4, 12]), ([2, 2], [8, 8])):
        routing = call(jnp.array(numbers))
        assert routing.dispatch.index.shape == (2, 8, 12)
        chooses(routing, oracle.expert_choice(logits, lambda n, b, k=numbers: oracle.rows_ecdlm(n, k[b], 8)), 8)
        np.testing.assert_array_equal(routing.dispatch.mask().sum(1), np.repeat(taken, 8).reshape(2, 8))
    # Without a schedule nothing is wider than the static number.
    assert decide(layer, x).dispatch.index.shape == (2, 8, 8)
    for group in ("batch", "position"):
        with pytest.raises(RecipeError, match=f"router.group={group} .* set group=sequence"):
            decide(layer_of({"group": group}), limit=jnp.array([1, 1]))
    with pytest.raises(RecipeError, match="set select=top"):
        decide(layer_of({"select": "threshold"}), limit=jnp.array([1, 1]))


def model_of(k: float, model=shapes.plain, **options):
    router = Settings(score="selected", decode="refuse", experts_per_token=k, **options)
    feed_forward = of_experts.Settings(router, experts=4, expert_size=8, execution="dense")
    return model(2, width=16, heads=2, kv_heads=1, feed_forward=feed_forward)


def test_a_model_takes_a_number_for_each_sequence():
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 40, (2, 16)))
    out = forward(model_of(2, most_per_token=4))(tokens, experts_per_token=np.array([1, 3]))
    (told,) = out.trace.experts().values()
    np.testing.assert_array_equal(told.per_token["experts"].sum(-1), [[16, 48]] * 2)
    for row, k in enumerate((1, 3)):
        np.testing.assert_allclose(out.logits[row], forward(model_of(k))(tokens).logits[row], atol=1e-5)


def test_rows_that_are_joined_take_no_number_each():
    body = model_of(2).body
    model = shapes.hnet(("m1", body, "m1"), widths=(16, 16), packing="device")
    tokens, numbers = jnp.zeros((2, 16), jnp.int32), jnp.array([1, 1])
    with pytest.raises(RecipeError, match="set packing=row"):
        nnx.eval_shape(lambda: model.build(jax.random.key(0))(tokens, experts_per_token=numbers))


def test_scaled_weights():
    y, routing = run(layer_of({"route_scale": 3.0}), X)
    agrees(y, routing, oracle.expert_choice(LOGITS, zhou, weights="probability", scale=3.0))


def test_scale_to_shared_experts():
    published = [1, 1.4142, 1.7995, 2.0806, 2.3206, 2.5166, 2.7022, 2.8729, 3.0265]
    np.testing.assert_allclose(scale.expert_choice_table(8, 2), published, rtol=0.01)
    np.testing.assert_allclose(scale.expert_choice_table(8, 2), oracle.scale_by_pickers(8, 2, 4000), rtol=0.01)
    table = scale.expert_choice_table(64, 2)
    np.testing.assert_allclose([table[1], table[2], table[8], table[64]], [1.4142, 1.7988, 3.0240, 7.395], rtol=0.01)
    for (experts, k), value in {(8, 2): 1.9111, (64, 8): 3.6313, (512, 20): 5.7756, (512, 32): 7.1591}.items():
        np.testing.assert_allclose(scale.token_choice_factor(experts, k, 2), value, rtol=0.01)
    np.testing.assert_allclose(oracle.scale_of_top(8, 2, 2, 4000), 1.9111, rtol=0.01)
    shared = {f"shared.{name}": np.zeros(s) for name, s in (("gate", (D, 24)), ("up", (D, 24)), ("down", (24, D)))}
    y, routing = run(layer_of({"score": "selected", "scale_to_shared": True}, WEIGHTS | shared), X)
    pairs = oracle.expert_choice(LOGITS, zhou, scales=scale.expert_choice_table(E, 2))
    agrees(y, routing, pairs)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_popularity_loss(group):
    layer = layer_of({"score": "selected", "group": group, "load_coefficient": 0.1}, z_coefficient=1)
    routing = decide(layer)
    pairs = oracle.expert_choice(LOGITS, zhou, group=group)
    expected = oracle.popularity_loss(LOGITS, pairs, K, group)
    np.testing.assert_allclose(routing.losses["popularity_loss"].value, expected, rtol=1e-5)
    assert layer.coefficients()["popularity_loss"] == 0.1
    np.testing.assert_allclose(routing.losses["router_z_loss"].value, oracle.z_loss(LOGITS), rtol=1e-5)


def test_popularity_ignores_padding():
    layer = layer_of({"score": "selected", "load_coefficient": 0.1})
    present = np.broadcast_to(np.arange(S) < 12, (B, S))
    padded = decide(layer, present=present).losses["popularity_loss"].value
    np.testing.assert_allclose(padded, decide(layer, X[:, :12]).losses["popularity_loss"].value, rtol=1e-5)


# --- thresholds and predictor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", KINDS)
def test_generation_compares_with_the_running_threshold(score):
    quantiles = np.quantile(LOGITS if score != "softmax" else _probabilities(), 0.6, axis=(0, 1))
    layer = layer_of({"score": score}, WEIGHTS | {"router.threshold": quantiles})
    y, routing = run(layer, X, selection="threshold", present=PRESENT)
    pairs = oracle.threshold_choice(LOGITS, quantiles.astype(np.float32), KINDS[score])
    pairs = [[t if PRESENT[b, s] else [] for s, t in enumerate(row)] for b, row in enumerate(pairs)]
    agrees(y, routing, pairs)


def _probabilities(logits=LOGITS):
    return np.apply_along_axis(oracle.softmax, -1, logits)


@pytest.mark.parametrize("score", ["softmax", "selected"])
def test_training_above_the_threshold_is_first_come_first_served(score):
    scores = _probabilities() if score == "softmax" else LOGITS
    thresholds = np.quantile(scores, 0.3, axis=(0, 1)).astype(np.float32)
    layer = layer_of({"score": score, "select": "threshold", "slack": 1.2}, WEIGHTS | {"router.threshold": thresholds})
    routing = decide(layer, present=PRESENT)
    wanted = oracle.threshold_choice(LOGITS, thresholds, KINDS[score])
    room, count, pickers, above = 10, np.zeros((B, E), int), [], 0  # ceil(8 * 1.2), of the padded length
    for b in range(B):
        pickers.append([[] for _ in range(S)])
        for s in range(S):
            for e, _ in wanted[b][s] if PRESENT[b, s] else []:
                above += 1
                if count[b, e] < room:
                    pickers[b][s].append(e)
                    count[b, e] += 1
    chooses(routing, oracle.weigh(LOGITS, pickers, KINDS[score]))
    assert routing.stats["dropped"] == above - count.sum() > 0
    # The threshold moves towards the least score that top-k takes of each sequence's real tokens.
    top = oracle.expert_choice(LOGITS, zhou, weights=KINDS[score], present=PRESENT)
    least = oracle.lowest_selected(LOGITS, top, KINDS[score])
    np.testing.assert_allclose(routing.stats["least"], least, rtol=1e-5)


@pytest.mark.parametrize(("score", "group"), [("softmax", "sequence"), ("selected", "batch"), ("selected", "sequence")])
def test_least_score_that_was_taken(score, group):
    routing = decide(layer_of({"score": score, "group": group}))
    pairs = oracle.expert_choice(LOGITS, zhou, weights=KINDS[score], group=group)
    expected = oracle.lowest_selected(LOGITS, pairs, KINDS[score], group)
    np.testing.assert_allclose(routing.stats["least"], expected, rtol=1e-5)


def test_threshold_is_a_mean_first_and_then_a_running_mean():
    layer = layer_of({"momentum": 0.9})
    values = np.random.default_rng(1).normal(size=(15, E))
    expected = None
    for i, least in enumerate(values):
        # Two micro-batches: their sum arrives.
        layer.update({"least": jnp.asarray(2 * least), "calls": jnp.asarray(2.0)})
        expected = values[: i + 1].mean(0) if i < 10 else 0.9 * expected + 0.1 * least
        np.testing.assert_allclose(layer.router.threshold[...], expected, atol=1e-5)
    assert layer.router.updates[...] == 15
    assert layer_of().router.options.momentum == 0.99
    assert not isinstance(layer.router.threshold, nnx.Param)


def test_predictor_learns_the_choice_and_decides_generation():
    predictor = np.random.default_rng(8).normal(size=(D, E))
    weights = WEIGHTS | {"router.predictor": predictor}
    layer = layer_of({"decode": "predictor", "predictor_coefficient": 0.05}, weights)
    routing = decide(layer, present=PRESENT)
    mask = oracle.dense_mask(oracle.expert_choice(LOGITS, zhou, weights="probability", present=PRESENT), E)
    said = X @ predictor
    bce = np.where(mask, np.log1p(np.exp(-said)), np.log1p(np.exp(said))).mean(-1)
    np.testing.assert_allclose(routing.losses["predictor_loss"].value, bce[PRESENT].mean(), rtol=1e-5)
    assert layer.coefficients()["predictor_loss"] == 0.05
    y, routing = run(layer, X, selection="threshold", present=PRESENT)
    pickers = [[[e for e in range(E) if said[b, s, e] > 0 and PRESENT[b, s]] for s in range(S)] for b in range(B)]
    agrees(y, routing, oracle.weigh(LOGITS, pickers, "probability"))
    assert "predictor_loss" not in routing.losses
    # Its loss reaches nothing but itself.
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    loss = lambda p, x: nnx.merge(graphdef, p, rest).router(x, Context()).losses["predictor_loss"].value  # noqa: E731
    grads, of_x = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(X, jnp.float32))
    reached = {".".join(map(str, path)) for path, leaf in nnx.to_flat_state(grads) if np.any(leaf[...])}
    assert reached == {"router.predictor"}
    assert not np.any(of_x)


# --- causality --------------------------------------------------------------------------------------------------------


def moved_by_a_new_suffix(layer, x, change, **context):
    """How far outputs before `change` move when the tokens after it do."""
    other = x.copy()
    other[:, change:] = np.random.default_rng(3).normal(size=other[:, change:].shape) * 3
    call = jax.jit(lambda x: layer.routed(x, Context(**context))[0])
    a, b = (np.asarray(call(jnp.asarray(v, jnp.float32))) for v in (x, other))
    assert np.abs(a - b)[:, change:].max() > 1e-3
    return np.abs(a - b)[:, :change].max()


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_choosing_over_a_sequence_sees_the_future(group):
    assert moved_by_a_new_suffix(layer_of({"group": group}), X, 8) > 1e-3


def test_chunks_leak_no_further_than_their_end():
    layer = layer_of({"group": "chunk", "chunk": 4})
    assert moved_by_a_new_suffix(layer, X, 8) == 0
    assert moved_by_a_new_suffix(layer, X, 5) > 1e-3


def test_positions_see_no_future_but_their_batch_mates():
    layer, x = layer_of({"group": "position"}), inputs(4, 8, D)
    assert moved_by_a_new_suffix(layer, x, 4) == 0
    call = jax.jit(lambda x: layer.routed(x, Context())[0][0])
    a, b = (call(jnp.asarray(v, jnp.float32)) for v in (x, np.concatenate([x[:1], 3 * x[1:, ::-1]])))
    assert jnp.abs(a - b).max() > 1e-3


def test_thresholds_in_training_see_neither():
    weights = WEIGHTS | {"router.threshold": np.full(E, 0.2)}
    layer = layer_of({"select": "threshold", "slack": 1.0}, weights)
    assert moved_by_a_new_suffix(layer, X, 8) == 0
    call = jax.jit(lambda x: layer.routed(x, Context())[0][0])
    a, b = (call(jnp.asarray(v, jnp.float32)) for v in (X, np.concatenate([X[:1], 3 * X[1:, ::-1]])))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("decode", ["threshold", "predictor"])
def test_generation_is_blind_to_the_future(decode):
    weights = WEIGHTS | {"router.threshold": np.full(E, 0.1)}
    if decode == "predictor":
        weights["router.predictor"] = np.random.default_rng(8).normal(size=(D, E))
    layer = layer_of({"decode": decode}, weights)
    assert not layer.refuse_generation()
    assert not layer.selects_alike()
    blind_to_the_future(layer, X, 8)


def test_refusing_says_why():
    layer = layer_of({"decode": "refuse"})
    assert "decode=threshold or decode=predictor" in layer.refuse_generation()
    with pytest.raises(RecipeError, match="which do not exist while generating"):
        layer.router(jnp.asarray(X, jnp.float32), Context(selection="threshold"))


def test_permuting_tokens_permutes_outputs_and_batch_mates_do_not_matter():
    layer = layer_of({"score": "selected"})
    order = np.random.default_rng(0).permutation(S)
    mates = np.concatenate([X[:1], 3 * X[1:, ::-1]])
    call = jax.jit(lambda x: layer.routed(x, Context())[0])
    y, permuted, among = (np.asarray(call(jnp.asarray(x, jnp.float32))) for x in (X, X[:, order], mates))
    np.testing.assert_allclose(permuted, y[:, order], atol=1e-6)
    np.testing.assert_allclose(among[0], y[0], atol=1e-6)


# --- gradients, executions, extremes ----------------------------------------------------------------------------------


MIX = np.random.default_rng(4).normal(size=X.shape)


def dense(weights, x, mask, score):
    """All experts on all tokens under a mask, with the losses: a number, jnp float32."""
    logits = x @ weights["router.weight"]
    if score == "softmax":
        gate = jnp.where(mask, jax.nn.softmax(logits), 0)
    else:
        gate = jnp.where(mask, jnp.exp(logits) if score == "selected" else jax.nn.sigmoid(logits), 0)
        gate = gate / (gate.sum(-1, keepdims=True) + 1e-20)
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, weights["experts.gate"]))
    hidden = hidden * jnp.einsum("bsd,edf->bsef", x, weights["experts.up"])
    y = jnp.einsum("bsef,efd,bse->bsd", hidden, weights["experts.down"], gate)
    popular = (jax.nn.softmax(logits, axis=1).sum(-1) * mask.sum(-1)).sum(-1).mean() / (E * K)
    z = jnp.square(jax.nn.logsumexp(logits, -1)).mean()
    said = jax.lax.stop_gradient(x) @ weights["router.predictor"]
    bce = optax.sigmoid_binary_cross_entropy(said, mask).mean()
    return (y * MIX).sum() + 0.7 * popular + 0.3 * z + 0.5 * bce


@pytest.mark.parametrize(
    ("score", "group", "execution"),
    [("softmax", "batch", "ragged"), ("selected", "sequence", "capacity"), ("sigmoid", "sequence", "dense")],
)
def test_gradients_are_those_of_the_dense_formula(score, group, execution):
    weights = WEIGHTS | {"router.predictor": np.random.default_rng(8).normal(size=(D, E))}
    options = {"score": score, "group": group, "decode": "predictor", "load_coefficient": 0.1}
    pairs = oracle.expert_choice(LOGITS, zhou, weights=KINDS[score], group=group)
    mask = oracle.dense_mask(pairs, E)
    assert (mask.sum(-1) == 0).any() or score == "softmax"
    graphdef, params, rest = nnx.split(layer_of(options, weights, z_coefficient=1, execution=execution), nnx.Param, ...)

    def value(params, x):
        y, routing = nnx.merge(graphdef, params, rest).routed(x, Context())
        parts = {"popularity_loss": 0.7, "router_z_loss": 0.3, "predictor_loss": 0.5}
        if group == "batch":  # the dense formula is that of a sequence
            parts.pop("popularity_loss")
        return (y * MIX).sum() + sum(c * routing.losses[name].value for name, c in parts.items())

    def formula(weights, x):
        popular = jax.nn.softmax(x @ weights["router.weight"], axis=1).sum(-1) * mask.sum(-1)
        return dense(weights, x, mask, score) - (group == "batch") * 0.7 * popular.sum(-1).mean() / (E * K)

    x = jnp.asarray(X, jnp.float32)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    arrays = {name: value for name, value in arrays.items() if name not in ("router.threshold", "router.updates")}
    of_weights, of_x = jax.jit(jax.grad(formula, (0, 1)))(arrays, x)
    of_params, got_x = jax.jit(jax.grad(value, (0, 1)))(params, x)
    got = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(of_params)} | {"x": got_x}
    assert set(got) == {*of_weights, "x"}
    for name, expected in (of_weights | {"x": of_x}).items():
        close(np.asarray(got[name]), np.asarray(expected), name)


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_executions_agree(group):
    present = jnp.asarray(PRESENT & HOLES)
    make = lambda name: layer_of({"score": "selected", "group": group}, execution=name)  # noqa: E731
    executions_agree(make, X, present=present)


def test_tokens_of_one_expert_give_its_router_no_gradient():
    layer = layer_of({"score": "selected"})
    pickers = np.asarray(decide(layer).dispatch.per_token())
    grads = router_gradients(layer, X)
    assert grads[pickers <= 1].max() < 1e-6
    assert grads[pickers > 1].min() > 1e-6
    raw = router_gradients(layer_of(), X)
    mask = np.asarray(decide(layer_of()).dispatch.per_token())
    assert raw[mask == 1].min() > 1e-6
    assert not layer.no_gradient()
    assert "always 1" in layer_of(weights=weights_of(1, 1, width=D, hidden=F), experts_per_token=1).no_gradient()


@pytest.mark.parametrize(("experts", "k", "seq"), [(1, 1, 5), (4, 4, 5), (4, 2, 1), (8, 1, 3)])
def test_extreme_sizes(experts, k, seq):
    """One expert, every expert on every token, a single token, fewer tokens than experts."""
    weights = weights_of(experts, experts, width=D, hidden=F)
    x = inputs(B, seq, D)
    ffn = [weights[f"experts.{name}"] for name in ("gate", "up", "down")]
    logits = oracle.linear_logits(x, weights["router.weight"])
    y, routing = run(layer_of({"score": "selected"}, weights, experts_per_token=k, execution="auto"), x)
    agrees(y, routing, oracle.expert_choice(logits, lambda n, b: oracle.rows_ecdlm(n, k, experts)), x, ffn)


@pytest.mark.parametrize("group", ["sequence", "batch", "position"])
def test_ties_go_to_the_earlier_token(group):
    layer = layer_of({"group": group}, WEIGHTS | {"router.weight": np.zeros((D, E))})
    mask = np.asarray(decide(layer).dispatch.mask())
    expected = np.zeros((B, S, E), bool)
    if group == "sequence":
        expected[:, : S // 2] = True
    else:
        expected[0] = True
    np.testing.assert_array_equal(mask, expected)


def test_a_broken_router_does_not_pass_for_one_that_drops():
    bad = WEIGHTS["router.weight"].copy()
    bad[0, 3] = np.nan
    y, _ = run(layer_of(weights=WEIGHTS | {"router.weight": bad}), X)
    assert np.isnan(y).all()


def test_cost_follows_experts_per_token_and_not_experts():
    def flops(experts, k):
        weights = weights_of(experts, experts, width=D, hidden=F)
        layer = layer_of({"score": "selected"}, weights, experts_per_token=k, execution="auto")
        call = jax.jit(lambda x: layer.routed(x, Context())[0])
        total = hlo.matmul_flops(call.lower(jnp.zeros((B, S, D))).compile().as_text())
        router, ours = layer.flops(S, D)
        assert total == B * (router + ours)
        return total - B * router

    assert flops(8, 2) == flops(4, 2) == 2 * flops(4, 1)


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        ({"scores": "softmax"}, {}, "no setting 'scores'; it has .*score=softmax"),
        ({"group": "chunks"}, {}, "group"),
        ({"group": "chunk", "chunk": 0}, {}, "chunk=0: must be at least 1"),
        ({"minimum": 0}, {}, "minimum=0: must be at least 1"),
        ({"momentum": 1.0}, {}, "router.momentum=1.0: must be at least 0 and below 1"),
        ({"most_per_token": 1.0}, {}, "from settings.router.experts_per_token=2 to settings.experts=4"),
        ({"select": "threshold", "group": "batch"}, {}, "set group=sequence"),
        ({"scale_to_shared": True}, {}, "shared_size"),
        ({}, {"experts_per_token": 5}, "router.experts_per_token=5: .* at most settings.experts=4"),
        ({}, {"experts_per_token": 0}, "above 0"),
    ],
)
def test_bad_settings_say_what_would_be_right(options, settings, says):
    with pytest.raises(RecipeError, match=says):
        layer_of(options, **settings)


def test_too_few_sequences_for_positions():
    layer = layer_of({"group": "position"}, experts_per_token=1)
    with pytest.raises(RecipeError, match="batch_size must be at least 4"):
        layer.router(jnp.asarray(X, jnp.float32), Context())
