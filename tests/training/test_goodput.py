"""The account of a run's time: what counts, what failures cost, and that it outlives its process."""

import dataclasses
import json
import types

import pytest

from adaptive.training import goodput
from adaptive.training.goodput import Account, Attempt, read_attempts, shares, spent
from adaptive.training.report.time import time


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_is_of_one_kind_at_a_time(tmp_path):
    clock = Clock()
    account = Account(990.0, clock)
    with account.of("compile"):
        clock.now += 5
    account.begins_at(0, tmp_path)
    account.becomes("step")
    clock.now += 20
    account.waited(2)
    with account.of("evaluation"):
        clock.now += 3
    account.note(7, stopped=True)
    (attempt,) = read_attempts(tmp_path)
    assert {kind: s for kind, s in attempt.seconds.items() if s} == {
        "start": 10, "compile": 5, "step": 18, "data": 2, "evaluation": 3,
    }  # fmt: skip
    assert (attempt.begin, attempt.end, attempt.first, attempt.last, attempt.stopped) == (990, 1028, 0, 7, True)
    assert account.spent().goodput == pytest.approx(18 / 38)
    assert [kind for kind, _, _ in shares(account.spent())] == ["step", "start", "compile", "evaluation", "data"]


def test_a_failure_costs_the_steps_that_are_taken_again_and_the_time_until_the_next_start(tmp_path):
    failed = Attempt(0.0, 100.0, 0, 50, False, {"start": 20.0, "step": 80.0})
    resumed = Attempt(110.0, 150.0, 40, 60, True, {"start": 10.0, "step": 30.0})
    later = Attempt(9000.0, 9010.0, 60, 60, True, {"start": 10.0})  # nobody missed it meanwhile
    found = spent([failed, resumed, later])
    assert found.seconds == {"start": 40.0, "step": 94.0, "lost": 16.0, "down": 10.0}
    assert (found.attempts, found.failures) == (3, 1) and found.goodput == 94 / 160
    assert spent([]).goodput is None and spent([later]).goodput is None


def test_an_attempt_goes_on_from_those_before_and_is_rewritten_now_and_then(tmp_path):
    clock = Clock()
    for begin, first in ((1000.0, 0), (1020.0, 4)):
        clock.now = begin
        account = Account(begin, clock)
        account.begins_at(first, tmp_path)
        account.becomes("step")
        clock.now += 10
        account.note(first + 5)
        clock.now += 0.5
        account.note(first + 6)  # too soon
    assert [(one.first, one.last, one.stopped) for one in read_attempts(tmp_path)] == [(0, 5, False), (4, 9, False)]
    assert account.spent().seconds["lost"] == 2.0
    (tmp_path / goodput.GOODPUT_FILE).write_text('{"attempts": [')
    assert read_attempts(tmp_path) == []
    account.begins_at(4, None)
    account.note(9, stopped=True)
    assert read_attempts(tmp_path) == []


def test_a_process_knows_when_it_began(monkeypatch):
    assert 0 <= goodput.time.time() - goodput.process_began() < 1e6
    monkeypatch.setattr(goodput, "Path", lambda name: types.SimpleNamespace(read_text=lambda **_: "?"))
    assert abs(goodput.time.time() - goodput.process_began()) < 60


def test_the_report_says_where_the_time_went(tmp_path):
    run = types.SimpleNamespace(path=tmp_path)
    assert time(run) == ""
    attempts = [Attempt(0.0, 100.0, 0, 50, False, {"start": 20.0, "step": 80.0}), Attempt(110.0, 111.0, 50, 50)]
    kept = {"attempts": [dataclasses.asdict(one) for one in attempts]}
    (tmp_path / goodput.GOODPUT_FILE).write_text(json.dumps(kept))
    page = time(run)
    assert "Goodput 72.7%" in page and "2 starts, 1 after a failure" in page
    assert "between a failure and the next start" in page and "1 min 50 s" in page
