import numpy as np
import pytest

from adaptive.data.__main__ import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CACHE", str(tmp_path / "cache"))


def test_prepare_then_show(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello\n<|endoftext|>\nworld\n<|endoftext|>\n")
    out = str(tmp_path / "out")
    assert main(["prepare", "--source", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", out]) == 0
    assert f"data.source=tokens data.paths={out} data.tokenizer=bytes" in capsys.readouterr().out
    assert main(["show", "--source", out, "--tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert "documents    2" in shown and "104 101 108 108 111" in shown and "'hello'" in shown


def test_prepare_takes_several_sources(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["prepare", "--source", *sources, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 0
    assert "documents    2" in capsys.readouterr().out


def test_show_text_and_foreign_tokens(tmp_path, capsys):
    np.array([104, 105], np.uint16).tofile(tmp_path / "a.bin")
    assert main(["show", "--source", "embedded:dna", str(tmp_path / "a.bin")]) == 0
    shown = capsys.readouterr().out
    assert "AGCTTTTC" in shown and "'hi'" in shown


def test_what_is_left_out_is_told(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"id": 1}\n', encoding="utf-8")
    (tmp_path / "b.csv").touch()
    out = str(tmp_path / "out, of")
    assert main(["prepare", "--source", str(tmp_path), "--tokenizer", "hnet-bytes", "--bos", "none", "--out", out]) == 0
    told = capsys.readouterr().out
    assert "1 file (1 .jsonl); passed over: 1 .csv" in told
    assert "left out     1 empty, 1 without the key" in told and "begins with no token" in told
    assert f"""'data.paths="{out}"' data.tokenizer=hnet-bytes data.bos=none""" in told
    assert main(["show", "--source", out, "--tokenizer", "hnet-bytes"]) == 2
    assert "begin token none, end token 255" in capsys.readouterr().err


def test_names_and_keys_do_not_steer_the_terminal(tmp_path, capsys):
    file = tmp_path / "\x1b[2Ja.jsonl"
    file.write_text('{"\\u001b[2J": 1}\n', encoding="utf-8")
    assert main(["show", "--source", str(tmp_path)]) == 2
    assert "have no 'text', only \u241b[2J" in (told := capsys.readouterr().err) and "\x1b" not in told
    file.write_text("{\n", encoding="utf-8")
    assert main(["show", "--source", str(tmp_path)]) == 2
    assert "\u241b[2Ja.jsonl:1: malformed JSON" in (told := capsys.readouterr().err) and "\x1b" not in told


def test_text_does_not_steer_the_terminal(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\x1b[2J\x1b]0;title\x07 text", encoding="utf-8")
    assert main(["show", "--source", str(tmp_path / "a.txt")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--source", "missing.txt"], "missing.txt: no such file"),
        (["show", "--source", "embedded:klingon"], "english, python, chinese, dna"),
        (["show", "--source", "embedded:dna", "--tokenizer", "missing.json"], "bytes, hnet-bytes, bpe-4096"),
        (["train-bpe", "--source", "embedded:dna", "--vocab_size", "10", "--out", "x"], "need 258"),
        (["train-bpe", "--source", "embedded:dna", "--vocab_size", "9" * 25, "--out", "x"], "at most 4,194,304"),
        (["prepare", "--source", "embedded:dna", "--tokenizer", "bytes", "--out", "."], "is not empty"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["show"],
        ["show", "--source", "x", "--tokens", "0"],
        ["train-bpe", "--source", "x", "--vocab_size", "0", "--out", "y"],
        ["train-bpe", "--source", "x", "--vocab_size", "9", "--validation_every", "-1", "--out", "y"],
    ],
)
def test_usage_mistakes_end_with_code_2(capsys, arguments):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
