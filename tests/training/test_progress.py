"""The live line on a terminal, plain lines elsewhere."""

import io
import re

import pytest

from adaptive.training.progress import Progress, plain_line

ROW = {
    "step": 10,
    "seconds": 5.0,
    "loss": 3.5,
    "ce": 3.0,
    "bits_per_byte": 4.33,
    "tokens_per_s": 12_345.0,
    "step_ms": 500.0,
}
EVALUATION = {
    "step": 20, "eval/loss": 1.5, "eval/bits_per_byte": 2.164, "eval/threshold/bits_per_byte": 2.2,
    "eval/routing/accuracy": 0.985,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_plain_lines_when_not_a_terminal():
    stream = io.StringIO()
    with Progress(100, stream=stream, plain_every=2) as progress:
        for step in (10, 20, 30, 40):
            progress.row({**ROW, "step": step, "seconds": step / 2})
        progress.row(EVALUATION)
        progress.say("saved")
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "step 10/100  loss 3.000  4.330 bits/byte  12.3k tok/s  0:45 left"
    assert lines[1].startswith("step 30/100") and lines[1].endswith("0:35 left")
    assert lines[2] == (
        "step 20/100  held-out  loss 1.5000  2.1640 bits/byte  (threshold 2.2000)  sampling accuracy 98.5%"
    )
    assert lines[3:] == ["saved"]


def test_the_load_of_experts_is_told_where_there_is_room(monkeypatch):
    row = {**ROW, "experts/load_max_over_mean": 1.314, "skipped": 1}
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.row(row)
    assert "12.3k tok/s · 1 skipped · max/mean load 1.31 · 0:45 left" in plain(stream.getvalue())
    even = {**row, "experts/load_max_over_mean": 1.0, "experts/without_expert": 0.05}
    assert "5.0% without expert" in plain_line(even, 100, None)
    monkeypatch.setenv("COLUMNS", "90")
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.row(row)
    assert "1 skipped" in plain(stream.getvalue()) and "load" not in plain(stream.getvalue())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.row(ROW)
    assert stream.getvalue() == "step 10/100  loss 3.000  4.330 bits/byte  12.3k tok/s  0:45 left\n"


def test_one_live_line_on_a_terminal_above_which_log_lines_scroll():
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.doing("compiling")
        progress.row({**ROW, "mfu_active": 0.412})
        progress.say("a checkpoint was saved")
        progress.row(EVALUATION)
    text = plain(stream.getvalue())
    assert "a checkpoint was saved\n" in text and "held-out" in text
    assert "step 10/100  loss 3.000  4.330 bits/byte  12.3k tok/s  MFU 41%  0:45 left\n" in text
    assert "step 10/100 · loss 3.000 · 4.330 bits/byte · 12.3k tok/s · MFU 41% · 0:45 left" in text
    assert "━" in text


def test_the_live_line_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.row(ROW)
        progress.say("x")
    shown = re.split(r"[\r\n]+", plain(stream.getvalue()))
    assert max(map(len, shown)) <= 44
    assert any(line.startswith("step 10/100 · loss 3.000 · 0:45 left") for line in shown)
    assert "step 10/100  loss 3.000  0:45 left" in shown  # scrolled


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.row(ROW)
        progress.say("x")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-9])m", stream.getvalue())


def test_other_processes_say_nothing():
    for stream in (io.StringIO(), Terminal()):
        with Progress(100, stream=stream, enabled=False) as progress:
            progress.row(ROW)
            progress.say("x")
        assert stream.getvalue() == ""


def test_time_left_follows_the_pace_of_this_attempt():
    progress = Progress(1000, start_step=500, stream=io.StringIO())
    assert progress.seconds_left() is None
    progress.row({"step": 510, "seconds": 9000.0})
    assert progress.seconds_left() is None
    progress.row({"step": 520, "seconds": 9020.0})
    assert progress.seconds_left() == pytest.approx(480 * 2)


def test_a_loss_that_is_not_finite_is_said():
    stream = io.StringIO()
    Progress(10, stream=stream).row({"step": 1, "loss": None, "ce": None, "skipped": 1})
    assert stream.getvalue() == "step 1/10  loss not finite  1 skipped\n"
