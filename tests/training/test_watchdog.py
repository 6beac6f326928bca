"""Limits expire, name what hung, and end a process that is stuck where no exception reaches it."""

import queue
import subprocess
import sys
import time

from adaptive.training.watchdog import EXPIRED, Watchdog

STUCK_IN_A_CALLBACK = """
import time
import jax
from adaptive.training.watchdog import Watchdog

def nap(x):
    time.sleep(600)
    return x

watchdog = Watchdog()
with watchdog.limit("step 7", 1.0):
    jax.jit(lambda x: jax.pure_callback(nap, jax.ShapeDtypeStruct((), "float32"), x))(1.0).block_until_ready()
"""


def test_a_step_stuck_in_a_callback_ends_with_every_stack():
    done = subprocess.run([sys.executable, "-c", STUCK_IN_A_CALLBACK], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXPIRED == 124
    assert "watchdog: step 7 is not done after 1 s" in done.stderr
    assert "in nap" in done.stderr  # where it hangs
    assert "in <module>" in done.stderr  # and who waits for it


def test_limits_nest_and_expire_by_name():
    expired: queue.Queue = queue.Queue()
    watchdog = Watchdog(lambda what, seconds: expired.put((what, seconds)))
    with watchdog.limit("run", 600):
        with watchdog.limit("quick", 600):
            pass
        with watchdog.limit("slow", 0.1):
            assert expired.get(timeout=30) == ("slow", 0.1)


def test_what_ends_in_time_does_not_expire(monkeypatch):
    monkeypatch.setattr("adaptive.training.watchdog._POLL_S", 0.01)
    expired: queue.Queue = queue.Queue()
    watchdog = Watchdog(lambda what, seconds: expired.put(what))
    for _ in range(3):
        with watchdog.limit("step", 0.2):
            pass
    time.sleep(0.4)  # past the due time of each
    assert expired.empty()


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    """A clock that jumps by an hour between two looks means that the process did not run."""
    clock = iter([0.0, 0.0, 3600.0, *(3600.0 + i for i in range(1, 10**6))])
    looks: queue.Queue = queue.Queue()

    class Time:
        monotonic = staticmethod(lambda: next(clock))

        @staticmethod
        def sleep(seconds):
            looks.put(seconds)
            time.sleep(0.01)

    monkeypatch.setattr("adaptive.training.watchdog.time", Time)
    expired: queue.Queue = queue.Queue()
    watchdog = Watchdog(lambda what, seconds: expired.put(what))
    with watchdog.limit("step", 4.5):
        for _ in range(3):
            looks.get(timeout=30)  # the hour has passed
        assert expired.empty()
        assert expired.get(timeout=30) == "step"  # seconds that did pass do count
