"""Makes a run's report.html from what it logged: adaptive report WORKDIR [--compare OTHER ...]

Works while a run goes on, after it ended, and after it crashed. Needs no device and no network.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.report"))

import webbrowser
from collections.abc import Sequence

from adaptive import command
from adaptive.errors import UserError
from adaptive.runs.folder import RunFolder
from adaptive.training.report.page import write_report


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    options = command.Options("report", __doc__ or "")
    options.add_argument("workdir", metavar="WORKDIR", help="folder of the run, as given to --workdir")
    options.add_argument("--compare", nargs="+", default=[], metavar="WORKDIR", help="runs to show against it")
    options.add_argument("--open", action="store_true", help="open the page in a browser")
    given = options.read(arguments)
    folder = RunFolder.at(given.workdir, "WORKDIR")
    others = [RunFolder.at(text, "--compare").path for text in given.compare]
    try:
        path = write_report(folder.path, others)
        folder.push()
    except OSError as error:
        raise UserError(f"cannot write the report: {error}") from None
    print(f"{folder}/{path.name}")
    if given.open:
        webbrowser.open(path.resolve().as_uri())
    return 0
