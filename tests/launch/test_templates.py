"""The templates for clusters that no test reaches: they parse, and set the variables that the code reads."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from adaptive.parallel import cluster

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh"])
def test_shell_templates_parse(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


def test_a_requeued_job_is_one_that_saved():
    assert f'"$code" -eq {cluster.PREEMPTED} ' in (LAUNCH / "slurm.sbatch").read_text()


def test_kubernetes_pods_describe_a_job():
    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    env = {variable["name"]: variable.get("value", "1") for variable in pod["containers"][0]["env"]}
    found = cluster.describe(env)
    assert found is not None
    assert (found.processes, found.index, found.hosts) == (job["spec"]["completions"], 1, job["spec"]["parallelism"])
    assert found.coordinator.startswith(f"{job['metadata']['name']}-0.{service['metadata']['name']}:")


def test_the_pod_slice_command_asks_for_the_tpu_way(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TPU": "one", "ZONE": "z"}
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), "--recipe", "mor_tiny", "--workdir", "a b"]
    sent = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "--worker=all" in sent
    assert re.search(r"ADAPTIVE_CLUSTER=tpu .*--recipe mor_tiny --workdir a\\ b$", sent, re.M)
    assert cluster.describe({"ADAPTIVE_CLUSTER": "tpu"}).how == "ADAPTIVE_CLUSTER"
