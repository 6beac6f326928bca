"""Schedules of the learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.optim.config import ScheduleConfig
from adaptive.optim.schedule import make_schedule, phases


def test_trapezoid_of_the_published_runs():
    """Steps and decay of the 360M runs (released configurations): vanilla 9438 and 1888, MoR 14161 and 2832. There
    steps are counted from zero."""
    config = ScheduleConfig(kind="trapezoid", warmup_steps=57, count_from="zero")
    assert phases(config, 9438) == (57, 1888)
    assert phases(dataclasses.replace(config, warmup_steps=86), 14161) == (86, 2832)
    rate = make_schedule(config, 3e-3, 9438)
    for t, share in [(0, 0), (1, 1 / 57), (56, 56 / 57), (57, 1), (7550, 1), (7551, 1 - 1 / 1888), (9437, 1 / 1888)]:
        assert float(rate(t)) == pytest.approx(3e-3 * share, rel=1e-4), t


def test_the_first_step_trains_and_the_last_has_the_floor():
    rate = make_schedule(ScheduleConfig(kind="trapezoid", warmup_steps=57, floor=0.1), 3e-3, 9438)
    for t, share in [(0, 1 / 57), (56, 1), (7549, 1), (7550, 1 - 0.9 / 1888), (9437, 0.1)]:
        assert float(rate(t)) == pytest.approx(3e-3 * share, rel=1e-4), t
    rate = make_schedule(ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1), 2.0, 110)
    assert [round(float(rate(t)), 5) for t in (0, 9, 59, 109)] == [0.2, 2, 1.1, 0.2]
    for warmup in (0, 60):  # a run of one step is no run of nothing
        assert float(make_schedule(ScheduleConfig(warmup_steps=warmup), 1e-3, 1)(0)) == pytest.approx(1e-3)


def test_cosine_ends_at_its_floor():
    rate = make_schedule(ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1, count_from="zero"), 2.0, 110)
    for t, value in [(0, 0), (5, 1), (10, 2), (60, 1.1), (35, 0.2 + 0.9 * (1 + 2**-0.5)), (110, 0.2), (200, 0.2)]:
        assert float(rate(t)) == pytest.approx(value, rel=1e-5), t


def test_a_short_run_shortens_its_warm_up():
    assert phases(ScheduleConfig(warmup_steps=100, decay_fraction=0.2), 10) == (8, 2)
    rate = make_schedule(ScheduleConfig(warmup_steps=100, decay_fraction=0.2), 1.0, 10)
    assert [round(float(rate(t)), 4) for t in (0, 3, 7, 8, 9)] == [0.125, 0.5, 1, 0.5, 0]


def test_square_root_decay_is_steep_at_first():
    config = ScheduleConfig(warmup_steps=10, decay_fraction=0.2, decay_shape="sqrt", floor=0.1)
    rate = make_schedule(config, 2.0, 100)
    expected = [2.0 * (1 - 0.9 * np.sqrt(progress)) for progress in (0, 0.05, 0.25, 1, 1)]
    np.testing.assert_allclose([rate(t) for t in (79, 80, 84, 99, 109)], expected, rtol=1e-6)
    np.testing.assert_allclose([rate(t) for t in (0, 4, 9, 78)], [0.2, 1, 2, 2])


@pytest.mark.compiles
def test_a_device_computes_what_the_host_does():
    rate = make_schedule(ScheduleConfig(kind="cosine", warmup_steps=3, floor=0.1), 2.0, 11)
    there = jax.jit(rate)(jnp.arange(11, dtype=jnp.int32))
    assert there.dtype == np.float32 and rate(0).dtype == np.float32
    np.testing.assert_allclose(there, [rate(t) for t in range(11)], rtol=1e-6)
