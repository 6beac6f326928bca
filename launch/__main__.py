"""One run over several processes: here, or on a cluster, from one description.

    adaptive launch --processes 2 --devices_per_process 4 -- --recipe mor_tiny mesh.fsdp=8
    adaptive launch slurm --nodes 4 -- --recipe mor_1_7b --workdir /shared/runs/one mesh.fsdp=32
    adaptive launch gke --accelerator v5e-256 --image IMAGE -- --recipe mor_1_7b --workdir gs://bucket/one mesh.fsdp=256

Targets: local (when none is said), slurm, tpu (Cloud TPU's queued resources), gke (JobSet on Kubernetes), skypilot.
What stands after -- are the arguments of `adaptive train`, which every process runs. For a cluster the command prints
what it would be told, and no more; --write keeps that as a file, and --start also starts it.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.launch.__main__"))

import difflib
import importlib
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from adaptive import command
from adaptive.command import Options
from adaptive.errors import UserError
from adaptive.launch.job import Rendered, add_options, check_recipe, described
from adaptive.launch.local import launch, split
from adaptive.launch.local import options as local_options

TARGETS = ("slurm", "tpu", "gke", "skypilot")  # a module each, with READS and render


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    own, rest = split(arguments)
    target = own.pop(0) if own and not own[0].startswith("-") else "local"
    if target == "local":
        if any(word.startswith("--write") for word in own):
            now = "adaptive launch slurm --write -- --recipe NAME --workdir DIR"
            raise UserError(f"--write belongs to a cluster, whose name comes first and whose file is rendered: {now}")
        return launch(local_options(__doc__ or "").read(own), rest)
    if target not in TARGETS:
        near = difflib.get_close_matches(target, (*TARGETS, "local"), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are local, {', '.join(TARGETS)}"
        raise UserError(f"there is no target '{target}'; {hint}")
    module = importlib.import_module(f"adaptive.launch.{target}")
    known = Options(f"launch {target}", module.__doc__ or "")
    add_options(known, module.READS)
    known.add_argument("--write", action="store_true", help="write the file into the working folder")
    known.add_argument("--start", action="store_true", help="write the file, and start the job with it")
    given = known.read(own)
    job = described(given, rest, target, module.READS)
    rendered: Rendered = module.render(job)
    check_recipe(job)
    if given.write or given.start:
        write(rendered)
    else:
        print(rendered.text, end="")
    return start(rendered) if given.start else 0


def write(rendered: Rendered) -> None:
    """Writes the file into the working folder. Raises UserError where another one of its name is there."""
    path = Path(rendered.file)
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != rendered.text:
            raise UserError(f"{path} is there already, and is another: move it away, or choose another --name")
        path.write_text(rendered.text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    commands = " && ".join(map(shlex.join, commands_of(rendered)))
    print(f"wrote     {path}; start it: {commands}")


def commands_of(rendered: Rendered) -> list[list[str]]:
    return [[rendered.file if word == "FILE" else word for word in each] for each in rendered.start]


def start(rendered: Rendered) -> int:
    """Runs the commands that start the job; the exit code of the first that fails. Raises UserError where a program is
    not installed."""
    for each in commands_of(rendered):
        if shutil.which(each[0]) is None:
            raise UserError(f"{each[0]} is not installed here; where it is, run {shlex.join(each)}")
        if code := subprocess.run(each).returncode:
            return code
    return 0
