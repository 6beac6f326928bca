"""The table of all operations, and the script that makes it on an accelerator."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from adaptive import bench
from adaptive.benchmarks import kernels
from adaptive.benchmarks.kernel_cases import SMALL, Least, cases

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check"


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    return module


def test_floors_are_the_longer_of_matmul_and_copy():
    rates = kernels.Rates(flops=100.0, bytes=10.0)
    assert rates.floor(Least(flops=200.0, bytes=10.0)) == 2.0
    assert rates.floor(Least(flops=200.0, bytes=50.0)) == 5.0


@pytest.mark.compiles
def test_least_costs_are_those_of_the_attended_pairs():
    made = {name: make() for name, make in cases(SMALL._replace(seq=256), jnp.float32) if "attention" in name}
    pairs = {name: case.forward.flops / (4 * SMALL.heads * 64) for name, case in made.items()}
    assert pairs["attention, causal"] == 256 * 257 / 2
    assert pairs["attention, window"] == 64 * 65 / 2 + 192 * 64
    assert pairs["attention, packed documents"] == sum(n * (n + 1) / 2 for n in (32, 96, 128))
    assert pairs["attention, KV sharing"] < 256 * 85
    assert pairs["block-sparse attention"] == 2 * 128 * 129 / 2 + 128**2  # both diagonal tiles and the one below
    assert all(case.both.flops == 3.5 * case.forward.flops for case in made.values())


@pytest.mark.compiles
def test_a_run_prints_a_line_for_each_case_and_goes_on_after_a_failure(monkeypatch, capsys):
    tiny = SMALL._replace(seq=96, width=16)
    known = dict(cases(tiny, jnp.float32))

    def broken():
        raise ValueError("no such\nshape")

    shown = {"gather": known["gather"], "broken": broken, "select": known["select"]}
    monkeypatch.setattr(kernels, "cases", lambda sizes, dtype: shown.items())
    monkeypatch.setattr(kernels, "rates", lambda dtype, repeats: kernels.Rates(1e9, 1e9))
    assert bench.main(["kernels", "--json", "--repeats", "1"]) == 1
    gather, failed, select = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed["failed"] == "ValueError: no such shape"
    assert gather["error"] == {"forward": 0.0, "gradients": 0.0} and gather["both"]["form_s"] > 0
    assert select["error"] == {"forward": 0.0} and "both" not in select
    assert bench.main(["kernels", "--only", "gatter"]) == 2
    assert "there is no case 'gatter'; there are gather" in capsys.readouterr().err


# scripts/gpu_check


def took(form, reference=2.0, floor=1.0, **more):
    return {"flops": 8.0, "bytes": 1.0, "form_s": form, "reference_s": reference, "floor_s": floor,
            "form_temporaries": 1, "reference_temporaries": 20, **more}  # fmt: skip


def case(name, form, error=0.001, **more):
    return {"case": name, "shape": "", "dtype": "bfloat16", "forward": took(form), "both": took(form, **more),
            "error": {"forward": error, "gradients": error}}  # fmt: skip


def results(platform):
    operations = [
        case("attention, causal", 1.0, stock_s=1.0), case("attention, KV sharing", 1.25), case("grouped matmul", 2.0),
        case("cross-entropy", 1.0), case("gather", 1.6, error=0.5),
        {"case": "scatter", "failed": "no result after 60 s"},
    ]  # fmt: skip
    training = {"hnet_tiny": {"first_loss": 5.0, "loss": 4.0, "tokens_per_s": 9.0}, "mor_135m": "not measured: time"}
    machine = {"device": "NVIDIA H200", "platform": platform, "devices": 1, "versions": {"jax": "0.10.2"}}
    return {"machine": machine, "date": "2026-01-01", "quick": False, "operations": operations, "training": training,
            "mor_360m": {"results": [{"utilisation": 0.4}]}}  # fmt: skip


def test_aims_are_ratios_of_what_was_measured(script):
    aims = {name.partition(" (")[0]: value for name, value in script.aims(results("gpu")).items()}
    assert aims["attention, KV sharing: FLOP/s over cuDNN's dense causal"] == "80%"
    assert aims["attention, packed documents: FLOP/s over cuDNN's dense causal"] == "not measured"
    assert aims["grouped matmul: of a dense one of its FLOPs"] == "50%"
    assert aims["gather: of a copy's bandwidth"] == "62%" and aims["scatter: of a copy's bandwidth"] == "not measured"
    assert aims["cross-entropy: time over materialised logits"] == "50%"
    assert aims["cross-entropy: memory over materialised logits"] == "5%"
    assert aims["mor_360m: MFU"] == "40%"
    assert set(script.aims(results("cpu")).values()) == {"not measured"}


def test_the_page_says_what_is_wrong_and_what_is_not_measured(script):
    found = results("gpu")
    page = script.markdown({**found, "aims": script.aims(found)})
    assert "| gather |  | forward | 1600.000 | 0.80 |  | 1000.000 | 1.6 | 5.0e-01 | **wrong** |" in page
    assert (
        "| attention, causal |  | with backward | 1000.000 | 0.50 | 1.00 | 1000.000 | 1.0 | 1.0e-03 | right |" in page
    )
    assert "| scatter | not measured: no result after 60 s |" in page and "| mor_135m | not measured: time |" in page


def test_a_case_that_takes_its_process_along_leaves_the_others(script, monkeypatch):
    asked = []

    def operations(which, end, quick):
        asked.append(list(which))
        return ([{"case": "a"}], "killed") if "b" in which else ([{"case": name} for name in which], "")

    monkeypatch.setattr(script, "names", lambda: ["a", "b", "c", "d"])
    monkeypatch.setattr(script, "operations", operations)
    found = script.measured(float("inf"), True)
    assert [one["case"] for one in found] == ["a", "b", "c", "d"] and found[1]["failed"] == "killed"
    assert asked == [["a", "b", "c", "d"], ["c", "d"]]
    late = script.measured(0.0, True)
    assert all(one["failed"] == "the time was up" for one in late) and len(late) == 4
