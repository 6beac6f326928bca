"""Expert choice against token choice: the runs are matched, begin as they say, and the page says what they say."""

import dataclasses
import functools
import re
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from flax import nnx
from sweeps import made

from adaptive import studies, study
from adaptive.data.pipeline import open_data
from adaptive.errors import UserError
from adaptive.parallel import mesh
from adaptive.retrofitting import retrofitted
from adaptive.runs.load import find, load
from adaptive.studies import ec_vs_tc
from adaptive.studies.ec_vs_tc import FULL, QUICK, VARIANTS, Size
from adaptive.sweeps import denoising
from adaptive.sweeps import runs as sweep
from adaptive.sweeps.ec_vs_tc_results import EC, LOW, RETROFIT_PARTS, first_step
from adaptive.sweeps.runs import Begins

HERE = Path("somewhere")
STUDY = studies.load("ec_vs_tc")


@functools.cache
def runs(**form):
    return STUDY.runs(studies.Form(**form), HERE)


def page(found, *, missing=(), **form):
    return STUDY.page(studies.Form(**form), found, missing)


def test_all_runs_are_valid_and_cost_the_same():
    assert STUDY.seeds == 3
    full = runs(seeds=3)
    assert len(full) == len({run.name for run in full}) == 3 * (len(VARIANTS) + len(RETROFIT_PARTS))
    first = [run for run in full if run.labels["part"] == "first"]
    assert full[: len(first)] == first  # what goes on from others comes last
    assert len({run.flops for run in first}) == 1
    for run in {run.labels["variant"]: run for run in [*full, *runs(seeds=3, quick=True)]}.values():
        run.recipe.validate()
        assert run.recipe.name == run.name
    assert {run.labels["variant"] for run in runs(quick=True)} == {*QUICK.variants, *QUICK.later}
    seeds = [run.recipe.train.seed for run in full if run.labels["variant"] in (EC, "ec_retrofit")]
    assert seeds == [0, 1, 2, 100, 101, 102]


def test_what_goes_on_from_a_run():
    by_name = {run.name: run for run in runs(seeds=3)}
    first, count = by_name["tc-s1"], FULL.tokens // 2048 // 2
    continued, replaced, scheduled = (by_name[f"{part}-s1"] for part in RETROFIT_PARTS)
    assert {run.begins.run for run in (continued, replaced, scheduled)} == {"tc-s1"}
    assert {run.recipe.train.steps for run in (continued, replaced, scheduled)} == {count + 1}
    init = continued.recipe.init
    assert init.run == str((HERE / "runs/tc-s1").absolute()) and init.step == first.recipe.train.steps
    assert continued.recipe.model == first.recipe.model
    assert replaced.recipe.schedule == continued.recipe.schedule
    for run, schedule in ((replaced, "static"), (scheduled, "linear_reverse")):
        router = run.recipe.model.body.stack.blocks[0].feed_forward.router
        twin = {"static": EC, "linear_reverse": LOW}[schedule]
        assert router == VARIANTS[twin] and router.schedule == schedule
        assert retrofitted(first.recipe, run.begins.settings, run.name) == run.recipe  # what the command makes


# Pages of runs that nobody trained


def told(loss, *, late=1.0, begun=None, low=0.0):
    """A curve that has the loss of others `late` times as late; low: what rows with few hidden tokens have less."""
    at = lambda step: loss + 2 * np.exp(-step / (80 * late))  # noqa: E731
    out = {
        "loss": loss,
        "curve": [[0, 5.0]] * bool(begun) + [[step, float(at(step))] for step in range(20, 401, 20)],
        "tokens_per_s": 1000.0,
        "experts": {"load_max_over_mean": 1.5, "dropped_fraction": 0.0, "without_expert": 0.01},
        "by_ratio": [loss - low, loss, loss, loss + 1],
    }
    return out | ({"begun": begun} if begun else {})


def outcomes(losses, late=None, begun=(2.0, 2.5), seeds=3):
    rng = np.random.default_rng(0)
    found = []
    for run in runs(seeds=seeds):
        name = run.labels["variant"]
        loss = losses.get(name, 2.0) * float(np.exp(0.001 * rng.standard_normal()))
        own = list(begun) if name in RETROFIT_PARTS[1:] else None
        one = made.outcome(run, loss, rules=("train",))
        found.append(dataclasses.replace(one, told={"train": told(loss, late=(late or {}).get(name, 1.0), begun=own)}))
    return found


def words(verdict):
    return " ".join(verdict.split())


def test_a_page_that_agrees_with_the_paper():
    losses = {EC: 1.9, LOW: 1.85, "ec_linear": 1.95, "ec_retrofit": 1.9, "tc_continued": 1.95, "ec_cosine": 1.96}
    shown = page(outcomes(losses, late={EC: 0.5}))
    faster, capacity, retrofit = map(words, shown.verdict)
    assert "expert choice ends lower at equal compute, -100" in faster
    speed = float(re.search(r"([\d.]+) times as fast", faster)[1])
    assert 2 < speed < 3  # half as late, and lower at the end
    assert "it is below 6 beyond chance" in faster
    assert "linear_reverse helps against the static budget" in capacity
    assert "ec_linear_reverse, ec," in capacity and "The lowest is linear_reverse; the paper" in capacity
    assert "from 2.0000 to 2.5000 at once" in retrofit and "it pays against going on with token choice" in retrofit
    assert set(shown.pictures) == {"curves.svg", "schedules.svg", "retrofit.svg"}
    for svg in shown.pictures.values():
        assert "nan" not in " ".join(ElementTree.fromstring(svg).itertext())
    assert all(name in shown.text for name in (*VARIANTS, *RETROFIT_PARTS))
    assert "`adaptive study ec_vs_tc`." in words(shown.text)
    assert max(map(len, (line for line in shown.text.splitlines() if not line.startswith("|")))) <= 120


def test_a_page_that_speaks_against_it():
    shown = page(outcomes({EC: 2.01, LOW: 2.2, "ec_retrofit": 2.3}, late={EC: 1.1}))
    faster, capacity, retrofit = map(words, shown.verdict)
    assert "ends higher" in faster and "after 1." in faster
    assert "linear_reverse hurts" in capacity and "The lowest is ec_linear;" not in capacity
    assert "does not pay" in retrofit
    same = page(outcomes({}))
    for line, said in zip(same.verdict, ("within chance", "no difference beyond chance", "neither pays"), strict=True):
        assert said in words(line)
    never = page(outcomes({EC: 2.6}))
    assert "It never has the loss" in words(never.verdict[0]) and "| never |" in never.text


def test_a_page_of_few_runs():
    assert page([], missing=["a"]).verdict == ["No run is finished: nothing follows yet."]
    found = outcomes({}, seeds=1)
    alone = page(found[:1], missing=["ec-s0"])
    assert all("not known yet" in line for line in alone.verdict) and "left out: ec-s0" in alone.text
    assert "No run has a second seed" in page(found).text
    assert "quick form" in page(found, quick=True).text


@pytest.mark.parametrize(("loss", "step"), [(3.0, 10), (2.5, 15), (2.0, 20), (1.75, 30), (1.4, None)])
def test_where_a_curve_first_is_as_low(loss, step):
    assert first_step([[0, 1.0], [10, 3.0], [20, 2.0], [40, 1.5]], loss) == step


# Runs that begin from others


def test_a_run_begins_from_one_that_is_finished(tmp_path):
    by_name = {run.name: run for run in STUDY.runs(studies.Form(quick=True), tmp_path)}
    run, source, called = by_name["ec_retrofit-s0"], tmp_path / "runs/tc-s0", []

    def begin():
        code = sweep.perform(tmp_path, run, lambda recipe, folder: 75, retrofit=retrofit)
        assert code == 75

    def retrofit(found, folder, settings, name):
        assert (found, settings, name) == (source, run.begins.settings, run.name)
        called.append(folder.exists())
        folder.mkdir()
        (folder / "half").write_text("")

    with pytest.raises(UserError, match="ec_retrofit-s0 begins from tc-s0, which is not finished"):
        begin()
    source.mkdir(parents=True)
    (source / "outcome.json").write_text("{}")
    begin()
    begin()  # stopped before it was whole: made anew
    assert called == [False, False]
    (run.folder(tmp_path) / "retrofit.json").write_text("{}")
    begin()
    assert len(called) == 2
    plain = dataclasses.replace(run, begins=Begins("tc-s0"))
    assert sweep.perform(tmp_path, plain, lambda recipe, folder: 75) == 75


@pytest.mark.compiles
def test_a_run_in_earnest(tmp_path, monkeypatch):
    """Two steps whose capacity follows what the objective hides, scored as the naive bound says, and a page."""
    monkeypatch.setenv("ADAPTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ec_vs_tc, "QUICK", Size(1, 16, 2 * 2048, (LOW,), (), evaluated=2))
    monkeypatch.setattr(denoising, "ROWS", 16)
    monkeypatch.setattr(denoising, "DRAWS", 2)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests' programs
    make = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda config: make(config, jax.devices()[:1]))
    assert study.main(["ec_vs_tc", "--quick", "--seeds", "1", "--workdir", str(tmp_path)]) == 0
    assert f"| {LOW} |" in (tmp_path / "ec_vs_tc.md").read_text()
    (run,) = STUDY.runs(studies.Form(quick=True), tmp_path)
    told = sweep.kept(tmp_path, run).told["train"]
    assert [step for step, _ in told["curve"]] == [1, 2] and sum(loss is not None for loss in told["by_ratio"]) > 2
    # What was hidden reached the router, and its sequences share rows.
    assert 0.9 < told["experts"]["rows_over_average"] < 1.1 and 0 < told["experts"]["rows_deviation"] < 0.1
    assert naive(load(find(run.folder(tmp_path)))) == pytest.approx(told["loss"], rel=1e-5)


def naive(trained):
    """The bound over the same rows and noise, from whole logits."""
    aim, recipe = trained.recipe.objective, trained.recipe
    data = open_data(recipe.data, batch_size=16, vocab_size=recipe.model.vocab_size)
    (batch,) = list(data.validation(16))
    nats, count = [], 0.0
    model = nnx.merge(trained.graphdef, trained.state)
    run = jax.jit(lambda tokens, positions, segments, ratio: model(
        tokens, positions=positions, segment_ids=segments, mask_ratio=ratio, sees="all").logits)  # fmt: skip
    for draw in range(2):
        inputs = aim.held_out(batch, jax.random.fold_in(jax.random.key(draw), 0))
        logits = np.asarray(run(inputs.tokens, batch.positions, batch.segment_ids, inputs.mask_ratio), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_p, np.asarray(inputs.targets)[..., None], -1)[..., 0]
        nats.append(-(picked * np.asarray(inputs.weights)).sum())
        count = np.asarray(inputs.counted).sum()
    return np.mean(nats) / count
