"""A job for Kubernetes: a JobSet of pods on TPU slices or nodes of GPUs, made for GKE.

What a pod's end means, in the order of the rules. `Ignore` makes the pod anew within its job; a failed job makes all
pods anew, which counts against --restarts where it is said to.

    preempted, evicted, drained     the job fails, not counted
    75, asked to stop and saved     the job fails, not counted
    76, another process was lost    ignored: the one that was lost decides
    2 or 3, what no restart mends   the JobSet fails
    anything else                   the job fails, counted
    --hours are over                the JobSet fails, after the save that SIGTERM asks for
"""

from typing import Any

import yaml

from adaptive.errors import UserError
from adaptive.launch.accelerators import CHIPS_PER_HOST, Slice, gpu_label
from adaptive.launch.job import FINAL, SAVED, Job, Rendered, require_workdir
from adaptive.parallel.cluster import LOST

READS = frozenset(
    {
        "name",
        "module",
        "nodes",
        "gpus_per_node",
        "accelerator",
        "slices",
        "image",
        "folder",
        "python",
        "hours",
        "grace_s",
        "restarts",
        "env",
        "spot",
        "volume",
        "namespace",
        "queue",
        "service_account",
    }
)
PORT = 7733
RUNS = "/runs"  # where the volume is mounted
_JOB, _CONTAINER = "slice", "train"


def render(job: Job) -> Rendered:
    """A JobSet (jobset.x-k8s.io/v1alpha2 of release 0.10 or newer). Raises UserError for a job without an image, or
    whose workdir would be lost with a pod."""
    if not job.image:
        raise UserError("--image: gke needs a container image with this package (Containerfile makes one)")
    if job.workdir().startswith(f"{RUNS}/") and not job.volume:
        raise UserError(f"--workdir {job.workdir()}: give the --volume that is to be mounted at {RUNS}")
    require_workdir(job, (RUNS,) if job.volume else ())
    tpu = job.tpu()
    if tpu is None and job.slices > 1:
        raise UserError("--slices: only TPUs have slices; say --nodes for machines with GPUs")
    if tpu is not None and job.nodes > 1:
        raise UserError(f"--nodes: {tpu.name} has {tpu.hosts} machine(s) by itself; --slices says how many slices")
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job, tpu),
        "spec": {
            "failurePolicy": _failure_policy(job),
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": _JOB, "replicas": job.slices, "template": {"spec": _job(job, tpu)}}],
        },
    }
    about = f"{job.slices} x {tpu.name}" if tpu else f"{job.nodes} node(s) of {job.gpus_per_node} GPUs"
    file = f"{job.name}.yaml"
    head = (
        f"# {about}. Written by `adaptive launch gke`; start it: kubectl apply -f {file}\n"
        "# The cluster needs JobSet 0.10 or newer (kubectl get crd jobsets.jobset.x-k8s.io).\n"
    )
    text = head + yaml.safe_dump(manifest, sort_keys=False, width=110)
    return Rendered(file, text, (("kubectl", "apply", "-f", "FILE"),))


def _metadata(job: Job, tpu: Slice | None) -> dict[str, Any]:
    made: dict[str, Any] = {"name": job.name}
    if job.namespace:
        made["namespace"] = job.namespace
    if job.queue:
        made["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    if tpu:  # a slice is a node pool, and all pods of one job go into the same
        made["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return made


def _failure_policy(job: Job) -> dict[str, Any]:
    """What becomes of the JobSet, by the number of the rule of `_pod_failure_policy` that ended a job."""

    def rule(name: str, action: str, index: int) -> dict[str, Any]:
        pattern = f"matching FailJob rule at index {index}$"
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [pattern],
        }

    again = "RestartJobSetAndIgnoreMaxRestarts"
    rules = [rule("preempted", again, 0), rule("saved", again, 1), rule("final", "FailJobSet", 3)]
    if job.hours:
        rules.append({"name": "late", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]})
    return {"maxRestarts": job.restarts, "rules": rules}


def _pod_failure_policy() -> dict[str, Any]:
    def codes(action: str, *values: int) -> dict[str, Any]:
        return {
            "action": action,
            "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": sorted(values)},
        }

    preempted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {"rules": [preempted, codes("FailJob", SAVED), codes("Ignore", LOST), codes("FailJob", *FINAL)]}


def _job(job: Job, tpu: Slice | None) -> dict[str, Any]:
    hosts = tpu.hosts if tpu else job.nodes
    return {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        **({"activeDeadlineSeconds": round(job.hours * 3600)} if job.hours else {}),
        "podFailurePolicy": _pod_failure_policy(),
        "template": {"spec": _pod(job, tpu)},
    }


def _pod(job: Job, tpu: Slice | None) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,  # for the save after SIGTERM
    }
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    if tpu:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    selector = _selector(job, tpu)
    if selector:
        pod["nodeSelector"] = selector
    tolerations = [{"key": "google.com/tpu" if tpu else "nvidia.com/gpu", "operator": "Exists"}]
    if job.spot:
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    pod["tolerations"] = tolerations
    pod["containers"] = [_container(job, tpu)]
    volumes: list[dict[str, Any]] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    if job.volume:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": job.volume}})
    pod["volumes"] = volumes
    return pod


def _selector(job: Job, tpu: Slice | None) -> dict[str, str]:
    spot = {"cloud.google.com/gke-spot": "true"} if job.spot else {}
    if tpu:
        return {
            "cloud.google.com/gke-tpu-accelerator": tpu.kind.gke,
            "cloud.google.com/gke-tpu-topology": tpu.shape,
            **spot,
        }
    return {"cloud.google.com/gke-accelerator": gpu_label(job.accelerator), **spot} if job.accelerator else spot


def _container(job: Job, tpu: Slice | None) -> dict[str, Any]:
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]
    if job.volume:
        mounts.append({"name": "runs", "mountPath": RUNS})
    chips = min(tpu.chips, CHIPS_PER_HOST) if tpu else job.gpus_per_node
    made: dict[str, Any] = {
        "name": _CONTAINER,
        "image": job.image,
        "command": [job.python, "-m", job.module, *job.arguments],
    }
    if job.folder:
        made["workingDir"] = job.folder
    if tpu:  # GKE tells each pod of a slice TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, of several, MEGASCALE_...
        made["ports"] = [{"containerPort": 8471}, {"containerPort": 8431}]
    made["env"] = _environment(job, tpu)
    made["resources"] = {"limits": {"google.com/tpu" if tpu else "nvidia.com/gpu": chips}}
    made["volumeMounts"] = mounts
    return made


def _environment(job: Job, tpu: Slice | None) -> list[dict[str, Any]]:
    own: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in job.variables().items()]
    if tpu or job.nodes == 1:
        return own
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "ADAPTIVE_COORDINATOR", "value": f"{job.name}-{_JOB}-0-0.{job.name}:{PORT}"},
        {"name": "ADAPTIVE_PROCESSES", "value": str(job.nodes)},
        {"name": "ADAPTIVE_PROCESS", "valueFrom": index},
        *own,
    ]
