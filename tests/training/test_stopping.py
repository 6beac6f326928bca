"""Signals become a flag at once, a second one ends the process, and processes agree on the step at which they stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from adaptive.training import stopping
from adaptive.training.stopping import INTERRUPTED, PREEMPTED, StopRequest

# The main thread is inside compiled code for seconds and cannot run a Python signal handler.
BUSY = """
import sys
import jax
import jax.numpy as jnp
from adaptive.training.stopping import StopRequest

@jax.jit
def long(x):
    return jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x) + i, x)

compiled = long.lower(jnp.ones(8)).compile()
with StopRequest(say=lambda line: print(line, flush=True)):
    print("ready", flush=True)
    compiled(jnp.ones(8)).block_until_ready()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_says_so(number):
    before = signal.getsignal(number)
    said, heard = [], threading.Event()

    def say(line):
        said.append(line)
        heard.set()

    with StopRequest(say) as stop:
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), number)
        assert heard.wait(30)
        assert stop.requested and stop.agreed()
    assert said[0].startswith(number.name) and len(said) == 1
    assert signal.getsignal(number) is before
    assert PREEMPTED == 75


def test_a_second_ctrl_c_ends_even_compiled_code():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("SIGINT: stopping after this step and saving")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED == 130
        assert "SIGINT again: ending now, without saving" in errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.compiles
def test_several_processes_learn_of_one_flag_a_call_later(monkeypatch):
    """The collective itself, over this process's devices; only the number of processes is pretended."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    stop = StopRequest()
    assert [stop.agreed(), stop.agreed()] == [False, False]
    stop._asked.set()
    assert [stop.agreed(), stop.agreed(), stop.agreed()] == [False, True, True]
    assert int(stopping._total(True)) == 1
