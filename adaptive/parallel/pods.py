"""Slices of TPUs: which machine of the job this is, as GKE or the metadata of a Cloud TPU machine say.

GKE sets variables in every pod; Cloud TPU keeps the same in the metadata of each machine. Several slices are one job:
the machines of the first come first.
"""

import dataclasses
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from adaptive.errors import ClusterError

PORT = 8482  # of process 0, as JAX uses it on TPUs
_ANSWER_S = 10.0


@dataclasses.dataclass(frozen=True)
class Pod:
    """The machines of a job: where the first is, how many there are, and which one this is."""

    coordinator: str
    processes: int
    index: int


def of_gke(env: Mapping[str, str]) -> Pod:
    """From what GKE sets. Raises ClusterError for what says too little."""
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    return _pod([name for name in workers.split(",") if name], env.get("TPU_WORKER_ID", ""), env)


def of_cloud_tpu(read: Callable[[str], str] | None = None) -> Pod:
    """From the metadata of this machine. Raises ClusterError where there is none of a TPU.

    read  the text of a key of the machine's metadata; default: asks for it
    """
    read = read or _attribute
    workers = [entry.split(":")[-1] for entry in read("worker-network-endpoints").split(",") if entry]
    lines = (line.partition(":") for line in read("tpu-env").splitlines())
    env = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    return _pod(workers, read("agent-worker-number"), env)


def _pod(workers: list[str], number: str, env: Mapping[str, str]) -> Pod:
    slices, slice_id = env.get("MEGASCALE_NUM_SLICES") or "1", env.get("MEGASCALE_SLICE_ID") or "0"
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS") or (workers[0] if workers else "")
    if not first or not all(text.strip().isdecimal() for text in (number, slices, slice_id)):
        raise ClusterError(
            f"this machine's place among those of its TPU is not known: workers {','.join(workers) or '(none)'}, this "
            f"one {number or '(none)'}, slice {slice_id} of {slices}; set ADAPTIVE_COORDINATOR, ADAPTIVE_PROCESSES and "
            "ADAPTIVE_PROCESS"
        )
    index = int(number) + int(slice_id) * len(workers)
    return Pod(f"{first.split(':')[0]}:{PORT}", len(workers) * int(slices), index)


def _attribute(key: str) -> str:
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404 and key == "tpu-env":
            return ""
        raise _no_metadata(key, error) from None
    except OSError as error:
        raise _no_metadata(key, getattr(error, "reason", error)) from None


def _no_metadata(key: str, why: object) -> ClusterError:
    return ClusterError(
        f"ADAPTIVE_CLUSTER=tpu asks the metadata of a Cloud TPU machine for {key}, and this machine has none ({why}): "
        "unset it, or set ADAPTIVE_COORDINATOR, ADAPTIVE_PROCESSES and ADAPTIVE_PROCESS"
    )
