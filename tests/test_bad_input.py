"""Whatever is typed at a setting or an option is taken or refused in a line: no other error, and no long wait."""

import argparse
import contextlib
import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from adaptive import bench, command, convert, doctor, evaluate, generate, recipe, report, serve, study, train
from adaptive import compile as compiling
from adaptive.benchmarks import aot, train_step
from adaptive.data import __main__ as data
from adaptive.errors import UserError
from adaptive.launch import __main__ as launcher
from adaptive.recipe import Recipe, leaves, load
from adaptive.runs.folder import RunFolder

RECIPES = ("hnet_mor_tiny", "mor_tiny", "moe_pp_tiny")
WORDS = ["", " ", "-", "--", "=", ",", ",,1", '"', "'", "()", "[[", "{}", "none", "null", "true", "nan", "inf", "-inf",
         "-1", "-0.0", "0", "0.5", "3", "1e-320", "1e308", "1e400", "1e999999999", "1e18", str(2**31 - 1), str(2**31),
         str(2**64), "9" * 300, "9" * 5000, "1_0", "٣", "0x10", "1,2,3", "1," * 999, "(" * 5000, "x" * 5000, "\0",
         "\n", "\udcff", "☃", "%s{}$HOME", "~nobody/x", "../..", "/dev/null", "/dev/null/x", "gs://a/b", "a:b",
         "builtins:open", "os.path:join", "mor_tiny.json", "x.py", "@1", "*", "**/*["]  # fmt: skip
DEEP = functools.reduce(lambda inner, _: [inner], range(900), [1])
TREES: list[Any] = [None, True, -1, 0, 0.5, 1e308, 10**18, 10**299, -(10**299), [], {}, [[]], [None], [{}], [1, "a"],
                    [1e308] * 3, {"kind": None}, {"kind": "none"}, {"kind": []}, {"a": {"b": 1}}, {"": 0},
                    DEEP]  # fmt: skip
TEXTS = [
    *map(json.dumps, [*WORDS, *TREES]),
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 100_000,
    '"',
    '"\\ud800"',
    "",
    '{"a": 1, "a": 2}',
]


def tried(call) -> Any:
    """What `call` returns; None where it was refused."""
    with contextlib.suppress(UserError):
        return call()
    return None


def settled(made: Recipe) -> None:
    """A recipe that could be written down comes back equal, and is valid or refused."""
    assert Recipe.from_json(made.to_json()) == made
    tried(made.validate)


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_on_the_command_line(name):
    draw, base = random.Random(name), load(name)
    for path in leaves(base):
        for word in draw.sample(WORDS, 1):
            made = tried(lambda: base.with_(f"{path}={word}"))  # noqa: B023
            if made is not None:
                settled(made)
    for word in draw.sample(WORDS, 6):
        tried(lambda: base.with_(f"{word}=1", f"model.{word}=1"))  # noqa: B023


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_file(name, tmp_path):
    draw, path = random.Random(name), tmp_path / "mine.json"
    saved = json.loads(load(name).to_json())
    for at in leaves(load(name)):
        for text in draw.sample(TEXTS, 1):
            path.write_text(f'{{"base": "{name}", "{at}": {text}}}')
            made = tried(lambda: load(str(path)))
            if made is not None:
                settled(made)
    for field in [*saved, "base"]:
        for text in draw.sample(TEXTS, 3):
            rest = {key: value for key, value in saved.items() if key != field}
            path.write_text(f'{json.dumps(rest)[:-1]}, "{field}": {text}}}')
            tried(lambda: load(str(path)))


def opened(made: Recipe, workdir: Path | None, arguments=(), compiled=None) -> int:
    """In place of training: the folder alone."""
    if workdir:
        with RunFolder.open(workdir, made):
            pass
    return 0


def not_compiled(*step, **how):
    raise UserError("nothing is compiled here")


COMMANDS = {
    "train": (train.main, ["--recipe=mor_tiny", "--workdir=run"]),
    "generate": (generate.main, ["--workdir=gone"]),
    "evaluate": (evaluate.main, ["--checkpoint=gone"]),
    "serve": (serve.main, ["--checkpoint=gone", "--port=0"]),
    "convert": (convert.main, ["--kind=hnet", "--tensors=gone", "--config=gone", "--workdir=run"]),
    "convert --export": (convert.main, ["--kind=hnet", "--workdir=gone", "--export=x.safetensors"]),
    "report": (report.main, ["gone"]),
    "study": (study.main, ["ladder", "--quick", "--list_runs"]),
    "bench": (bench.main, ["train", "--recipe=mor_tiny"]),
    "compile": (compiling.main, ["--recipe=mor_tiny", "--topology=cpu-8"]),
    "data prepare": (data.main, ["prepare", "--source=text.txt", "--tokenizer=bytes", "--out=tokens"]),
    "data train-bpe": (data.main, ["train-bpe", "--source=text.txt", "--vocab_size=258", "--out=t.json"]),
    "data show": (data.main, ["show", "--source=text.txt"]),
    "launch": (launcher.main, ["--processes=2"]),
    "launch slurm": (launcher.main, ["slurm", "--module=one.of_mine"]),
    "launch gke": (launcher.main, ["gke", "--module=one.of_mine", "--image=one"]),
    "launch tpu": (launcher.main, ["tpu", "--module=one.of_mine", "--accelerator=v5e-8", "--zone=z"]),
    "launch skypilot": (launcher.main, ["skypilot", "--module=one.of_mine", "--accelerator=h100"]),
    "doctor": (doctor.main, []),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, where nothing is trained, measured or started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "train", opened)
    monkeypatch.setattr(train_step, "measure", lambda recipes, **how: (recipes, {}))
    monkeypatch.setattr(train_step, "as_json", lambda *measured: "")
    monkeypatch.setattr(train_step, "table", lambda *measured: "")
    monkeypatch.setattr(aot, "compiled", not_compiled)
    monkeypatch.setattr(launcher, "launch", lambda given, rest: 0)
    monkeypatch.setattr(launcher, "start", lambda rendered: 0)
    (tmp_path / "text.txt").write_text("One text.\n" * 20)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command(name, here, monkeypatch, capsys):
    (main, usual), draw = COMMANDS[name], random.Random(name)
    known: list[command.Options] = []
    read = command.Options.read
    monkeypatch.setattr(command.Options, "read", lambda self, words: known.append(self) or read(self, words))
    assert main(usual) in (0, 2)
    takes = [action for action in known[0]._actions if not isinstance(action, argparse._HelpAction)]
    for action in takes:
        flag = action.option_strings[-1] if action.option_strings else ""
        others = [word for word in usual if not flag or not word.startswith(f"{flag}=")]
        for word in draw.sample(WORDS, 15):
            given = f"{flag}={word}" if flag else word
            assert main([*others, given]) in (0, 2), given
    for word in draw.sample(WORDS, 15):
        assert main([word]) in (0, 2), word
    assert "Traceback" not in capsys.readouterr().err


def test_recipes_are_named_by_anything(here):
    for word in random.Random(0).sample(WORDS, 20):
        for name in (word, f"{word}.json", f"{word}.py"):
            tried(lambda: recipe.load(name))  # noqa: B023
