"""The launcher, with real processes: joining, failing, stopping."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from adaptive.launch import local

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
if sys.argv[1] == "elsewhere":  # a relative workdir, and the second process is in another folder
    import os, pathlib
    from adaptive.errors import CheckpointError
    from adaptive.runs import shared
    folder = pathlib.Path("here")
    folder.mkdir(exist_ok=True)
    shared.check_shared(folder)
    shared.LOOK_S = 0.1
    pathlib.Path(str(job.index)).mkdir()
    os.chdir(str(job.index))
    folder.mkdir()
    try:
        shared.check_shared(folder)
    except CheckpointError as error:
        print(error, "left", list(folder.iterdir()), flush=True)
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
        return subprocess.Popen([*command, *arguments], env=env, stdout=subprocess.PIPE, text=True, cwd=tmp_path)

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


def test_a_workdir_that_is_not_shared_is_noticed_by_all(launch):
    job = launch("elsewhere")
    out, _ = job.communicate(timeout=120)
    host = socket.gethostname()
    said = f"process 1 on {host} cannot see what process 0 on {host} wrote there"
    assert out.count(said) == 2 and out.count("left []") == 2, out


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


@pytest.mark.parametrize(
    ("codes", "restarts", "result"),
    [
        ([-9, 75, 76, 124, 0], 9, 0),  # killed, asked to stop, another was lost, stuck, done
        ([-9, -9, -9], 2, 137),
        ([-15, 2], 9, 2),
        ([3], 9, 3),
        ([4], 9, 4),
        ([1, 1, -9, 1, 1, 1], 9, 1),  # three times in a row
    ],
)
def test_what_another_start_may_mend_is_started_again(monkeypatch, capsys, codes, restarts, result):
    starts = iter(codes)

    def started(given, arguments, starter):
        popen = types.SimpleNamespace(returncode=next(starts))
        popen.poll = lambda: popen.returncode
        end = types.SimpleNamespace(index=0, popen=popen, finish=lambda: None, last_traceback=lambda: "the end of it\n")
        return [end]

    monkeypatch.setattr(local, "started", started)
    assert local.launch(argparse.Namespace(module="none", restarts=restarts), []) == result
    assert next(starts, None) is None
    out = capsys.readouterr().out
    assert out.count("from the newest checkpoint") == len(codes) - 1 and ("the end of it" in out) == (result > 0)
