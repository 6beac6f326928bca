"""The time that something takes, while it does."""

import io
import time

from adaptive.training import waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_clock(monkeypatch):
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream, said = Terminal(), []
    with waiting.waiting("compiling", said.append, stream):
        until = time.monotonic() + 20
        while "compiling, 0:0" not in stream.getvalue() and time.monotonic() < until:
            time.sleep(0.05)
    assert "compiling, 0:0" in stream.getvalue() and "so far" in stream.getvalue() and not said


def test_elsewhere_a_line_is_said_now_and_then(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERY_S", 0.01)
    said = []
    with waiting.waiting("compiling", said.append, io.StringIO()):
        until = time.monotonic() + 20
        while len(said) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert said[0] == "compiling, 0:00 so far" and len(said) >= 2
