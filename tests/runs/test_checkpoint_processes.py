"""Two processes save, read back, pass over damage, fail and stop together."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import signal, sys, time
from pathlib import Path
from adaptive.parallel import cluster
job = cluster.join(limit_s=60)
import jax, numpy as np
from test_checkpoint import MeshConfig, abstract, full_disk, open_checkpoints, state_on
from adaptive.runs import checkpoint
from adaptive.runs.checkpoint import digest
from adaptive.training.stopping import StopRequest

checkpoint.SAVE_LIMIT_S = 8
folder = Path(sys.argv[1])
state = state_on(MeshConfig(data=1, fsdp=2, tensor=2))
print("result: digest", digest(state), flush=True)
said = []
with open_checkpoints(folder, said, keep_last=2) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state._replace(step=state.step + step), {"index": step})
    checkpoints.wait()
    if job.index == 0:
        (folder / "2" / "about" / "metadata").write_text("")
    cluster.anywhere(False)
    restored = checkpoints.restore(abstract(state_on(MeshConfig(data=4))))
    same = digest(restored.state.params) == digest(state.params)
    print("result: restored", restored.step, int(restored.state.step), same, flush=True)
    print("result: warned", len(said), flush=True)
    if job.index == 1:
        with full_disk():
            checkpoints.save(3, state, {})
            checkpoints.wait()
    else:
        checkpoints.save(3, state, {})
        checkpoints.wait()
    print("result: failed", checkpoints.failed, checkpoints.steps(), said[-1], flush=True)
    checkpoints.save(4, state, {})
    checkpoints.wait()
    print("result: failed", checkpoints.failed, checkpoints.steps(), flush=True)
with StopRequest(lambda line: None) as stop:
    for step in range(600):
        if job.index == 1 and step == 3:
            signal.raise_signal(signal.SIGTERM)
            while not stop.requested:
                time.sleep(0.01)
        if stop.agreed():
            break
    print("result: stopped at", step, flush=True)
sys.exit(cluster.leave(0))
"""


def test_two_processes_decide_everything_together(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "tests", Path(__file__).parent]))
    command = [sys.executable, "-m", "launch.local", "--devices_per_process", "2", "--module", "program", "--"]
    job = subprocess.run(
        [*command, str(tmp_path / "checkpoints")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stdout
    results = re.findall(r"\[([01])\] result: (.*)", job.stdout)  # gloo prints lines of its own between
    of = [[text for index, text in results if index == which] for which in "01"]
    assert of[0] == of[1], job.stdout
    reason = "checkpoint at step 3 could not be written: File too large; the last good one is step 1"
    assert of[0][1:] == [  # after the digest
        "restored 1 1 True",
        "warned 1",
        f"failed True [1] warning: {reason}; training goes on",
        "failed False [1, 4]",
        "stopped at 4",
    ]
