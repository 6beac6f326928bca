"""The rows of a run: what is kept over a resume, means over an interval, ratios."""

import dataclasses
import json
import math
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from adaptive.errors import UserError
from adaptive.training.log import MetricsLog, WorkdirLostError, read_rows, steps_without_row
from adaptive.training.metrics import Meter, OneStepLate, StepCost, bits_per_byte


def test_rows_past_the_restored_step_are_dropped_on_resume(tmp_path):
    log = MetricsLog.open(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0 / step})
    log.write({"step": 20, "eval/loss": 2.0})
    log.close()
    resumed = MetricsLog.open(tmp_path, 20)
    assert resumed.kept[-1] == {"step": 20, "eval/loss": 2.0} and len(resumed.kept) == 3
    resumed.write({"step": 30, "loss": 5.0})
    assert [(r["step"], r.get("loss")) for r in read_rows(tmp_path)] == [(10, 0.1), (20, 0.05), (20, None), (30, 5.0)]


def test_a_row_can_be_read_as_soon_as_it_is_written_and_a_torn_line_is_left_out(tmp_path):
    log = MetricsLog.open(tmp_path, 0)
    log.write({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_rows(tmp_path) == [{"step": 1}]
    again = MetricsLog.open(tmp_path, 5)
    again.write({"step": 3})
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 3]


def test_rows_are_strict_json_of_plain_numbers(tmp_path):
    log = MetricsLog.open(tmp_path, 0)
    log.write({"step": np.int32(1), "a": np.asarray(0.5, np.float32), "b": np.float32("nan"), "c": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": 0.5, "b": None, "c": None}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", 'no "step" that is a whole number'),
        ('{"loss": 1}', 'no "step"'),
        ('{"step": "7"}', 'no "step"'),
        ('{"step": -1}', 'no "step"'),
        ('{"step": 7, "loss": "low"}', "loss has 'low' where a number or null belongs"),
        ('{"step": 7, "experts/load": [[1, {}]]}', "experts/load has {}"),
        ('{"step": 7, "loss": NaN}', "NaN"),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_line(tmp_path, line, says):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n\n{line}\n{{"step": 9}}\n')
    for read in (read_rows, lambda path: MetricsLog.open(path, 9)):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert f"{tmp_path / 'metrics.jsonl'}, line 3" in str(error.value) and says in str(error.value)


def test_a_last_line_without_an_end_counts_where_it_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]


def test_steps_that_no_row_holds():
    rows = [{"step": 1, "steps": 1}, {"step": 5, "steps": 4}, {"step": 5, "eval/loss": 1}, {"step": 9, "steps": 2}]
    assert steps_without_row(rows, 9) == [(6, 7)]
    assert steps_without_row(rows, 12) == [(6, 7), (10, 12)]
    assert steps_without_row([{"step": 10}, {"step": 20}], 20) == []  # of the first versions
    assert steps_without_row([], 3) == [(1, 3)] and steps_without_row([], 0) == []


def test_a_workdir_that_was_moved_is_noticed(tmp_path):
    (tmp_path / "run").mkdir()
    log = MetricsLog.open(tmp_path / "run", 0)
    log.write({"step": 1})
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "run" / "old")  # as editors do
    log.write({"step": 2})
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [2]
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(WorkdirLostError, match="moved or deleted"):
        log.write({"step": 3})
    log.write({"step": 4})  # nothing is kept any more
    log.check()
    assert not (tmp_path / "run").exists()


def test_a_row_that_does_not_fit_on_the_disk_is_an_error():
    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 1})
    log.close()


def test_other_processes_keep_no_rows():
    MetricsLog(None).write({"step": 1})


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir"):
        MetricsLog.open(tmp_path / "file", 0)


def test_metrics_come_one_step_late():
    late = OneStepLate()
    with jax.transfer_guard_device_to_host("disallow"):
        assert late.swap(1, {"loss": jax.device_put(np.float32(3))}) is None
        assert late.swap(2, {"loss": jax.device_put(np.float32(2))})[:2] == (1, {"loss": 3.0})
        step, metrics, _ = late.flush()
    assert (step, float(metrics["loss"])) == (2, 2.0) and isinstance(metrics["loss"], np.ndarray)
    assert late.flush() is None


COST = StepCost(tokens=1000, flops=4e9, dense_flops=6e9, bytes_per_token=2.0, peak=8e9)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_row_holds_means_over_its_interval():
    clock = Clock()
    meter = Meter(COST, seconds=50.0, clock=clock)
    for ce, skipped in ((1.0, 0), (math.nan, 1), (3.0, 0)):
        clock.now += 2.0
        meter.waited(0.5)
        meter.add({"ce": ce, "skipped": skipped})
    with meter.paused():
        clock.now += 100.0
    row = meter.row(7, learning_rate=0.1)
    assert row["ce"] == 2.0 and row["skipped"] == 1 and row["learning_rate"] == 0.1
    assert row["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 2)
    assert (row["step"], row["tokens"], row["flops"]) == (7, 7000, 28e9)
    assert row["seconds"] == 156.0, "wall time goes on from the earlier attempt and counts pauses"
    assert row["step_ms"] == pytest.approx(2000) and row["data_wait_ms"] == pytest.approx(500)
    assert row["tokens_per_s"] == pytest.approx(500) and row["flops_per_s"] == pytest.approx(2e9)
    assert row["mfu_active"] == pytest.approx(0.25) and row["mfu_dense_equivalent"] == pytest.approx(0.375)
    assert not any(name == "mfu" for name in row)
    assert row["steps"] == 3
    clock.now += 1.0
    meter.add({"ce": math.nan})
    later = meter.row(8)
    assert math.isnan(later["ce"]) and later["step_ms"] == pytest.approx(1000) and later["data_wait_ms"] == 0


def test_a_step_takes_as_long_as_until_it_was_done():
    """Whether a call returns at once, or with its results: the last step before a pause and the first after it."""
    clock = Clock()
    meter = Meter(COST, clock=clock)
    times = []
    for done in (102.0, 104.0, 106.0, 158.0, 160.0):
        clock.now = max(clock.now, done + 1.0)  # the row is made while the next step runs
        if done == 106.0:  # seen to be done when the step before became a row
            clock.now = 105.0
        meter.add({}, done)
        times.append(meter.row(1)["step_ms"])
        if done == 106.0:
            clock.now = 106.0
            with meter.paused():
                clock.now = 156.0
    assert times == [2000.0] * 5


class Pending:
    """A scalar that comes later."""

    def __init__(self):
        self.there = threading.Event()

    def block_until_ready(self):
        assert self.there.wait(60)
        return self

    def copy_to_host_async(self):
        pass


def test_a_step_is_done_when_its_results_are_there_not_when_they_are_looked_at(monkeypatch):
    monkeypatch.setattr(jax, "device_get", lambda tree: tree)
    clock, first, second = Clock(), Pending(), Pending()
    late = OneStepLate(clock)
    late.swap(1, {"loss": first})
    clock.now = 104.0
    first.there.set()
    late._held[2]._thread.join()
    clock.now = 108.0
    assert late.swap(2, {"loss": second}).at == 104.0
    second.there.set()
    assert late.flush().at == 108.0


def test_no_utilisation_without_a_known_peak():
    clock = Clock()
    meter = Meter(dataclasses.replace(COST, peak=None), clock=clock)
    clock.now += 1
    meter.add({"ce": 1.0})
    assert not [name for name in meter.row(1) if name.startswith("mfu")]


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(8 * math.log(2), 4.0) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, 0.0))
