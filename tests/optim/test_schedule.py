"""Schedules of the learning rate."""

import dataclasses

import pytest

from adaptive.optim.config import ScheduleConfig
from adaptive.optim.schedule import make_schedule, phases

pytestmark = pytest.mark.compiles


def test_trapezoid_of_the_published_runs():
    """Steps and decay of the 360M runs (released configurations): vanilla 9438 and 1888, MoR 14161 and 2832."""
    config = ScheduleConfig(kind="trapezoid", warmup_steps=57)
    assert phases(config, 9438) == (57, 1888)
    assert phases(dataclasses.replace(config, warmup_steps=86), 14161) == (86, 2832)
    rate = make_schedule(config, 3e-3, 9438)
    for t, share in [(0, 0), (1, 1 / 57), (56, 56 / 57), (57, 1), (7550, 1), (7551, 1 - 1 / 1888), (9437, 1 / 1888)]:
        assert float(rate(t)) == pytest.approx(3e-3 * share, rel=1e-4), t


def test_cosine_ends_at_its_floor():
    rate = make_schedule(ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1), 2.0, 110)
    for t, value in [(0, 0), (5, 1), (10, 2), (60, 1.1), (35, 0.2 + 0.9 * (1 + 2**-0.5)), (110, 0.2), (200, 0.2)]:
        assert float(rate(t)) == pytest.approx(value, rel=1e-5), t


def test_a_short_run_shortens_its_warm_up():
    assert phases(ScheduleConfig(warmup_steps=100, decay_fraction=0.2), 10) == (8, 2)
    rate = make_schedule(ScheduleConfig(warmup_steps=100, decay_fraction=0.2), 1.0, 10)
    assert [round(float(rate(t)), 4) for t in (0, 4, 8, 9, 10)] == [0, 0.5, 1, 0.5, 0]
