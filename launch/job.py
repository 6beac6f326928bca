"""One description of a job, which every kind of cluster is told in its own words."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from adaptive.command import number
from adaptive.errors import UserError
from adaptive.launch.accelerators import Slice, slice_of
from adaptive.parallel.cluster import PREEMPTED
from adaptive.paths import is_address

# Exit codes that a restart does not mend: what was asked for cannot work, or numbers are not finite.
FINAL = (2, 3, 4)
HUNG = 124  # the watchdog ended it (adaptive/training/watchdog.py)
SAVED = PREEMPTED  # asked to stop, and saved: a restart that counts as no failure

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LONGEST_NAME = 30  # what pods are called begins with it, and may have 63
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


def option(default: Any, about: str, read: Any = str) -> Any:
    """A field that is an option of `adaptive launch`."""
    return dataclasses.field(default=default, metadata={"help": about, "read": read})


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to run, on what, and what happens when it ends early.

    arguments  of each process: those of `adaptive train`
    """

    arguments: tuple[str, ...] = ()
    name: str = option("adaptive", "of the job, its files and its machines")
    module: str = option("adaptive.train", "what each process runs, as in python -m MODULE")
    nodes: int = option(1, "machines with GPUs", number(int, least=1, most=10_000))
    gpus_per_node: int = option(8, "GPUs of each", number(int, least=1, most=64))
    process_per: str = option("node", "node: one process for all GPUs of a machine; gpu: one for each")
    accelerator: str = option("", "a TPU slice, such as v5e-256, or a kind of GPU, such as h200")
    slices: int = option(1, "TPU slices that a slower network joins", number(int, least=1, most=1000))
    image: str = option("", "container image with this package")
    folder: str = option("", "where this repository is: of the machines, or here where it is copied from")
    python: str = option(".venv/bin/python", "the interpreter, within the folder or by its whole path")
    hours: float = option(0.0, "time limit (default: 24 for slurm, else none)", number(float, above=0, most=10_000))
    grace_s: int = option(300, "seconds from the request to stop to the end, for saving", number(int, least=30))
    restarts: int = option(
        10, "after failures; a run that was asked to stop and saved is not counted", number(int, least=0)
    )
    env: tuple[str, ...] = option((), "NAME=VALUE for each process; may be given several times")
    spot: bool = option(False, "machines that may be taken away")
    sbatch: tuple[str, ...] = option((), "NAME=VALUE of another line #SBATCH --NAME=VALUE; may be given several times")
    zone: str = option("", "of Google Cloud")
    project: str = option("", "of Google Cloud (default: the one that gcloud is set to)")
    network: str = option("", "of the machines in Google Cloud")
    runtime: str = option("", "Cloud TPU's image of the machines (default: the one of the accelerator)")
    volume: str = option("", "a claim (PersistentVolumeClaim) that all pods can write, mounted at /runs")
    namespace: str = option("", "of Kubernetes")
    queue: str = option("", "of Kueue, which admits the job")
    service_account: str = option("", "of Kubernetes, for buckets")

    def tpu(self) -> Slice | None:
        return slice_of(self.accelerator)

    def devices(self) -> int:
        """What jax will see in all."""
        tpu = self.tpu()
        if tpu is None:
            return self.nodes * self.gpus_per_node
        return tpu.chips * tpu.kind.devices * self.slices

    def variables(self) -> dict[str, str]:
        """The environment that was asked for. Raises UserError for what is no NAME=VALUE."""
        found = {}
        for text in self.env:
            if not (match := _VARIABLE.fullmatch(text)):
                raise UserError(f"--env {text}: expected NAME=VALUE")
            found[match[1]] = match[2]
        return found

    def command(self, python: str | None = None) -> str:
        """What each process runs, as a shell reads it."""
        return shlex.join([python or self.python, "-m", self.module, *self.arguments])

    def workdir(self) -> str:
        """The value of --workdir among the arguments; empty: none."""
        for at, word in enumerate(self.arguments):
            if word == "--workdir":
                return self.arguments[at + 1] if at + 1 < len(self.arguments) else ""
            if word.startswith("--workdir="):
                return word.removeprefix("--workdir=")
        return ""


class Rendered(NamedTuple):
    """A file for a cluster, and the commands that start the job with it (FILE stands for the file)."""

    file: str
    text: str
    start: tuple[tuple[str, ...], ...]


OPTIONS = {field.name: field for field in dataclasses.fields(Job) if field.metadata}


def add_options(parser: argparse.ArgumentParser, reads: frozenset[str]) -> None:
    """Adds the options of a job; the help shows those that the target reads."""
    for name, field in OPTIONS.items():
        known: dict[str, Any] = {"help": field.metadata["help"], "default": None}
        if field.default is False:
            known["action"] = "store_true"
        elif field.default == ():
            known["action"] = "append"
        else:
            known["type"] = field.metadata["read"]
            if field.default not in ("", 0.0):
                known["help"] += f" (default {field.default})"
        if name not in reads:
            known["help"] = argparse.SUPPRESS
        parser.add_argument(f"--{name}", **known)


def described(given: argparse.Namespace, arguments: Sequence[str], target: str, reads: frozenset[str]) -> Job:
    """The job of a command line. Raises UserError for what the target does not read, or no job can have."""
    values = {name: getattr(given, name) for name in OPTIONS if getattr(given, name) not in (None, False)}
    for name in values.keys() - reads:
        raise UserError(f"--{name}: {target} does not use it (it reads {', '.join(sorted(f'--{n}' for n in reads))})")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in [*values.items(), *(("", word) for word in arguments)]:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.isprintable():
                where = f"--{name}" if name else "after --"
                raise UserError(f"{where}: {text[:60]!r} holds characters that are none of a line of text")
    job = Job(tuple(arguments), **values)
    if not _NAME.fullmatch(job.name) or len(job.name) > _LONGEST_NAME:
        what = f"letters a to z, digits and -, beginning with a letter, {_LONGEST_NAME} at most"
        raise UserError(f"--name {job.name}: expected {what}")
    if job.process_per not in ("node", "gpu"):
        raise UserError(f"--process_per {job.process_per}: expected node or gpu")
    job.variables()
    return job


def require_workdir(job: Job, outlives: tuple[str, ...] | None = None) -> None:
    """Raises UserError where a restart could not go on, because nothing says where, or it would be lost.

    outlives  folders that outlive the machines, where not every folder may; an address always does
    """
    if job.module != "adaptive.train":
        return
    address = "an address such as gs://bucket/run"
    places = ["a folder that all machines see"] if outlives is None else [f"a folder below {each}" for each in outlives]
    where = ", or ".join([*places, address])
    workdir = job.workdir()
    if not workdir:
        raise UserError(f"a restarted job goes on from its --workdir, and none is given: after --, say {where}")
    if outlives is None or is_address(workdir) or workdir.startswith(tuple(f"{each}/" for each in outlives)):
        return
    raise UserError(f"--workdir {workdir} is lost with the machine, and no other one sees it: give {where}")


def check_recipe(job: Job) -> None:
    """Reads the recipe and its settings here, and lays its mesh over the job's devices, so that mistakes are not found
    after hours in a queue.

    A recipe that is a file of the cluster alone is left to the cluster. Raises UserError as `adaptive train` does.
    """
    if job.module != "adaptive.train":
        return
    import os

    from adaptive import train
    from adaptive.parallel.mesh import axis_sizes
    from adaptive.recipe import load

    given = train.options().read(job.arguments)
    if not given.recipe:
        raise UserError("which recipe? after --, say --recipe NAME and what else `adaptive train` is to be told")
    if given.recipe.endswith((".py", ".json")) and not os.path.exists(given.recipe):
        return
    recipe = load(given.recipe).with_(*given.settings)
    recipe.validate()
    axis_sizes(recipe.mesh, job.devices())
    if recipe.mesh.slices != job.slices and job.slices > 1:
        raise UserError(
            f"--slices {job.slices}: say mesh.slices={job.slices} after --, so that what crosses the network between "
            f"them is little (it is {recipe.mesh.slices})"
        )
