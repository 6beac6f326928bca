"""Steps that wait for data are told of, once, with the source that is slow."""

from adaptive.training.data_alarm import DataAlarm


def rows(wait: float, count: int = 10, **more: float) -> list[dict]:
    return [{"steps": 10, "step_ms": 100.0, "data_wait_ms": wait, **more} for _ in range(count)]


def heard(alarm: DataAlarm, of: list[dict]) -> list[str]:
    return [line for row in of for line in alarm(row)]


def test_a_slow_source_is_named_once_while_it_lasts():
    alarm = DataAlarm(("english", "python"))
    assert heard(alarm, [{"step": 1, "eval/loss": 1.0}, *rows(2.9, 20)]) == [] and alarm.standing() == []
    times = {"data_ms/english": 4.0, "data_ms/python": 52.0}
    (line,) = heard(alarm, rows(40.0, 30, **times))
    assert "over 100 steps each waited 40.0 ms of 100.0 ms for data (40%)" in line
    assert "the slowest source is python, with 52.0 ms for its rows of a batch" in line and alarm.standing()
    assert heard(alarm, rows(0.0)) == [] and not alarm.standing()
    assert len(heard(alarm, rows(40.0))) == 1  # it came back
    assert "it comes from a, b" in heard(DataAlarm(("a", "b")), rows(40.0))[0]
