"""The script that puts a server under load: it counts what is lost."""

import asyncio
import runpy
from pathlib import Path

from serving_cases import Engine, while_serving

LOAD = Path(__file__).resolve().parents[2] / "scripts" / "load"


def test_nothing_is_lost():
    load = runpy.run_path(str(LOAD))
    engine = Engine(b"x" * 64, end=False, most=1000)
    answers, held, passed = while_serving(
        lambda address: asyncio.run(load["load"](address, 5, 0.3)), engine, context=200
    )[0]
    assert len(answers) >= 5 and not any(answer.problem for answer in answers) and held[0][1] > 1e6
    assert all(answer.tokens == answer.asked == len(answer.gaps) + 1 for answer in answers)
    told = load["told"](answers, held, 5, passed)
    assert f"{len(answers)} answers, 0 lost" in told and "evenness (Jain)" in told


def test_what_is_lost_is_told():
    load = runpy.run_path(str(LOAD))
    engine = Engine(b"x" * 8, end=False)  # fewer than are asked for
    answers, held, passed = while_serving(
        lambda address: asyncio.run(load["load"](address, 2, 0.01)), engine, context=200
    )[0]
    assert all("8 of" in answer.problem for answer in answers)
    assert f"{len(answers)} lost" in load["told"](answers, held, 2, passed)
