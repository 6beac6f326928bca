"""Whole models whose feed-forwards are experts: what they compute, cost, select causally, and generate."""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from adaptive.layers.moe_config import MoEConfig
from adaptive.models.build import build_model
from adaptive.models.config import RouterConfig, TransformerConfig
from flax import nnx

from adaptive.account import account, parameters
from adaptive.errors import RecipeError

pytestmark = pytest.mark.compiles

SEQ, VOCAB = 24, 40
BASE = TransformerConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=8,
    init_std=0.2,
)  # fmt: skip
EC = MoEConfig(router="expert_choice", experts=4, expert_size=12)
TC = MoEConfig(router="token_choice", experts=4, expert_size=12)
DEPTH = RouterConfig(kind="expert_choice")


def with_options(moe: MoEConfig, *options: str, **changes) -> MoEConfig:
    return dataclasses.replace(moe, options=options, **changes)


def model_config(moe: MoEConfig, **changes) -> TransformerConfig:
    return dataclasses.replace(BASE, moe=moe, num_layers=5 if "recursions" in changes else 4, **changes)


MODELS = {
    "ec-threshold": model_config(EC),
    "ec-predictor": model_config(with_options(EC, "decode=predictor")),
    "ec-chunk": model_config(with_options(EC, "group=chunk", "chunk=6")),
    "ec-position": model_config(with_options(EC, "group=position")),
    "ec-select": model_config(with_options(EC, "select=threshold")),
    "tc": model_config(TC),
    "tc-capacity": model_config(dataclasses.replace(TC, capacity_factor=0.75)),
    "tc-bias-dense-layers": model_config(with_options(TC, "bias=true", "balance=hf", dense_layers=(0, 3))),
    "mor-ec": model_config(EC, recursions=3, router=DEPTH),
    "mor-tc": model_config(TC, recursions=3, router=DEPTH, kv="shared"),
    "recursive-ec": model_config(EC, recursions=3),
}
MAY_SEE_NO_FUTURE_IN_TRAINING = ("ec-position", "ec-select", "tc", "tc-bias-dense-layers")


@functools.cache
def split_model(config: TransformerConfig):
    graphdef, state = nnx.split(build_model(config, key=jax.random.key(0)))

    def spread(path, variable):
        # Thresholds that let through some tokens and not others, as a trained model has.
        if "threshold" not in path:
            return variable
        value = variable[...]
        return variable.replace(value * jax.random.uniform(jax.random.key(value.size), value.shape, minval=0.5))

    flat = [(path, spread(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return graphdef, nnx.from_flat_state(flat)


@functools.cache
def forward(config: TransformerConfig, selection: str):
    graphdef, state = split_model(config)
    run = quick.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens, selection=selection))
    return lambda tokens: run(state, tokens)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (4, SEQ), 0, VOCAB)


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_suffix_leaves_causal_selection_alone(name, tokens):
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 7) % VOCAB)
    for selection in ("threshold", *["topk"] * (name in MAY_SEE_NO_FUTURE_IN_TRAINING)):
        run = forward(MODELS[name], selection)
        before, after = run(tokens), run(changed)
        np.testing.assert_allclose(after.logits[:, :15], before.logits[:, :15], atol=1e-5)
        for part, calls in before.trace.experts.items():
            np.testing.assert_array_equal(after.trace.experts[part].per_token[..., :15], calls.per_token[..., :15])


def test_expert_choice_over_the_sequence_sees_the_future(tokens):
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 7) % VOCAB)
    run = forward(MODELS["ec-threshold"], "topk")
    assert np.abs(run(changed).logits[:, :15] - run(tokens).logits[:, :15]).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["ec-threshold", "ec-predictor", "tc-capacity", "tc-bias-dense-layers", "mor-ec", "mor-tc"]
)
def test_generation_equals_the_full_forward(name, tokens):
    config = MODELS[name]
    graphdef, state = split_model(config)
    full = forward(config, "threshold")(tokens)
    extend = quick.jit(lambda state, tokens, cache: nnx.merge(graphdef, state).prefill(tokens, cache))
    cache = nnx.merge(graphdef, state).init_cache(4, SEQ)
    logits = []
    for start, stop in ((0, 20), *((i, i + 1) for i in range(20, SEQ))):
        out, cache = extend(state, tokens[:, start:stop], cache)
        logits.append(out.logits)
    np.testing.assert_allclose(np.concatenate(logits, 1), full.logits, atol=2e-5, rtol=1e-5)
    if name.startswith("ec"):
        assert len(np.unique(full.trace.experts["block"].per_token)) > 1, "the example should select"


def test_a_model_that_sees_the_future_refuses_to_generate(tokens):
    config = model_config(with_options(EC, "decode=refuse"))
    model = build_model(config, key=jax.random.key(0))
    assert model.selections() == ("topk",)
    with pytest.raises(RecipeError, match=r"which do not exist while generating.*decode=threshold or decode=predictor"):
        model.prefill(tokens, model.init_cache(4, SEQ))
    with pytest.raises(RecipeError, match="do not exist while generating"):
        model(tokens, selection="threshold")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_account(name):
    _, state = split_model(MODELS[name])
    params = [v for _, v in nnx.to_flat_state(state) if isinstance(v, nnx.Param)]
    assert parameters(MODELS[name]).total == sum(v[...].size for v in params)


@pytest.mark.parametrize("name", ["ec-threshold", "ec-predictor", "ec-chunk", "mor-ec"])
def test_the_compiled_gradient_has_exactly_the_matmuls_of_the_account(name, tokens):
    config = MODELS[name]
    graphdef, state = split_model(config)
    params, buffers = nnx.split_state(state, nnx.Param, ...)

    def loss(params):
        out = nnx.merge(graphdef, params, buffers)(tokens, logits=False)
        model = nnx.merge(graphdef, params, buffers)
        logits = out.hidden @ model.head_weight().T
        return jax.nn.logsumexp(logits).sum() + out.aux.total() + out.aux.separate_total()

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    # XLA makes multiplications of the outer products of one-column depth routers, which is 0.2% of a MoR here.
    expected = len(tokens) * account(config, SEQ).train_flops()
    assert hlo.matmul_flops(compiled.as_text()) == pytest.approx(expected, rel=2e-3 if name == "mor-ec" else 0)


def test_every_expert_and_router_learns(tokens):
    for name in ("tc", "mor-ec"):
        graphdef, state = split_model(MODELS[name])
        params, buffers = nnx.split_state(state, nnx.Param, ...)
        loss = lambda p: (nnx.merge(graphdef, p, buffers)(tokens).logits ** 2).mean()  # noqa: B023, E731
        grads = quick.jit(jax.grad(loss))(params)
        for path, grad in nnx.to_flat_state(grads):
            if "feed_forward" in path:
                assert np.all(np.abs(grad[...]).max((-2, -1)) > 0), path


def test_buffers_of_a_recursion_are_its_own(tokens):
    config = MODELS["mor-ec"]
    graphdef, state = split_model(config)
    model = nnx.merge(graphdef, state)
    out = model(tokens)
    before = model.block.feed_forward.router.threshold[...]
    moved = model.next_buffers(out.trace.sums())["block"]["feed_forward"]["router"]["threshold"][...]
    np.testing.assert_array_equal(model.block.feed_forward.router.threshold[...], before)
    assert moved.shape == (3, 1, 4)
    np.testing.assert_allclose(moved, out.trace.experts["block"].stats["least"], rtol=1e-6)
    assert len(np.unique(np.asarray(moved).round(6)[:, 0, 0])) == 3


def test_experts_choose_among_the_tokens_of_their_recursion(tokens):
    out = forward(MODELS["mor-ec"], "topk")(tokens)
    calls = out.trace.experts["block"]
    for r, capacity in enumerate(MODELS["mor-ec"].capacities(SEQ)):
        np.testing.assert_array_equal(calls.stats["kept"][r, 0], [len(tokens) * (capacity * 2 // 4)] * 4)
        assert calls.stats["tokens"][r, 0] == len(tokens) * capacity


def test_padding_takes_no_expert(tokens):
    segments = jnp.ones_like(tokens).at[:, 17:].set(0)
    graphdef, state = split_model(MODELS["ec-threshold"])
    calls = nnx.merge(graphdef, state)(tokens, segment_ids=segments).trace.experts["block"]
    assert not np.asarray(calls.per_token)[..., 17:].any()
    np.testing.assert_array_equal(calls.stats["kept"], np.full((4, 4), len(tokens) * (17 * 2 // 4)))


@pytest.mark.parametrize(("moe", "message"), [
    (dataclasses.replace(TC, experts_per_token=5), r"at most model\.moe\.experts=4"),
    (dataclasses.replace(TC, experts_per_token=0), r"must be above 0"),
    (dataclasses.replace(TC, capacity_factor=-1), r"0 drops nothing"),
    (dataclasses.replace(TC, dense_layers=(5,)), r"5 is not a layer of 0\.\.3"),
    (dataclasses.replace(TC, router="token_chioce"), r"no such router; nearest: token_choice"),
    (dataclasses.replace(TC, experts_per_token=1.5), r"a whole number"),
    (with_options(TC, "groups=3"), r"groups must divide"),
    (with_options(TC, "gropus=3"), r"has no setting 'gropus'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(moe, message):
    config = model_config(moe)
    with pytest.raises(RecipeError, match=message):
        nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0)))
