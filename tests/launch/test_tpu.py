"""The script for Cloud TPU, carried out: a gcloud that makes machines of folders, and runs on them what it is told."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from adaptive.launch import tpu
from adaptive.launch.job import Job

# State in $CLOUD: file `state`; a home folder for every worker, nodes/NODE/WORKER; file `calls`, a line for each.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
echo "$*" >>"$CLOUD/calls"
workers() { for each in "$CLOUD"/nodes/"$1"/*; do [ -d "$each" ] && echo "$each"; done; }
case "$*" in
*"queued-resources list"*) [ ! -f "$CLOUD/state" ] || echo "mine $(cat "$CLOUD/state")"; echo "other ACTIVE" ;;
*"queued-resources create"*)
    for node in $NODES; do mkdir -p "$CLOUD/nodes/$node/0" "$CLOUD/nodes/$node/1"; done
    echo ACTIVE >"$CLOUD/state" ;;
*"queued-resources delete"*) rm -rf "$CLOUD/nodes" "$CLOUD/state" ;;
*"tpu-vm scp"*)
    files=() node=
    for word in "${@:5}"; do case "$word" in *:) node=${word%:} ;; --*) ;; *) files+=("$word") ;; esac; done
    for home in $(workers "$node"); do cp "${files[@]}" "$home"; done ;;
*"tpu-vm ssh"*)
    node=$5 command= worker=
    for word in "$@"; do
        case "$word" in --command=*) command=${word#--command=} ;; --worker=*) worker=${word#*=} ;; esac
    done
    for home in $(workers "$node"); do
        [ "$worker" = all ] || [ "$worker" = "$(basename "$home")" ] || continue
        (cd "$home" && HOME=$home bash -c "$command") || exit 1
    done ;;
esac
"""
# The training script of a checkout: ends as the file `codes` of the machine's home says, a line for each start.
TRAIN = r"""#!/usr/bin/env bash
printf '%s|' "$ADAPTIVE_CLUSTER" "$ADAPTIVE_PLATFORM" "$A" "$@" >>"$HOME/ran"; echo >>"$HOME/ran"
trap 'exit 75' TERM
n=$(wc -l <"$HOME/ran")
code=$(sed -n "${n}p" "$CODES")
[ "$code" = wait ] || exit "$code"
while true; do sleep 0.05; done
"""


class Cloud:
    """A script in a folder, and the cloud that it talks to."""

    def __init__(self, at: Path, **of_job):
        code, self.at = at / "a checkout", at
        (code / "scripts").mkdir(parents=True)
        (code / "scripts" / "train").write_text(TRAIN)
        (code / "scripts" / "train").chmod(0o755)
        (code / ".gitignore").write_text("ignored\n")
        (code / "ignored").touch()
        subprocess.run(["git", "-C", str(code), "init", "-q"], check=True)
        arguments = ("--recipe", "mor_tiny", "--workdir", "gs://b/a b")
        job = Job(arguments, name="mine", accelerator="v5e-8", zone="z", folder=str(code), env=("A=b 'c",), **of_job)
        self.text = tpu.render(job).text
        (at / "mine.sh").write_text(self.text)
        (at / "bin").mkdir()
        (at / "bin" / "gcloud").write_text(GCLOUD)
        (at / "bin" / "gcloud").chmod(0o755)
        nodes = ["mine"] if job.slices == 1 else [f"mine-{i}" for i in range(job.slices)]
        self.homes = [at / "nodes" / node / worker for node in nodes for worker in "01"]
        self.env = {
            "PATH": f"{at / 'bin'}:{os.environ['PATH']}", "CLOUD": str(at), "NODES": " ".join(nodes), "HOME": str(at),
            "POLL_S": "0.1", "RESTART_S": "0.05", "CODES": str(at / "codes"),
        }  # fmt: skip

    def codes(self, *codes: object) -> None:
        (self.at / "codes").write_text("".join(f"{code}\n" for code in codes))

    def __call__(self, command: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "mine.sh", command], cwd=self.at, env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self, verb: str) -> list[str]:
        return [line for line in (self.at / "calls").read_text().splitlines() if verb in line]

    def until(self, there) -> None:
        deadline = time.monotonic() + 30
        while not there():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self) -> None:
        self.until(
            lambda: all((home / "mine.code").exists() and not (home / "mine.pid").exists() for home in self.homes)
        )


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path, restarts=2)
    yield made
    for pid in (int(path.read_text()) for path in tmp_path.glob("nodes/*/*/mine.pid")):
        subprocess.run(["pkill", "-KILL", "-s", str(pid)])  # all that the detached worker, which leads a session, began


def test_scripts_are_clean(cloud):
    program = shutil.which("shellcheck") or pytest.skip("no shellcheck")
    (worker,) = re.findall(r"<<'WORKER'\n(.*?)^WORKER$", cloud.text, re.DOTALL | re.MULTILINE)
    for text in (cloud.text, worker):
        done = subprocess.run([program, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_up_makes_copies_and_starts_and_what_it_started_goes_on_and_is_stopped(cloud):
    cloud.codes(1, "wait")
    cloud("up")
    (made,) = cloud.calls("create")
    for word in (
        "--node-id mine",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--zone=z",
    ):
        assert word in made
    for home in cloud.homes:
        cloud.until(lambda home=home: (home / "ran").exists() and (home / "ran").read_text().count("\n") == 2)
        assert set((home / "ran").read_text().splitlines()) == {"tpu|tpu|b 'c|--recipe|mor_tiny|--workdir|gs://b/a b|"}
        assert not (home / "mine" / "ignored").exists() and (home / "mine" / ".gitignore").exists()
    assert "mine runs already" in cloud("up") and len(cloud.calls("scp")) == 1
    assert cloud("status").count(": running") == 2
    cloud("stop")
    cloud.ended()
    assert {(home / "mine.code").read_text() for home in cloud.homes} == {"75\n"}
    cloud("down")
    assert not (cloud.at / "state").exists()


def test_restarts_are_counted_but_for_runs_that_saved(cloud):
    cloud.codes(75, 1, 75, 124, 137, "wait")
    cloud("up")
    cloud.ended()
    assert (cloud.homes[0] / "mine.code").read_text() == "137\n"
    assert (cloud.homes[0] / "mine.log").read_text().count("ended with") == 5


def test_a_slice_that_is_taken_away_is_made_anew(cloud):
    cloud.codes("wait")
    keeping = subprocess.Popen(
        ["bash", "mine.sh", "keep"], cwd=cloud.at, env=cloud.env, stdout=subprocess.PIPE, text=True
    )
    cloud.until(lambda: all((home / "ran").exists() for home in cloud.homes))
    pids = [int((home / "mine.pid").read_text()) for home in cloud.homes]
    cloud.codes(3)
    (cloud.at / "state").write_text("SUSPENDED\n")
    for pid in pids:
        subprocess.run(["pkill", "-KILL", "-s", str(pid)])
    out, _ = keeping.communicate(timeout=60)
    assert keeping.returncode == 3, out
    assert "mine was taken away" in out and "mine is SUSPENDED" in out and "mine ended with 3" in out
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 1


def test_several_slices_are_one_job(tmp_path):
    cloud = Cloud(tmp_path, slices=2, spot=True, project="p")
    cloud.codes(0, 0)
    cloud("up")
    cloud.ended()
    assert len(cloud.homes) == 4
    (made,) = cloud.calls("create")
    assert "--node-count 2 --node-prefix mine" in made and "--spot" in made and "--project=p" in made
    cloud("keep")


def test_without_a_command_the_script_says_what_it_does(cloud):
    said = cloud("", code=2)
    assert said.startswith("1 x v5e-8 (2x4).") and "bash mine.sh down" in said
