"""The command as a user meets it: texts, marks, refusals."""

import io
import itertools
import json
import sys

import jax
import numpy as np
import pytest
import shapes

from adaptive import command, generate
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import CheckpointError
from adaptive.inference.marks import Writer
from adaptive.layers.feed_forwards import experts
from adaptive.optim.build import make_optimizer
from adaptive.recipe import Recipe
from adaptive.runs.checkpoint import Checkpoints
from adaptive.runs.load import find, load
from adaptive.runs.state import initial_state

pytestmark = pytest.mark.compiles

HNET = shapes.hnet(("T1", ("T1",), "T1"), widths=(16, 16), hidden=16, rotary_dim=4)
SMALL = {"vocab_size": 320, "width": 16, "hidden": 16, "heads": 2}
PLAIN = shapes.recursive(4, 2, **SMALL)
ROUTED = shapes.mor(4, 2, "token_choice", **SMALL)
EXPERTS = shapes.plain(2, feed_forward=experts.Settings(experts=3, expert_size=8), **SMALL)
STUCK = shapes.recursive(4, 2, order="sequence", **SMALL)


def made(folder, model, *settings: str, steps=(3, 7)):
    """A folder as training leaves it, with a different model at each step."""
    recipe = Recipe(name="made", model=model).with_("train.compute_dtype=float32", *settings)
    recipe.validate()
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    tx = make_optimizer(recipe.optimizer, recipe.schedule, recipe.train.steps)
    start = jax.jit(lambda key: initial_state(model.build, tx, key))
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, {})
    states = {step: start(jax.random.key(step)) for step in steps}
    for step, state in states.items():
        checkpoints.save(step, state, {})
    checkpoints.close()
    return states


@pytest.fixture(scope="module")
def hnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "hnet"
    made(folder, HNET, "data.tokenizer=hnet-bytes", "data.seq_len=64")
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = generate.main([*map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


def test_the_parameters_are_those_of_the_checkpoint(tmp_path):
    states = made(tmp_path / "run", PLAIN)
    for step in (3, 7):
        trained = load(find(tmp_path / "run", step))
        assert trained.step == step and len(jax.tree.leaves(trained.state)[0].sharding.device_set) == 1
        same = jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), trained.state, states[step].params)
        assert all(jax.tree.leaves(same))
    assert find(tmp_path / "run").step == 7
    (tmp_path / "run" / "checkpoints" / "7" / "about" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"7 cannot be read: .*; there are also --step 3"):
        load(find(tmp_path / "run"))


def test_texts_are_continued_alone_and_together(run, hnet, tmp_path):
    code, alone, told = run("--workdir", hnet, "--prompt", "Grüße ", "--tokens", 12, "--temperature", 0)
    assert code == 0 and alone.startswith("Grüße ") and "per chunk: stage 0" in told and "12 tokens" in told
    file = tmp_path / "text"
    file.write_text("A cat")
    options = ("--prompt", "Grüße ", "--prompt_file", file, "--tokens", 12, "--temperature", 0)
    code, several, _ = run("--workdir", hnet, *options)
    assert code == 0 and f"--- 1 of 2\n{alone}" in several and "--- 2 of 2\nA cat" in several
    assert run("--workdir", hnet, *options, "--rows", 1)[1] == several
    assert run("--workdir", hnet, *options, "--step", 3)[1] != several


def test_json_holds_the_text_and_each_tokens_probability(run, hnet):
    options = ("--workdir", hnet, "--prompt", "Grüße ", "--prompt", "A cat", "--tokens", 12, "--seed", 5)
    _, several, _ = run(*options)
    code, out, told = run(*options, "--json", "--ignore_end")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "24 tokens" in told and [r["prompt"] for r in records] == ["Grüße ", "A cat"]
    tokenizer = load_tokenizer("hnet-bytes")
    for record in records:
        assert len(record["tokens"]) == len(record["logprobs"]) == 12 and max(record["logprobs"]) < 0
        assert (record["recipe"], record["step"], record["ended"]) == ("made", 7, "length")
        assert tokenizer.decode(record["tokens"]) == record["text"]
    assert f"A cat{records[1]['text']}" in several


def test_a_stop_text_ends_a_continuation(run, hnet):
    options = ("--workdir", hnet, "--prompt", "A cat", "--tokens", 30, "--seed", 5)
    whole = json.loads(run(*options, "--json")[1])
    stop = whole["text"][9:11]
    at = whole["text"].index(stop)
    code, text, _ = run(*options, "--stop", "not in it", "--stop", stop)
    assert code == 0 and text == f"A cat{whole['text'][:at]}\n"
    record = json.loads(run(*options, "--stop", stop, "--json")[1])
    assert record["ended"] == "stop" and record["text"] == whole["text"][:at]
    assert record["tokens"] == whole["tokens"][: len(record["tokens"])] and len(record["tokens"]) < 30


def test_marks_leave_the_text_as_it_is(run, hnet):
    options = ("--workdir", hnet, "--prompt", "Grüße, wörld", "--tokens", 20, "--seed", 5)
    _, plain, _ = run(*options)
    code, marked, _ = run(*options, "--show_chunks")
    legend, _, text = marked.partition("\n\n")
    assert code == 0 and "| stage 0" in legend
    assert text.replace("|", "") == plain.replace("|", "") and text.count("|") > 1


def test_depths_are_shown_where_they_change(run, tmp_path, monkeypatch):
    made(tmp_path / "run", ROUTED, steps=(3,))
    options = ("--workdir", tmp_path / "run", "--tokens", 20, "--seed", 5)
    code, shown, told = run(*options, "--prompt", "A cat", "--show_depth")
    legend, _, text = shown.partition("\n\n")
    assert code == 0 and legend.endswith("begins: ¹, ²") and "passes of a token: 1 " in told
    record = json.loads(run(*options, "--prompt", "A cat", "--json")[1])
    assert set(record["depths"]) <= {1, 2} and len(record["depths"]) == len(record["tokens"])
    assert text.replace("¹", "").replace("²", "") == f"A cat{record['text']}\n"
    code, out, told = run(*options, "--prompt", "A cat", "--json", "--cache", "active_only(0)")
    compact = json.loads(out)
    assert code == 0 and all(compact[key] == record[key] for key in ("tokens", "depths")) and "note" not in told
    changes = sum(a != b for a, b in zip(record["depths"], record["depths"][1:], strict=False))
    assert changes <= text.count("¹") + text.count("²") <= changes + 6  # and those of the prompt
    monkeypatch.setattr(sys, "stdin", io.StringIO("A cat\n\nA dog\n"))
    code, several, told = run(*options, "--interactive")
    assert code == 0 and several.startswith(f"A cat{record['text']}\nA dog") and told.count("20 tokens") == 2


def test_experts_are_shown_where_they_change(run, tmp_path):
    made(tmp_path / "run", EXPERTS, steps=(3,))
    options = ("--workdir", tmp_path / "run", "--tokens", 20, "--seed", 5, "--prompt", "A cat", "--show_experts")
    code, out, _ = run(*options, "--json")
    record = json.loads(out)
    assert code == 0 and len(record["experts"]) == 20
    assert all(len(one) == 2 and set(one) <= {0, 1, 2} for one in record["experts"])
    code, shown, _ = run(*options)
    legend, _, text = shown.partition("\n\n")
    assert code == 0 and legend.endswith("begins: ₀, ₁, ₂")
    last = [one[-1] for one in record["experts"]]
    marks = sum(text.count(mark) for mark in "₀₁₂")
    changes = sum(a != b for a, b in itertools.pairwise(last))
    assert changes <= marks <= changes + 6  # and those of the prompt
    assert text.translate(dict.fromkeys(map(ord, "₀₁₂"))) == f"A cat{record['text']}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which run?"),
        (["--workdir", "{hnet}", "--interactive", "--prompt", "a"], "leave out --prompt"),
        (["--workdir", "{hnet}", "--show_depth"], "whose tokens choose it"),
        (["--workdir", "nowhere"], "no such folder"),
        (["--workdir", "{empty}"], "holds no run"),
        (["--workdir", "{hnet}", "--step", "5"], "there are 3, 7"),
        (["--workdir", "{hnet}", "--promt", "x"], "prompt"),
        (["--workdir", "{hnet}", "Once upon"], "--prompt 'Once upon'"),
        (["--workdir", "{hnet}", "--tokens", "0"], "tokens"),
        (["--workdir", "{hnet}", "--temperature", "-1"], "temperature"),
        (["--workdir", "{hnet}", "--temperature", "nan"], "--temperature: 'nan' is not a number"),
        (["--workdir", "{hnet}", "--top_p", "0"], "--top_p: 0: must be above 0"),
        (["--workdir", "{hnet}", "--min_p", "1.1"], "--min_p: 1.1: must be at least 0 and at most 1"),
        (["--workdir", "{hnet}", "--top_k", "-1"], "--top_k: -1: must be at least 0"),
        (["--workdir", "{hnet}", "--repetition_penalty", "0"], "--repetition_penalty: 0: must be at least 0.0001"),
        (["--workdir", "{hnet}", "--temperature", "1e-30"], "0 takes the likeliest token"),
        (["--workdir", "{hnet}", "--temperature", "1e30"], "must be at least 0 and at most 10000"),
        (["--workdir", "{hnet}", "--seed", "1e99"], "--seed: '1e99' is not a whole number"),
        (["--workdir", "{hnet}", "--tokens", "9999999999"], "--tokens: 9999999999: must be"),
        (["--workdir", "{hnet}", "--stop", ""], "--stop is empty"),
        (["--workdir", "{hnet}", "--json", "--show_chunks"], "leave out --show_chunks"),
        (["--workdir", "ftp://bucket/run"], "--workdir: ftp://bucket/run is an address"),
        (["--workdir", "{hnet}", "--prompt_file", "s3://a/b"], "--prompt_file: s3://a/b is an address"),
        (["--workdir", "{hnet}", "--prompt_file", "missing"], "missing"),
        (["--workdir", "{hnet}", "--prompt_file", "{bytes}"], "not UTF-8 text: byte 1"),
        (["--workdir", "{plain}", "--show_chunks"], "show_chunks is for H-Nets"),
        (["--workdir", "{plain}", "--cache", "active_only"], "nothing to leave out; it can be cycle, last, per_pass"),
        (["--workdir", "{hnet}", "--cache", "last"], "has no recursion, so each layer keeps one cache"),
        (["--workdir", "{plain}", "--cache", "cycle(0)"], "number=0: must be at least 1"),
        (["--workdir", "{plain}", "--rows", "2"], "rows is for H-Nets"),
        (["--workdir", "{plain}", "--show_experts"], "show_experts is for models with experts"),
        (["--workdir", "{new}"], "no checkpoint yet"),
        (["--workdir", "{plain}", "--prompt", ""], "prompt is empty"),
        (["--workdir", "{stuck}"], "cannot generate"),
    ],
)
def test_what_cannot_work_is_refused(run, hnet, places, arguments, says):
    code, out, err = run(*(text.format(hnet=hnet, **places) for text in arguments))
    assert code == 2 and says in err and err.startswith("error: ") and not out


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    for name in ("empty", "new"):
        (folder / name).mkdir()
    (folder / "new" / "recipe.json").write_text(Recipe(name="new").to_json())
    (folder / "bytes").write_bytes(b"a\xff")
    made(folder / "plain", PLAIN, steps=(1,))
    made(folder / "stuck", STUCK, steps=(1,))
    return {path.name: str(path) for path in folder.iterdir()}


def test_an_interrupt_leaves_what_there_is(run, hnet, monkeypatch):
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if len(self.getvalue()) > 40:
                monkeypatch.undo()
                raise KeyboardInterrupt
            return super().write(text)

    stream = Interrupted()
    monkeypatch.setattr(sys, "stdout", stream)
    code, _, told = run("--workdir", hnet, "--prompt", "x" * 39, "--tokens", 200, "--temperature", 0.9)
    assert code == command.INTERRUPTED and "interrupted: " in told
    assert stream.getvalue().startswith("x" * 39)


def test_a_mark_is_put_before_the_character_it_falls_into():
    tokenizer = load_tokenizer("hnet-bytes")
    writer = Writer(tokenizer, marks=True)
    tokens = np.array([254, *"aüb€".encode()])
    stages = np.zeros((2, len(tokens)), bool)
    stages[0, [0, 1, 3, 5]] = True  # the begin token, a, the second byte of ü, the first of €
    stages[1, [0, 6]] = True
    stages[0, 6] = True
    shown = [writer.push(tokens[i : i + 1], stages[:, i : i + 1]) for i in range(len(tokens))]
    assert shown == ["", "|a", "", "|ü", "b", "", "", "\u2016€"]
    assert writer.tally() == (7, (4, 1))
    coloured = Writer(tokenizer, marks=True, colour=True)
    assert coloured.push(tokens, stages).count("\x1b[0m") == 3
