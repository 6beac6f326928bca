"""What every command shares: its options, how mistakes are told, and which code it ends with.

Imports nothing but the standard library: an interrupt is one line from the first moment on, and `adaptive.doctor` can
say which packages are missing.
"""

import argparse
import difflib
import importlib
import importlib.util
import math
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from adaptive.errors import StopError, UserError
from adaptive.printable import printable

INTERRUPTED = 130
NO_READER = 141  # whoever read the output has had enough; a shell's code for a program that SIGPIPE ended

Run = Callable[[Sequence[str]], int]


def start(module: str, *, stopped: int | None = None) -> int:
    """The exit code of the module's `main` with the arguments of this process: all that `python -m` does.

    Its imports happen in here, and Ctrl-C ends them like all that follows. Text that the terminal cannot show is
    replaced rather than an error. stopped: see `imported`.
    """
    _make_streams_safe()
    try:
        code = exit_code(lambda arguments: imported(module, stopped=stopped).main(arguments), sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _lost_readers():
            raise  # another pipe than that of the output
        return NO_READER


def imported(module: str, *, stopped: int | None = None) -> Any:
    """The module. Ctrl-C while it is imported ends the process at once: there are packages that would go on.

    stopped  the exit code after a SIGTERM meanwhile; None: that of any process

    Raises UserError where a package is not installed.
    """
    if default := stopped is not None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(stopped))
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package):
            raise
        raise UserError(f"{package} is not installed in {sys.prefix}; python -m adaptive.doctor tells more") from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: object) -> None:
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(INTERRUPTED)


def exit_code(run: Run, arguments: Sequence[str], *, interrupted: str = "interrupted") -> int:
    """What `run` returns, or the code of an error that a user can cause, whose message alone is printed.

    interrupted  what is printed after a Ctrl-C, which ends with code 130
    """
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.code
    except StopError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except SystemExit as done:  # of --help and --version
        return done.code if isinstance(done.code, int) else 0


def _make_streams_safe() -> None:
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the process lives
        else:
            stream.reconfigure(errors="replace")


def _lost_readers() -> bool:
    """Whether nobody reads an output of this process any more; such a one leads to nothing from now on."""
    lost = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            lost = True
    return lost


# Options


class Options(argparse.ArgumentParser):
    """The options of one command, and what its --help shows.

    name   of the command: `adaptive NAME`
    about  what it does; usually its module's docstring
    """

    def __init__(self, name: str, about: str):
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(f"adaptive {name}", description=about.strip(), formatter_class=shape, allow_abbrev=False)

    def add_settings(self) -> None:
        """Lets the command take settings, which `read` returns as `settings`."""
        self.add_argument("settings", nargs="*", metavar="name=value", help="settings of the recipe")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """What a command line says; words that are no options may stand anywhere among them.

        Raises UserError for an option that does not exist, with the nearest, or cannot have its value, and for a
        setting that is none.
        """
        for word in arguments:
            if word.endswith("=--") and (name := word.removesuffix("=--")) in self._option_string_actions:
                raise UserError(f"{name}: '--' cannot be its value (--help shows all options)")  # argparse drops it
        found, rest = self.parse_known_intermixed_args(arguments)
        for word in rest:
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"'{word}' is no option{hint} (--help shows all options)")
        for word in getattr(found, "settings", ()):
            if "=" not in word:
                raise UserError(f"'{word}' is neither an option (--{word}) nor a setting (name=value)")
        return found

    def error(self, message: str) -> NoReturn:
        name, colon, what = message.removeprefix("argument ").partition(": ")
        hint = f"; one that begins with - is written {name}=VALUE" if what == "expected one argument" else ""
        raise UserError(f"{name}{colon}{what}{hint} (--help shows all options)")


def number(
    kind: type, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """What reads an option's value as a finite number of type `kind`, int or float, from `least` to `most`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            shown = text if len(text) < 40 else f"{text[:37]}..."
            raise argparse.ArgumentTypeError(f"'{shown}' is not a {'whole ' * (kind is int)}number")
        if not (least <= value <= most and value > above):
            low = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
            high = f" and at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {low}{high}")
        return value

    return read
