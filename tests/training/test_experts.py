"""What experts did over an interval: against direct counts, over steps, through a real step and evaluation."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from train_steps import compiled_step, packed_batch

from adaptive.data.tokenizers import ByteCounts
from adaptive.layers import stack
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import token_choice
from adaptive.models.bodies import plain
from adaptive.models.facts import Experts
from adaptive.runs.state import abstract_model
from adaptive.training.experts import layers_of, scalar_columns
from adaptive.training.log import MetricsLog, read_rows
from adaptive.training.metrics import Meter, StepCost
from adaptive.training.parts import PartSums
from adaptive.training.step import make_eval_step

pytestmark = pytest.mark.compiles

TOKENS, EXPERTS, CHOICES = 40, 4, 6
PART = "stack/blocks/1/feed_forward"


def known(*layers, part=PART):
    """What a model's facts say of experts in these layers."""
    return Experts(part, f"model.body.{part.replace('/', '.')}", None, layers)


def drawn(rng):
    """One call: a router's wishes bool[tokens, choices] and what of them is computed bool[tokens, experts]."""
    wanted = rng.random((TOKENS, CHOICES)) < np.array([0.7, 0.3, 0.0, 0.1, 0.2, 0.2])
    kept = wanted[:, :EXPERTS] & (rng.random((TOKENS, EXPERTS)) < 0.8)
    return wanted, kept, rng.normal(size=(TOKENS, CHOICES))


def sums_of(*calls, part=PART):
    """What a step returns of such calls."""

    def one(wanted, kept, logits):
        z = np.log(np.exp(logits).sum(-1))
        p = np.exp(logits - z[:, None])
        return {
            "calls": 1.0,
            "tokens": float(TOKENS),
            "claimed": wanted.sum(0),
            "kept": kept.sum(0),
            "experts_per_token": np.bincount(kept.sum(-1), minlength=17),
            "dropped": wanted[:, :EXPERTS].sum() - kept.sum(),
            "lost": 2.0,
            "z": (z**2).sum(),
            "entropy": -(p * np.log(p)).sum(),
            "top": p.max(-1).sum(),
            "least": np.arange(EXPERTS) / 10,
        }

    made = [one(*call) for call in calls]
    return {f"told/{part}:{name}": np.stack([np.asarray(m[name], np.float32) for m in made]) for name in made[0]}


def test_columns_equal_a_direct_count_over_the_steps():
    rng = np.random.default_rng(0)
    steps = [(drawn(rng), drawn(rng)) for _ in range(3)]
    sums = PartSums([known(1, 3)])
    for step in steps:
        sums.add(sums_of(*step))
    row = sums.columns()
    assert row["experts/by_layer/layer"] == [1, 3]
    for i in range(2):
        wanted = np.concatenate([step[i][0] for step in steps])
        kept = np.concatenate([step[i][1] for step in steps])
        logits = np.concatenate([step[i][2] for step in steps])
        load = wanted[:, :EXPERTS].sum(0)
        share = load / load.sum()
        z = np.log(np.exp(logits).sum(-1))
        p = np.exp(logits - z[:, None])
        entropy = -sum(s * math.log(s) for s in share if s)
        expected = {
            "load_max_over_mean": load.max() / load.mean(),
            "load_min_over_mean": 0.0,
            "load_std_over_mean": load.std() / load.mean(),
            "load_entropy": entropy,
            "load_entropy_normalised": entropy / math.log(EXPERTS),
            "empty": 1,
            "empty_fraction": 0.25,
            "dropped_fraction": 1 - kept.sum() / load.sum(),
            "lost_fraction": 6 / load.sum(),
            "per_token": kept.sum(-1).mean(),
            "without_expert": (kept.sum(-1) == 0).mean(),
            "router_z": (z**2).mean(),
            "router_entropy": -(p * np.log(p)).sum(-1).mean(),
            "top_probability": p.max(-1).mean(),
            "zero_share": wanted[:, EXPERTS:].sum() / wanted.sum(),
            "least": 0.15,
        }
        for name, value in expected.items():
            assert row[f"experts/by_layer/{name}"][i] == pytest.approx(value, rel=2e-5, abs=1e-7), name
        histogram = [(kept.sum(-1) == n).mean() for n in range(EXPERTS + 1)]
        shown = row["experts/by_layer/experts_per_token"][i]
        np.testing.assert_allclose(shown, histogram[: len(shown)], atol=1e-5)
        assert sum(shown) == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(row["experts/load"][i], share, atol=1e-4)
    for name in expected:
        assert row[f"experts/{name}"] == pytest.approx(np.mean(row[f"experts/by_layer/{name}"]), rel=1e-4), name


def test_no_column_of_zero_experts_without_them_and_none_at_all_without_routing():
    wanted, kept, logits = drawn(np.random.default_rng(1))
    sums = PartSums()
    sums.add(sums_of((wanted[:, :EXPERTS], kept, logits[:, :EXPERTS])))
    assert "experts/zero_share" not in sums.columns() and sums.columns()["experts/by_layer/layer"] == [0]
    sums.clear()
    sums.add({"ce": 1.0})
    assert sums.columns() == {}


def test_a_routers_own_sums_are_shares_of_what_they_count():
    step = sums_of(drawn(np.random.default_rng(5)))
    tokens = float(TOKENS)
    own = {
        "touched_8": 12.0, "chunks_8": 5.0, "reused": 3.0, "reusable": 12.0, "quantile": 0.6, "quantiles": 2.0,
        "big": 10.0, "chunk_sparsity": 0.5, "loops": [tokens / 4, 3 * tokens / 4],
    }  # fmt: skip
    step |= {f"told/{PART}:{name}": np.array([value]) for name, value in own.items()}
    sums = PartSums()
    sums.add(step)
    sums.add(step)
    row = sums.columns()
    expected = {
        "cls_8": 1 - 12 / (5 * CHOICES), "reuse": 0.25, "threshold": 0.3, "big_share": 0.25, "chunk_sparsity": 0.5,
        "loops": 1.75,
    }  # fmt: skip
    for name, value in expected.items():
        assert row[f"experts/{name}"] == pytest.approx(value), name
    assert not {"experts/reusable", "experts/quantiles", "experts/chunks_8", "experts/touched_8"} & set(row)


def test_a_call_that_no_token_reached_is_left_out_of_means(tmp_path):
    call = drawn(np.random.default_rng(2))
    step = sums_of(call, call)
    for value in step.values():
        value[1] = 0.0
    sums = PartSums()
    sums.add(step)
    row = sums.columns()
    assert row["experts/load"][1] is None and math.isnan(row["experts/by_layer/empty"][1])
    assert row["experts/per_token"] == pytest.approx(call[1].sum(-1).mean())
    MetricsLog.open(tmp_path, 0).write({"step": 1, **row})
    assert read_rows(tmp_path)[0]["experts/by_layer/router_z"][1] is None


def test_a_meter_adds_up_an_interval_and_a_skipped_step_adds_nothing(tmp_path):
    rng = np.random.default_rng(3)
    meter = Meter(StepCost(TOKENS, 1.0, 1.0, 1.0), experts=[known(0, 1)])
    first, second, bad = ((drawn(rng), drawn(rng)) for _ in range(3))
    for step, skipped in ((first, 0), (bad, 1), (second, 0)):
        meter.add({"ce": 1.0, "skipped": np.int32(skipped), **sums_of(*step)})
    row = meter.row(3)
    direct = PartSums([known(0, 1)])
    direct.add(sums_of(*first))
    direct.add(sums_of(*second))
    assert {name: value for name, value in row.items() if name.startswith("experts/")} == direct.columns()
    assert row["skipped"] == 1 and row["ce"] == 1.0
    MetricsLog.open(tmp_path, 0).write(row)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["experts/load"] == row["experts/load"]
    meter.add({"ce": 1.0, "skipped": 1, **sums_of(*bad)})
    assert not [name for name in meter.row(4) if name.startswith("experts/")]


def test_layers_get_names_of_their_own_where_only_scalars_are_understood():
    sums = PartSums([known(2, 5)])
    rng = np.random.default_rng(4)
    sums.add(sums_of(drawn(rng), drawn(rng)))
    row = {f"eval/{name}": value for name, value in sums.columns().items()}
    flat = scalar_columns({"step": 3, **row})
    assert all(isinstance(value, int | float) for value in flat.values())
    assert flat["eval/experts/layer_5/dropped_fraction"] == row["eval/experts/by_layer/dropped_fraction"][1]
    assert flat["step"] == 3 and flat["eval/experts/empty"] == row["eval/experts/empty"]
    assert not [name for name in flat if "by_layer" in name or name.endswith("/layer")]


def test_blocks_of_one_stack_take_turns_and_loads_are_as_long_as_there_are_experts():
    rng = np.random.default_rng(6)
    few, many = "core/blocks/0/feed_forward", "core/blocks/1/feed_forward"
    sums = PartSums([known(0, part="prelude/blocks/0/feed_forward"), known(1, 3, part=few), known(2, 4, part=many)])
    sums.add(sums_of(drawn(rng), drawn(rng), part=many))
    wanted, kept, logits = drawn(rng)
    sums.add(sums_of(*[(wanted[:, :3], kept[:, :3], logits[:, :3])] * 2, part=few))
    row = sums.columns()
    assert row["experts/by_layer/layer"] == [1, 2, 3, 4] and row["experts/by_layer/part"] == [few, many] * 2
    assert [len(load) for load in row["experts/load"]] == [3, 4, 3, 4]
    assert np.isnan(row["experts/by_layer/zero_share"]).tolist() == [True, False] * 2
    assert row["experts/zero_share"] == pytest.approx(np.nanmean(row["experts/by_layer/zero_share"]), rel=1e-4)
    assert layers_of(row) == [(1, ""), (2, ""), (3, ""), (4, "")]


def test_layers_of_different_networks_are_told_apart_where_their_numbers_do_not():
    rng = np.random.default_rng(7)
    outer, inner = "encoder/blocks/0/feed_forward", "inner/stack/blocks/0/feed_forward"
    sums = PartSums([known(0, part=outer), known(0, part=inner)])
    for part in (inner, outer):
        sums.add(sums_of(drawn(rng), part=part))
    row = sums.columns()
    assert row["experts/by_layer/part"] == [outer, inner], "in the order they run"
    assert layers_of(row) == [(0, "encoder"), (0, "inner/stack")]
    flat = scalar_columns(row)
    assert flat["experts/inner/stack/layer_0/router_z"] == row["experts/by_layer/router_z"][1]


def test_a_model_whose_core_has_experts_tells_every_pass():
    model = shapes.recursive(8, 3, feed_forward=experts.Settings(experts=4, expert_size=8))
    first, core, last = model.facts().experts
    assert (first.layers, core.layers, last.layers) == ((0,), (1, 2, 3, 4, 5, 6), (7,))


ROWS, SEQ = 4, 16
DENSE = shapes.block(heads=2, kv_heads=1, hidden=24)
ROUTED = experts.Settings(token_choice.Settings(capacity_factor=1.0), experts=4, expert_size=8)
PATTERN = (DENSE, dataclasses.replace(DENSE, feed_forward=ROUTED))
MOE = shapes.wrapped(plain.Settings(stack.Settings(PATTERN)), vocab_size=32, width=16)


def test_a_train_step_reports_what_its_experts_did_and_accumulation_changes_nothing():
    batch = packed_batch(ROWS, SEQ, 32)
    rows = []
    for accumulation in (1, 2):
        program = compiled_step(MOE, optax.sgd(0.1), (1, 1, 1, 1), ROWS, SEQ, accumulation)
        meter = Meter(StepCost(ROWS * SEQ, 1.0, 1.0, 1.0), experts=MOE.facts().experts)
        _, metrics = program.run(program.state(), batch)
        meter.add(jax.device_get(metrics))
        rows.append({name: value for name, value in meter.row(1).items() if name.startswith("experts/")})
    assert rows[0]["experts/by_layer/layer"] == [1]
    assert np.shape(rows[0]["experts/load"]) == (1, 4)
    np.testing.assert_allclose(np.sum(rows[0]["experts/load"], -1), 1.0, atol=1e-3)
    assert 0 < rows[0]["experts/dropped_fraction"] < 0.5
    assert rows[0]["experts/per_token"] == pytest.approx(2 * (1 - rows[0]["experts/dropped_fraction"]))
    for name, value in rows[0].items():
        np.testing.assert_allclose(rows[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_evaluation_reports_the_same_on_held_out_text_for_each_way_of_selecting():
    batch = packed_batch(ROWS, SEQ, 32)
    program = compiled_step(MOE, optax.sgd(0.1), (1, 1, 1, 1), ROWS, SEQ)
    state, (graphdef, _) = program.state(), abstract_model(program.build)
    columns = {}
    for selection in ("topk", "threshold"):
        step = make_eval_step(graphdef, ByteCounts(jnp.ones(32, jnp.int32)), selection=selection)
        evaluate = jax.jit(step)
        sums = PartSums(MOE.facts().experts)
        sums.add(jax.device_get(evaluate(state.params, state.buffers, batch, jax.random.key(0)).told))
        columns[selection] = sums.columns()
    _, metrics = program.run(state, batch)
    trained = PartSums(MOE.facts().experts)
    trained.add(jax.device_get(metrics))
    for name, value in trained.columns().items():
        np.testing.assert_allclose(columns["topk"][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert columns["threshold"]["experts/dropped_fraction"] == 0, "who else is in the sequence must not matter"
    assert columns["threshold"]["experts/per_token"] == 2
