"""The ladder's runs are matched as it says, and its page says what the runs say."""

import functools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from sweeps import made

from adaptive import studies
from adaptive.studies.ladder import FULL, QUICK, VARIANTS
from adaptive.sweeps import ladder_results, shuffled
from adaptive.sweeps.compare import Cell, Spread, difference
from adaptive.sweeps.ladder_results import worth_in_words

HERE = Path("somewhere")
STUDY = studies.load("ladder")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(ladder_results, "fit", functools.partial(ladder_results.fit, resamples=60))


def runs(**form):
    return STUDY.runs(studies.Form(**form), HERE)


def page(found, *, missing=(), **form):
    return STUDY.page(studies.Form(**form), found, missing)


@pytest.fixture(scope="module")
def full():
    return runs()


def test_runs_of_a_size_cost_the_same(full):
    for width in FULL.widths:
        some = [run for run in full if run.labels["width"] == width and run.labels["amount"] == 1.0]
        assert {run.labels["variant"] for run in some} == set(VARIANTS)
        per_step = [run.flops / run.recipe.train.steps for run in some]
        assert max(run.flops for run in some) - min(run.flops for run in some) <= max(per_step)
    same = runs(match="data")
    assert {run.tokens for run in same if run.labels["width"] == 24 and run.labels["amount"] == 1.0} == {366 * 2048}


def test_runs_are_valid_and_differ_by_what_they_are_called(full):
    assert len(full) >= 60 and len({run.name for run in full}) == len(full)
    for run in {run.labels["variant"]: run for run in [*full, *runs(quick=True)]}.values():
        run.recipe.validate()
        assert run.recipe.name == run.name
    two = [run for run in runs(quick=True, seeds=2) if run.name.startswith("mor3-w16")]
    assert [run.recipe.train.seed for run in two] == [0, 1]


def test_recursions_share_the_middle_of_one_depth(full):
    first = {run.labels["variant"]: run for run in full if run.labels["width"] == 32}
    assert {run.recipe.model.body.layers for name, run in first.items() if name != "hnet"} == {14}
    whole = first["vanilla"].labels["once"]
    for name, times in (("recursive2", 2), ("recursive3", 3), ("recursive4", 4), ("mor3", 3)):
        labels = first[name].labels
        assert labels["once"] + times * labels["shared"] == whole
    assert [first[name].labels["passes"] for name in ("recursive3", "mor2", "mor4")] == [3, 1.5, 2.5]


def test_a_page_finds_what_the_runs_were_made_with(full):
    # Losses by the law with phi = 0.46 and the noise of seeds; experts and chunks better by 3 %.
    better = lambda run: 0.97 if run.labels["variant"] in ("moe_tc", "hnet") else 1.0  # noqa: E731
    found = [
        made.outcome(run, 3.1, rules=("train", "causal")) if run.labels["control"] else one
        for run, one in zip(full, made.outcomes(full, 0.46, 0.002, better), strict=True)
    ]
    told = page(found)
    recursive, routed, orderings, best, control = told.verdict
    assert "a recursion adds capacity, and less than fresh layers would" in recursive
    low, high = map(float, re.search(r"\[(.*?), (.*?)\]", recursive).groups())
    assert low < 0.46 < high and high - low < 0.2
    # At phi = 0.46 a routed recursion is not worth what it costs.
    assert "mor" in routed and "vanilla < recursive2" in orderings
    assert "11 of 12 appear" in orderings and "1 the other way round (mor2 < vanilla)" in orderings
    assert "(w48)" in best and "no model is better" in control
    assert "| vanilla < recursive4 |" not in told.text and "mor3 < recursive3" in told.text
    assert set(told.pictures) == {"loss.svg", "against.svg", "phi.svg"}
    for svg in told.pictures.values():
        words = " ".join(ElementTree.fromstring(svg).itertext())
        assert "nan" not in words
    assert all(name in told.pictures["loss.svg"] for name in VARIANTS)
    assert "commit 012345678 with changes; `adaptive study ladder`." in " ".join(told.text.split())
    assert max(map(len, (line for line in told.text.splitlines() if not line.startswith("|")))) <= 120


def test_a_page_says_what_speaks_against_the_papers(full):
    # A loop is worth nothing, experts are worse than none, and a router on shuffled text reads its targets.
    worse = lambda run: 1.5 if run.labels["variant"] == "moe_tc" else 1.0  # noqa: E731
    found = [
        made.outcome(run, 1.0 if run.labels["variant"] == "moe_ec" else 3.1) if run.labels["control"] else one
        for run, one in zip(full, made.outcomes(full, 0.0, 0.002, worse), strict=True)
    ]
    told = page(found)
    assert "adds no capacity that can be told from none" in told.verdict[0] and "0.46 is outside" in told.verdict[0]
    assert re.search(r"other way round \(.*moe_tc < vanilla", told.verdict[2])
    assert told.verdict[-1].startswith("**On shuffled text below what is possible: moe_ec, causal.**")


def test_a_page_of_few_runs_says_so():
    planned = runs(quick=True)
    found = made.outcomes(planned, 0.46)
    assert "quick form" in page(found, quick=True).text
    few = page(found[:3], missing=[run.name for run in planned[3:]])
    assert "too few runs" in few.text and planned[-1].name in few.text
    assert page([], missing=["a"]).verdict == ["No run is finished: nothing follows yet."]
    assert {run.labels["variant"] for run in planned} == set(QUICK.variants)


def test_chance_of_seeds_and_of_documents_is_in_differences():
    a, b = (Cell(loss, loss * np.linspace(0.9, 1.1, 1000), 1) for loss in (2.0, 2.01))
    assert difference(a, b, Spread(0.0, 0)).sign == -1  # the documents are paired
    assert difference(a, b, Spread(0.02, 4)).sign == 0
    low, high = difference(a, b, Spread(0.001, 50))[1:]
    assert high - low == pytest.approx(2 * 1.96 * 0.001 * 2.0 * 2**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        ((0.3, 0.6), "less than fresh layers would; the published 0.46 is inside"),
        ((-0.2, 0.2), "adds no capacity that can be told from none"),
        ((-0.2, 1.2), "neither from one pass nor from fresh layers"),
        ((0.8, 1.1), "cannot be told from fresh layers"),
        ((1.1, 1.3), "worth more than fresh layers"),
        ((-0.6, -0.1), "takes capacity away"),
        ((-1.0, 2.0), "not determined by these runs"),
    ],
)
def test_a_worth_in_words(drawn, words):
    class Told:
        def interval(self, name):
            return drawn

        def __getitem__(self, name):
            return sum(drawn) / 2

        def at_limit(self, name):
            return drawn == (-1.0, 2.0)

    assert words in worth_in_words(Told())


def test_shuffled_text_keeps_characters_and_documents(tmp_path, monkeypatch):
    texts = ["abab", "ccd über", "aaaa"]
    monkeypatch.setattr(shuffled, "_documents", lambda corpus: iter(texts))
    shuffled.write_shuffled(tmp_path / "shuffled.txt")
    parts = (tmp_path / "shuffled.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")[:-1]
    assert [sorted(part) for part in parts] == [sorted(text) for text in texts] and parts != texts
    # Every second document: 8 characters in 8! / 2! orders, over 9 bytes.
    assert shuffled.least_loss(2) == pytest.approx(np.log(40320 / 2) / 9)
