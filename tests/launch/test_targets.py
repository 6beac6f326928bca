"""What clusters are told: shell that is clean, manifests that fit their schemas, processes that find each other."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from adaptive.launch import gke, skypilot, slurm, tpu
from adaptive.launch.job import Job
from adaptive.parallel import cluster

ARGUMENTS = ("--recipe", "mor_tiny", "--workdir", "gs://bucket/a b", "mesh.fsdp=8")
KUBERNETES = "1.34"
JOBSET = json.loads((Path(__file__).parent / "jobset.json").read_text())


def shellcheck(text: str) -> None:
    program = shutil.which("shellcheck") or pytest.skip("no shellcheck")
    done = subprocess.run([program, "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def validated(text: str) -> dict:
    """A JobSet that fits its schema, whose jobs and pods fit that of Kubernetes."""
    jsonschema = pytest.importorskip("jsonschema")
    manifest = yaml.safe_load(text)
    jsonschema.validate(manifest, JOBSET)
    for each in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}, **each["template"]}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    return manifest


# SLURM


@pytest.mark.parametrize("per", ["node", "gpu"])
def test_a_slurm_job_starts_what_finds_itself(per, tmp_path):
    job = Job(
        ARGUMENTS, name="one", nodes=2, gpus_per_node=4, process_per=per, env=("A=b 'c",), sbatch=("account=x y",)
    )
    text = slurm.render(job).text
    shellcheck(text)
    assert "#SBATCH --account=x y\n" in text and "#SBATCH --requeue\n" in text and "#SBATCH --signal=TERM@300\n" in text
    tasks = int(re.search(r"--ntasks-per-node=(\d+)", text)[1])
    assert tasks == (4 if per == "gpu" else 1)
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
           "SLURM_STEP_NUM_TASKS": str(2 * tasks), "SLURM_STEP_NUM_NODES": "2"}  # fmt: skip
    found = cluster.describe(env)
    assert (found.processes, found.index, found.hosts) == (2 * tasks, 1, 2)
    assert found.gpus == ((1,) if per == "gpu" else None)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 99, True), (2, 0, False), (3, 0, False), (76, 0, True), (124, 2, True), (137, 3, False)],
)
def test_a_slurm_job_comes_back_where_that_helps(tmp_path, code, restarts, requeued):
    text = slurm.render(Job(ARGUMENTS, restarts=3)).text
    programs = {"srun": f'printf "%s\\n" "$@" >srun; echo "$A" >>srun; exit {code}', "scontrol": 'echo "$@" >scontrol'}
    for name, body in programs.items():
        (tmp_path / name).write_text("")
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "scontrol").read_text() == ("requeue 7\n" if requeued else "")
    ran = (tmp_path / "srun").read_text().splitlines()
    assert ran[2:-1] == [".venv/bin/python", "-m", "adaptive.train", *ARGUMENTS]


# Kubernetes


def test_pods_with_gpus_describe_their_job():
    job = Job(
        ARGUMENTS, name="one", nodes=3, accelerator="h200", image="i", queue="q", namespace="n", service_account="s"
    )
    manifest = validated(gke.render(job).text)
    (each,) = manifest["spec"]["replicatedJobs"]
    spec = each["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {variable["name"]: variable.get("value", "2") for variable in container["env"]}
    found = cluster.describe(env)
    assert (found.processes, found.index, found.hosts) == (spec["completions"], 2, spec["parallelism"]) == (3, 2, 3)
    # JobSet's name of the first pod, and its service, which is called as the set is.
    assert found.coordinator == f"one-{each['name']}-0-0.one:{gke.PORT}"
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["command"] == [".venv/bin/python", "-m", "adaptive.train", *ARGUMENTS]
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}


@pytest.mark.parametrize(
    ("name", "slices", "shape", "hosts", "chips"),
    [
        ("v5e-256", 2, "16x16", 64, 4), ("v5p-128", 1, "4x4x4", 16, 4), ("v6e-8", 1, "2x4", 2, 4),
        ("v7x-64", 4, "2x4x4", 8, 4),
    ],
)  # fmt: skip
def test_pods_on_tpus_ask_for_their_topology(name, slices, shape, hosts, chips):
    manifest = validated(gke.render(Job(ARGUMENTS, accelerator=name, slices=slices, image="i", spot=True)).text)
    assert manifest["metadata"]["annotations"].popitem()[1] == "cloud.google.com/gke-nodepool"
    (each,) = manifest["spec"]["replicatedJobs"]
    spec = each["template"]["spec"]
    assert (each["replicas"], spec["parallelism"], spec["completions"]) == (slices, hosts, hosts)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    names = ",".join(f"w{i}" for i in range(hosts))
    assert cluster.describe({"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": "1"}).processes == hosts


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("disruption", "again"), (75, "again"), (76, "ignored"), (2, "over"), (3, "over"),
        (1, "counted"), (124, "counted"), (137, "counted"),
    ],
)  # fmt: skip
def test_what_the_end_of_a_pod_means(end, outcome):
    """The two policies, carried out as Kubernetes and JobSet document them."""
    spec = validated(gke.render(Job(ARGUMENTS, accelerator="v5e-16", image="i", restarts=4)).text)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"

    def matches(rule):
        if end == "disruption":
            return any(each["type"] == "DisruptionTarget" for each in rule.get("onPodConditions", []))
        return end in rule.get("onExitCodes", {}).get("values", [])

    rules = job["podFailurePolicy"]["rules"]
    hit = next((i for i, rule in enumerate(rules) if matches(rule)), None)
    if hit is None:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    elif rules[hit]["action"] == "Ignore":
        assert outcome == "ignored"
        return
    else:
        message = f"Container train for pod n/one failed with exit code {end} matching FailJob rule at index {hit}"
        reason = "PodFailurePolicy"
    actions = [
        rule["action"]
        for rule in spec["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
    ]
    said = {"RestartJobSetAndIgnoreMaxRestarts": "again", "FailJobSet": "over"}
    assert (said[actions[0]] if actions else "counted") == outcome
    assert spec["failurePolicy"]["maxRestarts"] == 4


def test_a_time_limit_is_for_good():
    spec = validated(gke.render(Job(ARGUMENTS, accelerator="v5e-16", image="i", hours=1.5)).text)["spec"]
    assert spec["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] == 5400
    late = {"name": "late", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]}
    assert spec["failurePolicy"]["rules"][-1] == late
    assert "#SBATCH --time=1:30:00\n" in slurm.render(Job(ARGUMENTS, hours=1.5)).text


def test_a_volume_is_mounted_where_the_workdir_is():
    job = Job(("--recipe", "a", "--workdir", "/runs/one"), image="i", volume="claim")
    pod = validated(gke.render(job).text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert {"name": "runs", "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "claim"}} in pod["volumes"]
    assert "nodeSelector" not in pod and pod["containers"][0]["env"] == []


# SkyPilot


def test_a_sky_task_describes_its_job(tmp_path):
    task = yaml.safe_load(skypilot.render(Job(ARGUMENTS, nodes=2, accelerator="h100", env=("A=b",))).text)
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    assert task["envs"] == {"ADAPTIVE_PLATFORM": "gpu", "A": "b"}
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 10, "recover_on_exit_codes": [75, 76, 124]}
    shellcheck("#!/bin/bash\n" + task["run"])
    said = task["run"].replace("exec .venv/bin/python", "env; exec printf '%s\\n'")
    env = {"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2"}
    out = subprocess.run(
        ["bash", "-c", said], env=env | {"SKYPILOT_NODE_RANK": "1"}, capture_output=True, text=True
    ).stdout
    found = cluster.describe(dict(line.partition("=")[::2] for line in out.splitlines() if "=" in line))
    assert (found.coordinator, found.processes, found.index) == (f"10.0.0.4:{skypilot.PORT}", 2, 1)
    assert out.splitlines()[-len(ARGUMENTS) - 2 :] == ["-m", "adaptive.train", *ARGUMENTS]


def test_a_sky_task_on_a_slice():
    task = yaml.safe_load(skypilot.render(Job(ARGUMENTS, accelerator="v5p-16")).text)
    assert task["resources"]["accelerators"] == "tpu-v5p-16"  # which counts cores
    assert "ADAPTIVE_CLUSTER=tpu" in task["run"] and task["num_nodes"] == 1


# Refusals


@pytest.mark.parametrize(
    ("module", "job", "why"),
    [
        (gke, Job(ARGUMENTS), "--image"),
        (gke, Job(("--recipe", "a"), image="i"), "none is given: after --, say an address such as gs://"),
        (gke, Job(("--workdir", "runs/x"), image="i"), "lost with the machine"),
        (gke, Job(("--workdir", "/runs/x"), image="i"), "give the --volume"),
        (gke, Job(ARGUMENTS, image="i", accelerator="v5e-48"), "v5e-32, v5e-64"),
        (gke, Job(ARGUMENTS, image="i", accelerator="v9-8"), "no TPU is called v9"),
        (gke, Job(ARGUMENTS, image="i", accelerator="h1000"), "neither a TPU slice"),
        (gke, Job(ARGUMENTS, image="i", accelerator="h200", slices=2), "--slices: only TPUs"),
        (gke, Job(ARGUMENTS, image="i", accelerator="v5e-16", nodes=2), "has 4 machine"),
        (slurm, Job(("--recipe", "a")), "a folder that all machines see"),
        (slurm, Job(ARGUMENTS, sbatch=("--",)), "--sbatch --"),
        (tpu, Job(ARGUMENTS, accelerator="h200", zone="z"), "expected a slice"),
        (tpu, Job(ARGUMENTS, accelerator="v5e-16"), "--zone"),
        (tpu, Job(ARGUMENTS, accelerator="v7x-16", zone="z"), "use gke"),
        (tpu, Job(ARGUMENTS, accelerator="v5e-16", zone="z", folder="/tmp"), "no checkout"),
        (skypilot, Job(ARGUMENTS), "asked for one of"),
        (skypilot, Job(("--workdir", "/x"), accelerator="h100"), "lost with the machine"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_work_are_refused(module, job, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        module.render(job)
