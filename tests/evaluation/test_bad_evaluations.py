"""What cannot be evaluated is said before anything is computed."""

import re
import shutil
import sys

import pytest
from evaluation import small_runs

from adaptive import evaluate
from adaptive.data.prepare import prepare
from adaptive.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    small_runs.made(folder / "plain", small_runs.PLAIN)
    small_runs.made(folder / "mor", small_runs.MOR)
    shutil.copytree(folder / "plain", folder / "cut")
    (folder / "cut" / "checkpoints" / "3" / "about" / "metadata").unlink()
    (folder / "empty.txt").write_text("")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "keys.jsonl").write_text('{"body": "a"}\n')
    (folder / "one.txt").write_text("")
    prepare([folder / "plain" / "texts" / "own.txt"], load_tokenizer("hnet-bytes"), folder / "tokens")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"which checkpoint\?"),
        (["--checkpoint", "gone"], "--checkpoint gone: there is no such folder"),
        (["--checkpoint", "tokens"], "--checkpoint tokens holds no run: recipe.json"),
        (["--checkpoint", "plain", "--step", "7"], "no checkpoint of step 7; there are 3"),
        (["--checkpoint", "plain/checkpoints/3", "--step", "7"], "of step 3, and --step says 7"),
        (["--checkpoint", "plain", "--ema"], "keeps no running average"),
        (["--checkpoint", "cut"], "3 cannot be read"),
        (["--checkpoint", "plain", "--data", "wiki"], "no such file or folder, and no set of that name: validation"),
        (["--checkpoint", "plain", "--data", "empty.txt"], "empty.txt is empty"),
        (["--checkpoint", "plain", "--data", "bad.jsonl"], "bad.jsonl:2: malformed JSON"),
        (["--checkpoint", "plain", "--data", "keys.jsonl"], "have no 'text', only body"),
        (["--checkpoint", "plain", "--data", "tokens"], "hnet-bytes"),
        (["--checkpoint", "plain", "--data", "own=tokens", "own=bad.jsonl"], "hnet-bytes"),
        (["--checkpoint", "plain", "--data", "validation", "plain/texts/own.txt"], "two sets are called own"),
        (["--checkpoint", "plain", "--stride", "33"], "stride 33: rows have data.seq_len=32"),
        (["--checkpoint", "plain", "--depths", "1,2"], "made has no recursion"),
        (["--checkpoint", "mor", "--depths", "1,4"], "--depths 4: .* above the 3"),
        (["--checkpoint", "mor", "--depths", "0"], "--depths 0: passes=0"),
        (["--checkpoint", "mor", "--depths", "deep"], "'deep' is not whole numbers"),
        (["--checkpoint", "plain", "--caches", "last"], "made has no recursion, so each layer keeps one cache"),
        (["--checkpoint", "mor", "--caches", "lats"], "--caches=lats: .* nearest: last"),
        (["--checkpoint", "plain", "--name", "a/b"], "--name a/b: letters, digits"),
    ],
)
def test_a_mistake_is_told(runs, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("ADAPTIVE_CACHE", str(runs / "cache"))
    assert evaluate.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (runs / "plain" / "evaluations").exists()


def test_a_missing_harness_is_told_before_anything_is_loaded(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "adaptive.evaluation.lm_eval", raising=False)
    assert evaluate.main(["--checkpoint", "plain", "--harness", "piqa"]) == 2
    assert "pip install 'adaptive-lm[lm_eval]'" in capsys.readouterr().err
