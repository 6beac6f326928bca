"""Who is in the job: what each environment says, what is refused, and who is missed at the roll call."""

import contextlib
import re
import socket
import sys
import threading
import time

import jax
import pytest

from adaptive.errors import AbsentError, ClusterError, UserError
from adaptive.parallel import cluster, pods, rollcall
from adaptive.parallel.cluster import describe, join

EXPLICIT = {"ADAPTIVE_COORDINATOR": "10.0.0.1:1234", "ADAPTIVE_PROCESSES": "4", "ADAPTIVE_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[007-010,12]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}


def test_nothing_said_is_one_process():
    assert describe({}) is None
    assert join(env={}) is None


def test_explicit_variables():
    job = describe(EXPLICIT)
    assert (job.coordinator, job.processes, job.index, job.hosts) == ("10.0.0.1:1234", 4, 3, 4)
    assert describe(EXPLICIT | {"ADAPTIVE_HOSTS": "1"}).hosts == 1


def test_slurm():
    job = describe(SLURM)
    assert (job.coordinator, job.processes, job.index, job.hosts) == ("gpu007:61441", 8, 5, 2)


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("a[3,5-9],b", "a3"), ("rack[01-02]n,x", "rack01n")]
)
def test_the_first_name_of_a_node_list(nodes, first):
    assert describe(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61441"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, (1,)),
        ("0,1,2,3", (1,)),
        ("0,1,2,3,4,5,6,7", (2, 3)),
        ("6", None),  # the scheduler shows each process its own GPU: ordinal 1 would not exist
    ],
)
def test_gpus_of_one_of_four_processes_of_a_host(visible, gpus):
    assert describe(SLURM | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})).gpus == gpus


def test_a_slurm_allocation_without_a_step_is_one_process():
    assert describe({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None


def test_open_mpi_on_one_host_needs_nothing_more_and_on_several_needs_the_address():
    assert describe(OPEN_MPI).coordinator.startswith("127.0.0.1:")
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ClusterError, match="set ADAPTIVE_COORDINATOR=HOST:PORT"):
        describe(several)
    job = describe(several | {"ADAPTIVE_COORDINATOR": "node1:99"})
    assert (job.coordinator, job.processes, job.index, job.hosts) == ("node1:99", 4, 2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ADAPTIVE_PROCESS": ""}, "without ADAPTIVE_PROCESS"),
        ({"ADAPTIVE_PROCESS": "4"}, "index must be 0 to 3"),
        ({"ADAPTIVE_PROCESSES": "four"}, "ADAPTIVE_PROCESSES=four: expected a whole number"),
        ({"ADAPTIVE_COORDINATOR": "node1"}, "expected HOST:PORT"),
    ],
)
def test_incomplete_descriptions_are_refused(change, says):
    with pytest.raises(ClusterError, match=says):
        describe(EXPLICIT | change)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.1.1", "[::1]"])
def test_loopback_with_several_hosts_is_refused(host):
    env = EXPLICIT | {"ADAPTIVE_COORDINATOR": f"{host}:1234", "ADAPTIVE_HOSTS": "2"}
    with pytest.raises(ClusterError, match="other machines cannot reach"):
        join(limit_s=1, env=env)


def test_a_platform_that_is_not_there_is_told_in_a_line(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu\nmore")

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # joining replaces it
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **about: None)
    monkeypatch.setattr(cluster, "_line", lambda *job: ([], None))
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=tpu does not work here: backend 'tpu': no libtpu\. Unset it"):
        join(limit_s=1, env=EXPLICIT, say=lambda line: None)


# Slices of TPUs

GKE = {"TPU_WORKER_HOSTNAMES": "one-slice-0-0.one,one-slice-0-1.one", "TPU_WORKER_ID": "1"}
SECOND = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "one-slice-0-0.one"}


def test_pods_of_gke():
    job = describe(GKE)
    assert (job.coordinator, job.processes, job.index, job.hosts) == (f"one-slice-0-0.one:{pods.PORT}", 2, 1, 2)
    several = describe(GKE | SECOND)
    assert (several.coordinator, several.processes, several.index) == (f"one-slice-0-0.one:{pods.PORT}", 6, 5)
    assert describe({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    with pytest.raises(ClusterError, match=r"this one \(none\)"):
        describe({"TPU_WORKER_HOSTNAMES": "a,b"})


@pytest.mark.parametrize("workers", ["t1v-n-w-0,t1v-n-w-1", "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"])
def test_machines_of_cloud_tpu(monkeypatch, workers):
    metadata = {"worker-network-endpoints": workers, "agent-worker-number": "1", "tpu-env": "TYPE: 'V5LITE_POD'\n"}
    monkeypatch.setattr(pods, "_attribute", metadata.__getitem__)
    first = workers.split(",")[0].split(":")[-1]
    job = describe({"ADAPTIVE_CLUSTER": "tpu"})
    assert (job.coordinator, job.processes, job.index, job.hosts) == (f"{first}:{pods.PORT}", 2, 1, 2)
    metadata["tpu-env"] += "\n".join(f"{name}: '{value}'" for name, value in SECOND.items())
    job = describe({"ADAPTIVE_CLUSTER": "tpu"})
    assert (job.coordinator, job.processes, job.index) == (f"one-slice-0-0.one:{pods.PORT}", 6, 5)


def test_a_machine_without_metadata_is_told(monkeypatch):
    monkeypatch.setattr(pods.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ClusterError, match=r"asks the metadata of a Cloud TPU machine .*no route"):
        describe({"ADAPTIVE_CLUSTER": "tpu"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(port: int, processes: int, present: list[int], limit_s: float) -> list[str]:
    """What each of `present` ends with: "" or the error."""
    ended = [""] * len(present)

    def one(slot: int) -> None:
        try:
            deadline = time.monotonic() + limit_s
            rollcall.gather(f"127.0.0.1:{port}", processes, present[slot], deadline, lambda line: None)
        except ClusterError as error:
            ended[slot] = str(error)

    threads = [threading.Thread(target=one, args=(slot,)) for slot in range(len(present))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return ended


def test_roll_call_and_the_port_is_free_afterwards():
    port = free_port()
    assert call(port, 3, [2, 0, 1], limit_s=20) == ["", "", ""]
    assert call(port, 3, [0, 1, 2], limit_s=20) == ["", "", ""]


def test_all_who_came_learn_who_is_missing():
    ended = call(free_port(), 5, [0, 1, 3], limit_s=1.5)
    assert all("process 2, 4 of 5 did not connect" in text for text in ended), ended


def test_who_came_is_told_the_time_left_and_who_is_missing(monkeypatch):
    monkeypatch.setattr(rollcall, "_REMIND_S", 0.2)
    heard: dict[int, list[str]] = {0: [], 2: []}
    address, deadline = f"127.0.0.1:{free_port()}", time.monotonic() + 1.5

    def one(index: int) -> None:
        with contextlib.suppress(ClusterError):
            rollcall.gather(address, 3, index, deadline, heard[index].append)

    threads = [threading.Thread(target=one, args=(index,)) for index in heard]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for lines in heard.values():
        assert any(re.fullmatch(r"job: waiting for process 1, \d+ s left", line) for line in lines), heard


def test_nobody_at_the_coordinator():
    (ended,) = call(free_port(), 2, [1], limit_s=1)
    assert "process 0 does not answer at 127.0.0.1" in ended


def test_who_is_missing_may_come_when_all_start_again():
    """76, which launchers start again after, and not 2."""
    with pytest.raises(AbsentError) as missed:
        rollcall.gather(f"127.0.0.1:{free_port()}", 2, 0, time.monotonic(), lambda line: None)
    assert missed.value.code == cluster.LOST
    with pytest.raises(AbsentError, match="does not resolve"):
        rollcall.resolve("no-such-host.invalid:1", 2, time.monotonic() - 1)


def test_the_same_index_twice():
    ended = call(free_port(), 4, [0, 1, 1], limit_s=20)
    assert all("two processes have index 1" in text for text in ended), ended


def test_a_stranger_at_the_port_does_no_harm():
    port = free_port()
    results: list[list[str]] = []
    job = threading.Thread(target=lambda: results.append(call(port, 2, [0, 1], limit_s=20)))

    def knock() -> None:
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                time.sleep(0.005)
            if results:
                return

    knocker = threading.Thread(target=knock)
    knocker.start()
    job.start()
    job.join(timeout=30)
    knocker.join(timeout=30)
    assert results == [["", ""]]


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"cannot listen on port {port}"):
            rollcall.gather(f"127.0.0.1:{port}", 2, 0, time.monotonic() + 1, lambda line: None)
