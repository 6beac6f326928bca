"""Policies of caches: what each keeps of a recursion's passes, which are exact, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import forward, split_model

from adaptive.errors import RecipeError
from adaptive.inference.caching import refuse_fixed
from adaptive.models import kept, policies
from adaptive.models.policies import Policy, active_only, cycle, last, per_pass, shared

ROWS, SEQ = 2, 24
PROMPTS = np.array([10, 6])
ROUTED = shapes.mor(3, ends=0)
LOOPED = shapes.recursive(3, ends=0)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (ROWS, SEQ), 0, 40))


def with_policy(model, policy):
    return shapes.with_body(model, cache=policy)


@functools.cache
def programs(model):
    """(prompts of these lengths, one more token of each row) with a cache."""
    graphdef, state = split_model(model)

    @functools.partial(jax.jit, static_argnums=2)
    def read(tokens, valid, room):
        made = nnx.merge(graphdef, state)
        return made.prefill(tokens, made.init_cache(ROWS, room), valid)

    step = jax.jit(lambda token, cache: nnx.merge(graphdef, state).decode_step(token, cache))
    return read, step


def generated(model, tokens, steps=14, room=SEQ, between=lambda cache: cache):
    """(logits [rows, n, vocab], depth, cache) of prompts and of `steps` tokens after each, at their places; NaN where
    there are none."""
    read, step = programs(model)
    valid = np.arange(PROMPTS.max()) < PROMPTS[:, None]
    out, cache = read(tokens[:, : PROMPTS.max()], valid, room)
    logits, depth = np.full((ROWS, SEQ, 40), np.nan), np.zeros((ROWS, SEQ), int)
    for r, n in enumerate(PROMPTS):
        logits[r, :n], depth[r, :n] = out.logits[r, :n], out.trace.depth[r, :n]
    for i in range(steps):
        at = PROMPTS + i
        out, cache = step(jnp.asarray(tokens[np.arange(ROWS), at]), between(cache))
        logits[np.arange(ROWS), at], depth[np.arange(ROWS), at] = out.logits[:, 0], out.trace.depth[:, 0]
    return logits, depth, cache


def difference(model, logits, tokens):
    """The largest of each position that was computed, against the full forward pass."""
    exact = with_policy(model, per_pass.Settings())
    whole = np.asarray(forward(exact, selection="threshold")(tokens).logits)
    return [np.abs(logits[r] - whole[r]).max(-1)[: n + 14] for r, n in enumerate(PROMPTS)]


@pytest.mark.compiles
@pytest.mark.parametrize("depth", ["expert_choice", "token_choice"])
def test_caches_of_active_tokens_alone_equal_the_full_forward_pass(depth, tokens):
    """They hold no more than the tokens that ran each pass, and grow in time where a row needs more."""
    model = with_policy(shapes.mor(3, ends=0, depth=depth), active_only.Settings(slack=0.1))
    grow = lambda cache: kept.with_room(cache, 1, 16) if kept.lacking(cache, 1) else cache  # noqa: E731
    logits, depth, cache = generated(model, tokens, between=grow)
    assert max(each.max() for each in difference(model, logits, tokens)) < 1e-4
    for r, own in enumerate(cache["body"]["core"].passes):
        assert own.filled[0].tolist() == (depth > r).sum(1).tolist() and not own.overflow.any()
        assert kept.slots_of(own) <= max(int(own.filled.max()) + 16, np.ceil((1 - r / 3 + 0.1) * SEQ))


@pytest.mark.compiles
def test_a_token_without_a_slot_is_counted_and_never_wrong(tokens):
    model = with_policy(ROUTED, active_only.Settings(slack=0.0))
    logits, _, cache = generated(model, tokens, steps=0, room=8)
    assert cache["body"]["core"].passes[0].overflow[0].tolist() == [2, 0]  # 10 and 6 tokens for 8 slots
    for n, one in zip(PROMPTS, difference(model, logits, tokens), strict=True):
        there = np.isfinite(one[:n])
        assert there[:3].all() and one[:n][there].max() < 1e-4 and not (n == 10 and there[8:].any())


@pytest.mark.compiles
def test_passes_that_share_a_cache_are_told_inexact_and_are(tokens):
    """Tokens of one prompt read each other exactly, and later ones do not; enough caches are those of every pass."""
    assert not last.Settings().exact(LOOPED.body) and not cycle.Settings(2).exact(LOOPED.body)
    logits, _, _ = generated(with_policy(LOOPED, last.Settings()), tokens, steps=2)
    each = difference(LOOPED, logits, tokens)
    assert max(d[:n].max() for d, n in zip(each, PROMPTS, strict=True)) < 1e-4
    assert min(d[n : n + 2].max() for d, n in zip(each, PROMPTS, strict=True)) > 1e-2
    assert [cycle.Settings(2).cache(r) for r in range(3)] == [0, 1, 0]
    shapes_of = lambda policy: jax.eval_shape(  # noqa: E731
        lambda: nnx.merge(*split_model(with_policy(LOOPED, policy))).init_cache(ROWS, 8)
    )
    assert cycle.Settings(3).exact(LOOPED.body) and shapes_of(cycle.Settings(3)) == shapes_of(per_pass.Settings())


@pytest.mark.compiles
def test_a_cache_of_the_first_pass_is_that_of_models_trained_with_it(tokens):
    trained = shapes.recursive(3, ends=0, keys_values="shared")
    as_trained, _, _ = generated(trained, tokens, steps=0)
    chosen, _, _ = generated(with_policy(LOOPED, shared.Settings()), tokens, steps=0)
    np.testing.assert_array_equal(as_trained, chosen)  # the same parameters
    assert shared.Settings().exact(trained.body) and not shared.Settings().exact(LOOPED.body)


@pytest.mark.compiles
def test_rows_that_take_a_pass_are_computed_in_groups(tokens):
    graphdef, state = split_model(ROUTED)

    @jax.jit
    def run(tokens):
        made = nnx.merge(graphdef, state)

        def step(cache, token):
            out, cache = nnx.merge(graphdef, state).decode_step(token, cache, rows=1)
            return cache, (out.logits[:, 0], out.trace.depth[:, 0])

        return jax.lax.scan(step, made.init_cache(ROWS, SEQ), tokens.T)[1]

    whole, (logits, depth) = forward(ROUTED, selection="threshold")(tokens), run(tokens)
    np.testing.assert_array_equal(depth.T, whole.trace.depth)
    assert (np.ptp(depth, axis=1) > 0).any() and (depth.min(1) > 1).any()
    np.testing.assert_allclose(logits.swapaxes(0, 1), whole.logits, atol=1e-4)


def matmuls(jaxpr, inside_cond=False):
    """FLOPs of matmuls that run whatever happens, and of those behind a condition."""
    always = behind = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            flops = 2 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[i] for i in contract])
            always += flops
        for name, sub in eqn.params.items():
            for part in sub if isinstance(sub, tuple | list) else (sub,):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    a, b = matmuls(getattr(part, "jaxpr", part))
                    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
                    if eqn.primitive.name == "cond" and len(eqn.params["branches"]) == 2:
                        behind += a + b
                    elif eqn.primitive.name == "cond":  # one of several sizes
                        always += a if name == "branches" and part is sub[-1] else 0
                    else:
                        always, behind = always + times * a, behind + times * b
    return always, behind


@pytest.mark.compiles
@pytest.mark.parametrize("depth", ["expert_choice", "token_choice"])
def test_tokens_that_stop_cost_no_matmul_in_decode(depth):
    """All but the first pass is behind a condition: 2 of 3 equal passes."""
    model = shapes.mor(3, ends=0, depth=depth)
    graphdef, state = split_model(model)

    def step(token):
        made = nnx.merge(graphdef, state)
        return made.decode_step(token, made.init_cache(ROWS, SEQ))

    always, behind = matmuls(jax.make_jaxpr(step)(jnp.zeros(ROWS, jnp.int32)).jaxpr)
    head, routers = 2 * ROWS * 32 * 40, 2 * ROWS * 32 * 3
    assert behind == pytest.approx(2 * (always - head - routers), rel=1e-6)


def test_what_cannot_run_is_refused_with_what_can():
    says = lambda body, policy: policies.refusal(policy, body)  # noqa: E731
    assert "nothing to leave out; it can be cycle, last, per_pass, shared" in says(LOOPED.body, active_only.Settings())
    mamba = shapes.recursive(3, ends=0, pattern=(shapes.block(mixer="mamba2"),))
    assert "other mixers; it can be per_pass" in says(mamba.body, last.Settings())
    trained = shapes.recursive(3, ends=0, keys_values="shared")
    assert "keys_values=shared" in says(trained.body, cycle.Settings()) and not says(trained.body, shared.Settings())
    blocks = shapes.mor(4, 4, ends=0, depth="mixture_of_depths", shared="none").body
    assert "parameters of their own" in says(blocks, last.Settings()) and "loop" in says(blocks, active_only.Settings())
    with pytest.raises(RecipeError, match=r"model.body.cache=active_only: .*; it can be cycle, last, per_pass, shared"):
        with_policy(LOOPED, active_only.Settings())


def test_an_engine_whose_rows_have_fixed_room_is_told():
    assert "use per_pass" in refuse_fixed(with_policy(ROUTED, active_only.Settings()))
    assert not refuse_fixed(ROUTED) and not refuse_fixed(with_policy(LOOPED, last.Settings()))


def test_a_policy_is_named_with_its_one_number():
    assert policies.named("cycle(3)", "--cache") == cycle.Settings(3)
    assert policies.named("active_only", "--cache") == active_only.Settings()
    assert [policies.named(Policy.member(kind)().describe(), "x").kind() for kind in Policy.kinds()] == Policy.kinds()
    for text, says in {
        "cycl": "nearest: cycle", "cycle(0)": "number=0: must be at least 1", "last(2)": "has no number",
        "cycle(x)": "a whole number", "cycle(2": "as in cycle",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=says.replace("(", r"\(")):
            policies.named(text, "--cache")
