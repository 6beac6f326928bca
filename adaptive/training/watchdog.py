"""A clock for what must not take forever: when it runs out, the run says where every thread is, and ends."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

COMPILE_S = 4 * 3600.0  # more than any compilation takes
EXPIRED = 124  # the exit code of a run that the watchdog ended

_POLL_S = 0.25
_PAUSE_S = 5.0  # a thread that was not run for so long was stopped together with its process (Ctrl-Z, a laptop's sleep)


def end_run(what: str, seconds: float) -> None:
    """Writes what took too long and the stacks of all threads to standard error, and ends the process with 124."""
    print(f"watchdog: {what} is not done after {seconds:g} s; where every thread is:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    os._exit(EXPIRED)  # not sys.exit: the main thread is stuck, and so would be what runs at exit


class Watchdog:
    """`with watchdog.limit("step 12", 300): ...` must end in time, or `on_expire(what, seconds)` is called, once.

    Start it before anything that can hang. Limits nest: the inner one stands for the
    outer one while it lasts, and the outer one's clock runs on.
    """

    def __init__(self, on_expire: Callable[[str, float], None] = end_run):
        self._on_expire = on_expire
        self._lock = threading.Lock()
        self._limit: tuple[str, float, float] | None = None  # what, seconds, when it is due
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def limit(self, what: str, seconds: float) -> Iterator[None]:
        """The block, named `what` in the message, must end within `seconds`."""
        with self._lock:
            outer, self._limit = self._limit, (what, seconds, time.monotonic() + seconds)
        try:
            yield
        finally:
            with self._lock:
                self._limit = outer

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(_POLL_S)
            now = time.monotonic()
            paused = now - before if now - before > _PAUSE_S else 0.0
            before = now
            with self._lock:
                if self._limit is None:
                    continue
                what, seconds, due = self._limit
                self._limit = what, seconds, due + paused
            if now > due + paused:
                self._on_expire(what, seconds)
                return
