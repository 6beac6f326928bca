"""Several processes of one run on this machine, or a template for a cluster:

    adaptive launch --processes 2 --devices_per_process 4 -- --recipe mor_tiny mesh.fsdp=8
    adaptive launch --write slurm

What stands after -- are the arguments of `adaptive train`. Each process sees emulated CPU devices of its own: a way to
try a run of several processes, its data, its checkpoints and its mesh before a cluster does.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.launch.__main__"))

from collections.abc import Sequence
from pathlib import Path

from adaptive import command
from adaptive.errors import UserError
from adaptive.launch.local import launch, options, split

TEMPLATES = {"slurm": "slurm.sbatch", "gke": "gke.yaml", "tpu_pod": "tpu_pod.sh"}


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    own, rest = split(arguments)
    known = options(__doc__ or "")
    known.add_argument("--write", choices=TEMPLATES, help="write this template into the working folder, and end")
    given = known.read(own)
    return write(given.write) if given.write else launch(given, rest)


def write(name: str) -> int:
    """Copies a template into the working folder. Raises UserError where a file of its name is there."""
    source = Path(__file__).parent / TEMPLATES[name]
    path = Path(source.name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
        path.chmod(source.stat().st_mode & 0o777)
    except FileExistsError:
        raise UserError(f"{path} is there already, and nothing was written: move it away first") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    print(f"wrote     {path}; what to fill in is said at its top")
    return 0
