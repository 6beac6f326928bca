"""Whole plain and recursive models: sharing, causality, generation, packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import continued, forward, split_model

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import moe_pp
from adaptive.models.depth import all as everyone
from adaptive.models.depth import expert_choice, token_choice

pytestmark = pytest.mark.compiles

SEQ, VOCAB = 24, 40
PLAIN = shapes.plain(8)
AUXILIARY = expert_choice.Settings(sampling="aux_router")
OLMO = {"qk_norm": "full", "clip_qkv": 0.8, "window": 6}
CAUSAL = {
    "plain": PLAIN,
    "plain-olmo": shapes.plain(**OLMO),
    "expert-olmo": shapes.mor(8, **OLMO),
    "recursive": shapes.recursive(8),
    "recursive-kv-shared": shapes.recursive(keys_values="shared"),
    "own-parameters-kv-shared": shapes.recursive(4, 2, ends=0, keys_values="shared", shared="none"),
    "expert": shapes.mor(8),
    "expert-cycle": shapes.mor(4, 2, ends=0),
    "expert-kv-shared": shapes.mor(keys_values="shared"),
    "expert-kv-hybrid": shapes.mor(keys_values="hybrid"),
    "expert-aux-router": shapes.mor(depth=AUXILIARY),
    "token": shapes.mor(depth="token_choice"),
    "token-kv-shared": shapes.mor(depth="token_choice", keys_values="shared"),
    "token-capacity": shapes.mor(depth=token_choice.Settings(execution="capacity")),
}


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, SEQ), 0, VOCAB)


def layer_of(model, number: int) -> tuple[str, int]:
    """The part that unrolled layer `number` is of, and its place among the part's layers."""
    body = model.body
    before = 0 if body.prelude is None else body.prelude.layers
    if number < before:
        return "prelude", number
    if number >= body.layers - before:
        return "coda", number - (body.layers - before)
    inner = number - before
    return "core", inner % body.core.layers if body.order == "cycle" else inner // body.recursions


def arrays_of(model, state, number: int):
    part, place = layer_of(model, number)
    return [a[place] for a in jax.tree.leaves(state["body"][part]["blocks"])]


def written_out(model, state):
    """(a plain model, its state) with the same layers, each of its own."""
    plain = shapes.plain(model.body.layers)
    layers = [arrays_of(model, state, i) for i in range(model.body.layers)]
    flat = nnx.to_flat_state(split_model(plain)[1])
    stacked = iter([jnp.stack(a) for a in zip(*layers, strict=True)])
    others = {("embedding",): state["embedding"], ("body", "stack", "norm", "weight"): state["body"]["norm"]["weight"]}
    made = [(path, others[path] if path in others else value.replace(next(stacked))) for path, value in flat]
    return plain, nnx.from_flat_state(made)


@pytest.mark.parametrize("order", ["cycle", "sequence"])
@pytest.mark.parametrize("ends", [0, 1])
def test_sharing_equals_the_layers_written_out(order, ends, tokens):
    """Outputs are equal, and the gradient of a shared weight is the sum over its uses."""
    model = shapes.recursive(6 if ends else 4, 2, ends=ends, order=order)
    graphdef, state = split_model(model)
    plain, flat = written_out(model, state)

    @jax.jit(static_argnums=0)
    def logits_and_grads(graphdef, state):
        def loss(state):
            logits = nnx.merge(graphdef, state)(tokens).logits
            return (logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).mean(), logits

        return jax.grad(loss, has_aux=True)(state)[::-1]

    logits, grads = logits_and_grads(graphdef, state)
    flat_logits, flat_grads = logits_and_grads(split_model(plain)[0], flat)
    np.testing.assert_allclose(logits, flat_logits, atol=1e-4)
    uses: dict = {}
    for number in range(model.body.layers):
        uses.setdefault(layer_of(model, number), []).append(number)
    assert len(uses) == model.body.stored_layers
    for (part, place), numbers in uses.items():
        want = [g[np.array(numbers)].sum(0) for g in jax.tree.leaves(flat_grads["body"]["stack"]["blocks"])]
        got = [g[place] for g in jax.tree.leaves(grads["body"][part]["blocks"])]
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), rtol=1e-3)


@pytest.mark.parametrize("keys_values", ["per_recursion", "shared"])
def test_one_pass_is_a_plain_transformer(keys_values, tokens):
    model = shapes.recursive(4, 1, ends=1, keys_values=keys_values)
    plain, flat = written_out(model, split_model(model)[1])
    want = jax.jit(lambda state: nnx.merge(split_model(plain)[0], state)(tokens).logits)(flat)
    np.testing.assert_allclose(forward(model)(tokens).logits, want, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "stored", "routers"),
    [
        (PLAIN, 8, 0), (CAUSAL["recursive"], 4, 0), (CAUSAL["own-parameters-kv-shared"], 4, 0),
        (CAUSAL["expert"], 4, 3 * 32), (CAUSAL["expert-aux-router"], 3, 6 * 32), (CAUSAL["token"], 3, 3 * 32),
        (shapes.mor(4, 2, expert_choice.Settings(network="mlp")), 3, 2 * 66 * 32),
        (shapes.mor(depth=token_choice.Settings(network="wide_mlp")), 3, 4 * 32 * (32 + 3)),
    ],
)  # fmt: skip
def test_number_of_unique_parameters(model, stored, routers):
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    params = nnx.state(nnx.eval_shape(lambda: model.build(jax.random.key(0))), nnx.Param)
    assert model.body.stored_layers == stored
    assert sum(p.size for p in jax.tree.leaves(params)) == stored * per_layer + VOCAB * 32 + 32 + routers


@pytest.mark.parametrize(("prelude", "coda", "core"), [(0, 2, 1), (3, 0, 2), (2, 1, 1)])
def test_ends_of_any_size(prelude, coda, core, tokens):
    """Logits are those of the layers written out; generation goes on where a prompt ended."""
    base = shapes.recursive(4, 2)
    repeated = lambda n: shapes.stacks.Settings(base.body.core.blocks, repeats=n) if n else None  # noqa: E731
    model = shapes.with_body(base, prelude=repeated(prelude), core=repeated(core), coda=repeated(coda))
    assert model.body.layers == prelude + 2 * core + coda and model.body.stored_layers == prelude + core + coda
    want = forward(model)(tokens)
    assert np.all(np.asarray(want.trace.depth) == 2)
    np.testing.assert_allclose(continued(model, 22)(tokens)[0], want.logits, atol=1e-4)


# Equal passes as a loop

MAMBA = shapes.block(mixer="mamba2", feed_forward=None, repeat=3)
CORES = {
    "three Mamba-2 and one attention": shapes.recursive(10, 2, pattern=(MAMBA, shapes.block())),
    "experts of every pass": shapes.recursive(
        4, 2, shared="mixers", feed_forward=experts.Settings(moe_pp.Settings(), experts=4, expert_size=8)
    ),
}


@pytest.mark.parametrize("name", CORES)
def test_a_loop_of_passes_equals_them_written_out(name, tokens):
    """Logits, losses, statistics and what a cache generates; but for experts, whose take long to compile, gradients."""
    model = CORES[name]
    grads = name != "experts of every pass"
    loop = shapes.with_body(model, depth=everyone.Settings(loop=True))
    _, state = split_model(model)
    params, buffers = nnx.split_state(state, nnx.Param, ...)

    def found(model):
        graphdef, _ = split_model(model)

        def loss(params):
            out = nnx.merge(graphdef, params, buffers)(tokens)
            weights = jnp.cos(jnp.arange(out.logits.size).reshape(out.logits.shape))
            return (out.logits * weights).mean() + out.aux.total(), (out.logits, out.aux.scalars(), out.trace.sums())

        return jax.jit(jax.value_and_grad(loss, has_aux=True) if grads else loss)(params)

    got, want = found(loop), found(model)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1e-3, np.abs(b).max()))
    np.testing.assert_allclose(continued(loop, 20)(tokens)[0], forward(model)(tokens).logits, atol=1e-4)


def test_a_call_says_how_many_passes_there_are(tokens):
    """As many as a traced number says: the model with that many recursions."""
    graphdef, state = split_model(shapes.recursive(6, 4))
    run = jax.jit(lambda state, n: nnx.merge(graphdef, state)(tokens, passes=n))
    for passes in (1, 2, 4, 5):
        other, _ = split_model(shapes.recursive(2 + passes, passes))
        want = jax.jit(lambda state, g=other: nnx.merge(g, state)(tokens).logits)(state)
        got = run(state, jnp.asarray(passes))
        np.testing.assert_allclose(got.logits, want, atol=1e-4)
        assert np.all(np.asarray(got.trace.depth) == passes)
    for model in (CAUSAL["expert"], CAUSAL["recursive-kv-shared"], shapes.recursive(4, 2, order="sequence")):
        with pytest.raises(RecipeError, match="passes of a call"):
            jax.eval_shape(lambda n, made=model: nnx.merge(*split_model(made))(tokens, passes=n), jnp.asarray(2))
    with pytest.raises(RecipeError, match=r"depth.loop=true: .* keys_values=per_recursion"):
        shapes.recursive(depth=everyone.Settings(loop=True), keys_values="shared")


@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_a_call_caps_the_depth_that_routers_decide(rule, tokens):
    """A known number of passes: the recursions after it might as well not be there."""
    graphdef, state = split_model(CAUSAL["expert"])
    run = lambda graphdef, state, passes: jax.jit(  # noqa: E731
        lambda s: nnx.merge(graphdef, s)(tokens, selection=rule, passes=passes)
    )(state)
    shorter = shapes.mor(6, 2, depth=expert_choice.Settings(capacities=(1.0, 2 / 3)))
    fewer = [(path, value) for path, value in nnx.to_flat_state(state) if path[:4] != ("body", "depth", "routers", 2)]
    got = run(graphdef, state, 2)
    want = run(split_model(shorter)[0], nnx.from_flat_state(fewer), None)
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    np.testing.assert_array_equal(got.trace.depth, want.trace.depth)
    token = split_model(CAUSAL["token" if rule == "threshold" else "token-capacity"])
    depths = [run(*token, passes).trace.depth for passes in (2, None)]
    np.testing.assert_array_equal(depths[0], np.minimum(depths[1], 2))


def test_passes_of_a_model_that_cannot_leave_some_out():
    body = shapes.recursive(4, 2, order="sequence").body
    assert not body.refuse_passes(1) and "order=cycle" in body.refuse_passes(3)
    assert "at least 1" in CAUSAL["expert"].body.refuse_passes(0)
    assert not CAUSAL["recursive-kv-shared"].body.refuse_passes(2)
    blocks = shapes.mor(4, 4, ends=0, depth="mixture_of_depths", shared="none").body
    assert "blocks of its own" in blocks.refuse_passes(2)


def test_passes_beyond_those_with_parameters_of_their_own_are_refused(tokens):
    """In a traced number, which no error can follow, nothing of the output passes for a result."""
    graphdef, state = split_model(shapes.recursive(3, 3, ends=0, shared="none"))
    run = jax.jit(lambda n: nnx.merge(graphdef, state)(tokens, passes=n).logits)
    assert np.isfinite(run(jnp.asarray(3))).all() and np.isnan(run(jnp.asarray(4))).all()
    with pytest.raises(RecipeError, match=r"passes=4: there are 3 with parameters of their own \(shared=none\)"):
        nnx.merge(graphdef, state)(tokens, passes=4)


@pytest.mark.parametrize("ends", [0, 1])
@pytest.mark.parametrize("depth", ["all", "expert_choice", "token_choice", "mixture_of_depths"])
def test_a_float32_stream_stays_so_between_passes(depth, ends, tokens):
    model = shapes.recursive(4 + 2 * ends, 4, ends=ends, depth=depth)
    model = shapes.with_body(model, core=dataclasses.replace(model.body.core, stream="float32"))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model.build(jax.random.key(0), dtype=jnp.bfloat16)))
    program = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(tokens).hidden)(state)
    assert program.out_avals[0].dtype == jnp.bfloat16
    sums = [e.outvars[0].aval for e in program.eqns if e.primitive.name == "add"]
    assert ends or {found.dtype.name for found in sums if found.shape[-1:] == (32,)} <= {"float32"}


# Causality and generation


def outputs_for_two_futures(model, tokens, selection):
    """Outputs with the given tokens and with others from position 15 on."""
    other = tokens.at[:, 15:].set((tokens[:, 15:] + 7) % VOCAB)
    run = forward(model, selection=selection)
    a, b = run(tokens), run(other)
    assert np.abs(np.asarray(a.logits - b.logits)[:, 15:]).max() > 0.1
    return a, b


@pytest.mark.parametrize("name", CAUSAL)
def test_threshold_selection_is_blind_to_the_future(name, tokens):
    a, b = outputs_for_two_futures(CAUSAL[name], tokens, "threshold")
    np.testing.assert_array_equal(a.trace.depth[:, :15], b.trace.depth[:, :15])
    np.testing.assert_allclose(a.logits[:, :15], b.logits[:, :15], atol=1e-4)


def test_token_choice_is_blind_to_the_future_in_training_too(tokens):
    for name in ("token", "token-capacity"):
        a, b = outputs_for_two_futures(CAUSAL[name], tokens, "topk")
        np.testing.assert_allclose(a.logits[:, :15], b.logits[:, :15], atol=1e-4)


def test_top_k_sees_the_future(tokens):
    a, b = outputs_for_two_futures(CAUSAL["expert"], tokens, "topk")
    assert np.any(np.asarray(a.trace.depth)[:, :15] != np.asarray(b.trace.depth)[:, :15])
    assert np.abs(np.asarray(a.logits - b.logits)[:, :15]).max() > 1e-3


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_equals_the_full_forward_pass(name, tokens):
    """A prompt of 10 tokens and then single ones."""
    full = forward(CAUSAL[name], selection="threshold")(tokens)
    logits, depth = continued(CAUSAL[name], 10)(tokens)
    np.testing.assert_array_equal(depth, full.trace.depth)
    np.testing.assert_allclose(logits, full.logits, atol=1e-4)
    if name.startswith(("expert", "token")):
        assert len(np.unique(full.trace.depth)) > 1, "the example should use several depths"


def test_layers_repeated_in_place_have_no_cached_generation(tokens):
    model = nnx.merge(*split_model(shapes.recursive(4, 2, order="sequence")))
    assert "order=cycle" in model.refuse_cache() and not model.refuse_generation()
    with pytest.raises(RecipeError, match="order=cycle"):
        model.prefill(tokens, {})


@pytest.mark.parametrize("name", ["plain", "plain-olmo", "recursive", "recursive-kv-shared", "expert", "token"])
def test_a_packed_document_has_the_logits_it_has_alone(name, tokens):
    lengths = [7, 11, 6]
    segments = np.repeat([1, 2, 3], lengths)[None].repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, 0).astype(np.int32)
    run = forward(CAUSAL[name], selection="threshold")
    packed = run(tokens, segment_ids=segments, positions=positions).logits
    alone = run(jnp.roll(tokens, -7, axis=1)).logits  # the second document comes first; what follows is the future
    np.testing.assert_allclose(packed[:, 7:18], alone[:, :11], atol=1e-4)


def test_the_window_limits_what_a_token_sees(tokens):
    """With 8 layers of window 3, position 20 sees 16 positions back and no further; in a recursion, of the row's."""
    other = tokens.at[:, 3].add(1)
    narrow = forward(shapes.plain(8, window=3), selection="threshold")
    difference = np.abs(narrow(tokens).logits - narrow(other).logits).max((0, 2))
    assert (difference[:3] == 0).all() and (difference[20:] == 0).all() and (difference[3:6] > 1e-3).all()
    alone = forward(shapes.mor(8, window=1), selection="threshold")
    difference = np.abs(alone(tokens).logits - alone(other).logits).max((0, 2))
    assert difference[3] > 1e-3 and (np.delete(difference, 3) == 0).all()


def test_a_model_that_sees_all_reads_both_ways(tokens):
    """Every position reads every other of its document; order is what rotary positions alone tell."""
    model = shapes.plain(2)
    run = forward(model, sees="all")
    other = tokens.at[:, 20].add(1)
    assert np.all(np.abs(run(tokens).logits - run(other).logits).max((0, 2)) > 1e-4)
    segments = np.repeat([1, 2, 0], [9, 11, 4])[None].repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (9, 11, 4)])[None].repeat(2, 0).astype(np.int32)
    packed = run(tokens, segment_ids=segments, positions=positions).logits
    alone = run(tokens[:, 9:20]).logits
    np.testing.assert_allclose(packed[:, 9:20], alone, atol=1e-4)
    still = forward(shapes.plain(2, rotary_dim=0), sees="all")
    turned = still(tokens[:, ::-1]).logits[:, ::-1]
    np.testing.assert_allclose(turned, still(tokens).logits, atol=1e-4)


def test_the_lookup_does_not_train_the_padding_token(tokens):
    tokens = tokens.at[:, ::5].set(2).at[tokens == 2].set(3)

    @jax.jit(static_argnums=0)
    def gradient(graphdef, state):
        loss = lambda state: (nnx.merge(graphdef, state)(tokens).hidden ** 3).mean()  # noqa: E731
        return jax.grad(loss)(state)["embedding"][...]

    got, want = gradient(*split_model(shapes.plain(2, padding_token=2))), gradient(*split_model(shapes.plain(2)))
    assert not np.asarray(got[2]).any() and np.abs(want[2]).max() > 1e-3
    np.testing.assert_allclose(jnp.delete(got, 2, 0), jnp.delete(want, 2, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_qkv": -1.0}, r"model.body.stack.blocks.0.mixer.clip_qkv=-1.0: must be at least 0"),
        ({"window": -3}, r"mixer.window=-3: must be at least 0"),
        ({"heads": 6, "kv_heads": 4}, r"heads=6 is not a multiple of .*kv_heads=4; kv_heads can be 1, 2, 3, 6"),
        ({"head_dim": 7}, r"head_dim=7: rotary embeddings need an even head_dim"),
        ({"rotary_dim": 10}, r"rotary_dim=10: must be even and at most .*head_dim=8"),
        ({"padding_token": VOCAB}, f"model.padding_token={VOCAB}: must be a token, 0 to {VOCAB - 1}, or -1"),
        ({"mixer": None, "feed_forward": None}, r"a block needs a mixer or a feed-forward"),
    ],
)
def test_settings_of_a_block_that_cannot_be(change, message):
    with pytest.raises(RecipeError, match=message):
        shapes.plain(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "token_choice", "keys_values": "hybrid"}, r"=hybrid needs model.body.depth=expert_choice"),
        ({"depth": "token_choice", "layers": 4, "recursions": 1}, r"needs model.body.recursions of at least 2"),
        ({"depth": "expert_choice", "order": "sequence"}, r"order=sequence repeats each layer in place"),
        ({"feed_forward": experts.Settings(), "order": "sequence"}, r"no experts; use order=cycle"),
        ({"keys_values": "shared", "mixer": "mamba2"}, r"only attention has keys and values to share"),
        ({"depth": expert_choice.Settings(capacities=(0.5, 0.7, 0.1))}, r"must not increase.*0.7,0.5,0.1"),
        ({"depth": expert_choice.Settings(capacities=(1.0, 0.7))}, r"2 shares for 3 recursions"),
        ({"depth": expert_choice.Settings(capacities=(0.9, 0.7, 0.1)), "keys_values": "shared"}, "share must be 1"),
    ],
)  # fmt: skip
def test_settings_of_a_recursion_that_cannot_be(options, message):
    with pytest.raises(RecipeError, match=message):
        shapes.recursive(**options)


# Training


def test_auxiliary_routers_learn_apart(tokens):
    graphdef, state = split_model(shapes.mor(4, 2, AUXILIARY, ends=0))

    @jax.jit
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
    assert np.all([np.any(g) for g in jax.tree.leaves(apart["body"]["depth"]["aux_routers"])])


def test_loss_free_bias_moves_towards_the_underloaded():
    depth = token_choice.Settings(balancing="loss_free", bias_update_rate=0.01)
    model = nnx.merge(*split_model(shapes.mor(depth=depth)))
    after = model.next_buffers({"depth": jnp.array([0.5, 0.3, 0.2])})
    np.testing.assert_allclose(after["body"]["depth"]["bias"][...], [-0.01, 0.01, 0.01], rtol=1e-6)
