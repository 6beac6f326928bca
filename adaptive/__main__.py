"""One command for all that the package does: `adaptive train ...` is `python -m adaptive.train ...`, and so on.

adaptive COMMAND --help    what a command does, and its options
adaptive --version
adaptive --completion bash    a script for the shell, or for zsh: put it where the shell finds completions
"""

import contextlib
import difflib
import io
import sys
from collections.abc import Sequence

from adaptive import __version__, command
from adaptive.errors import UserError

COMMANDS = {
    "train": "train a model, or go on training one",
    "generate": "continue texts with a trained model",
    "serve": "answer requests with a trained model over HTTP",
    "evaluate": "losses, depths and tasks of a checkpoint, with intervals",
    "report": "make the report of a run",
    "study": "a sweep of runs, and a page on what follows",
    "convert": "released weights to a run, and back",
    "compile": "whether a recipe fits machines that are not here, and what a step would take",
    "bench": "measure what a recipe or an operation costs",
    "data": "prepare tokens, train tokenizers, look at sources",
    "launch": "several processes of one run: here, or as jobs of clusters",
    "doctor": "which versions and devices are here, and whether they fit",
}
PACKAGES = ("data", "launch")  # commands whose module is a package's __main__


def enter() -> int:
    """What the installed script `adaptive` runs."""
    return command.start("adaptive.__main__")


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"adaptive {__version__}")
        return 0
    if name == "--completion":
        from adaptive.completion import script

        print(script(rest[0] if rest else "", {each: help_of(each) for each in COMMANDS}), end="")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command '{name}'; {hint} (adaptive --help)")
    stopped = 75 if name == "train" else None
    return command.imported(module_of(name), stopped=stopped).main(rest)


def help_of(name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        run([name, "--help"])
    return shown.getvalue()


def module_of(name: str) -> str:
    return f"adaptive.{name}" + ".__main__" * (name in PACKAGES)


def help_text() -> str:
    rows = [f"  {name:10} {about}" for name, about in COMMANDS.items()]
    return "\n".join(["usage: adaptive COMMAND ...", "", (__doc__ or "").strip(), "", "commands:", *rows])


if __name__ == "__main__":
    sys.exit(enter())
