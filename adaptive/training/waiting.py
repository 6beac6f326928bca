"""What a person sees while something without steps takes long, such as compilation."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from adaptive.training.report.numbers import clock

_EVERY_S = 60.0  # between lines where there is no terminal


@contextlib.contextmanager
def waiting(what: str, say: Callable[[str], None], stream: TextIO | None = None) -> Iterator[None]:
    """Shows `what` with the time it has taken: on a terminal as a line that runs, elsewhere said once a minute.

    stream  where the terminal is looked for; None: standard output
    """
    console = Console(file=stream or sys.stdout, highlight=False)
    begin = time.monotonic()
    told = lambda: f"{what}, {clock(time.monotonic() - begin)} so far"  # noqa: E731
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(get_renderable=lambda: Text(told()), console=console, refresh_per_second=2, transient=True):
            yield
        return
    done = threading.Event()

    def remind() -> None:
        while not done.wait(_EVERY_S):
            say(told())

    thread = threading.Thread(target=remind, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
