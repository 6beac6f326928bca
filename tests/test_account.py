"""The compute account against formulas written out here, against traced programs, and against compiled ones."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hlo import matmul_flops
from jax.interpreters import partial_eval
from shapes import block, mor, plain, recursive, wrapped

from adaptive.account import account, at_depths, dense_equivalent, paper_flops_per_token, parameters
from adaptive.errors import RecipeError
from adaptive.layers import stack as stacks
from adaptive.layers.feed_forwards import experts
from adaptive.layers.mixers import mamba2
from adaptive.layers.moe.routers import expert_choice as choosing_experts
from adaptive.models.bodies import plain as plain_body
from adaptive.models.bodies import recursive as recursive_body
from adaptive.models.depth import expert_choice, token_choice
from adaptive.models.language_model import Settings
from adaptive.objectives.cross_entropy import cross_entropy_sum
from adaptive.peaks import memory_of, peak_of

pytestmark = pytest.mark.compiles

D, F, V, H, K, HD, S = 32, 48, 64, 4, 2, 8, 24  # those of `shapes` but for the vocabulary
TOKEN, CAPACITY = token_choice.Settings(), token_choice.Settings(execution="capacity")
EXPERTS = experts.Settings(choosing_experts.Settings(), experts=4, expert_size=20)


def loops(recursions: int = 3, **options) -> Settings:
    return recursive(8, recursions, vocab_size=V, **options)


def routed(recursions: int = 3, depth="expert_choice", **options) -> Settings:
    return mor(8, recursions, depth, vocab_size=V, **options)


VANILLA = plain(8, vocab_size=V)


def layer(q: float, k: float, *, own_keys: bool = True) -> float:
    """Forward FLOPs of a layer of q queries on k keys, written out matmul by matmul."""
    query = 2 * q * D * (H * HD)
    key = value = 2 * q * D * (K * HD) if own_keys else 0
    scores = weighted = 2 * q * k * (H * HD)
    output = 2 * q * (H * HD) * D
    gate = up = down = 2 * q * D * F
    return query + key + value + scores + weighted + output + gate + up + down


HEAD = 2 * S * D * V
ROUTER = 2 * D  # per candidate

# Top-k capacities of 24 tokens in three recursions are 24, 16, 8; in two 24, 12; in four 24, 18, 12, 6.
FORWARD = [
    (VANILLA, 8 * layer(S, S) + HEAD),
    (loops(), 8 * layer(S, S) + HEAD),
    (loops(4, ends=0, order="sequence"), 8 * layer(S, S) + HEAD),
    (loops(keys_values="shared"), 4 * layer(S, S) + 4 * layer(S, S, own_keys=False) + HEAD),
    (
        routed(2),
        2 * layer(S, S) + 3 * (layer(24, 24) + layer(12, 12)) + ROUTER * (24 + 24) + HEAD,
    ),
    (
        routed(),
        2 * layer(S, S) + 2 * (layer(24, 24) + layer(16, 16) + layer(8, 8)) + ROUTER * (24 + 24 + 16) + HEAD,
    ),
    (
        routed(4, ends=0),
        2 * (layer(24, 24) + layer(18, 18) + layer(12, 12) + layer(6, 6)) + ROUTER * (24 + 24 + 18 + 12) + HEAD,
    ),
    (
        routed(keys_values="shared"),
        2 * layer(S, S)
        + 2 * (layer(24, 24) + layer(16, 24, own_keys=False) + layer(8, 24, own_keys=False))
        + ROUTER * (24 + 24 + 16)
        + HEAD,
    ),
    (
        routed(keys_values="hybrid"),
        2 * layer(S, S) + 2 * (layer(24, 24) + layer(16, 24) + layer(8, 24)) + ROUTER * (24 + 24 + 16) + HEAD,
    ),
    (routed(depth=TOKEN), 8 * layer(S, S) + 3 * ROUTER * S + HEAD),
    (
        routed(depth=CAPACITY),
        2 * layer(S, S) + 2 * (layer(24, 24) + layer(16, 16) + layer(8, 8)) + 3 * ROUTER * S + HEAD,
    ),
]


@pytest.mark.parametrize(("model", "flops"), FORWARD)
def test_forward_flops(model, flops):
    assert account(model, S).forward_flops == flops
    assert account(model, S).train_flops() == 3 * flops


def test_useful_attention_counts_causal_pairs():
    pairs = sum(q + 1 for q in range(S))
    useful = 8 * (layer(S, S) - 4 * S * S * H * HD + 4 * pairs * H * HD) + HEAD
    assert account(VANILLA, S).forward_flops_per_token * S == pytest.approx(useful)
    assert account(VANILLA, S).train_flops_per_token * S == pytest.approx(3 * useful)


def test_useful_attention_counts_pairs_within_the_window():
    pairs = sum(min(q + 1, 5) for q in range(S))
    useful = 8 * (layer(S, S) - 4 * S * S * H * HD + 4 * pairs * H * HD) + HEAD
    assert account(plain(8, vocab_size=V, window=5), S).forward_flops_per_token * S == pytest.approx(useful)
    assert account(plain(8, vocab_size=V, window=S), S) == account(VANILLA, S)


def test_auxiliary_router_has_no_input_gradient():
    mlp = expert_choice.Settings(network="mlp", sampling="aux_router")
    first, second = 2 * D * (2 * D), 2 * (2 * D)
    expected = (24 + 24 + 16) * (3 * (first + second) + 2 * first + 3 * second)
    assert sum(stage.router_train for stage in account(routed(depth=mlp), S).stages) == expected


def test_dense_equivalent_takes_every_step():
    dense = dense_equivalent(routed(), S)
    assert dense.forward_flops == 8 * layer(S, S) + 3 * ROUTER * S + HEAD
    assert account(routed(), S).forward_flops < dense.forward_flops


def test_account_of_measured_depths():
    model = routed(depth=TOKEN)
    assert at_depths(model, S, (0, 0, 1)) == dense_equivalent(model, S)
    shallow = at_depths(model, S, (1, 0, 0)).forward_flops
    assert shallow == 4 * layer(S, S) + 3 * ROUTER * S + HEAD
    thirds = at_depths(model, S, (1 / 3, 1 / 3, 1 / 3)).forward_flops
    balanced = account(routed(depth=CAPACITY), S).forward_flops
    assert thirds == pytest.approx(balanced)
    with pytest.raises(RecipeError, match="expected 3 that sum to 1"):
        at_depths(model, S, (0.5, 0.1, 0.1))
    with pytest.raises(RecipeError, match="expected 3"):
        at_depths(model, S, (0.5, 0.5))
    returning = recursive(4, 4, ends=0, shared="none", depth="mixture_of_depths")
    with pytest.raises(RecipeError, match="do not tell which passes they took"):
        at_depths(returning, S, (0, 0.5, 0.5, 0))
    with pytest.raises(RecipeError, match="2 token counts for 3 recursions"):
        account(model, S, (24, 12))


def test_rows_are_a_table_whose_parts_sum_up():
    header, *stages, total = account(routed(), S).rows()
    assert {len(row) for row in (header, *stages, total)} == {len(header)}
    assert [row[0] for row in stages] == [
        "first layer", "recursion 1", "recursion 2", "recursion 3", "last layer", "head"
    ]  # fmt: skip
    column = header.index("total")
    assert sum(float(row[column]) for row in stages) == pytest.approx(float(total[column]), abs=0.01)
    assert int(total[1]) == 8


def test_paper_accounting_ignores_grouped_keys_and_counts_forward_alone():
    lin, att = 8 * D * D + 6 * D * F, 2 * D * S
    assert paper_flops_per_token(VANILLA, S) == 8 * (lin + att)
    thirds = [1, 2 / 3, 1 / 3]
    own = 2 * (lin + att) + 2 * sum(c * lin + c * c * att for c in thirds)
    assert paper_flops_per_token(routed(), S) == pytest.approx(own)
    assert paper_flops_per_token(routed(depth=TOKEN), S) == pytest.approx(own)
    shared = 2 * (lin + att) + 2 * sum(c * (lin - (4 * D * D if c < 1 else 0)) + c * att for c in thirds)
    assert paper_flops_per_token(routed(keys_values="shared"), S) == pytest.approx(shared)


# Parts together

MAMBA = mamba2.Settings(d_state=6, head_dim=8, block=8)
INNER, SCAN = 2 * D, 2 * 8 * 8 * 6 + 2 * 8 * 8 * 2 * D + 4 * 8 * 2 * D * 6  # of a block of 8 positions


def mamba(tokens: int) -> float:
    """Forward FLOPs of a Mamba-2 layer without a feed-forward."""
    return 2 * tokens * D * (3 * INNER + 2 * 6 + INNER // 8) + tokens // 8 * SCAN


def hybrid(depth="expert_choice", **options) -> Settings:
    """Recursions of a pattern of two Mamba-2 layers and one of attention, behind two layers of their own."""
    core = stacks.Settings((block(mixer=MAMBA, feed_forward=None, repeat=2), block()))
    own = {"prelude": stacks.Settings((block(),), repeats=2), "core": core, "recursions": 3}
    model = recursive(5, 3, depth=depth, vocab_size=V)
    return wrapped(recursive_body.Settings(**own, depth=model.body.depth, **options), vocab_size=V)


def test_a_pattern_is_the_sum_of_its_blocks_on_what_each_recursion_takes():
    cost = account(hybrid(), S)
    assert [(s.name, s.layers, s.tokens, s.keys) for s in cost.stages] == [
        ("first layers", 2, 24, 24), ("recursion 1", 3, 24, 24), ("recursion 2", 3, 16, 16), ("recursion 3", 3, 8, 8),
        ("head", 0, 24, 0),
    ]  # fmt: skip
    routers = ROUTER * (24 + 24 + 16)
    core = sum(2 * mamba(n) + layer(n, n) for n in (24, 16, 8))
    assert cost.forward_flops == 2 * layer(S, S) + core + routers + HEAD
    assert at_depths(hybrid(), S, (1, 0, 0)).stages[3].forward == 0


def test_nothing_attends_in_a_stack_of_state_spaces():
    cost = account(plain(2, mixer=MAMBA, feed_forward=None, vocab_size=V), S)
    assert [s.keys for s in cost.stages] == [0, 0]
    assert cost.forward_flops == 2 * mamba(S) + HEAD


def test_experts_and_dense_feed_forwards_mix():
    mixed = stacks.Settings((block(), block(feed_forward=EXPERTS, repeat=3)))
    cost = account(wrapped(plain_body.Settings(mixed), vocab_size=V), S).stages[0]
    assert cost.feed_forward == 6 * S * D * F + 3 * (6 * (S * 2) * D * 20)
    assert cost.router == 3 * 2 * S * D * 4
    assert cost.layers == 4


# Against programs

PROGRAMS = {
    "sequence shared": loops(4, ends=0, order="sequence", keys_values="shared"),
    "vanilla, keys shared across layers": loops(keys_values="shared", shared="none"),
    "mixers shared": loops(shared="mixers"),
    "untied": plain(8, vocab_size=V, tie_embeddings=False),
    "qwen": plain(8, vocab_size=V, bias="all", qk_norm="head"),
    "olmo": loops(qk_norm="full", clip_qkv=1.0, window=5),
    "no mixer": wrapped(plain_body.Settings(stacks.Settings((block(mixer=None), block()))), vocab_size=V),
    "mor": routed(),
    "mor wide router": routed(depth=expert_choice.Settings(network="wide_mlp")),
    "mor auxiliary router": routed(depth=expert_choice.Settings(network="mlp", sampling="aux_router")),
    "mor additive": routed(depth=expert_choice.Settings(gating="additive", sampling="none")),
    "mor random": routed(depth=expert_choice.Settings(random=True)),
    "mor shared": routed(keys_values="shared"),
    "mor hybrid": routed(keys_values="hybrid"),
    "mixture of depths": recursive(4, 4, ends=0, depth="mixture_of_depths", shared="none", vocab_size=V),
    "experts with a predictor": plain(
        8,
        vocab_size=V,
        feed_forward=experts.Settings(
            choosing_experts.Settings(decode="predictor"), experts=4, expert_size=20, shared_size=24
        ),
    ),
    "mor of experts": routed(
        feed_forward=experts.Settings(choosing_experts.Settings(), experts=4, expert_size=20, gated=False)
    ),
    "dense and experts": wrapped(
        plain_body.Settings(stacks.Settings((block(repeat=2), block(feed_forward=EXPERTS)), repeats=2)), vocab_size=V
    ),
    "token": routed(depth=TOKEN),
    "token capacity shared": routed(depth=CAPACITY, keys_values="shared"),
    "recursive hybrid": hybrid("all"),
    "mor of state spaces": hybrid(),
    "mor of state spaces and experts": routed(mixer=MAMBA, feed_forward=EXPERTS),
}


def program(model: Settings, remat="none", batch: int = 1, seq: int = S):
    """(function of loss and gradients, its abstract arguments) of one model."""
    built = nnx.eval_shape(lambda: model.build(jax.random.key(0), remat=remat))
    graphdef, params, rest = nnx.split(built, nnx.Param, ...)

    def loss(params, rest, tokens):
        m = nnx.merge(graphdef, params, rest)
        out = m(tokens, deterministic=False, logits=False)
        nll, _ = cross_entropy_sum(out.hidden, m.head_weight(), tokens, jnp.ones(tokens.shape), seq // 2)
        return nll + out.aux.total() + out.aux.separate_total(), out.trace.scalars

    return jax.value_and_grad(loss, has_aux=True), (params, rest, jax.ShapeDtypeStruct((batch, seq), jnp.int32))


def traced_flops(step, arguments) -> int:
    """Matmul FLOPs of the traced program, without what no result needs.

    Differentiating a block of a scan computes its results again, which XLA leaves out where no gradient needs them.
    """
    traced = jax.make_jaxpr(step)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return dots(needed)


def dots(jaxpr) -> int:
    """2 m n k of every dot_general of a jaxpr, scans multiplied out. Where the platform decides, that of the default,
    which comes last."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            total += dots(eqn.params["branches"][-1].jaxpr)
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    total += times * dots(sub)
    return total


REMATS = [(name, "none") for name in PROGRAMS] + [
    ("mor shared", "layer"), ("sequence shared", "dots"), ("experts with a predictor", "layer"),
    ("experts with a predictor", "dots"), ("recursive hybrid", "layer"), ("recursive hybrid", "dots"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "remat"), REMATS)
def test_traced_training_program_has_exactly_the_matmuls_and_parameters_of_the_account(name, remat):
    model = PROGRAMS[name]
    step, arguments = program(model, remat)
    assert sum(leaf.size for leaf in jax.tree.leaves(arguments[0])) == parameters(model).total
    assert traced_flops(step, arguments) == account(model, S).train_flops(remat)


@pytest.mark.parametrize("model", [routed(), hybrid()], ids=["mor", "mor of state spaces"])
def test_compiled_training_program_has_the_matmuls_of_the_account(model):
    """Tokens that are not selected cost no matmul: nothing beyond the account, within 2%, is in what XLA compiled."""
    step, arguments = program(model, batch=2)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert matmul_flops(compiled.as_text()) == pytest.approx(2 * account(model, S).train_flops(), rel=0.02)


# Peaks


def test_peaks_are_known_by_exact_name_and_dtype():
    assert peak_of("NVIDIA H200", "bfloat16").flops == 989e12
    for kind, dtype in (("NVIDIA H200", "float32"), ("NVIDIA H", "bfloat16"), ("cpu", "bfloat16")):
        peak = peak_of(kind, dtype)
        assert peak.flops is None
        assert peak.why
    assert memory_of("TPU v5 lite") == 15.75 * 2**30 and memory_of("cpu") is None
