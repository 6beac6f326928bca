"""What every command shares: how its options are read, how mistakes are told, and which code it ends with.

Imports nothing but the standard library, so that `adaptive.doctor` can say which packages are missing.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adaptive.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from absl import flags

INTERRUPTED = 130

Main = Callable[[Sequence[str]], int]


def start(main: Main) -> int:
    """The exit code of `main` with the arguments of this process: the first thing that `python -m` does.

    Text that the terminal cannot show is replaced rather than an error.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    return main(sys.argv[1:])


def exit_code(run: Main, arguments: Sequence[str], *, interrupted: str = "interrupted") -> int:
    """What `run` returns, or the code of an error that a user can cause, whose message alone is printed.

    interrupted  what is printed after a Ctrl-C, which ends with code 130
    """
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


def parse(options: "flags.FlagValues", arguments: Sequence[str]) -> list[str]:
    """Sets the options from a command line, and returns what else it holds, which may stand anywhere among them.

    Raises UserError for an option that does not exist or cannot have the value.
    """
    from absl import flags

    options.unparse_flags()
    options.set_gnu_getopt(True)
    try:
        return options(["", *arguments])[1:]
    except flags.Error as error:
        raise UserError(f"{error} (--help shows all options)") from None


def parse_with_settings(options: "flags.FlagValues", arguments: Sequence[str]) -> list[str]:
    """As `parse`, where all else must be settings (name=value); raises UserError for what is none."""
    rest = parse(options, arguments)
    for text in rest:
        if "=" not in text:
            raise UserError(f"'{text}' is neither an option (--{text}) nor a setting (name=value)")
    return rest
