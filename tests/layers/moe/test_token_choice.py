"""Token choice against loops over tokens: selections, outputs, losses, drops, gradients, and what it refuses."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_oracle import close, executions_agree, inputs, router_gradients, run, weights_of
from flax import nnx
from oracle import moe as oracle

from adaptive.errors import RecipeError
from adaptive.layers.moe import layer_from_weights
from adaptive.layers.moe.base import Context
from adaptive.routing.balance import balancing_loss, importance_and_load
from adaptive.routing.capacity import keep_within, slots

pytestmark = pytest.mark.compiles

B, S, D, F, E, K = 2, 16, 8, 12, 8, 2
WEIGHTS = weights_of(E, E, width=D, hidden=F, seed=5)
X = inputs(B, S, D)
FFN = [WEIGHTS[f"experts.{name}"] for name in ("gate", "up", "down")]
LOGITS = oracle.linear_logits(X, WEIGHTS["router.weight"])
PRESENT = np.arange(S) < np.array([[16], [11]])
HOLES = np.arange(S) % 5 != 1


def layer_of(options=None, weights=WEIGHTS, **settings):
    settings = {"experts_per_token": K, "execution": "dense"} | settings
    return layer_from_weights("token_choice", weights, options=options or {}, **settings)


def decide(layer, x=X, **context):
    """The router alone, compiled."""
    return jax.jit(lambda x: layer.router(x, Context(**context)))(jnp.asarray(x, jnp.float32))


def combined(routing, experts=E):
    return np.asarray(routing.dispatch.combine_matrix()).reshape(*routing.logits.shape[:2], experts)


def chooses(routing, pairs, experts=E):
    """Selections exactly, weights within 1e-6 of what they are."""
    np.testing.assert_array_equal(routing.dispatch.mask(), oracle.dense_mask(pairs, experts))
    np.testing.assert_allclose(combined(routing, experts), oracle.dense_weights(pairs, experts), rtol=1e-6, atol=1e-6)


def agrees(y, routing, pairs, x=X, ffn=FFN):
    """The same, and outputs within 2e-5."""
    chooses(routing, pairs, ffn[0].shape[0])
    np.testing.assert_allclose(y, oracle.combine(x, pairs, *ffn), atol=2e-5, rtol=2e-5)


BIAS = np.linspace(-0.2, 0.3, E)[::-1]
SCORES = {
    "mixtral": ({}, {}),
    "olmoe": ({"normalise": False}, {"weights": "none"}),
    "megatron": ({"score": "logits"}, {"weights": "logits"}),
    "pre-softmax": ({"normalise": False, "route_scale": 2.5}, {"weights": "none", "scale": 2.5}),
    "sigmoid": ({"score": "sigmoid"}, {"score": "sigmoid"}),
    "longcat-like": (
        {"normalise": False, "bias": True, "route_scale": 6.0},
        {"weights": "none", "bias": BIAS, "scale": 6.0},
    ),
    "deepseek_v3": (
        {"score": "sigmoid", "bias": True, "groups": 4, "kept_groups": 2, "route_scale": 2.5},
        {"score": "sigmoid", "bias": BIAS, "groups": 4, "kept": 2, "scale": 2.5},
    ),
    "deepseek_v2": (
        {"normalise": False, "groups": 4, "kept_groups": 2, "group_score": "max", "route_scale": 16.0},
        {"weights": "none", "groups": 4, "kept": 2, "group_score": "max", "scale": 16.0},
    ),
    "ec-dlm loss-free": (
        {"score": "logits", "normalise": False, "bias": True},
        {"weights": "logits, undivided", "bias": BIAS},
    ),
    "logits in groups": (
        {"score": "logits", "groups": 2, "kept_groups": 1},
        {"weights": "logits", "groups": 2, "kept": 1},
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_the_published_ones(name):
    options, theirs = SCORES[name]
    weights = WEIGHTS | ({"router.bias": BIAS} if options.get("bias") else {})
    y, routing = run(layer_of(options, weights), X)
    agrees(y, routing, oracle.token_choice(LOGITS, K, **theirs))
    np.testing.assert_allclose(routing.logits, LOGITS, atol=2e-5)


def test_cosine_gate():
    rng = np.random.default_rng(2)
    projection, experts = rng.normal(size=(D, 6)), rng.normal(size=(6, E))
    for temperature in (np.log(9.0), 7.0):  # the second is above the largest that is let through
        weights = WEIGHTS | {
            "router.weight": experts,
            "router.projection": projection,
            "router.temperature": np.array(temperature),
        }
        y, routing = run(layer_of({"score": "cosine", "cosine_size": 6}, weights), X)
        logits = oracle.cosine_logits(X, projection, experts, temperature)
        np.testing.assert_allclose(routing.logits, logits, atol=2e-4 if temperature == 7 else 2e-5)
        pairs = oracle.token_choice(logits, K)
        np.testing.assert_array_equal(routing.dispatch.mask(), oracle.dense_mask(pairs, E))
        np.testing.assert_allclose(y, oracle.combine(X, pairs, *FFN), atol=2e-4 if temperature == 7 else 2e-5)


# --- capacity ---------------------------------------------------------------------------------------------------------


def rooms(rule, k, experts, factor, least):
    return {
        "megatron": lambda n: oracle.capacity_megatron(n, k, experts, factor),
        "maxtext": lambda n: oracle.capacity_maxtext(n, k, experts, factor),
        "flaxformer": lambda n: oracle.capacity_flaxformer(n, experts, factor, least),
        "tutel": lambda n: k * int(factor * -(-n // experts)),
    }[rule]


def test_slots_follow_their_rules_for_numbers_and_arrays():
    n = np.arange(1, 300)
    for rule in ("megatron", "maxtext", "flaxformer", "tutel"):
        for k, experts, factor, least in ((2, 8, 1.25, 1), (2, 8, 0.75, 4), (1, 3, 2.0, 1), (8, 64, 1.5, 1)):
            expected = [min(max(rooms(rule, k, experts, factor, least)(int(i)), least, 1), i) for i in n]
            assert [slots(int(i), k, experts, factor, rule, least) for i in n] == expected
            np.testing.assert_array_equal(slots(jnp.asarray(n), k, experts, factor, rule, least), expected)
    assert slots(32, 2, 8, 1.1) == 9  # 8.8
    assert slots(60, 1, 8, 1.2) == 9  # 9.000000000000002 in floating point
    assert slots(20, 1, 8, 1.0, "flaxformer") == 2  # 2.5
    assert slots(28, 1, 8, 1.0, "flaxformer") == 4  # 3.5
    assert slots(8, 1, 8, 1.0, "flaxformer", 4) == 4


POLICIES = {"weight": "weight", "position": "position", "token": "token", "choice": "choice", "batch": "bpr"}


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("drop", POLICIES)
def test_who_is_dropped(drop, group):
    """With weights that are normalised: V-MoE's order is that of the scores, which are not."""
    k = 3
    settings = {"capacity_factor": 0.6, "capacity_group": group, "drop": drop, "experts_per_token": k}
    top1 = np.vectorize(lambda b, s: oracle.softmax(LOGITS[b, s]).max())(*np.indices((B, S)))
    present = PRESENT if group == "batch" or drop == "weight" else None
    wanted = oracle.token_choice(LOGITS, k, present=present)
    pairs = oracle.drop(wanted, E, rooms("megatron", k, E, 0.6, 1), POLICIES[drop], group, top1)
    routing = decide(layer_of(**settings), present=present)
    chooses(routing, pairs)
    count = lambda p: sum(len(token) for row in p for token in row)  # noqa: E731
    assert routing.stats["dropped"] == count(wanted) - count(pairs) > 0
    assert routing.stats["claimed"].sum() == count(wanted)


@pytest.mark.parametrize(
    ("options", "settings", "policy"),
    [
        ({"capacity_rule": "maxtext"}, {"drop": "token"}, "token"),
        (
            {"capacity_rule": "flaxformer", "least_slots": 4, "normalise": False},
            {"drop": "batch", "capacity_group": "batch"},
            "bpr",
        ),
        ({"capacity_rule": "tutel"}, {"drop": "choice", "capacity_group": "batch"}, "choice"),
    ],
    ids=lambda v: v.get("capacity_rule") if isinstance(v, dict) else None,
)
def test_capacities_of_other_frameworks(options, settings, policy):
    top1 = np.vectorize(lambda b, s: oracle.softmax(LOGITS[b, s]).max())(*np.indices((B, S)))
    room = rooms(options["capacity_rule"], K, E, 0.75, options.get("least_slots", 1))
    weights = "sum" if options.get("normalise", True) else "none"
    wanted = oracle.token_choice(LOGITS, K, weights=weights)
    pairs = oracle.drop(wanted, E, room, policy, settings.get("capacity_group", "sequence"), top1)
    routing = decide(layer_of(options, capacity_factor=0.75, **settings))
    chooses(routing, pairs)
    assert routing.stats["dropped"] > 0


def test_generation_drops_none_and_earlier_tokens_win_ties():
    layer = layer_of(capacity_factor=0.5)
    routing = decide(layer, selection="threshold")
    assert routing.stats["dropped"] == 0
    assert not layer.selects_alike()
    assert layer_of().selects_alike()
    tied = WEIGHTS | {"router.weight": np.zeros((D, E))}
    for k in (2, 8):  # argmax by argmax, and a sort
        routing = decide(layer_of(weights=tied, experts_per_token=k, capacity_factor=0.5 * E / k))
        np.testing.assert_array_equal(routing.dispatch.index, np.broadcast_to(np.arange(k), (B, S, k)))
        np.testing.assert_array_equal(routing.dispatch.mask().sum(1), [[8] * k + [0] * (E - k)] * B)
        assert np.asarray(routing.dispatch.valid)[:, :8].all()
        assert not np.asarray(routing.dispatch.valid)[:, 8:].any()


def test_weights_that_tie_drop_the_later_token():
    index, valid = jnp.zeros((1, 5, 1), jnp.int32), jnp.ones((1, 5, 1), bool)
    for drop in ("weight", "batch"):
        kept = keep_within(index, jnp.array([1.0, 2, 2, 1, 2])[None, :, None], valid, 2, 3, drop)
        np.testing.assert_array_equal(kept[0, :, 0], [False, True, True, False, False])


def test_the_account_knows_projections_and_capacities():
    cosine = {"router.projection": np.zeros((D, 6)), "router.temperature": 0.0, "router.weight": np.zeros((6, E))}
    layer = layer_of({"score": "cosine", "cosine_size": 6}, WEIGHTS | cosine)
    ffn = 3 * 2 * S * K * D * F
    assert layer.flops(S, D) == (2 * S * 6 * D + 2 * S * 6 * E, ffn)
    assert layer_of(capacity_factor=1.5).flops(S, D) == (2 * S * D * E, ffn)
    assert layer_of(capacity_factor=0.5).flops(S, D)[1] == ffn / 2


# --- losses -----------------------------------------------------------------------------------------------------------


def expected_loss(form, pairs, present, score="softmax"):
    return {
        "switch": lambda: oracle.switch_loss(LOGITS, pairs, K, present),
        "hf": lambda: oracle.hf_loss([(LOGITS, pairs)], present),
        "flaxformer": lambda: oracle.flaxformer_loss(LOGITS, pairs, present),
        "maxtext": lambda: oracle.maxtext_loss(LOGITS, pairs, present),
        "gshard": lambda: oracle.gshard_loss(LOGITS, pairs, present),
        "sequence": lambda: oracle.sequence_loss(LOGITS, pairs, K, present, score),
    }[form]()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["switch", "hf", "maxtext", "flaxformer", "gshard", "sequence"])
def test_balancing_losses(form, score):
    """Counted before dropping and without padding; the softmax, but for DeepSeek's loss of a sigmoid."""
    layer = layer_of({"balance": form, "score": score}, z_coefficient=0.5)
    call = jax.jit(lambda x, present: layer(x, Context(present=present))[1])
    for present in (np.ones((B, S), bool), PRESENT & HOLES):
        aux = call(X, present)
        pairs = oracle.token_choice(LOGITS, K, score=score, present=present)
        np.testing.assert_allclose(
            aux["load_balancing_loss"].value, expected_loss(form, pairs, present, score), rtol=1e-5
        )
        np.testing.assert_allclose(aux["router_z_loss"].value, oracle.z_loss(LOGITS, present), rtol=1e-5)
    assert aux["load_balancing_loss"].coefficient == 0.01
    assert aux["router_z_loss"].coefficient == 0.5


def test_flaxformers_groups_are_those_of_the_capacity():
    """Two sequences of different topics: their mean is not the loss of both as one group."""
    x = X + np.array([1.0, -1.0])[:, None, None]
    logits = oracle.linear_logits(x, WEIGHTS["router.weight"])
    pairs = oracle.token_choice(logits, K)
    expected = {group: oracle.flaxformer_loss(logits, pairs, None, group) for group in ("sequence", "batch")}
    assert abs(expected["sequence"] - expected["batch"]) > 0.03
    for group, value in expected.items():
        losses = decide(layer_of({"balance": "flaxformer"}, capacity_group=group), x).losses
        np.testing.assert_allclose(losses["load_balancing_loss"].value, value, rtol=1e-5)


def test_hugging_face_concatenates_layers():
    layers = [layer_of({"balance": "hf"}, WEIGHTS | {"router.weight": WEIGHTS["router.weight"] * f}) for f in (1, -2)]
    parts = [decide(layer, present=PRESENT).parts for layer in layers]
    joint = layers[0].joint_losses(jax.tree.map(lambda *a: jnp.stack(a), *parts))["load_balancing_loss"].value
    routed = [(LOGITS * f, oracle.token_choice(LOGITS * f, K, present=PRESENT)) for f in (1, -2)]
    np.testing.assert_allclose(joint, oracle.hf_loss(routed, PRESENT), rtol=1e-5)
    assert abs(joint - np.mean([oracle.hf_loss([layer], PRESENT) for layer in routed])) > 1e-2


def test_balanced_is_one_or_k_and_zero_logits_have_a_known_z():
    index = jnp.asarray([[[(s + j) % E for j in range(K)] for s in range(S)]] * B)
    p, valid = jnp.full((B, S, E), 1 / E), jnp.ones((B, S, K), bool)
    forms = ("switch", "gshard", "sequence", "hf", "maxtext", "flaxformer")
    losses = jax.jit(lambda p: [balancing_loss(p, index, valid, None, form).value for form in forms])(p)
    np.testing.assert_allclose(losses, [1, 1, 1, K, K, K], rtol=1e-6)
    layer = layer_of(weights=WEIGHTS | {"router.weight": np.zeros((D, E))}, z_coefficient=1)
    np.testing.assert_allclose(decide(layer).losses["router_z_loss"].value, np.log(E) ** 2, rtol=1e-6)


@pytest.mark.parametrize("of", ["scores", "logits"])
def test_importance_and_load(of):
    options = {"noise": 1.0, "importance_coefficient": 0.1, "load_of": of}
    layer = layer_of(options)
    present = PRESENT if of == "scores" else None
    got = decide(layer, present=present).losses["importance_loss"].value
    np.testing.assert_allclose(got, oracle.tutel_second_loss(LOGITS, K, 1.0, present, of), rtol=1e-5)
    assert layer.coefficients()["importance_loss"] == 0.1
    even = jnp.full((B, S, E), 0.25)
    assert jax.jit(lambda a: importance_and_load(a / 2, a, a, K, 1.0).value)(even) < 1e-9


def test_noise_is_for_training_alone():
    layer = layer_of({"noise": 4.0})
    quiet = oracle.dense_mask(oracle.token_choice(LOGITS, K), E)
    key = jax.random.key(3)
    for noisy in (layer, layer_of({"jitter": 0.9})):
        np.testing.assert_array_equal(decide(noisy, key=key).dispatch.mask(), quiet)
        assert (np.asarray(decide(noisy, key=key, training=True).dispatch.mask()) != quiet).any()


def test_one_update_of_the_bias():
    layer = layer_of({"bias": True}, weights_of(4, 4, width=D, hidden=F) | {"router.bias": np.zeros(4)})
    claimed = np.array([10.0, 6, 8, 8])
    layer.update({"claimed": jnp.asarray(claimed)})
    np.testing.assert_allclose(layer.router.bias[...], [-0.001, 0.001, 0, 0], atol=1e-9)
    layer.update({"claimed": jnp.asarray(claimed)})
    expected = oracle.bias_update(oracle.bias_update(np.zeros(4), claimed, 1e-3), claimed, 1e-3)
    np.testing.assert_allclose(layer.router.bias[...], expected, atol=1e-9)
    assert not isinstance(layer.router.bias, nnx.Param)


# --- shared experts ---------------------------------------------------------------------------------------------------


def test_shared_experts_are_added_and_scales_match():
    rng = np.random.default_rng(9)
    shared = {f"shared.{n}": rng.normal(size=s) / 2 for n, s in (("gate", (D, 24)), ("up", (D, 24)), ("down", (24, D)))}
    pairs = oracle.token_choice(LOGITS, K)
    always = np.stack([[oracle.feed_forward(x, *shared.values()) for x in row] for row in X])
    y, _ = run(layer_of(weights=WEIGHTS | shared), X, present=PRESENT)
    routed = oracle.combine(X, oracle.token_choice(LOGITS, K, present=PRESENT), *FFN)
    np.testing.assert_allclose(y, routed + always, atol=2e-5, rtol=2e-5)
    y, routing = run(layer_of({"scale_to_shared": True}, WEIGHTS | shared), X)
    factor = combined(routing).max(-1) / oracle.dense_weights(pairs, E).max(-1)
    np.testing.assert_allclose(factor, 1.9111, rtol=0.01)  # two shared experts
    np.testing.assert_allclose(y, oracle.combine(X, pairs, *FFN) * factor[0, 0] + always, atol=5e-5)
    with pytest.raises(RecipeError, match="shared_size"):
        layer_of({"scale_to_shared": True})


# --- gradients, executions, extremes ----------------------------------------------------------------------------------


def dense(weights, x, mask, *, score, k, bias=0.0):
    """All experts on all tokens under a mask: (y, Switch's loss, z), jnp float32."""
    logits = x @ weights["router.weight"]
    s = jax.nn.sigmoid(logits) if score == "sigmoid" else jax.nn.softmax(logits)
    if score == "logits":
        s = jnp.exp(logits)
    gate = jnp.where(mask, s, 0)
    if score != "plain":
        gate = gate / gate.sum(-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, weights["experts.gate"]))
    hidden = hidden * jnp.einsum("bsd,edf->bsef", x, weights["experts.up"])
    y = jnp.einsum("bsef,efd,bse->bsd", hidden, weights["experts.down"], gate)
    p = jax.nn.softmax(logits).mean((0, 1))
    return y, E * (p * mask.mean((0, 1))).sum() / k, jnp.square(jax.nn.logsumexp(logits, -1)).mean()


MIX = np.random.default_rng(4).normal(size=X.shape)


def gradients(layer, x, **context):
    """Of sum(y * MIX) + 0.7 * balancing + 0.3 * z by x and all weights, by name."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def value(params, x):
        y, routing = nnx.merge(graphdef, params, rest).routed(x, Context(**context))
        losses = routing.losses
        return (y * MIX).sum() + 0.7 * losses["load_balancing_loss"].value + 0.3 * losses["router_z_loss"].value

    of_params, of_x = jax.jit(jax.grad(value, (0, 1)))(params, jnp.asarray(x, jnp.float32))
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(of_params)} | {"x": of_x}


@pytest.mark.parametrize(
    ("score", "options", "execution"),
    [
        ("softmax", {}, "ragged"),
        ("plain", {"normalise": False}, "dense"),
        ("logits", {"score": "logits"}, "capacity"),
        ("sigmoid", {"score": "sigmoid"}, "capacity"),
    ],
)
def test_gradients_are_those_of_the_dense_formula(score, options, execution):
    layer = layer_of(options, z_coefficient=1, execution=execution)
    mask = np.asarray(run(layer, X)[1].dispatch.mask())
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in WEIGHTS.items()}

    def value(weights, x):
        y, balance, z = dense(weights, x, mask, score=score, k=K)
        return (y * MIX).sum() + 0.7 * balance + 0.3 * z

    with jax.default_matmul_precision("highest"):
        of_weights, of_x = jax.jit(jax.grad(value, (0, 1)))(arrays, jnp.asarray(X, jnp.float32))
    got = gradients(layer, X)
    assert set(got) == {*of_weights, "x"}
    for name, expected in (of_weights | {"x": of_x}).items():
        close(np.asarray(got[name]), np.asarray(expected), name)


@pytest.mark.parametrize("case", ["drops", "padding", "one expert"])
def test_executions_agree(case):
    weights, settings, context = dict(WEIGHTS), {}, {}
    if case == "drops":
        settings = {"capacity_factor": 0.75, "capacity_group": "batch"}
    if case == "padding":
        settings, context = {"capacity_factor": 1.25}, {"present": jnp.asarray(PRESENT & HOLES)}
    x = X
    if case == "one expert":  # expert 3 takes every token, seven are empty
        settings["experts_per_token"] = 1
        x = np.abs(X)
        weights["router.weight"] = np.eye(E)[3] * np.ones((D, 1))
    make = lambda name: layer_of(weights=weights, execution=name, **settings)  # noqa: E731
    executions_agree(make, x, **context)
    if case == "one expert":
        np.testing.assert_array_equal(decide(make("auto"), x).stats["kept"], np.eye(E)[3] * B * S)


@pytest.mark.parametrize(("experts", "k", "seq"), [(1, 1, 5), (4, 4, 5), (4, 2, 1), (12, 9, 3)])
def test_extreme_sizes(experts, k, seq):
    weights = weights_of(experts, experts, width=D, hidden=F)
    x = inputs(B, seq, D)
    ffn = [weights[f"experts.{name}"] for name in ("gate", "up", "down")]
    pairs = oracle.token_choice(oracle.linear_logits(x, weights["router.weight"]), k)
    kept = oracle.drop(pairs, experts, rooms("megatron", k, experts, 1.0, 1), "weight", "batch")
    settings = {"capacity_factor": 1.0, "capacity_group": "batch", "execution": "auto"}
    y, routing = run(layer_of(weights=weights, experts_per_token=k, **settings), x)
    agrees(y, routing, kept, x, ffn)


def test_absent_tokens_take_no_part():
    layer = layer_of(capacity_factor=1.0)
    present = PRESENT & HOLES
    y, routing = run(layer, X, present=present)
    assert not np.asarray(y)[~present].any()
    other = np.where(present[..., None], X, 50 * X[::-1])
    z, again = run(layer, other, present=present)
    np.testing.assert_array_equal(np.asarray(y)[present], np.asarray(z)[present])
    for name in routing.losses:
        np.testing.assert_allclose(routing.losses[name].value, again.losses[name].value, rtol=1e-6)
    assert routing.stats["tokens"] == present.sum()
    assert np.asarray(routing.stats["experts_per_token"]).sum() == present.sum()
    # Room is counted for the tokens that exist: the same as of a sequence that ends there.
    short = decide(layer, X[1:, :11]).dispatch.combine_matrix()
    long = decide(layer, X[1:], present=PRESENT[1:]).dispatch.combine_matrix()
    np.testing.assert_allclose(long[:11], short, atol=1e-6)


def test_a_broken_router_does_not_pass_for_one_that_drops():
    bad = WEIGHTS["router.weight"].copy()
    bad[0, 3] = np.nan
    y, _ = run(layer_of(weights=WEIGHTS | {"router.weight": bad}, capacity_factor=1.0), X)
    assert np.isnan(y).all()


def test_one_expert_renormalised_teaches_the_router_nothing():
    mute = layer_of(experts_per_token=1)
    assert router_gradients(mute, X).max() < 1e-6
    assert "normalise=false" in mute.no_gradient()
    assert "normalise=false" in layer_of({"score": "logits"}, experts_per_token=1).no_gradient()
    assert not layer_of({"score": "logits", "normalise": False}, experts_per_token=1).no_gradient()
    heard = layer_of({"normalise": False}, experts_per_token=1)
    assert router_gradients(heard, X).min() > 1e-6
    assert not heard.no_gradient()
    assert not layer_of().no_gradient()
    lone = weights_of(1, 1, width=D, hidden=F)
    assert "experts=1" in layer_of({"normalise": False}, lone, experts_per_token=1).no_gradient()


def test_permuting_tokens_permutes_outputs_and_batch_mates_do_not_matter():
    layer = layer_of(capacity_factor=0.75)
    order = np.random.default_rng(0).permutation(S)
    mates = np.concatenate([X[:1], 3 * X[1:, ::-1]])
    call = jax.jit(lambda x: layer.routed(x, Context())[0])
    y, permuted, among = (np.asarray(call(jnp.asarray(x, jnp.float32))) for x in (X, X[:, order], mates))
    np.testing.assert_allclose(permuted, y[:, order], atol=1e-6)
    np.testing.assert_allclose(among[0], y[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        ({"nomralise": False}, {}, "no setting 'nomralise'; it has .*score=softmax"),
        ({"score": "tanh"}, {}, "score"),
        ({"groups": 3, "kept_groups": 2}, {}, "groups must divide them"),
        ({"groups": 0}, {}, "router.groups=0: must be at least 1"),
        ({"groups": 4, "kept_groups": 5}, {}, "at most groups"),
        ({"groups": 4, "kept_groups": 1}, {"experts_per_token": 3}, "leaves 2 experts for a top-3"),
        ({"groups": 8, "kept_groups": 2}, {}, "use max"),
        ({"importance_coefficient": 0.1}, {}, "needs settings.router.noise above 0"),
        ({"jitter": 2}, {}, "router.jitter=2.0: must be at least 0 and at most 1"),
        ({"least_slots": 0}, {}, "at least 1"),
        ({}, {"experts_per_token": 9}, "at most settings.experts=8"),
        ({}, {"experts_per_token": 1.5}, "whole number"),
        ({}, {"capacity_factor": -1}, "router.capacity_factor=-1.0: must be at least 0"),
    ],
)
def test_bad_settings_say_what_would_be_right(options, settings, says):
    with pytest.raises(RecipeError, match=says):
        layer_of(options, **settings)


def test_settings_without_effect_are_named_once():
    with pytest.warns(UserWarning, match="token_choice: drop=position has no effect: capacity_factor=0") as told:
        layer_of({"bias_rate": 0.1, "group_score": "max"}, drop="position")
    assert len(told) == 1
    said = str(told[0].message)
    assert "bias_rate=0.1 has no effect: bias=false" in said and "group_score=max has no effect: all groups" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_of({"bias": True, "bias_rate": 0.1, "score": "sigmoid"}, drop="position", capacity_factor=1.0)
        layer_of(drop="weight")  # what it does anyway


def test_explicit_weights_must_fit():
    for wrong, says in (
        ({"router.bais": np.zeros(E)}, "unknown: router.bais"),
        ({"router.weight": np.zeros((D, E + 1))}, r"expected \[8, 8\]"),
    ):
        with pytest.raises(RecipeError, match=says):
            layer_of(weights=WEIGHTS | wrong)
    with pytest.raises(RecipeError, match=r"missing: router\.weight"):
        layer_of(weights={name: value for name, value in WEIGHTS.items() if name != "router.weight"})
    with pytest.raises(RecipeError, match=r"router=token_choise: .* nearest: token_choice"):
        layer_from_weights("token_choise", WEIGHTS)
