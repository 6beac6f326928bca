"""Ends of a run other than the last step: what is saved, what is said, and what the next start makes up for."""

import contextlib
import os
import signal
import subprocess
import sys
import types

import pytest

from adaptive.errors import CheckpointError
from adaptive.training.log import MetricsLog, WorkdirLostError
from adaptive.training.loop import FAILED, Loop
from adaptive.training.stopping import PREEMPTED, StopRequest
from adaptive.training.stragglers import Stragglers

HELD = """
import signal, sys, threading
from adaptive.training.stopping import StopRequest

with StopRequest(say=lambda line: print(line, flush=True)) as stop:
    with stop.at_once(lambda: print("closed", flush=True)):
        print("ready", flush=True)
        threading.Event().wait(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_where_nothing_is_to_be_saved_a_signal_ends_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == PREEMPTED
        assert output == f"{number.name}: stopping now; there is nothing to save\nclosed\n"
    finally:
        process.kill()
        process.wait()


def test_a_hang_up_asks_to_stop_unless_it_was_to_be_ignored():
    with StopRequest(lambda line: None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop._asked.wait(30)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest(lambda line: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop._asked.wait(30)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Folder(types.SimpleNamespace):
    def __str__(self):
        return str(self.path)


def loop_of(tmp_path, **more):
    """A loop of as much as the parts under test touch."""
    said = []
    loop = types.SimpleNamespace(
        folder=Folder(
            path=tmp_path, metrics=tmp_path / "metrics.jsonl", checkpoints=tmp_path / "checkpoints", saved=0
        ),
        primary=True, failure=None, said=said, say=said.append, stop=StopRequest(), alarms=(),
        progress=types.SimpleNamespace(row=lambda row: None), tracker=types.SimpleNamespace(log=lambda row: None),
        checkpoints=types.SimpleNamespace(steps=lambda: [4], save=lambda *given: said.append("save")),
        aside=lambda kind: contextlib.nullcontext(), stragglers=Stragglers(), **more,
    )  # fmt: skip
    for name in ("record", "fail", "failed", "last_words", "save", "note_saved", "refuse_lost_checkpoints", "catch_up",
                 "evaluation_due", "opened_log"):  # fmt: skip
        setattr(loop, name, types.MethodType(getattr(Loop, name), loop))
    return loop


def test_a_row_that_cannot_be_written_stops_the_run_after_a_save(tmp_path, capsys):
    loop = loop_of(tmp_path)
    loop.folder.note = lambda **facts: None
    loop.log = MetricsLog.open(tmp_path, 0)
    loop.log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    loop.log.check = lambda: None
    loop.record({"step": 5})
    loop.record({"step": 5, "eval/loss": 1.0})  # said once
    assert loop.stop.requested and len(loop.said) == 1 and "No space left on device" in loop.said[0]
    loop.save(6, None, types.SimpleNamespace(state=dict))
    assert "save" in loop.said
    assert loop.failed(6) == FAILED
    assert f"stopped at step 6, because {tmp_path} could not be written" in capsys.readouterr().out


def test_a_workdir_that_is_gone_is_not_made_again(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    loop = loop_of(tmp_path / "run")
    loop.log = MetricsLog.open(tmp_path / "run", 0)
    (tmp_path / "run").rename(tmp_path / "moved")
    loop.save(6, None, types.SimpleNamespace(state=dict))
    assert isinstance(loop.failure, WorkdirLostError) and "save" not in loop.said and loop.stop.requested
    assert loop.failed(6) == FAILED and not (tmp_path / "run").exists()
    assert "moved or deleted" in capsys.readouterr().out


def test_a_run_without_the_checkpoints_that_it_had_is_not_begun_anew(tmp_path):
    loop = loop_of(tmp_path)
    loop.refuse_lost_checkpoints()
    loop.folder.saved = 40
    with pytest.raises(CheckpointError, match=r"holds no checkpoint, though this run had one of step 40.*put the"):
        loop.refuse_lost_checkpoints()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        loop.refuse_lost_checkpoints()


@pytest.mark.parametrize(
    ("begin", "rows", "made"),
    [
        (4, [{"step": 4, "loss": 1}], [(4, True)]),  # stopped where one was due
        (4, [{"step": 4, "loss": 1}, {"step": 4, "eval/loss": 1}], []),
        (6, [{"step": 6, "loss": 1}], []),
        (0, [], []),
        (9, [{"step": 9, "loss": 1}], [(9, True)]),  # killed before the last one
        (9, [{"step": 9, "loss": 1}, {"step": 9, "eval/loss": 1}], [(9, False)]),  # or before the report
    ],
)
def test_an_evaluation_that_was_not_made_is_made_up(tmp_path, begin, rows, made):
    did = []
    recipe = types.SimpleNamespace(
        eval=types.SimpleNamespace(every=4), train=types.SimpleNamespace(steps=9)
    )  # fmt: skip
    loop = loop_of(tmp_path, recipe=recipe)
    loop.evaluate = lambda state, step, recorded: did.append((step, recorded))
    loop.log, loop.checkpoints = types.SimpleNamespace(kept=rows), types.SimpleNamespace(rate=lambda step, loss: False)
    loop.catch_up(None, begin)
    assert did == made


def test_rows_that_were_cut_out_are_mentioned(tmp_path):
    loop = loop_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "steps": 1}\n{"step": 6, "steps": 2}\n')
    loop.opened_log(8)
    assert loop.said == [f"warning: {tmp_path / 'metrics.jsonl'} has no row of step 2 to 4, 7 to 8"]


BEFORE = """
import sys, time
from adaptive import train

def run(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("unwound", flush=True)

train.run = run
sys.exit(train.main([]))
"""
IMPORTS = "from adaptive import command; command.imported('slow', stopped=75)"


def test_before_training_begins_a_signal_ends_with_75_as_well(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BEFORE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "unwound\n" and process.returncode == PREEMPTED
    finally:
        process.kill()
        process.wait()
    (tmp_path / "slow.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    assert subprocess.run([sys.executable, "-c", IMPORTS], env=env, timeout=60).returncode == PREEMPTED
