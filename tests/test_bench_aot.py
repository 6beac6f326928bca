"""Train steps compiled for machines that are not here: reading a program's text, the estimate, the command."""

import argparse
import json
import types
from pathlib import Path

import pytest

from adaptive import bench, targets
from adaptive.benchmarks import aot, aot_program
from adaptive.benchmarks.compiled_text import Array, Count, Text
from adaptive.benchmarks.estimate import BYTES, RATES, estimate, head_dim
from adaptive.recipe import load

ROOT = Path(__file__).resolve().parent.parent

# As compilers for TPUs write it: a loop over 7 layers, in it a fusion, a kernel, a gather begun and ended apart; a
# reduce-scatter as an all-reduce inside a computation that is named after it; an array in the core's memory.
PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}

%fused_softmax (p.1: f32[4,64,64]) -> f32[4,64,64] {
  %p.1 = f32[4,64,64]{2,1,0} parameter(0)
  ROOT %hidden = f32[4,512,512]{2,1,0} broadcast(%p.1), dimensions={}
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum.9 = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p.2: f32[64,16]) -> f32[8,16] {
  %p.2 = f32[64,16]{1,0} parameter(0)
  %all-reduce.5 = f32[64,16]{1,0} all-reduce(%p.2), replica_groups={{0,1}}, to_apply=%add
  ROOT %slice.1 = f32[8,16]{1,0} dynamic-slice(%all-reduce.5)
}

%condition (state.1: (s32[], f32[64,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (state.2: (s32[], f32[64,16])) -> (s32[], f32[64,16]) {
  %all-gather-start.1 = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[64,16]{1,0:T(8,128)(2,1)}) all-gather-start(%x)
  %all-gather-done.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.1)
  %softmax.1 = f32[4,64,64]{2,1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused_softmax
  %quick = f32[4,128,128]{2,1,0:T(8,128)S(1)} copy(%x)
  %attention.1 = (bf16[4,64,32]{2,1,0}, f32[4,64]{1,0}) custom-call(%x), custom_call_target="tpu_custom_call"
  %scattered.1 = f32[8,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %state.3 = (s32[], f32[64,16]) tuple(%i, %x)
}

ENTRY %main.1 (p.3: f32[64,16]) -> f32[] {
  %p.3 = f32[1024,1024]{1,0} parameter(0)
  %while.1 = (s32[], f32[64,16]{1,0}) while(%start), condition=%condition, body=%body
  %note = f32[64,16]{1,0} custom-call(%p.3), custom_call_target="Sharding"
  %largest.1 = f32[256,192]{1,0} add(%p.3, %p.3)
  ROOT %all-reduce.1 = f32[] all-reduce(%y), to_apply=%add
}
"""


def test_collectives_and_kernels_are_counted_as_often_as_their_loop_runs():
    text = Text(PROGRAM)
    assert text.collectives() == {
        "all-gather": Count(1, 7, 7 * 64 * 16 * 2),
        "all-reduce": Count(1, 1, 4),
        "reduce-scatter": Count(1, 7, 7 * 64 * 16 * 4),
    }
    assert text.kernels() == {"tpu_custom_call": Count(1, 7, 7 * (4 * 64 * 32 * 2 + 4 * 64 * 4))}
    assert text.unknown_loops == 0
    assert Text(PROGRAM.replace("constant(7)", "parameter(0)")).unknown_loops == 1
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert Text(known).collectives()["all-gather"].runs == 3


def test_arrays_are_those_that_reach_the_devices_memory():
    text = Text(PROGRAM)
    assert text.largest(2) == [(Array("f32", (256, 192)), 1), (Array("f32", (4, 64, 64)), 1)]
    assert text.largest_square({64}, [], 0, 2) == Array("f32", (256, 192))  # multiples: of heads, and padded
    assert text.largest_square({64}, [(7, 192, 256)], 0, 2) == Array("f32", (4, 64, 64))  # a parameter's gradient
    assert text.largest_square({64}, [], 192, 2) == Array("f32", (4, 64, 64))  # logits
    assert text.largest_square({100}, [], 0, 2) is None  # 256 is a multiple of 128, what 100 is padded to; 192 is not
    assert text.largest_square({64}, [(3, 64)], 0, 2) == Array("f32", (4, 64, 64))  # several matrices for each row
    assert text.largest_square({64}, [(3, 64)], 0, 4) is None  # one: 64 positions of 64 channels
    assert text.largest_square({64}, [(9, 16, 4)], 0, 4) is None  # of 16 heads of 4
    narrow = Text(PROGRAM.replace("f32[256,192]", "bf16[512,512]"))
    assert narrow.largest_square({64}, [], 0, 2) == Array("bf16", (512, 512))
    assert narrow.largest_square({64}, [(10, 256)], 0, 2) == Array("f32", (4, 64, 64))  # tokens by hidden units
    assert Array("bf16", (3, 5)).bytes == 30 and Array("pred", (9,)).bytes == 9 and Array("s4", (3,)).bytes == 2


@pytest.mark.parametrize(("message", "needs"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.93G of 15.75G hbm. Exceeded", 19.93),
    ("RESOURCE_EXHAUSTED: memory required for HLO temporaries (24.34G) exceeds available HBM (15.75G).", 24.34),
    ("RESOURCE_EXHAUSTED: something new", None),
])  # fmt: skip
def test_a_step_that_does_not_fit_is_a_result(message, needs):
    told = aot_program.overflow(message)["needs"]
    assert told == (pytest.approx(needs * 2**30) if needs else None)
    with pytest.raises(RuntimeError):
        aot_program.overflow("INTERNAL: Mosaic failed")


def published(name, **settings):
    recipe = load(name)
    rows = recipe.train.device_batch_size or recipe.train.batch_size
    return recipe.with_(
        "mesh.fsdp=8", f"train.batch_size={rows * 8}", *(f"train.{key}={value}" for key, value in settings.items())
    )


def test_the_estimate_is_the_arithmetic_that_it_says():
    reference = estimate(published("vanilla_360m", kernels="reference"), "v5e", 8)
    bandwidth, peak = 0.82e12 * RATES["v5e"].memory, 197e12
    scores = 16 * 32 * 15 * 2048**2
    assert reference.attention == pytest.approx(scores * (16 + 20 + 14) / bandwidth)
    body = 32 * (960 * (15 + 2 * 5) * 64 + 15 * 64 * 960 + 3 * 960 * 2560)  # parameters of the matmuls
    assert reference.matmuls == pytest.approx(16 * 2048 * 8 * body / (peak * RATES["v5e"].matmul))
    assert reference.optimizer == pytest.approx(BYTES.parameter * 361_821_120 / 8 / bandwidth)
    kernels = estimate(published("vanilla_360m"), "v5e", 8)
    attended = 4 * 64 * 15 * 32 * 2048 * 2049 / 2
    assert kernels.attention == pytest.approx(16 * attended * 4.5 / (peak * RATES["v5e"].attention))
    assert (kernels.matmuls, kernels.head, kernels.elementwise) == (
        reference.matmuls,
        reference.head,
        reference.elementwise,
    )
    useful = 3 * 16 * (2 * 2048 * (body + 49152 * 960) + attended)
    assert kernels.utilisation == pytest.approx(useful / (kernels.step * peak))
    without, dots, attention = (
        estimate(published("vanilla_360m", remat=remat), "v5e", 8) for remat in ("none", "dots", "attention")
    )
    assert without.matmuls == pytest.approx(kernels.matmuls * 3 / 4) and without.attention < kernels.attention
    assert without.attention == attention.attention < dots.attention == kernels.attention


@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("name", ["mor_360m", "hnet_1stage_l", "hnet_2stage_l"])
def test_every_target_has_an_estimate(name, target):
    kernels, reference = (estimate(published(name, kernels=kind), target, 8) for kind in ("auto", "reference"))
    assert 0.05 < reference.utilisation < kernels.utilisation < 0.6
    assert (kernels.scan > 0) == (kernels.routing == 0) == name.startswith("hnet")
    assert head_dim(published(name)) in (64, 96)


# The command


GIVEN = argparse.Namespace(devices=8, target="v5e", against_reference=False, kernels="auto", settings=[])
FACTS = {
    "fits": True, "needs": 5 * 2**30, "arguments": 2**30, "temporaries": 4 * 2**30, "peak": 5 * 2**30,
    "compile_s": 12.3,
    "collectives": {"all-gather": {"number": 2, "runs": 64, "bytes": 2**20}},
    "custom_calls": {"tpu_custom_call": {"number": 3, "runs": 96, "bytes": 0}},
    "largest": [{"array": "f32[4,8]", "bytes": 2**20, "number": 2}], "square": None, "unknown_loops": 0,
}  # fmt: skip


def test_a_step_has_the_published_rows_on_every_device():
    (step,) = aot.steps(["vanilla_360m"], GIVEN)
    assert (step.recipe.train.batch_size, step.rows, step.recipe.mesh.fsdp) == (128, 16, 8)
    assert step.recipe.train.compute_dtype == "bfloat16"
    given = argparse.Namespace(**{**vars(GIVEN), "against_reference": True, "settings": ["train.batch_size=16"]})
    both = list(aot.steps(["vanilla_360m"], given))
    assert [step.kernels for step in both] == ["auto", "reference"] and both[0].rows == 2


def test_tables_tell_what_fits_and_what_does_not():
    (step,) = aot.steps(["mor_360m"], GIVEN)
    good = aot.record(step, -1.0, FACTS)
    bad = aot.record(step, -1.0, {"fits": False, "needs": 24.34 * 2**30, "says": "RESOURCE_EXHAUSTED"})
    memory, content = aot.markdown([bad, good]).split("\n\n")
    assert "| `mor_360m` | 8 x v5e | layer | auto | 16 x 2,048 |" in memory and "**no**: 24.34" in memory
    assert "all-gather 64, 1" in content and len(content.splitlines()) == 3  # nothing is known of what does not fit
    assert all(len({line.count("|") for line in text.splitlines()}) == 1 for text in (memory, content))
    assert aot.fits(good) == "fits: 5.00 of 15.75 GiB" and aot.fits(bad).startswith("does not fit: 24.34")
    assert aot.table([good, bad]).row_count == len(aot.ROWS)
    less = aot.record(step, -1.0, {**FACTS, "remat": "none"})
    assert less["remat"] == "none" and less["estimated"]["step"] < good["estimated"]["step"]
    assert json.loads(json.dumps(good)) == good


def test_a_missing_compiler_and_a_failing_one_are_a_line(monkeypatch, capsys):
    monkeypatch.setattr(targets, "can_compile", lambda name: False)
    assert bench.main(["aot", "--recipe", "mor_360m", "--target", "h200"]) == 2
    assert "needs jax-cuda13-plugin" in capsys.readouterr().err
    monkeypatch.setattr(targets, "can_compile", lambda name: True)
    failed = types.SimpleNamespace(returncode=-6, stdout="", stderr="much\nCheck failed: it aborts")
    monkeypatch.setattr(aot.subprocess, "run", lambda *args, **kwargs: failed)
    assert bench.main(["aot", "--recipe", "mor_360m"]) == 2
    assert "compiling mor_360m for v5e ended with code -6: Check failed: it aborts" in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "says"), [
    (["--target", "v9"], "--target"),
    (["--devices", "9"], "--devices: 9: must be at least 1 and at most 8"),
    (["train.batch_size=7"], "train.batch_size=7 does not divide over 8"),
    (["--kept", "/nowhere"], "--kept: no .json file in /nowhere"),
])  # fmt: skip
def test_mistakes_are_told(extra, says, capsys):
    assert bench.main(["aot", "--recipe", "mor_360m", *extra]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.compiles
def test_a_small_step_compiles_for_a_tpu(capsys, tmp_path):
    if not targets.can_compile("v5e"):
        pytest.skip("compiling for v5e needs libtpu, which is not installed")
    small = [
        "model.width=128",
        "model.body.stack.repeats=2",
        "data.seq_len=512",
        "train.batch_size=4",
        "train.remat=attention",
    ]
    run = ["aot", "--recipe", "vanilla_tiny", "--target", "v5e", "--devices", "4", "--keep", str(tmp_path), "--json"]
    assert bench.main([*run, *small]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["fits"] and found["square"] is None and not found["unknown_loops"]
    assert found["custom_calls"]["tpu_custom_call"]["runs"] == 2 * 2  # both layers' forward and backward, none again
    assert found["collectives"]["all-gather"]["runs"] > 2 and found["versions"]["libtpu"]
    assert aot.read(str(tmp_path)) == [found]


def test_the_documented_table_is_that_of_the_records():
    documented = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert aot.markdown(aot.read(str(ROOT / "benchmarks" / "aot"))) in documented
