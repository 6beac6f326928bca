"""What a run says before it compiles, from the facts of its model."""

import dataclasses

import numpy as np
import pytest
import shapes

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice
from adaptive.layers.moe.routers import token_choice as routers
from adaptive.models.depth import token_choice
from adaptive.objectives import next_token
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe
from adaptive.training import replicated
from adaptive.training.plan import make_plan, plan_lines, runs_on
from adaptive.training.program import Program

UNREAD = routers.Settings(drop="position", bias_rate=0.1)
SCHEDULED = expert_choice.Settings(schedule="linear", k_min=1, k_max=3)


def lines_of(model, *overrides, **changes) -> list[str]:
    seq_len = [] if any(one.startswith("data.seq_len") for one in overrides) else ["data.seq_len=64"]
    recipe = dataclasses.replace(Recipe(name="made", model=model).with_(*seq_len, *overrides), **changes)
    program = Program(recipe, make_mesh(recipe.mesh))
    return plan_lines(make_plan(program, (np.ones(model.vocab_size, int), np.arange(8))), program)


def beginning(lines: list[str], word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in lines if line.startswith(word)]


def test_a_router_of_depth_and_kinds_of_experts_are_told():
    few, many = experts.Settings(experts=4), experts.Settings(expert_choice.Settings(), experts=8)
    pattern = [shapes.block(feed_forward=moe) for moe in (few, many, few)]
    lines = lines_of(shapes.mor(8, 2, pattern=pattern))
    assert beginning(lines, "routing") == ["expert_choice, 2 recursions over 64, 32 of 64"]
    first, second = beginning(lines, "experts")
    assert first.startswith("token_choice: 4 experts") and second.startswith("expert_choice: 8 experts")
    names = [line.partition(":")[0] for line in beginning(lines, "kernels")]
    assert names == ["attention", "routing", "grouped_matmul"]


def test_what_a_cache_keeps_is_told_by_policy():
    """Keys and values of 2 heads of 8 in float32, and an index, for each layer and pass."""
    one = 2 * 2 * 8 * 4 + 4
    lines = lines_of(shapes.mor(5))
    at = next(i for i, line in enumerate(lines) if line.startswith("cache"))
    first, exact, inexact = (line.strip() for line in lines[at : at + 3])
    assert first == f"cache     {5 * one} bytes a token in generation (per_pass)"
    assert exact.startswith("exact as well: active_only(0.1) ")
    assert inexact == f"inexact: cycle(2) {4 * one}, last {3 * one}, shared {3 * one}"
    assert beginning(lines_of(shapes.plain(4)), "cache") == [f"{4 * one} bytes a token in generation"]
    assert not beginning(lines_of(shapes.recursive(4, 2, order="sequence")), "cache")


def test_slots_of_nested_stages_follow_both_schedules():
    model = shapes.hnet(("m1", ("m1", ("T1",), "m1"), "m1"), chunker=("dynamic", "stride"), target=3.0)
    inner = dataclasses.replace(model.body.inner, capacities=(1.0, 0.5), capacity_steps=(200,))
    model = shapes.with_body(model, capacities=(1.0, 0.5), capacity_steps=(100,), inner=inner)
    lines = lines_of(model)
    assert beginning(lines, "chunks") == [
        "stage 0: dynamic of about 3; room for 64 of 64, 32 of 64 from step 100",
        "stage 1: stride of about 3; room for 64 of 64, 32 of 32 from step 100, 16 of 32 from step 200",
    ]
    assert [line.partition(":")[0] for line in beginning(lines, "kernels")] == ["ssd", "routing", "ema", "attention"]
    assert not beginning(lines, "routing") and not beginning(lines, "experts")


def test_an_objective_other_than_the_usual_is_told():
    class Settings(next_token.Settings):
        @classmethod
        def kind(cls) -> str:
            return "other_words"

    assert beginning(lines_of(shapes.plain(2), objective=Settings()), "objective") == ["other words"]
    assert not beginning(lines_of(shapes.plain(2)), "objective")


def test_how_auxiliary_losses_are_accumulated_is_told():
    many = ("train.batch_size=16", "train.device_batch_size=1")
    routed = shapes.plain(2, feed_forward=experts.Settings(experts=4))

    def told(model, *overrides):
        return [line.strip() for line in lines_of(model, *overrides) if "micro" in line]

    assert told(routed, "train.batch_size=16") == [] and len(told(shapes.plain(2), *many)) == 1
    whole, each = told(routed, *many)[1], told(routed, *many, "train.auxiliary_over=micro_batch")[1]
    assert whole.startswith("load_balancing_loss: of the whole batch") and "one more forward pass" in whole
    assert each.startswith("load_balancing_loss: of each micro-batch")


@pytest.mark.parametrize(
    ("model", "overrides", "says"),
    [
        (shapes.plain(2), ["log.profile_steps=3", "log.profile_start=200"],
         ["log.profile_steps=3 has no effect: the trace would begin after step 200, the run has 100"]),
        (shapes.plain(2), ["eval.selection=topk", "train.device_batch_size=8"],
         ["eval.selection=topk has no effect: this model", "train.device_batch_size=8 has no effect: no device"]),
        (shapes.plain(2), ["schedule.kind=constant", "schedule.floor=0.1", "data.shuffle=false", "data.shuffle_seed=2"],
         ["schedule.floor=0.1 has no effect: schedule.kind", "data.shuffle_seed=2 has no effect: data.shuffle"]),
        (shapes.mor(5, 3, token_choice.Settings(balancing="loss_free", balance_coefficient=0.2)), [],
         ["model.body.depth.balance_coefficient=0.2 has no effect: balancing=loss_free adds no loss"]),
        (shapes.plain(2, feed_forward=experts.Settings(UNREAD, experts=4)), [],
         ["router.drop=position has no effect: capacity_factor=0", "router.bias_rate=0.1 has no effect: bias=false"]),
        (shapes.plain(2, feed_forward=experts.Settings(SCHEDULED, experts=4)), [],
         ["router.schedule=linear has no effect: objective=next_token hides no tokens"]),
        (shapes.plain(2), ["log.profile_steps=3", "log.profile_start=20", "schedule.floor=0.1", "data.seq_len=32"], []),
    ],
)  # fmt: skip
def test_settings_that_the_run_never_reads_are_told(model, overrides, says):
    notes = beginning(lines_of(model, *overrides), "note")
    assert len(notes) == len(says)
    for part in says:
        assert any(part in note for note in notes), notes


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_operation_says_what_computes_it(platform):
    texts = [runs_on(operation, platform) for operation in ("attention", "ssd", "ema", "grouped_matmul", "routing")]
    assert all(texts) and ("Pallas for TPUs" in texts[1]) == (platform == "tpu")


def test_the_rates_of_both_ends_are_told():
    (line,) = beginning(lines_of(shapes.plain(2), "train.steps=10", "schedule.warmup_steps=4"), "training")
    assert line.endswith("warm-up 4, decay over the last 2; rate 0.00075 in the first step, 0 in the last")
    before = "train.steps=10", "schedule.warmup_steps=4", "schedule.count_from=zero"
    (line,) = beginning(lines_of(shapes.plain(2), *before), "training")
    assert line.endswith("rate 0 in the first step, 0.0015 in the last")


def test_a_state_that_many_devices_have_whole_is_told(monkeypatch):
    """Two hidden layers of 64 KiB in each of parameters, mean and variance."""
    monkeypatch.setattr(replicated, "LEAST", 2**16)
    model, notes = shapes.plain(2, width=64, hidden=128), "note"
    (line,) = beginning(lines_of(model, "mesh.fsdp=2"), notes)
    assert "the same on all 4 devices of mesh.data" in line and "mesh.fsdp=8 mesh.data=1 would leave each" in line
    assert "feed_forward" in line
    assert not beginning(lines_of(model, "mesh.fsdp=8"), notes)


def test_axes_of_one_device_are_not_told():
    assert beginning(lines_of(shapes.plain(2), "mesh.data=1", "mesh.context=8"), "mesh")[0].startswith("context=8 on 8")
