"""Sizes of blocks: by the device that a program is made for, else a form's own."""

import json
import math

import pytest

from adaptive.benchmarks import tune
from kernels_pallas import sizes
from kernels_pallas.choice import target


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "sizes.json"
    monkeypatch.setattr(sizes, "TABLE", path)
    sizes._table.cache_clear()
    yield path
    sizes._table.cache_clear()


def test_what_was_found_holds_for_its_device_alone(table):
    assert sizes.sizes("a", (1, 2)) == (1, 2)
    sizes.write("chip", {"a": (3, 4)})
    sizes.write("chip", {"b": (5,)})
    sizes.write("other", {"a": (6, 7)})
    assert json.loads(table.read_text())["chip"] == {"a": [3, 4], "b": [5]}
    assert sizes.sizes("a", (1, 2)) == (1, 2)
    with target("gpu", device="chip"):
        assert sizes.sizes("a", (1, 2)) == (3, 4) and sizes.sizes("c", (1,)) == (1,)
        with sizes.tried({"a": (8, 9)}):
            assert sizes.sizes("a", (1, 2)) == (8, 9) and sizes.sizes("b", (1,)) == (5,)


def test_the_usual_stays_unless_something_is_clearly_faster():
    knob = tune.Knob("a", "", (1,), ((2,), (3,)))
    assert tune.chosen(knob, {(1,): 1.0, (2,): 0.99, (3,): math.inf}) == (1,)
    assert tune.chosen(knob, {(1,): 1.0, (2,): 0.9, (3,): 0.95}) == (2,)
    assert tune.chosen(knob, {(1,): math.inf, (2,): 2.0, (3,): math.inf}) == (2,)


@pytest.mark.compiles
def test_tuning_times_what_forms_ask_for_and_writes_it(table, capsys, monkeypatch):
    monkeypatch.setattr(tune, "seconds", lambda program, inputs: 1.0 if program is usual(program) else 0.5)
    seen = []

    def usual(program):
        seen.append(program)
        return seen[0]

    monkeypatch.setitem(tune.KNOBS, "cpu", (tune.KNOBS["cpu"][0]._replace(others=((128,),)),))
    assert tune.main(["--repeats", "1"]) == 0
    (written,) = json.loads(table.read_text()).values()
    assert written == {"attention/xla": [128]} and "attention/xla" in capsys.readouterr().out
