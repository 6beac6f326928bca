"""Properties of whole models: sharing, routing, causality, generation, packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.attention import Rows
from adaptive.layers.moe.base import Context
from adaptive.layers.rope import rope_at
from adaptive.models import recursion
from adaptive.models.build import build_model
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.models.forward import Forward

SEQ, VOCAB = 24, 40
# Weights larger than a real model's, so that attention and routers decide something at this size.
VANILLA = TransformerConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=8,
    init_std=0.2,
)  # fmt: skip
EXPERT = RouterConfig(kind="expert_choice")
AUXILIARY = RouterConfig(kind="expert_choice", sampling="aux_router")
TOKEN = RouterConfig(kind="token_choice", activation="softmax", alpha=1.0)


def model_config(router: RouterConfig | None = None, **changes) -> TransformerConfig:
    return dataclasses.replace(VANILLA, router=router or RouterConfig(), **changes)


OLMO = {"qk_norm": "full", "clip_qkv": 0.8, "attention_window": 6}
CAUSAL = {
    "vanilla": VANILLA,
    "vanilla-olmo": model_config(**OLMO),
    "expert-olmo": model_config(EXPERT, recursions=3, **OLMO),
    "recursive": model_config(recursions=3),
    "recursive-kv-shared": model_config(recursions=3, kv="shared"),
    "vanilla-kv-shared": model_config(recursions=2, sharing="cycle", kv="shared", share_parameters=False),
    "expert": model_config(EXPERT, recursions=3),
    "expert-cycle": model_config(EXPERT, recursions=2, sharing="cycle"),
    "expert-kv-shared": model_config(EXPERT, recursions=3, kv="shared"),
    "expert-kv-hybrid": model_config(EXPERT, recursions=3, kv="hybrid"),
    "expert-aux-router": model_config(AUXILIARY, recursions=3),
    "token": model_config(TOKEN, recursions=3),
    "token-kv-shared": model_config(TOKEN, recursions=3, kv="shared"),
    "token-capacity": model_config(dataclasses.replace(TOKEN, execution="capacity"), recursions=3),
}


@functools.cache
def split_model(config: TransformerConfig):
    return nnx.split(build_model(config, key=jax.random.key(0)))


@functools.cache
def forward(config: TransformerConfig, **options):
    """tokens, **arrays -> Output, compiled once per config and options."""
    graphdef, state = split_model(config)
    run = quick.jit(lambda state, tokens, arrays: nnx.merge(graphdef, state)(tokens, **options, **arrays))
    return lambda tokens, **arrays: run(state, tokens, arrays)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, SEQ), 0, VOCAB)


def layer_parameters(config: TransformerConfig, state, index: int):
    """The arrays of parameter set `index`, as TransformerConfig.parameter_index counts them."""
    if config.unique_ends and index == 0:
        return jax.tree.leaves(state["first"])
    if config.unique_ends and index == config.block_size + 1:
        return jax.tree.leaves(state["last"])
    return [a[index - config.unique_ends] for a in jax.tree.leaves(state["block"])]


def unrolled(config: TransformerConfig, state):
    """(vanilla config, its state) with the same layers, each written out."""
    vanilla = dataclasses.replace(VANILLA, num_layers=config.num_layers)
    layers = [layer_parameters(config, state, config.parameter_index(i)) for i in range(config.num_layers)]
    _, out = split_model(vanilla)
    block = jax.tree.unflatten(jax.tree.structure(out["block"]), [jnp.stack(a) for a in zip(*layers, strict=True)])
    return vanilla, nnx.State({**out, "block": block, "embedding": state["embedding"]})


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_one_recursion_is_a_vanilla_transformer(sharing, tokens):
    config = model_config(sharing=sharing, recursions=1)
    np.testing.assert_array_equal(forward(config)(tokens).logits, forward(VANILLA)(tokens).logits)


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_sharing_equals_the_layers_written_out(sharing, tokens):
    """Outputs are equal, and the gradient of a shared weight is the sum over its uses."""
    config = model_config(sharing=sharing, recursions=2, num_layers=6)
    graphdef, state = split_model(config)
    vanilla, flat = unrolled(config, state)
    flat_graphdef, _ = split_model(vanilla)

    @quick.jit(static_argnums=0)
    def logits_and_grads(graphdef, state):
        def loss(state):
            logits = nnx.merge(graphdef, state)(tokens).logits
            return (logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).mean(), logits

        return jax.grad(loss, has_aux=True)(state)[::-1]

    logits, grads = logits_and_grads(graphdef, state)
    flat_logits, flat_grads = logits_and_grads(flat_graphdef, flat)
    np.testing.assert_allclose(logits, flat_logits, atol=1e-5, rtol=1e-5)
    for index in range(config.unique_layers):
        uses = [i for i in range(config.num_layers) if config.parameter_index(i) == index]
        want = [g[np.array(uses)].sum(0) for g in jax.tree.leaves(flat_grads["block"])]
        for a, b in zip(layer_parameters(config, grads, index), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "routers"),
    [(VANILLA, 0), (model_config(recursions=3), 0), (CAUSAL["expert"], 3 * 32), (CAUSAL["expert-aux-router"], 6 * 32),
     (CAUSAL["token"], 3 * 32), (model_config(dataclasses.replace(EXPERT, network="mlp"), recursions=2), 2 * 66 * 32),
     (model_config(dataclasses.replace(TOKEN, network="wide_mlp"), recursions=3), 4 * 32 * (32 + 3))],
)  # fmt: skip
def test_number_of_unique_parameters(config, routers):
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    params = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(build_model(config, key=jax.random.key(0)), nnx.Param)))
    layers = {1: 8, 2: 5, 3: 4}[config.recursions]
    assert config.unique_layers == layers
    assert sum(p.size for p in params) == layers * per_layer + VOCAB * 32 + 32 + routers


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_shared_keys_of_one_recursion_are_its_own(sharing, tokens):
    config = model_config(sharing=sharing, kv="shared")
    np.testing.assert_allclose(forward(config)(tokens).logits, forward(VANILLA)(tokens).logits, atol=1e-6)


def test_capacities_round_as_published():
    def capacities(recursions, seq):
        return model_config(EXPERT, recursions=recursions).capacities(seq)

    assert capacities(3, 2048) == (2048, 1365, 682)
    assert capacities(2, 2048) == (2048, 1024)
    assert capacities(4, 2048) == (2048, 1536, 1024, 512)
    assert capacities(3, 2) == (2, 1, 1)


@pytest.mark.parametrize("name", ["expert", "expert-aux-router", "expert-kv-shared", "expert-kv-hybrid"])
def test_selections_are_nested_ascending_and_full(name, tokens):
    out = forward(CAUSAL[name])(tokens)
    before, depth = np.ones((2, SEQ), bool), np.zeros((2, SEQ), int)
    for selection, capacity in zip(out.trace.selections, (24, 16, 8), strict=True):
        assert selection.indices.shape == (2, capacity) and np.all(selection.valid)
        assert np.all(np.diff(selection.indices, axis=1) > 0)
        now = np.zeros((2, SEQ), bool)
        np.put_along_axis(now, np.asarray(selection.indices), True, axis=1)
        assert not np.any(now & ~before)
        before, depth = now, depth + now
    np.testing.assert_array_equal(out.trace.depth, depth)
    scores = np.stack(out.trace.scores)
    assert np.array_equal(np.isfinite(scores).sum((1, 2)), [48, 48, 32])  # candidates: those of the step before


def test_padding_is_never_selected_while_tokens_are_left(tokens):
    segments = jnp.ones((2, SEQ), jnp.int32).at[0, 20:].set(0).at[1, 5:].set(0)
    out = forward(CAUSAL["expert"])(tokens, segment_ids=segments)
    held = [np.asarray(s.valid).sum(1).tolist() for s in out.trace.selections]
    assert held == [[20, 5], [16, 5], [8, 5]]
    assert not np.any(np.asarray(out.trace.depth)[np.asarray(segments) == 0])
    for selection in out.trace.selections:
        assert np.all(np.diff(selection.indices, axis=1) > 0)


# One recursive part alone: a block from a model, a stream, routers


@functools.cache
def parts(config: TransformerConfig):
    """(step function, routers, stream, rows) of the recursion of a model with this config."""
    model = build_model(config, key=jax.random.key(0))
    index = jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32), (2, SEQ))
    rows = Rows(rope_at(index, config.head_dim, config.rope_theta), index)
    forward = Forward(config, Context(), jnp.float32, "none", False)
    steps = recursion.Steps(forward.block(model.block, None), config, rows)
    bias = None if model.router_bias is None else model.router_bias[...]
    routers = recursion.Routers(list(model.routers), list(model.aux_routers), bias)
    return steps, routers, jax.random.normal(jax.random.key(2), (2, SEQ, config.hidden_size)), rows


def test_full_capacity_and_additive_gating_is_x_plus_f():
    router = dataclasses.replace(EXPERT, capacities=(1.0, 1.0), gating="additive")
    config = model_config(router, recursions=2)
    steps, routers, x, rows = parts(config)
    got = recursion.expert_choice_top(steps, config, routers, x, rows)
    want = x + steps(0, x, rows, None)
    want = want + steps(1, want, rows, None)
    np.testing.assert_allclose(got.x, want, atol=1e-5, rtol=1e-5)
    assert np.all(np.asarray(got.trace.depth) == 2)


def test_the_gate_scales_the_update():
    router = dataclasses.replace(EXPERT, capacities=(1.0, 1.0))
    config = model_config(router, recursions=2)
    steps, routers, x, rows = parts(config)
    want = x
    for r in range(2):
        gate = 0.1 / (1 + np.exp(-np.asarray(routers.main[r](want))))
        want = want + gate * steps(r, want, rows, None)
    got = recursion.expert_choice_top(steps, config, routers, x, rows).x
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_tokens_that_are_not_selected_stay_bit_identical():
    config = model_config(dataclasses.replace(EXPERT, capacities=(0.5, 0.25)), recursions=2)
    steps, routers, x, rows = parts(config)
    both = recursion.expert_choice_top(steps, config, routers, x, rows)
    depth = np.asarray(both.trace.depth)
    assert np.bincount(depth.ravel()).tolist() == [24, 12, 12]
    np.testing.assert_array_equal(np.asarray(both.x)[depth == 0], np.asarray(x)[depth == 0])
    one = dataclasses.replace(config, recursions=1, router=dataclasses.replace(EXPERT, capacities=(0.5,)))
    after_one = recursion.expert_choice_top(steps, one, routers, x, rows).x
    np.testing.assert_array_equal(np.asarray(both.x)[depth == 1], np.asarray(after_one)[depth == 1])
    assert not np.any(np.all(np.asarray(both.x) == np.asarray(after_one), axis=-1)[depth == 2])


def test_token_choice_at_full_depth_is_x_plus_gated_last_pass():
    router = dataclasses.replace(TOKEN, balance_warmup_steps=1)
    config = model_config(router, recursions=3)
    steps, routers, x, rows = parts(config)
    got = recursion.token_choice_depths(steps, config, routers, x, rows, step=jnp.zeros((), jnp.int32))
    h = x
    for r in range(3):
        h = steps(r, h, rows, None)
    gate = jax.nn.softmax(routers.main[0](x), axis=-1)[..., 2:]
    assert np.all(np.asarray(got.trace.depth) == 3)
    np.testing.assert_allclose(got.x, x + gate * h, atol=1e-5, rtol=1e-5)


def test_token_choice_with_room_for_all_equals_masked(tokens):
    roomy = dataclasses.replace(TOKEN, execution="capacity", capacities=(1.0, 1.0, 1.0))
    got, want = (forward(model_config(r, recursions=3))(tokens) for r in (roomy, TOKEN))
    np.testing.assert_array_equal(got.trace.depth, want.trace.depth)
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    assert got.trace.scalars["overflow"] == 0
    assert len(np.unique(got.trace.depth)) == 3, "the example should use every depth"


def test_token_choice_counts_what_overflows(tokens):
    tight = dataclasses.replace(TOKEN, execution="capacity", capacities=(1.0, 1 / 24, 1 / 24))
    out, free = (forward(model_config(r, recursions=3))(tokens) for r in (tight, TOKEN))
    depth, wanted = np.asarray(out.trace.depth), np.asarray(free.trace.depth)
    assert np.all((depth > 1).sum(1) <= 1) and np.all(depth <= wanted)
    for row in range(2):  # first come, first served
        assert np.flatnonzero(depth[row] > 1).tolist() == np.flatnonzero(wanted[row] > 1)[:1].tolist()
    assert out.trace.scalars["overflow"] >= ((depth < wanted).sum() - 0.5) / depth.size


# Causality and generation


def outputs_for_two_futures(config, tokens, selection):
    """Logits before position 15 with the given tokens and with others after it, and the depths there."""
    other = tokens.at[:, 15:].set((tokens[:, 15:] + 7) % VOCAB)
    run = forward(config, selection=selection)
    a, b = run(tokens), run(other)
    assert np.abs(np.asarray(a.logits - b.logits)[:, 15:]).max() > 0.1
    return a, b


@pytest.mark.parametrize("name", CAUSAL)
def test_threshold_selection_is_blind_to_the_future(name, tokens):
    a, b = outputs_for_two_futures(CAUSAL[name], tokens, "threshold")
    np.testing.assert_array_equal(a.trace.depth[:, :15], b.trace.depth[:, :15])
    np.testing.assert_allclose(a.logits[:, :15], b.logits[:, :15], atol=1e-5, rtol=1e-5)


def test_token_choice_is_blind_to_the_future_in_training_too(tokens):
    for name in ("token", "token-capacity"):
        a, b = outputs_for_two_futures(CAUSAL[name], tokens, "topk")
        np.testing.assert_allclose(a.logits[:, :15], b.logits[:, :15], atol=1e-5, rtol=1e-5)


def test_top_k_sees_the_future(tokens):
    a, b = outputs_for_two_futures(CAUSAL["expert"], tokens, "topk")
    assert np.any(np.asarray(a.trace.depth)[:, :15] != np.asarray(b.trace.depth)[:, :15])
    assert np.abs(np.asarray(a.logits - b.logits)[:, :15]).max() > 1e-3


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_equals_the_full_forward_pass(name, tokens):
    config = CAUSAL[name]
    graphdef, state = split_model(config)
    full = forward(config, selection="threshold")(tokens)
    extend = quick.jit(lambda state, tokens, cache: nnx.merge(graphdef, state).prefill(tokens, cache))
    cache = nnx.merge(graphdef, state).init_cache(2, SEQ + 4)
    logits, depth = [], []
    for start, stop in [(0, 10), *((i, i + 1) for i in range(10, SEQ))]:
        out, cache = extend(state, tokens[:, start:stop], cache)
        logits.append(out.logits)
        depth.append(out.trace.depth)
    np.testing.assert_array_equal(np.concatenate(depth, 1), full.trace.depth)
    np.testing.assert_allclose(np.concatenate(logits, 1), full.logits, atol=2e-5, rtol=1e-5)
    assert (cache.length == SEQ).all()
    if config.router.kind != "none":
        assert len(np.unique(full.trace.depth)) > 1, "the example should use several depths"


def test_sequence_sharing_has_no_cached_generation(tokens):
    model = build_model(model_config(recursions=2, sharing="sequence"), key=jax.random.key(0))
    with pytest.raises(RecipeError, match="cycle or middle_cycle"):
        model.prefill(tokens, model.init_cache(2, SEQ))


@pytest.mark.parametrize("name", ["vanilla", "vanilla-olmo", "recursive", "recursive-kv-shared", "expert", "token"])
def test_a_packed_document_has_the_logits_it_has_alone(name, tokens):
    lengths = [7, 11, 6]
    segments = np.repeat([1, 2, 3], lengths)[None].repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, 0).astype(np.int32)
    run = forward(CAUSAL[name], selection="threshold")
    packed = run(tokens, segment_ids=segments, positions=positions).logits
    alone = run(jnp.roll(tokens, -7, axis=1)).logits  # the second document comes first; what follows is the future
    np.testing.assert_allclose(packed[:, 7:18], alone[:, :11], atol=2e-5, rtol=1e-5)


def test_the_window_limits_what_a_token_sees(tokens):
    """With 8 layers of window 3, position 20 sees 16 positions back and no further; in a recursion, of the row's."""
    other = tokens.at[:, 3].add(1)
    narrow = forward(model_config(attention_window=3), selection="threshold")
    difference = np.abs(narrow(tokens).logits - narrow(other).logits).max((0, 2))
    assert (difference[:3] == 0).all() and (difference[20:] == 0).all() and (difference[3:6] > 1e-3).all()
    alone = forward(model_config(EXPERT, recursions=3, attention_window=1), selection="threshold")
    difference = np.abs(alone(tokens).logits - alone(other).logits).max((0, 2))
    assert difference[3] > 1e-3 and (np.delete(difference, 3) == 0).all()


def test_the_lookup_does_not_train_the_padding_token(tokens):
    tokens = tokens.at[:, ::5].set(2).at[tokens == 2].set(3)

    def gradient(config):
        graphdef, state = split_model(config)
        loss = lambda state: (nnx.merge(graphdef, state)(tokens).hidden ** 3).mean()  # noqa: E731
        return jax.grad(loss)(state)["embedding"][...]

    got, want = gradient(model_config(padding_token=2)), gradient(VANILLA)
    assert not np.asarray(got[2]).any() and np.abs(want[2]).max() > 1e-3
    np.testing.assert_allclose(jnp.delete(got, 2, 0), jnp.delete(want, 2, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_qkv": -1.0}, "model.clip_qkv=-1: must be at least 0"),
        ({"attention_window": -3}, "model.attention_window=-3: must be at least 0"),
        ({"padding_token": VOCAB}, f"model.padding_token={VOCAB}: must be a token, 0 to {VOCAB - 1}, or -1"),
    ],
)
def test_attention_settings_that_cannot_be(change, message):
    with pytest.raises(RecipeError, match=message):
        model_config(**change).validate()


# Training


def test_capacity_warm_up_takes_the_published_numbers(tokens):
    from adaptive.routing.expert_choice import capacity_limit

    want = [(47, 47), (46, 44), (44, 41), (42, 36), (40, 32), (37, 27), (35, 22), (33, 19), (32, 16), (32, 16)]
    got = [tuple(int(capacity_limit(c, 48, jnp.asarray(t), 10)) for c in (2 / 3, 1 / 3)) for t in range(10)]
    assert got == want
    config = model_config(dataclasses.replace(EXPERT, capacity_warmup_steps=4), recursions=3)
    graphdef, state = split_model(config)
    run = quick.jit(lambda state, step: nnx.merge(graphdef, state)(tokens, deterministic=False, step=step).trace)
    for t in (0, 1, 6):
        trace = run(state, jnp.asarray(t))
        limits = [int(capacity_limit(c, SEQ, jnp.asarray(t), 4)) for c in (1, 2 / 3, 1 / 3)]
        assert [np.asarray(s.valid).sum(1).tolist() for s in trace.selections] == [[k, k] for k in limits]
        assert np.all(np.asarray(trace.depth).sum(1) == sum(limits))
    settled = forward(config)(tokens)
    np.testing.assert_array_equal(trace.depth, settled.trace.depth)


def test_loss_free_bias_moves_towards_the_underloaded():
    router = dataclasses.replace(TOKEN, balancing="loss_free", bias_update_rate=0.01)
    model = build_model(model_config(router, recursions=3), key=jax.random.key(0))
    after = model.next_buffers({"depth": jnp.array([0.5, 0.3, 0.2])})
    np.testing.assert_allclose(jax.tree.leaves(after)[0], [-0.01, 0.01, 0.01], rtol=1e-6)


def test_auxiliary_routers_learn_apart(tokens):
    graphdef, state = split_model(model_config(AUXILIARY, recursions=2, sharing="cycle"))

    @quick.jit
    def grads(state):
        def parts(state):
            out = nnx.merge(graphdef, state)(tokens)
            return jax.nn.logsumexp(out.logits, axis=-1).mean() + out.aux.total(), out.aux.separate_total()

        return jax.jacrev(parts)(state)

    together, apart = grads(state)
    for auxiliary, other in ((apart, together), (together, apart)):
        expected_zero = other is together
        names = {jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(auxiliary) if np.any(g)}
        assert names
        assert all(("aux_routers" in name) == expected_zero for name in names)
    assert np.all([np.any(g) for g in jax.tree.leaves(apart["aux_routers"])])


def test_routers_learn_through_the_gate(tokens):
    """Without any auxiliary loss the language-model loss still reaches every router; additive gating cuts that."""
    for gating, reached in (("weighted", True), ("additive", False)):
        router = dataclasses.replace(EXPERT, sampling="none", gating=gating)
        graphdef, state = split_model(model_config(router, recursions=2, sharing="cycle"))
        loss = lambda s, g=graphdef: nnx.merge(g, s)(tokens).logits.std()  # noqa: E731
        grads = quick.jit(jax.grad(loss))(state)
        assert [bool(np.any(g)) for g in jax.tree.leaves(grads["routers"])] == [reached] * 2
