"""The account of H-Nets: published sizes and FLOPs, and formulas written out here."""

import dataclasses

import jax
import pytest
from hlo import matmul_flops
from shapes import block, hnet, mor, plain, recursive, with_body
from test_account import program, traced_flops

from adaptive.account import (
    account,
    at_depths,
    chunk_counts,
    dense_equivalent,
    layer_counts,
    paper_flops_per_byte,
    paper_flops_per_token,
    parameters,
    recursion_capacities,
    stage_parameters,
)
from adaptive.errors import RecipeError
from adaptive.layers import stack as stacks
from adaptive.layers.feed_forwards import experts
from adaptive.layers.mixers import mamba2
from adaptive.layers.moe.routers import expert_choice
from adaptive.models.language_model import Settings
from adaptive.recipe import load
from kernels_pallas import ssd

pytestmark = pytest.mark.compiles

# Total, embeddings and head, each stage's own (released configurations, instantiated)
SIZES = {
    "hnet_1stage_l": (679_405_312, 524_288, (55_957_248, 622_923_776)),
    "hnet_1stage_xl": (1_270_833_920, 524_288, (55_957_248, 1_214_352_384)),
    "hnet_2stage_l": (874_315_264, 524_288, (55_957_248, 81_651_456, 736_182_272)),
    "hnet_2stage_xl": (1_603_492_224, 524_288, (55_957_248, 180_865_152, 1_366_145_536)),
    "hnet_2stage_chinese": (1_755_285_888, 524_288, (55_957_248, 180_865_152, 1_517_939_200)),
    "hnet_2stage_code": (1_654_090_112, 524_288, (55_957_248, 180_865_152, 1_416_743_424)),
}

# Tiny: Mamba-2 of 16 inner channels in heads of 4 with 6 states; attention of 2 heads; feed-forwards of 128.
D, E, SEQ, V = 8, 16, 40, 64
TINY = {"widths": (D, E), "hidden": 128, "window": (8, 0), "rotary_dim": 0, "d_state": 6, "ssm_block": 16,
        "vocab_size": V, "tie_embeddings": True}  # fmt: skip


def tiny(layout=("m2", ("T3",), "t1m1"), **settings) -> Settings:
    return hnet(layout, **(TINY | settings))


def two(**settings) -> Settings:
    return tiny(("m2", ("T1m1", ("T2",), "m1T1"), "m2"), widths=(D, D, E), window=0, **settings)


def inside(depth="all", **settings) -> Settings:
    """An H-Net around a model of three recursions of one layer."""
    inner = recursive(5, 3, depth=depth, width=E, heads=2, kv_heads=1, hidden=24)
    return tiny(("m1", (inner.body,), "m1"), **settings)


def scan(q: int, blocks: int, width: int = D, n: int = 6) -> int:
    """Forward FLOPs of a scan of blocks of q positions."""
    return blocks * (2 * q * q * n + 2 * q * q * 2 * width + 2 * 2 * q * 2 * width * n)


def mamba(positions: int, width: int = D, n: int = 6) -> int:
    """Forward FLOPs of the matmuls of one Mamba-2 layer, without its scan."""
    inner = 2 * width
    z = x = out = 2 * positions * width * inner
    return z + x + out + 2 * positions * width * (2 * n + inner // 4)


# Parameters


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_released_ones(name):
    total, ends, stages = SIZES[name]
    model = load(name).model
    sizes = parameters(model)
    assert sizes.total == total
    assert sizes.embedding + sizes.head == ends
    assert stage_parameters(model) == stages
    assert sum(stages) + ends == total


def test_the_model_inside_brings_its_layers_and_routers_but_no_table():
    model = inside("expert_choice")
    alone = parameters(dataclasses.replace(model, width=E, body=model.body.inner))
    sizes = parameters(model)
    assert sizes.embedding == V * D and sizes.head == 0
    assert sizes.routers == 2 * D * D + alone.routers == 2 * D * D + 3 * E
    assert stage_parameters(model)[-1] == (E - D) + alone.unique + alone.routers
    assert sizes.effective - sizes.unique == alone.effective - alone.unique > 0
    assert layer_counts(model) == (2 + 3, 2 + 5)


def test_rules_have_no_parameters():
    learned, rule = (parameters(tiny(chunker=kind)).total for kind in ("dynamic", "space"))
    assert learned - rule == 2 * D * D


# FLOPs


def test_forward_flops_of_one_stage():
    model = tiny(capacities=(0.5,))
    chunks = 24  # 20 slots, rounded up to a multiple of 8
    assert chunk_counts(model, SEQ) == (chunks,)
    by_name = {stage.name: stage for stage in account(model, SEQ).stages}
    assert by_name["encoder 0"].forward == 2 * (mamba(SEQ) + scan(16, 3))  # 40 positions: three blocks of 16
    attention = 4 * 2 * SEQ * D * D + 2 * 2 * SEQ * SEQ * D
    assert by_name["decoder 0"].forward == attention + mamba(SEQ) + scan(16, 3)
    assert by_name["chunking 0"].forward == 3 * 2 * SEQ * D * D
    layer = 4 * 2 * chunks * E * E + 2 * 2 * chunks * chunks * E + 3 * 2 * chunks * E * 128
    assert by_name["main network"].forward == 3 * layer
    assert by_name["head"].forward == 2 * SEQ * D * V
    assert account(model, SEQ).forward_flops == sum(stage.forward for stage in by_name.values())


def test_useful_flops_count_pairs_in_the_window_and_in_the_block():
    by_name = {stage.name: stage for stage in account(tiny(("t1", ("T3",), "m1")), SEQ).stages}
    pairs = sum(min(position + 1, 8) for position in range(SEQ))
    assert by_name["encoder 0"].attention_useful == pytest.approx(4 * D * pairs)
    # Blocks of 16, 16 and 8: the last is not full, and its share of the pairs is taken as any position's.
    pairs = SEQ * 17 / 2
    assert by_name["decoder 0"].state_space_useful == pytest.approx(2 * pairs * (6 + 2 * D) + 4 * SEQ * 2 * D * 6)
    stage = by_name["decoder 0"]
    assert stage.train_useful == pytest.approx(3 * (mamba(SEQ) + stage.state_space_useful))


def test_training_repeats_a_part_of_the_scan():
    stage = account(tiny(), SEQ).stages[0]
    assert stage.state_space_again == 2 * 3 * (2 * 16 * 16 * 6 + 2 * 2 * 16 * 2 * D * 6)
    assert stage.train == 3 * stage.forward + stage.state_space_again


@pytest.mark.parametrize(("positions", "blocks"), [(1, (1, 1)), (64, (1, 64)), (65, (2, 40)), (300, (5, 64))])
def test_blocks_are_equal_and_few(positions, blocks):
    assert ssd.plain_blocks(positions) == blocks
    assert ssd.plain_blocks(positions, 16) == (-(-positions // 16), min(positions, 16))


def test_two_stages_chunk_chunks():
    model = tiny(("m1", ("m1", ("T1",), "m1"), "m1"), widths=(D, D, E), window=0, capacities=(0.8, 0.5))
    assert chunk_counts(model, SEQ) == (32, 16)
    cost = account(model, SEQ)
    assert [(stage.name, stage.tokens) for stage in cost.stages] == [
        ("encoder 0", 40), ("chunking 0", 40), ("encoder 1", 32), ("chunking 1", 32), ("main network", 16),
        ("decoder 1", 32), ("decoder 0", 40), ("head", 40),
    ]  # fmt: skip
    assert cost.rows()[-1][1] == "5"


def test_useful_and_dense_are_the_account_at_other_counts():
    model = tiny(capacities=(0.5,))
    useful, paid, dense = account(model, SEQ, (10.5,)), account(model, SEQ), dense_equivalent(model, SEQ)
    assert useful.forward_flops < paid.forward_flops < dense.forward_flops
    assert dense == account(model, SEQ, (SEQ,)) == account(tiny(), SEQ)
    fixed = [[s.forward for s in cost.stages if s.name != "main network"] for cost in (useful, paid, dense)]
    assert fixed[0] == fixed[1] == fixed[2]
    with pytest.raises(RecipeError, match="2 chunk counts for 1 chunking stage: "):
        account(model, SEQ, (10, 5))


def test_capacities_on_a_schedule_count_at_their_end():
    scheduled = with_body(tiny(), capacities=(0.9, 0.5), capacity_steps=(100,))
    assert account(scheduled, SEQ) == account(tiny(capacities=(0.5,)), SEQ)


def test_the_model_inside_is_counted_on_the_chunks():
    model = inside("expert_choice", capacities=(0.6,))
    chunks = 24
    assert recursion_capacities(model, SEQ) == (24, 16, 8)
    mine = {stage.name: stage for stage in account(model, SEQ).stages}
    for stage in account(dataclasses.replace(model, width=E, body=model.body.inner), chunks).stages[:-1]:
        assert mine[stage.name] == stage
    assert mine["recursion 3"].tokens == 8
    dense = {stage.name: stage for stage in dense_equivalent(model, SEQ).stages}
    assert dense["recursion 3"].tokens == SEQ
    shallow = at_depths(model, SEQ, (1, 0, 0))
    assert [s.tokens for s in shallow.stages if s.recursion] == [chunks, 0, 0]


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_recomputation_adds_to_training(remat):
    cost = account(tiny(("m2", ("T3",), "M1")), SEQ)
    encoder, main, decoder = (next(s for s in cost.stages if s.name == n) for n in ("encoder 0", "main network",
                                                                                    "decoder 0"))  # fmt: skip
    more = cost.train_flops(remat) - cost.train_flops()
    if remat == "dots":
        assert more == encoder.state_space + main.attention + decoder.state_space
    else:  # all but each block's last matmul: the output projection, or down
        out, down, main_down = 2 * SEQ * 2 * D * D, 2 * SEQ * 128 * D, 2 * SEQ * 128 * E
        assert more == encoder.forward - 2 * out + decoder.forward - down + main.forward - 3 * main_down


# The paper's accounting


@pytest.mark.parametrize(("name", "ratio", "printed"), [("hnet_1stage_l", 4.8, 0.433), ("hnet_1stage_xl", 4.7, 0.716)])
def test_paper_accounting_gives_the_printed_gflops_per_byte(name, ratio, printed):
    assert paper_flops_per_byte(load(name).model, 8192, (ratio,)) / 1e9 == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize(("width", "hidden", "printed"), [(1536, 4096, 0.420), (2048, 5504, 0.695)])
def test_paper_accounting_of_the_token_baselines(width, hidden, printed):
    model = plain(24, width=width, hidden=hidden, heads=16, kv_heads=0, head_dim=width // 16, vocab_size=50257)
    flops = paper_flops_per_byte(model, 1792, bytes_per_token=4.6)
    assert flops / 1e9 == pytest.approx(printed, abs=6e-4)


def test_the_plan_counts_chunks_at_their_target():
    model = load("hnet_1stage_l").model
    assert paper_flops_per_token(model, 8192) == paper_flops_per_byte(model, 8192, (6,))


def test_a_recursion_inside_counts_as_executed():
    around, inner = inside(), inside().body.inner
    executed = sum(part.forward for part in inner.cost(E, round(SEQ / 3))) / SEQ
    mixer = 2 * D * (4 * D + 2 * 6 + 4) + 4 * D * D + 6 * 2 * D * 6 + 2 * D * 4 + 5 * D
    assert paper_flops_per_byte(around, SEQ) == pytest.approx(4 * V * D + 2 * 3 * D * D + 2 * mixer + executed)


# Against programs

MAMBA = mamba2.Settings(d_state=6, head_dim=4, block=16)
EXPERTS = experts.Settings(expert_choice.Settings(), experts=4, expert_size=20)


def deep() -> Settings:
    """Two stages, experts in the outer encoder, and inside a Mixture-of-Recursions whose experts sit between Mamba-2
    layers."""
    pattern = (block(mixer=MAMBA, feed_forward=None), block(mixer=MAMBA, feed_forward=EXPERTS))
    inner = mor(6, 3, ends=0, pattern=pattern, width=E)
    model = two(capacities=(0.8, 0.8))
    own = dataclasses.replace(model.body.inner, inner=inner.body)
    return with_body(model, encoder=stacks.Settings((block(mixer=MAMBA, feed_forward=EXPERTS),)), inner=own)


PROGRAMS = {
    "one stage": tiny(capacities=(0.5,)),
    "attention and feed-forwards": tiny(("T1M1", ("T2",), "t2"), capacities=(0.5,)),
    "no chunking": tiny(("m1T1",)),
    "two stages": two(capacities=(0.8, 0.6)),
    "a rule, summed": tiny(chunker="space", merge="sum", capacities=(0.5,)),
    "similarity": tiny(chunker="similarity", merge="sum", capacities=(0.5,)),
    "around recursions": inside("expert_choice", capacities=(0.6,)),
    "all of it": deep(),
}
REMATS = [(name, "none") for name in PROGRAMS] + [
    ("attention and feed-forwards", "layer"),
    ("attention and feed-forwards", "dots"),
]


@pytest.mark.parametrize(("name", "remat"), REMATS)
def test_traced_training_program_has_exactly_the_matmuls_and_parameters_of_the_account(name, remat):
    model = PROGRAMS[name]
    step, arguments = program(model, remat, seq=SEQ)
    assert sum(leaf.size for leaf in jax.tree.leaves(arguments[0])) == parameters(model).total
    assert traced_flops(step, arguments) == account(model, SEQ).train_flops(remat)


def test_compiled_training_program_has_the_matmuls_of_the_account():
    """Positions that begin no chunk cost the inner network no matmul: nothing beyond the account, within 2%."""
    model = PROGRAMS["around recursions"]
    step, arguments = program(model, batch=2, seq=SEQ)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert matmul_flops(compiled.as_text()) == pytest.approx(2 * account(model, SEQ).train_flops(), rel=0.02)
