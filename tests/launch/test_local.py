"""The launcher, with real processes: joining, failing, stopping."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import signal, sys, time
from adaptive.parallel import cluster
job = cluster.join(limit_s=60)
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
one = multihost_utils.process_allgather(jnp.ones(()) * (job.index + 1))
print("devices", jax.device_count(), "sum", float(one.sum()), flush=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if sys.argv[1] == "raise":
    if job.index == 1:
        raise ValueError("the third shard is missing")
    time.sleep(60)
if sys.argv[1] == "refuse":
    sys.exit(cluster.leave(2 + job.index * 50) if job.index == 1 else time.sleep(60))
if sys.argv[1] == "stop":
    print("running", flush=True)
    while not cluster.anywhere(bool(stopped)):
        time.sleep(0.1)
    sys.exit(cluster.leave(75))
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launch.local", "--devices_per_process", "2", "--module", "program", "--"]
        return subprocess.Popen([*command, *arguments], env=env, stdout=subprocess.PIPE, text=True)

    return start


def children(pid: int) -> list[int]:
    return [*map(int, subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split())]


def test_processes_join_and_their_output_is_told_apart(launch):
    job = launch("train")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    for index in (0, 1):
        assert f"[{index}] devices 4 sum 3.0" in out
        assert f"[{index}] job: process {index} of 2 on 1 host(s)" in out


def test_the_first_failure_ends_the_job_and_is_shown_last(launch):
    job = launch("raise")
    begin = time.monotonic()
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert out.endswith("ValueError: the third shard is missing\n")
    assert "process 1 ended first, with exit code 1" in out
    assert time.monotonic() - begin < 55, "the others were waited for"


def test_the_exit_code_of_the_first_failure_is_kept(launch):
    job = launch("refuse")
    job.communicate(timeout=120)
    assert job.returncode == 52


def test_a_signal_to_one_process_stops_all_together(launch):
    job = launch("stop")
    out = ""
    while out.count("running") < 2:
        line = job.stdout.readline()
        assert line, out
        out += line
    (server,) = children(job.pid)
    os.kill(children(server)[0], signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 75
