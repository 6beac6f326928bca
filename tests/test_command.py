"""What every command shares: options, errors, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from adaptive import command
from adaptive.errors import DataError, NonFiniteError, UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def options():
    made = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "a folder", flag_values=made)
    flags.DEFINE_integer("rows", 1, "a number", lower_bound=1, flag_values=made)
    return made


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no such recipe"), 2, "error: no such recipe\n"),
        (DataError("no such file"), 2, "error: no such file\n"),
        (NonFiniteError("5 steps in a row"), 3, "stopped: 5 steps in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_of_the_user_is_a_line_and_a_code(capsys, raised, code, said):
    def run(arguments):
        raise raised

    assert command.exit_code(run, []) == code
    assert capsys.readouterr().err == said


def test_a_broken_invariant_keeps_its_traceback():
    def run(arguments):
        raise AssertionError(arguments)

    with pytest.raises(AssertionError):
        command.exit_code(run, ["a"])


def test_settings_stand_anywhere_among_the_options(options):
    rest = command.parse_with_settings(options, ["train.steps=1", "--workdir", "here", "mesh.fsdp=2", "--rows=3"])
    assert rest == ["train.steps=1", "mesh.fsdp=2"]
    assert (options.workdir, options.rows) == ("here", 3)
    assert command.parse(options, []) == [] and (options.workdir, options.rows) == ("", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdri", "here"], r"workdri.*--help"),
        (["--rows", "0"], r"rows.*--help"),
        (["steps"], r"'steps' is neither an option \(--steps\) nor a setting"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_the_users_error(options, arguments, says):
    with pytest.raises(UserError, match=says):
        command.parse_with_settings(options, arguments)


def test_text_that_the_terminal_cannot_show_is_replaced():
    program = "import sys; from adaptive import command; sys.exit(command.start(lambda rest: print('—', *rest) or 7))"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, "a", "b"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "? a b\n"), done.stderr


def test_it_imports_nothing_that_may_be_missing():
    program = "import sys; import adaptive.command; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"absl", "jax", "numpy"} & set(loaded.stdout.split())
