"""What every command shares: options, errors, streams, exit codes."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive import __main__, command
from adaptive.command import number
from adaptive.errors import DataError, NonFiniteError, UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def options():
    made = command.Options("test", "Tests.")
    made.add_argument("--workdir", default="")
    made.add_argument("--rows", type=number(int, least=1, most=9), default=1)
    made.add_argument("--share", type=number(float, above=0), default=0.5)
    made.add_settings()
    return made


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no such recipe"), 2, "error: no such recipe\n"),
        (DataError("no such file"), 2, "error: no such file\n"),
        (NonFiniteError("5 steps in a row"), 3, "stopped: 5 steps in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(0), 0, ""),
    ],
)
def test_an_error_of_the_user_is_a_line_and_a_code(capsys, raised, code, said):
    def run(arguments):
        raise raised

    assert command.exit_code(run, []) == code
    assert capsys.readouterr().err == said


def test_bytes_that_are_no_text_can_be_told(capsys):
    def run(arguments):
        raise UserError("no file a\udcff")

    assert command.exit_code(run, []) == 2
    assert capsys.readouterr().err == "error: no file a\N{REPLACEMENT CHARACTER}\n"


def test_a_broken_invariant_keeps_its_traceback():
    def run(arguments):
        raise AssertionError(arguments)

    with pytest.raises(AssertionError):
        command.exit_code(run, ["a"])


def test_settings_stand_anywhere_among_the_options(options):
    found = options.read(["train.steps=1", "--workdir", "here", "mesh.fsdp=2", "--rows=3"])
    assert found.settings == ["train.steps=1", "mesh.fsdp=2"]
    assert (found.workdir, found.rows) == ("here", 3)
    found = options.read([])
    assert (found.settings, found.workdir, found.rows) == ([], "", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdri", "here"], "'--workdri' is no option; did you mean --workdir? (--help shows all options)"),
        (["--work=here"], "'--work=here' is no option; did you mean --workdir? (--help shows all options)"),
        (["--rows", "0"], "--rows: 0: must be at least 1 and at most 9 (--help shows all options)"),
        (["--rows", "9" * 5000], f"--rows: '{'9' * 37}...' is not a whole number (--help shows all options)"),
        (["--rows", "1.5"], "--rows: '1.5' is not a whole number (--help shows all options)"),
        (["--share", "0"], "--share: 0: must be above 0 (--help shows all options)"),
        (["--share", "nan"], "--share: 'nan' is not a number (--help shows all options)"),
        (["--share", "inf"], "--share: 'inf' is not a number (--help shows all options)"),
        (["--workdir", "-x"], "argument; one that begins with - is written --workdir=VALUE (--help shows all options)"),
        (["--workdir=--"], "--workdir: '--' cannot be its value (--help shows all options)"),
        (["steps"], "'steps' is neither an option (--steps) nor a setting (name=value)"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_the_users_error(options, arguments, says):
    with pytest.raises(UserError) as raised:
        options.read(arguments)
    assert str(raised.value).endswith(says)


@pytest.fixture
def process(tmp_path):
    """Runs `command.start` on a module with this `main`, in a process of its own."""

    def run(main: str, **options) -> subprocess.CompletedProcess[str]:
        (tmp_path / "module.py").write_text(main)
        program = "import sys; from adaptive import command; sys.exit(command.start('module'))"
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONIOENCODING": "ascii"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.run([sys.executable, "-c", program, "a"], env=env, text=True, **pipes)

    return run


def test_text_that_the_terminal_cannot_show_is_replaced(process):
    done = process("def main(arguments): print('—', *arguments); return 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "? a\n", "")


SWALLOWED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
except BaseException:
    pass
main = print
"""


@pytest.mark.parametrize("where", [SWALLOWED, "def main(arguments): raise KeyboardInterrupt"])
def test_an_interrupt_is_one_line_also_while_modules_are_imported(process, where):
    done = process(where)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_package_that_is_not_installed_is_told(process):
    done = process("import package_that_is_not_there.part")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: package_that_is_not_there is not installed in ")
    done = process("import json.part_that_is_not_there")
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_has_had_enough_is_no_error(process, flush):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody:
        done = process(f"def main(arguments): print('x', flush={flush}); return 0", stdout=nobody)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(process):
    done = process("def main(arguments): raise BrokenPipeError")
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_it_imports_nothing_that_may_be_missing():
    program = "import sys; import adaptive.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"absl", "jax", "numpy"} & set(loaded.stdout.split())


# One command for all


def test_each_command_is_there_and_tells_its_options(capsys):
    assert __main__.main([]) == 0
    listed = capsys.readouterr().out
    for name in __main__.COMMANDS:
        assert f"  {name} " in listed
        if name != "data":  # has commands of its own
            assert __main__.main([name, "--help"]) == 0
            assert capsys.readouterr().out.startswith(f"usage: adaptive {name} [-h]")


AT = "ftp://host/run"
RELEASED = {"--tensors": "t", "--config": "c", "--workdir": "w"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["--recipe", "mor_tiny", "--workdir", AT]),
        ("train", ["--recipe", "mor_tiny", "--init_from", AT]),
        ("train", ["--recipe", f"{AT}.json"]),
        ("train", ["--recipe", f"{AT}.py"]),
        ("bench", ["train", "--recipe", f"{AT}.json"]),
        ("generate", ["--workdir", AT]),
        ("generate", ["--workdir", "w", "--prompt_file", AT]),
        ("evaluate", ["--checkpoint", AT]),
        ("serve", ["--checkpoint", AT, "--port", "0"]),
        ("report", [AT]),
        ("report", ["w", "--compare", "v", AT]),
        ("data", ["prepare", "--source", "embedded:dna", "--tokenizer", "bytes", "--out", AT]),
        ("data", ["prepare", "--source", AT, "--tokenizer", "bytes", "--out", "tokens"]),
        *(
            ("convert", ["--kind", "hnet", *(f"{key}={value}" for key, value in (RELEASED | {name: AT}).items())])
            for name in RELEASED
        ),
        ("convert", ["--kind", "hnet", "--workdir", "w", "--export", f"{AT}.safetensors"]),
    ],
)
def test_an_address_of_another_place_is_refused_at_once(capsys, monkeypatch, tmp_path, name, arguments):
    monkeypatch.chdir(tmp_path)
    assert __main__.main([name, *arguments]) == 2
    error = capsys.readouterr().err
    assert AT in error and "is an address, and only paths on this machine work" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("bash"), reason="completes in bash")
@pytest.mark.parametrize(("typed", "completions"), [
    (["adaptive", "rep"], ["report"]),
    (["adaptive", "train", "--pri"], ["--print_recipe"]),
    (["adaptive", "train", "--recipe", "mod_"], ["mod_tiny"]),
    (["adaptive", "data", "train"], ["train-bpe"]),
])  # fmt: skip
def test_a_shell_completes(tmp_path, typed, completions, shell_script):
    words = " ".join(typed)
    program = f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _adaptive; echo ${{COMPREPLY[@]}}"
    shown = subprocess.run(["bash", "-c", shell_script + program], capture_output=True, text=True, check=True).stdout
    assert shown.split() == completions


@pytest.fixture(scope="module")
def shell_script():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert __main__.main(["--completion", "bash"]) == 0
    return out.getvalue()


def test_shells_that_are_not_known_are_refused(capsys):
    assert __main__.main(["--completion", "fish"]) == 2
    assert "there is one for bash and zsh" in capsys.readouterr().err


def test_a_command_that_is_not_there_is_refused(capsys):
    assert __main__.main(["trian", "--recipe", "x"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["adaptive.train", "adaptive.data", "adaptive.launch", "adaptive"])
def test_modules_run_as_their_commands(module):
    """`python -m` hands over before anything is imported: no module is loaded twice, no import is outside the guard."""
    program = f"""
import runpy, sys
from adaptive import command
command.start = lambda module, **more: print(module, 'jax' in sys.modules)
sys.argv = ['x']
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit:
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    wanted = module if module == "adaptive.train" else f"{module}.__main__"
    assert done.stdout == f"{wanted} False\n", done.stderr
