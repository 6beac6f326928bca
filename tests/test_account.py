"""The compute account against formulas written out here, against traced programs, and against compiled ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hlo import matmul_flops

from adaptive.account import account, at_depths, dense_equivalent, paper_flops_per_token, parameters
from adaptive.errors import RecipeError
from adaptive.layers.moe_config import MoEConfig
from adaptive.models.build import build_model
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.objectives.cross_entropy import cross_entropy_sum
from adaptive.peaks import peak_of

D, F, V, H, K, HD, S = 32, 48, 64, 4, 2, 8, 24
BASE = TransformerConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=8, num_heads=H, num_kv_heads=K, head_dim=HD
)
EXPERT = RouterConfig(kind="expert_choice")
EXPERTS = MoEConfig(router="expert_choice", experts=4, expert_size=20)
TOKEN = RouterConfig(kind="token_choice", activation="softmax", alpha=1.0)


def model(recursions=1, router=RouterConfig(), **settings) -> TransformerConfig:  # noqa: B008
    config = dataclasses.replace(BASE, recursions=recursions, router=router, **settings)
    config.validate()
    return config


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
    (model(), 8 * layer(S, S) + HEAD),
    (model(3), 8 * layer(S, S) + HEAD),
    (model(4, sharing="sequence"), 8 * layer(S, S) + HEAD),
    (model(3, kv="shared"), 4 * layer(S, S) + 4 * layer(S, S, own_keys=False) + HEAD),
    (
        model(2, EXPERT),
        2 * layer(S, S) + 3 * (layer(24, 24) + layer(12, 12)) + ROUTER * (24 + 24) + HEAD,
    ),
    (
        model(3, EXPERT),
        2 * layer(S, S) + 2 * (layer(24, 24) + layer(16, 16) + layer(8, 8)) + ROUTER * (24 + 24 + 16) + HEAD,
    ),
    (
        model(4, EXPERT, sharing="cycle"),
        2 * (layer(24, 24) + layer(18, 18) + layer(12, 12) + layer(6, 6)) + ROUTER * (24 + 24 + 18 + 12) + HEAD,
    ),
    (
        model(3, EXPERT, kv="shared"),
        2 * layer(S, S)
        + 2 * (layer(24, 24) + layer(16, 24, own_keys=False) + layer(8, 24, own_keys=False))
        + ROUTER * (24 + 24 + 16)
        + HEAD,
    ),
    (
        model(3, EXPERT, kv="hybrid"),
        2 * layer(S, S) + 2 * (layer(24, 24) + layer(16, 24) + layer(8, 24)) + ROUTER * (24 + 24 + 16) + HEAD,
    ),
    (model(3, TOKEN), 8 * layer(S, S) + 3 * ROUTER * S + HEAD),
    (
        model(3, dataclasses.replace(TOKEN, execution="capacity")),
        2 * layer(S, S) + 2 * (layer(24, 24) + layer(16, 16) + layer(8, 8)) + 3 * ROUTER * S + HEAD,
    ),
]


@pytest.mark.parametrize(("config", "flops"), FORWARD)
def test_forward_flops(config, flops):
    assert account(config, S).forward_flops == flops


@pytest.mark.parametrize(("config", "flops"), FORWARD)
def test_training_is_three_forwards(config, flops):
    assert account(config, S).train_flops() == 3 * flops


def test_useful_attention_counts_causal_pairs():
    pairs = sum(q + 1 for q in range(S))
    useful = 8 * (layer(S, S) - 4 * S * S * H * HD + 4 * pairs * H * HD) + HEAD
    assert account(model(), S).forward_flops_per_token * S == pytest.approx(useful)
    assert account(model(), S).train_flops_per_token * S == pytest.approx(3 * useful)


def test_useful_attention_counts_pairs_within_the_window():
    pairs = sum(min(q + 1, 5) for q in range(S))
    useful = 8 * (layer(S, S) - 4 * S * S * H * HD + 4 * pairs * H * HD) + HEAD
    assert account(model(attention_window=5), S).forward_flops_per_token * S == pytest.approx(useful)
    assert account(model(attention_window=S), S) == account(model(), S)


def test_auxiliary_router_has_no_input_gradient():
    mlp = dataclasses.replace(EXPERT, network="mlp", sampling="aux_router")
    first, second = 2 * D * (2 * D), 2 * (2 * D)
    expected = (24 + 24 + 16) * (3 * (first + second) + 2 * first + 3 * second)
    assert sum(stage.router_train for stage in account(model(3, mlp), S).stages) == expected


def test_dense_equivalent_takes_every_step():
    routed = model(3, EXPERT)
    dense = dense_equivalent(routed, S)
    assert dense.forward_flops == 8 * layer(S, S) + 3 * ROUTER * S + HEAD
    assert account(routed, S).forward_flops < dense.forward_flops


def test_account_of_measured_depths():
    config = model(3, TOKEN)
    assert at_depths(config, S, (0, 0, 1)) == dense_equivalent(config, S)
    shallow = at_depths(config, S, (1, 0, 0)).forward_flops
    assert shallow == 4 * layer(S, S) + 3 * ROUTER * S + HEAD
    thirds = at_depths(config, S, (1 / 3, 1 / 3, 1 / 3)).forward_flops
    balanced = account(model(3, dataclasses.replace(TOKEN, execution="capacity")), S).forward_flops
    assert thirds == pytest.approx(balanced)
    with pytest.raises(RecipeError, match="expected 3 that sum to 1"):
        at_depths(config, S, (0.5, 0.1, 0.1))
    with pytest.raises(RecipeError, match="expected 3"):
        at_depths(config, S, (0.5, 0.5))


def test_rows_are_a_table_whose_parts_sum_up():
    header, *stages, total = account(model(3, EXPERT), S).rows()
    assert {len(row) for row in (header, *stages, total)} == {len(header)}
    assert [row[0] for row in stages] == [
        "first layer", "recursion 1", "recursion 2", "recursion 3", "last layer", "head"
    ]  # fmt: skip
    column = header.index("total")
    assert sum(float(row[column]) for row in stages) == pytest.approx(float(total[column]), abs=0.01)
    assert int(total[1]) == 8


def test_paper_accounting_ignores_grouped_keys_and_counts_forward_alone():
    lin, att = 8 * D * D + 6 * D * F, 2 * D * S
    assert paper_flops_per_token(model(), S) == 8 * (lin + att)
    thirds = [1, 2 / 3, 1 / 3]
    own = 2 * (lin + att) + 2 * sum(c * lin + c * c * att for c in thirds)
    assert paper_flops_per_token(model(3, EXPERT), S) == pytest.approx(own)
    assert paper_flops_per_token(model(3, TOKEN), S) == pytest.approx(own)
    shared = 2 * (lin + att) + 2 * sum(c * (lin - (4 * D * D if c < 1 else 0)) + c * att for c in thirds)
    assert paper_flops_per_token(model(3, EXPERT, kv="shared"), S) == pytest.approx(shared)


# Against programs

PROGRAMS = {
    "vanilla": model(),
    "recursive": model(3),
    "sequence shared": model(4, sharing="sequence", kv="shared"),
    "vanilla, keys shared across layers": model(3, kv="shared", share_parameters=False),
    "untied": model(tie_embeddings=False),
    "qwen": model(attention_bias=True, qk_norm="head"),
    "olmo": model(3, qk_norm="full", clip_qkv=1.0, attention_window=5),
    "mor": model(3, EXPERT),
    "mor wide router": model(3, dataclasses.replace(EXPERT, network="wide_mlp")),
    "mor auxiliary router": model(3, dataclasses.replace(EXPERT, network="mlp", sampling="aux_router")),
    "mor additive": model(3, dataclasses.replace(EXPERT, gating="additive", sampling="none")),
    "mor random": model(3, dataclasses.replace(EXPERT, random=True)),
    "mor shared": model(3, EXPERT, kv="shared"),
    "mor hybrid": model(3, EXPERT, kv="hybrid"),
    "experts that choose": model(moe=EXPERTS),
    "experts with a predictor": model(moe=dataclasses.replace(EXPERTS, options=("decode=predictor",), shared_size=24)),
    "mor of experts": model(3, EXPERT, moe=dataclasses.replace(EXPERTS, gated=False)),
    "token": model(3, TOKEN),
    "token capacity shared": model(3, dataclasses.replace(TOKEN, execution="capacity"), kv="shared"),
}


def program(config: TransformerConfig, remat="none", batch: int = 1, seq: int = S):
    """(function of loss and gradients, its abstract arguments) of one model."""
    built = nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0), remat=remat))
    graphdef, params, rest = nnx.split(built, nnx.Param, ...)

    def loss(params, rest, tokens):
        m = nnx.merge(graphdef, params, rest)
        out = m(tokens, deterministic=False, logits=False)
        nll, _ = cross_entropy_sum(out.hidden, m.head_weight(), tokens, jnp.ones(tokens.shape), seq // 2)
        return nll + out.aux.total() + out.aux.separate_total(), out.trace.scalars

    return jax.value_and_grad(loss, has_aux=True), (params, rest, jax.ShapeDtypeStruct((batch, seq), jnp.int32))


def traced_flops(jaxpr) -> int:
    """2 m n k of every dot_general of a jaxpr, scans multiplied out. Where the platform decides, that of the default,
    which comes last."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            total += traced_flops(eqn.params["branches"][-1].jaxpr)
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
                    total += times * traced_flops(sub)
    return total


@pytest.mark.parametrize("name", PROGRAMS)
def test_parameters_are_those_of_the_model(name):
    _, (params, _, _) = program(PROGRAMS[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters(PROGRAMS[name]).total


@pytest.mark.parametrize(
    ("name", "remat"),
    [(name, "none") for name in PROGRAMS]
    + [(name, remat) for name in ("vanilla", "mor", "mor shared", "sequence shared") for remat in ("layer", "dots")],
)
def test_traced_training_program_has_exactly_the_matmuls_of_the_account(name, remat):
    config = PROGRAMS[name]
    step, arguments = program(config, remat)
    assert traced_flops(jax.make_jaxpr(step)(*arguments).jaxpr) == account(config, S).train_flops(remat)


@pytest.mark.parametrize(
    "config",
    [model(), model(3), model(2, EXPERT), model(3, EXPERT), model(4, EXPERT, sharing="cycle")],
    ids=["vanilla", "recursive", "mor 2", "mor 3", "mor 4"],
)
def test_compiled_training_program_has_the_matmuls_of_the_account(config):
    """Tokens that are not selected cost no matmul: nothing beyond the account, within 2%, is in what XLA compiled."""
    step, arguments = program(config, batch=2)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert matmul_flops(compiled.as_text()) == pytest.approx(2 * account(config, S).train_flops(), rel=0.02)


# Peaks


def test_peaks_are_known_by_exact_name_and_dtype():
    assert peak_of("NVIDIA H200", "bfloat16").flops == 989e12
    for kind, dtype in (("NVIDIA H200", "float32"), ("NVIDIA H", "bfloat16"), ("cpu", "bfloat16")):
        peak = peak_of(kind, dtype)
        assert peak.flops is None
        assert peak.why
