"""Joining the processes of one job: where process 0 is, how many there are, and which one this is.

The environment describes the job. These variables come first, and fill in or replace what a scheduler says:

    ADAPTIVE_COORDINATOR   host:port of process 0, as the other hosts reach it
    ADAPTIVE_PROCESSES     how many processes
    ADAPTIVE_PROCESS       which one this is, from 0
    ADAPTIVE_HOSTS         over how many machines (default: one per process)
    ADAPTIVE_CLUSTER=tpu   a Cloud TPU slice, or several: the machine's metadata say all of these
    ADAPTIVE_START_LIMIT   seconds for all processes to be there (600)

Then a SLURM step (srun), Open MPI (mpirun), and the variables that GKE sets on TPU nodes. None of them: one process.
"""

import contextlib
import dataclasses
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from adaptive.errors import AbsentError, ClusterError
from adaptive.parallel import pods, rollcall
from adaptive.parallel.backend import find_devices
from adaptive.parallel.lifeline import Lifeline

PREEMPTED = 75  # the exit code of a run that was asked to stop, and saved: every process ends with it
LOST = 76  # the exit code of a process that ends because another one of its job was lost
START_LIMIT_S = 600.0
_NOTICE_S = 2.0  # for the line to another process to break, after a collective with it failed


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One job of several processes, as this process sees it."""

    how: str  # what described the job
    coordinator: str  # host:port of process 0; empty: not known
    processes: int
    index: int
    hosts: int
    gpus: tuple[int, ...] | None = None  # ordinals that belong to this process; None: every visible one


def describe(env: Mapping[str, str]) -> Cluster | None:
    """The job that `env` describes, or None for a single process. Raises ClusterError if it does not say enough."""
    explicit = {
        name: env[name] for name in ("ADAPTIVE_COORDINATOR", "ADAPTIVE_PROCESSES", "ADAPTIVE_PROCESS") if env.get(name)
    }
    if not explicit and env.get("ADAPTIVE_CLUSTER"):
        if env["ADAPTIVE_CLUSTER"] != "tpu":
            raise ClusterError(f"ADAPTIVE_CLUSTER={env['ADAPTIVE_CLUSTER']}: expected tpu")
        job: Cluster | None = _of_pod("ADAPTIVE_CLUSTER=tpu", pods.of_cloud_tpu())
    else:
        job = _slurm(env) or _open_mpi(env) or (None if explicit else _gke_tpu(env))
    if explicit:
        job = _overlay(job, explicit, env)
    if job is None or job.processes == 1:
        return None
    if not job.coordinator:
        raise ClusterError(
            f"{job.how} started {job.processes} processes on {job.hosts} hosts but does not say where process 0 is: "
            "set ADAPTIVE_COORDINATOR=HOST:PORT, the same for all of them"
        )
    if not 0 <= job.index < job.processes:
        raise ClusterError(f"process {job.index} of {job.processes}: the index must be 0 to {job.processes - 1}")
    return job


def _overlay(job: Cluster | None, explicit: Mapping[str, str], env: Mapping[str, str]) -> Cluster:
    missing = {"ADAPTIVE_COORDINATOR", "ADAPTIVE_PROCESSES", "ADAPTIVE_PROCESS"} - set(explicit)
    if job is None and missing:
        raise ClusterError(
            f"{' and '.join(explicit)} set without {' and '.join(sorted(missing))}: a job needs all three"
        )
    processes = _number(env, "ADAPTIVE_PROCESSES", job.processes if job else 1)
    coordinator = explicit.get("ADAPTIVE_COORDINATOR", job.coordinator if job else "")
    if not re.fullmatch(r"(\[[^\]]+\]|[^:]+):\d+", coordinator):
        raise ClusterError(f"ADAPTIVE_COORDINATOR={coordinator}: expected HOST:PORT")
    return Cluster(
        how=" over ".join(["ADAPTIVE_COORDINATOR", *([job.how] if job else [])]),
        coordinator=coordinator,
        processes=processes,
        index=_number(env, "ADAPTIVE_PROCESS", job.index if job else 0),
        hosts=_number(env, "ADAPTIVE_HOSTS", job.hosts if job else processes),
        gpus=job.gpus if job else None,
    )


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError:
        raise ClusterError(f"{name}={env[name]}: expected a whole number") from None


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    """The step that srun started; a script or a shell inside an allocation is not one."""
    if not all(name in env for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        return None
    tasks, hosts = _number(env, "SLURM_STEP_NUM_TASKS", 1), _number(env, "SLURM_STEP_NUM_NODES", 1)
    port = 61440 + _number(env, "SLURM_JOB_ID", 0) % 4096  # jobs on one host rarely meet
    return Cluster(
        how="SLURM",
        coordinator=f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        processes=tasks,
        index=_number(env, "SLURM_PROCID", 0),
        hosts=hosts,
        gpus=_share_of_gpus(env, _number(env, "SLURM_LOCALID", 0), tasks // hosts),
    )


def _first_host(nodes: str) -> str:
    """The first name of a SLURM node list: "a[007-9,12]b,c" gives "a007b"."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


def _open_mpi(env: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    processes, here = _number(env, "OMPI_COMM_WORLD_SIZE", 1), _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    hosts = -(-processes // here)
    return Cluster(
        how="Open MPI",
        coordinator=f"127.0.0.1:{61440 + os.getppid() % 4096}" if hosts == 1 else "",
        processes=processes,
        index=_number(env, "OMPI_COMM_WORLD_RANK", 0),
        hosts=hosts,
        gpus=_share_of_gpus(env, _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0), here),
    )


def _share_of_gpus(env: Mapping[str, str], local_index: int, local_processes: int) -> tuple[int, ...] | None:
    """Ordinals, among the visible GPUs, for one of several processes of a host.

    A scheduler that binds GPUs shows each process its own only: then the ordinal is 0 whatever the process's index, and
    picking by index would ask for a GPU that is not there.
    """
    if local_processes == 1:
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return (local_index,)
    share = len(visible.split(",")) // local_processes
    return tuple(range(local_index * share, (local_index + 1) * share)) or None


def _gke_tpu(env: Mapping[str, str]) -> Cluster | None:
    if not env.get("TPU_WORKER_HOSTNAMES"):
        return None
    return _of_pod("TPU_WORKER_HOSTNAMES", pods.of_gke(env))


def _of_pod(how: str, pod: pods.Pod) -> Cluster:
    return Cluster(how, pod.coordinator, pod.processes, pod.index, pod.processes)


def start_limit(env: Mapping[str, str] = os.environ) -> float:
    """Seconds for all processes to be there; raises ClusterError unless they are a number above 0."""
    text = env.get("ADAPTIVE_START_LIMIT") or str(START_LIMIT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise ClusterError(f"ADAPTIVE_START_LIMIT={text}: expected seconds, above 0, such as {START_LIMIT_S:g}")
    return seconds


def join(
    limit_s: float = 0.0, env: Mapping[str, str] = os.environ, say: Callable[[str], None] | None = None
) -> Cluster | None:
    """Joins the job that the environment describes; must come before anything that asks JAX for devices.

    Returns the job, or None for a single process, where nothing happens. Collectives between CPU processes use gloo.
    An uncaught exception then ends this process at once (see `leave`).

    limit_s   for all processes to be there; a line tells the time left; 0: as `start_limit` says
    say       prints one line; default: print

    Raises ClusterError if the description is incomplete, the coordinator's name leads to this machine alone while the
    job has several, or its port is taken; AbsentError if a process is missing when the time is up (it names which);
    UserError if there is no such platform as JAX_PLATFORMS names.
    """
    say = say or (lambda line: print(line, flush=True))
    job = describe(env)
    if job is None:
        return None
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the training loop
    deadline = time.monotonic() + (limit_s or start_limit(env))
    address = rollcall.resolve(job.coordinator, job.hosts, deadline)
    say(f"job: process {job.index} of {job.processes} on {job.hosts} host(s), from {job.how}")
    say(f"job: coordinator {job.coordinator} = {address}, {_visible(job, env)}")
    _Job.index = job.index
    _Job.hosts, _Job.line = _line(address, job, deadline, say)
    with _countdown(deadline, say):
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=job.processes,
            process_id=job.index,
            local_device_ids=job.gpus,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(deadline - time.monotonic())),
        )
    _exit_at_once_on_errors()
    find_devices()
    job = dataclasses.replace(job, processes=jax.process_count(), index=jax.process_index())
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    say(f"job: joined as process {job.index} of {job.processes}, {devices}")
    return job


class _Job:
    """Of this process's job: the host of every process, and the line to the others."""

    index: int = 0
    stopped: bool = False  # whether this process was asked to stop before the others were
    hosts: list[str] = []  # noqa: RUF012  # of the process, set once
    line: Lifeline | None = None


def _line(address: str, job: Cluster, deadline: float, say: Callable[[str], None]) -> tuple[list[str], Lifeline | None]:
    """The roll call, and the line over which a lost process is known; none where a firewall closes its port."""
    if job.index == 0:
        line, port = Lifeline.listen(_end, job.processes)
        try:
            hosts = rollcall.gather(address, job.processes, 0, deadline, say, port).hosts
        except ClusterError:
            line.close()
            raise
        return hosts, line
    hosts, port = rollcall.gather(address, job.processes, job.index, deadline, say)
    host = address.rsplit(":", 1)[0].strip("[]")
    with contextlib.suppress(OSError):
        return hosts, Lifeline.connect(_end, host, port, job.index)
    return hosts, None


def _end(who: str, stopped: bool) -> None:
    """Ends this process because another one was lost, or stopped at once: it would wait for it in a collective."""
    if " on " not in who and _Job.hosts:
        who = f"{who} on {_Job.hosts[0]}"
    what = "was asked to stop, with nothing to save" if stopped else "ended before the others"
    print(f"job: {who} {what}; this process ends, too", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(PREEMPTED if stopped else LOST)


def stopped() -> None:
    """Tells the others of the job, if this process is in one, that it was asked to stop and is about to end: they end
    as well, with the same code."""
    _Job.stopped = True
    if _Job.line is not None:
        _Job.line.close(stopped=f"process {_Job.index}")


def meet(what: str) -> None:
    """Waits, within the start limit, until every process of the job is here. All must call it, in the same order.

    Collectives fail where one process comes half a minute after another; so it stands between what may take processes
    different times, such as a compilation, and the first collective after it. Raises AbsentError that names who is
    missing.
    """
    import jax

    if jax.process_count() == 1:
        return
    from jax._src import distributed  # no public way leads to a barrier without a collective

    client: Any = distributed.global_state.client
    limit = start_limit()
    try:
        client.wait_at_barrier(f"adaptive: {what}", int(limit * 1000))
    except jax.errors.JaxRuntimeError as error:
        named = re.search(r"timed out task names:\s*([\d\s,]+)", str(error))
        if named is None:
            raise
        absent = [int(number) for number in re.findall(r"\d+", named[1])]
        who = ", ".join(f"process {i}{host_of(i)}" for i in absent)
        raise AbsentError(
            f"{what}: {who} did not come within {limit:g} s of the others (ADAPTIVE_START_LIMIT sets how many)"
        ) from None


def host_of(index: int) -> str:
    """ " on HOST" of a process of this job; empty where it is not known."""
    return f" on {_Job.hosts[index]}" if index < len(_Job.hosts) else ""


@contextlib.contextmanager
def one_compiles(what: str) -> Iterator[None]:
    """Around a compilation. Where all processes compute on the CPU of one machine, process 0 runs the block before the
    others, which then find the program in the cache and leave it the CPU. Raises as `meet`."""
    import jax

    shared = jax.process_count() > 1 and len(set(_Job.hosts)) == 1 and jax.default_backend() == "cpu"
    if shared and jax.process_index() > 0:
        meet(f"{what} by process 0")
    yield
    if shared and jax.process_index() == 0:
        meet(f"{what} by process 0")


def _visible(job: Cluster, env: Mapping[str, str]) -> str:
    if job.gpus is not None:
        return f"GPUs {','.join(map(str, job.gpus))} of this host's"
    named = env.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES={named}" if named else "all devices of this host"


@contextlib.contextmanager
def _countdown(deadline: float, say: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, says every 30 s how much time is left."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(30):
            say(f"job: waiting for the other processes, {deadline - time.monotonic():.0f} s left")

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def make_room_for_emulated_devices() -> None:
    """Gives XLA's CPU client more threads where XLA_FLAGS makes several devices of one; call before importing jax.

    It has one thread per device otherwise. Two independent collectives of one device can then hold two of them, and the
    device that finds none never arrives.
    """
    emulated = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if emulated:
        os.environ.setdefault("NPROC", str(4 * int(emulated.group(1))))


def anywhere(flag: bool) -> bool:
    """True, in every process, if `flag` is true in one. All processes must call it, at the same step.

    For decisions that all must take together, such as stopping when a signal reached one process. A single process gets
    its own flag back at no cost; several exchange it by a collective, behind the steps that are already on their way.
    """
    import jax

    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _exit_at_once_on_errors() -> None:
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if _Job.line is not None and _Job.line.told.wait(_NOTICE_S):
            time.sleep(_NOTICE_S)  # the thread that was told ends this process
        report(kind, error, trace)  # type: ignore[arg-type]
        leave(130 if kind is KeyboardInterrupt else 1)

    sys.excepthook = hook


def leave(code: int) -> int:
    """The exit code of a process of a job; does not return from a process that failed.

    JAX's clean-up at exit waits for every process of the job, five minutes by default, and then aborts with a code of
    its own. A process that failed must not wait for others, which are themselves waiting for it inside a collective: it
    ends here. One that finished, or was preempted as all were, returns and ends in the usual way.
    """
    import jax

    if (code in (0, PREEMPTED) and not _Job.stopped) or not jax.distributed.is_initialized():
        if _Job.line is not None:
            _Job.line.close()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
