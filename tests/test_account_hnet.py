"""The account of H-Nets: published sizes and FLOPs, and formulas written out here."""

import dataclasses

import jax
import pytest
from hlo import matmul_flops
from jax.interpreters import partial_eval
from test_account import program, traced_flops

from adaptive import account_hnet
from adaptive.account import account, at_depths, dense_equivalent, paper_flops_per_token, parameters
from adaptive.errors import RecipeError
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.models.hnet_config import HNetConfig
from kernels_pallas import ssd
from kernels_pallas.ssd import chunked


def hnet(layout: str, *, vocab: int = 256, tied: bool = False, **settings) -> TransformerConfig:
    """An H-Net on bytes; settings in their order by stage, the released ones where not given."""
    own = HNetConfig(layout=layout, **settings)
    config = TransformerConfig(vocab_size=vocab, tie_embeddings=tied, hnet=own)
    config.validate()
    return config


def released(layout: str, widths: tuple[int, ...], intermediates: tuple[int, ...]) -> TransformerConfig:
    rotary = tuple(width // 32 for width in widths)  # half of each of 16 heads
    windows = (1023,) * (len(widths) - 1) + (-1,)
    return hnet(layout, widths=widths, intermediates=intermediates, heads=(16,), rotary_dims=rotary, windows=windows)


TWO = '["m4", ["T1m4", ["T{}"], "m4T1"], "m4"]'
XL = (1024, 1536, 2048), (0, 4096, 5504)
RELEASED = {
    "1stage_L": released('["m4", ["T22"], "m4"]', (1024, 1536), (0, 4096)),
    "1stage_XL": released('["m4", ["T24"], "m4"]', (1024, 2048), (0, 5504)),
    "2stage_L": released(TWO.format(26), (1024, 1024, 1536), (0, 2816, 4096)),
    "2stage_XL": released(TWO.format(27), *XL),
    "2stage_XL_chinese": released(TWO.format(30), *XL),
    "2stage_XL_code": released(TWO.format(28), *XL),
}

# Total, embeddings and head, each stage's own (released configurations, instantiated)
SIZES = {
    "1stage_L": (679_405_312, 524_288, (55_957_248, 622_923_776)),
    "1stage_XL": (1_270_833_920, 524_288, (55_957_248, 1_214_352_384)),
    "2stage_L": (874_315_264, 524_288, (55_957_248, 81_651_456, 736_182_272)),
    "2stage_XL": (1_603_492_224, 524_288, (55_957_248, 180_865_152, 1_366_145_536)),
    "2stage_XL_chinese": (1_755_285_888, 524_288, (55_957_248, 180_865_152, 1_517_939_200)),
    "2stage_XL_code": (1_654_090_112, 524_288, (55_957_248, 180_865_152, 1_416_743_424)),
}

# Tiny: Mamba-2 of 16 inner channels in heads of 4 with 6 states; attention of 2 heads; feed-forwards of 128.
D, E, SEQ, V = 8, 16, 40, 64
SSM = {"d_state": (6,), "ssm_head_dim": (4,), "ssm_block": (16,)}
TINY = {"widths": (D, E), "intermediates": (0, 100), "heads": (2,), "windows": (7, -1)}


def tiny(layout='["m2", ["T3"], "t1m1"]', **settings) -> TransformerConfig:
    return hnet(layout, vocab=V, **(TINY | SSM | settings))


def inside(layout='["m1", ["model"], "m1"]', *, router="none", **settings) -> TransformerConfig:
    """An H-Net around a model of three recursions of one layer."""
    own = HNetConfig(layout=layout, **(TINY | {"intermediates": (0,)} | SSM | settings))
    config = TransformerConfig(
        vocab_size=V, hidden_size=E, intermediate_size=24, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=8,
        recursions=3, router=RouterConfig(kind=router), hnet=own,
    )  # fmt: skip
    config.validate()
    return config


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
    sizes = parameters(RELEASED[name])
    assert sizes.total == total
    assert sizes.embedding + sizes.head == ends
    assert account_hnet.stage_parameters(RELEASED[name]) == stages
    assert sum(stages) + ends == total


def test_the_model_inside_brings_its_layers_and_routers_but_no_table():
    config = inside(router="expert_choice")
    alone = parameters(dataclasses.replace(config, hnet=HNetConfig()))
    sizes = parameters(config)
    assert sizes.embedding == V * D and sizes.head == 0
    assert sizes.routers == 2 * D * D + alone.routers == 2 * D * D + 3 * E
    assert account_hnet.stage_parameters(config)[-1] == (E - D) + alone.unique + alone.routers
    assert sizes.effective - sizes.unique == alone.effective - alone.unique > 0
    assert account_hnet.layers(config) == (2 + 3, 2 + 5)


def test_rules_have_no_parameters():
    learned, rule = (parameters(tiny(chunkers=(kind,))).total for kind in ("dynamic", "space"))
    assert learned - rule == 2 * D * D


# FLOPs


def test_forward_flops_of_one_stage():
    config = tiny(capacities=(0.5,))
    chunks = 24  # 20 slots, rounded up to a multiple of 8
    assert account_hnet.chunk_counts(config.hnet, SEQ) == (chunks,)
    by_name = {stage.name: stage for stage in account(config, SEQ).stages}
    assert by_name["encoder 0"].forward == 2 * (mamba(SEQ) + scan(16, 3))  # 40 positions: three blocks of 16
    attention = 4 * 2 * SEQ * D * D + 2 * 2 * SEQ * SEQ * D
    assert by_name["decoder 0"].forward == attention + mamba(SEQ) + scan(16, 3)
    assert by_name["chunking 0"].forward == 3 * 2 * SEQ * D * D
    layer = 4 * 2 * chunks * E * E + 2 * 2 * chunks * chunks * E + 3 * 2 * chunks * E * 128  # 100, rounded up
    assert by_name["main network"].forward == 3 * layer
    assert by_name["head"].forward == 2 * SEQ * D * V
    assert account(config, SEQ).forward_flops == sum(stage.forward for stage in by_name.values())


def test_useful_flops_count_pairs_in_the_window_and_in_the_block():
    config = tiny('["t1", ["T3"], "m1"]')
    by_name = {stage.name: stage for stage in account(config, SEQ).stages}
    pairs = sum(min(position + 1, 8) for position in range(SEQ))  # a window of 7 to the left
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


@pytest.mark.parametrize("positions", [1, 5, 16, 17, 40, 48, 100, 129])
def test_blocks_are_those_of_the_scan(positions):
    assert account_hnet.block_of(positions, 16) == chunked.block_of(positions, 16)
    assert account_hnet.SCAN_BLOCK == ssd.PLAIN_BLOCK


def test_two_stages_chunk_chunks():
    config = hnet('["m1", ["m1", ["T1"], "m1"], "m1"]', vocab=V, **(TINY | SSM | {
        "widths": (D, D, E), "intermediates": (0, 0, 100), "windows": (-1,), "capacities": (0.8, 0.5)}))  # fmt: skip
    assert account_hnet.chunk_counts(config.hnet, SEQ) == (32, 16)
    cost = account(config, SEQ)
    assert [(stage.name, stage.tokens) for stage in cost.stages] == [
        ("encoder 0", 40), ("chunking 0", 40), ("encoder 1", 32), ("chunking 1", 32), ("main network", 16),
        ("decoder 1", 32), ("decoder 0", 40), ("head", 40),
    ]  # fmt: skip
    assert cost.rows()[-1][1] == "5"


def test_useful_and_dense_are_the_account_at_other_counts():
    config = tiny(capacities=(0.5,))
    useful, paid, dense = account(config, SEQ, (10.5,)), account(config, SEQ), dense_equivalent(config, SEQ)
    assert useful.forward_flops < paid.forward_flops < dense.forward_flops
    assert dense == account(config, SEQ, (SEQ,)) == account(tiny(), SEQ)
    fixed = [[s.forward for s in cost.stages if s.name != "main network"] for cost in (useful, paid, dense)]
    assert fixed[0] == fixed[1] == fixed[2]
    with pytest.raises(RecipeError, match="2 chunk counts for the 1 chunking stages"):
        account(config, SEQ, (10, 5))


def test_capacities_on_a_schedule_count_at_their_end():
    scheduled = tiny(capacities=(0.9, 0.5), capacity_steps=(100,))
    assert account(scheduled, SEQ) == account(tiny(capacities=(0.5,)), SEQ)


def test_the_model_inside_is_counted_on_the_chunks():
    config = inside(router="expert_choice", capacities=(0.6,))
    alone = dataclasses.replace(config, hnet=HNetConfig())
    chunks = 24
    mine = {stage.name: stage for stage in account(config, SEQ).stages}
    for stage in account(alone, chunks).stages[:-1]:
        assert mine[stage.name] == stage
    assert mine["recursion 3"].tokens == 8
    dense = {stage.name: stage for stage in dense_equivalent(config, SEQ).stages}
    assert dense["recursion 3"].tokens == SEQ
    shallow = at_depths(config, SEQ, (1, 0, 0))
    assert [s.tokens for s in shallow.stages if s.recursion] == [chunks, 0, 0]


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_recomputation_adds_to_training(remat):
    config = tiny('["m2", ["T3"], "M1"]', intermediates=(100, 100))
    cost = account(config, SEQ)
    encoder, main, decoder = (next(s for s in cost.stages if s.name == n) for n in ("encoder 0", "main network",
                                                                                    "decoder 0"))  # fmt: skip
    more = cost.train_flops(remat) - cost.train_flops()
    if remat == "dots":
        assert more == encoder.state_space + main.attention + decoder.state_space
    else:  # all but each block's last matmul: the output projection, or down
        out, down, main_down = 2 * SEQ * 2 * D * D, 2 * SEQ * 128 * D, 2 * SEQ * 128 * E
        assert more == encoder.forward - 2 * out + decoder.forward - down + main.forward - 3 * main_down


# The paper's accounting


@pytest.mark.parametrize(("name", "ratio", "printed"), [("1stage_L", 4.8, 0.433), ("1stage_XL", 4.7, 0.716)])
def test_paper_accounting_gives_the_printed_gflops_per_byte(name, ratio, printed):
    flops = account_hnet.paper_flops_per_byte(RELEASED[name], 8192, (ratio,))
    assert flops / 1e9 == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize(("width", "intermediate", "printed"), [(1536, 4096, 0.420), (2048, 5504, 0.695)])
def test_paper_accounting_of_the_token_baselines(width, intermediate, printed):
    config = hnet('["T24"]', vocab=50257, tied=True, widths=(width,), intermediates=(intermediate,), heads=(16,))
    flops = account_hnet.paper_flops_per_byte(config, 1792, bytes_per_token=4.6)
    assert flops / 1e9 == pytest.approx(printed, abs=6e-4)


def test_the_plan_counts_chunks_at_their_target():
    config = RELEASED["1stage_L"]
    assert paper_flops_per_token(config, 8192) == account_hnet.paper_flops_per_byte(config, 8192, (6,))


# Against programs

PROGRAMS = {
    "one stage": tiny(capacities=(0.5,)),
    "attention and feed-forwards": tiny('["T1M1", ["T2"], "t2"]', intermediates=(100, 120), capacities=(0.5,)),
    "no chunking": hnet('["m1T1"]', vocab=V, **(TINY | SSM | {
        "widths": (D,), "intermediates": (100,), "windows": (7,)})),
    "two stages": hnet('["m2", ["T1m1", ["T2"], "m1T1"], "m2"]', vocab=V, **(TINY | SSM | {
        "widths": (D, D, E), "intermediates": (0, 60, 100), "windows": (-1,), "capacities": (0.8, 0.6)})),
    "a rule, summed": tiny(chunkers=("space",), merge="sum", capacities=(0.5,)),
    "similarity": tiny(chunkers=("similarity",), merge="sum", capacities=(0.5,)),
    "around recursions": inside(router="expert_choice", capacities=(0.6,)),
    "around a transformer": inside(capacities=(0.6,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_parameters_are_those_of_the_model(name):
    _, (params, _, _) = program(PROGRAMS[name], seq=SEQ)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters(PROGRAMS[name]).total


@pytest.mark.parametrize(
    ("name", "remat"),
    [(name, "none") for name in PROGRAMS]
    + [(name, remat) for name in ("one stage", "two stages", "around recursions") for remat in ("layer", "dots")],
)
def test_traced_training_program_has_exactly_the_matmuls_of_the_account(name, remat):
    config = PROGRAMS[name]
    step, arguments = program(config, remat, seq=SEQ)
    traced = jax.make_jaxpr(step)(*arguments).jaxpr
    # Differentiating a block of the scan computes its results again, which XLA leaves out where no gradient needs them.
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    assert traced_flops(needed) == account(config, SEQ).train_flops(remat)


@pytest.mark.parametrize("name", ["one stage", "two stages", "around recursions"])
def test_compiled_training_program_has_the_matmuls_of_the_account(name):
    """Positions that begin no chunk cost the inner network no matmul: nothing beyond the account, within 2%."""
    step, arguments = program(PROGRAMS[name], batch=2, seq=SEQ)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert matmul_flops(compiled.as_text()) == pytest.approx(2 * account(PROGRAMS[name], SEQ).train_flops(), rel=0.02)
