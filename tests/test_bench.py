"""The measurement's arithmetic, its refusals, and one run from end to end. No assertion is about time."""

import itertools
import json

import jax
import numpy as np
import pytest

from adaptive import bench
from adaptive.account import account, recursion_capacities
from adaptive.benchmarks import data, peers, train_step
from adaptive.recipe import load

pytestmark = pytest.mark.compiles

SMALL = ("model.width=32", "data.seq_len=24", "train.batch_size=8")


@pytest.fixture
def ticking(monkeypatch):
    """A clock of which every interval lasts as many seconds as the matmul or the recipe under test deserves."""

    class Step:
        def __init__(self, recipe, devices):
            self.recipe = recipe
            self.program = type("Program", (), {"dtype": np.dtype("float32"), "remat": "none"})
            self.compiled = type("Compiled", (), {"seconds": 7.0, "memory": lambda self: {"a": 3, "b": 4}})()
            self._times = iter([2.0, 4.0, 6.0] if recipe.model.body.passes > 1 else [4.0, 4.0, 8.0])

        def seconds(self, steps):
            return next(self._times)

    monkeypatch.setattr(train_step, "TimedStep", Step)
    monkeypatch.setattr(train_step, "matmul_timer", lambda device, dtype: lambda: 5e9)


def test_overhead_is_the_ratio_of_times_over_that_of_flops(ticking):
    routed, plain = load("mor_bench"), load("vanilla_bench")
    results, (comparison,), matmul = train_step.measure(
        [routed, plain], repeats=3, steps_per_repeat=1, devices=jax.devices()[:1]
    )
    flops = [account(r.model, 512).train_flops() * 4 for r in (routed, plain)]
    assert [r.flops for r in results] == flops
    assert (results[0].step_s.median, results[1].step_s.median) == (4.0, 4.0)
    assert comparison.time.median == 0.75  # of 2/4, 4/4 and 6/8: pairs, not 4/4 of the medians
    assert comparison.flops == flops[0] / flops[1] < 0.75
    assert comparison.overhead == pytest.approx(0.75 * flops[1] / flops[0])
    assert matmul.median == 5e9
    assert results[0].share_of_matmul == pytest.approx(flops[0] / 4.0 / 5e9)
    assert results[0].tokens_per_s == 512
    assert (results[0].compile_s, results[0].device_bytes, results[0].utilisation) == (7.0, 7, None)


def test_the_bench_recipes_are_of_one_depth_and_one_training():
    routed, plain = load("mor_bench"), load("vanilla_bench")
    assert (plain.model.width, plain.data.seq_len, plain.train.batch_size) == (256, 512, 4)
    assert plain.model.body.layers == routed.model.body.layers == 11
    assert (routed.model.body.recursions, routed.model.body.core.layers) == (3, 3)
    assert recursion_capacities(routed.model, 512) == (512, 341, 170)
    assert (routed.train, routed.data, routed.optimizer) == (plain.train, plain.data, plain.optimizer)


def test_the_matmul_is_timed_as_its_flops(monkeypatch):
    monkeypatch.setitem(train_step.MATMUL_SIDE, "cpu", 16)
    ticks = iter([10.0, 10.5])
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: next(ticks))
    assert train_step.matmul_timer(jax.devices()[0], np.dtype("float32"))() == 2 * 16**3 / 0.5


def test_random_rows_are_shifted_whole_documents():
    recipe = load("mor_bench").with_(*SMALL)
    batch = train_step.random_batch(recipe)
    assert {np.shape(a) for a in jax.tree.leaves(batch)} == {(8, 24)}
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
    assert batch.tokens.max() < recipe.model.vocab_size
    assert batch.mask.all() and (batch.segment_ids == 1).all()


def run(*extra):
    return bench.main(["train", "--recipe", "mor_bench", *SMALL, "--repeats", "2", "--steps_per_repeat", "1", *extra])


def test_a_run_prints_one_line_of_json(monkeypatch, capsys):
    monkeypatch.setitem(train_step.MATMUL_SIDE, "cpu", 32)
    assert run("--against", "vanilla_bench", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert [r["recipe"] for r in record["results"]] == ["mor_bench", "vanilla_bench"]
    assert all(r["tokens"] == 192 and r["step_s"]["least"] > 0 for r in record["results"])
    assert record["comparisons"][0]["flops"] < 1


def test_a_table_names_what_was_measured(ticking, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert run() == 0
    out = capsys.readouterr().out
    for words in ("tokens/s", "step, ms", "compilation", "GFLOP/s", "matmul"):
        assert words in out


@pytest.mark.parametrize(("extra", "says"), [
    (["--recipe", "mor_bunch"], "mor_bench"),
    (["--against", "nothing"], "there is no recipe"),
    (["model.sizee=3"], "does not exist"),
    (["--against", "vanilla_bench", "model.body.recursions=2"], "vanilla_bench: "),
    (["--against", "vanilla_bench", "model.body.recursions=2"], "settings are given to both recipes"),
    (["model.body.core.blocks.0.mixer.kv_heads=3"], "is not a multiple of"),
    (["train.batch_size=7"], "does not divide over 8"),
    (["--repeats", "0"], "--repeats: 0: must be at least 1"),
    (["--repeats", "many"], "--repeats: 'many' is not a whole number"),
    (["--againts", "mor_bench"], "did you mean --against?"),
])  # fmt: skip
def test_mistakes_are_told_and_exit_with_2(extra, says, capsys):
    overrides = [o for o in SMALL if not o.startswith(extra[-1].partition("=")[0] + "=")]
    assert bench.main(["train", "--recipe", "mor_bench", *overrides, *extra]) == 2
    assert says in capsys.readouterr().err


def test_peers_say_what_they_need(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["peers"]) == 2
    assert "pip install 'adaptive-lm[peers]'" in capsys.readouterr().err
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    assert bench.main(["peers", "--recipes", "mor_tiny"]) == 2
    assert "mor_tiny is no plain transformer" in capsys.readouterr().err


def test_reading_is_measured_beside_plain_loops(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ADAPTIVE_CACHE", str(tmp_path))
    whole = data.parts
    monkeypatch.setattr(data, "parts", lambda given: itertools.islice(whole(given), 1))
    assert bench.main(["data", "--seconds", "0.1", "--turns", "1", "--workers"]) == 0
    shown = capsys.readouterr().out
    assert "stored, rows of 256" in shown and all(way in shown for way in ("row by row", "nanoGPT's loop", "ours"))
