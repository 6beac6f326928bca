"""python -m adaptive.report WORKDIR [--compare OTHER ...] [--open]: makes a run's report.html from what it logged.

Works while a run goes on, after it ended, and after it crashed. Needs no device and no network.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence

from adaptive import command
from adaptive.errors import UserError
from adaptive.training.report.page import write_report


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m adaptive.report", description="Make the report of a run.")
    parser.add_argument("workdir", help="folder of the run, as given to --workdir")
    parser.add_argument("--compare", nargs="+", default=[], metavar="WORKDIR", help="runs to show against it")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    args = parser.parse_args(arguments)
    try:
        path = write_report(args.workdir, args.compare)
    except OSError as error:
        raise UserError(f"cannot write the report: {error}") from None
    print(path)
    if args.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(command.start(main))
