import json
import random
import sys

import numpy as np
import pytest

from adaptive.data.__main__ import main
from adaptive.data.bpe import train_bpe
from adaptive.data.corpus import embedded_file
from adaptive.data.tokenizers import BUILT_IN, load_tokenizer
from adaptive.errors import DataError

TEXTS = ["plain", "naïve café 你好 🙂", "x  2\n\n\t34", "<|endoftext|> and <|pad|>", "a\x00b", " leading and trailing "]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    ranges = [(32, 126), (0xA0, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 60)))


@pytest.fixture(scope="module", params=BUILT_IN)
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.mark.parametrize("text", [*TEXTS, *(random_text(seed) for seed in range(20))])
def test_text_survives_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_byte_lengths()[ids].sum() == len(text.encode())
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)


def test_markers_in_text_are_not_special(tokenizer):
    ids = tokenizer.encode("<|endoftext|><|pad|></s>")
    assert tokenizer.eos_id not in ids
    (document,) = tokenizer.encode_documents(["<|endoftext|>"])
    assert (document == tokenizer.eos_id).sum() == 1 and document[-1] == tokenizer.eos_id


def test_specials_have_no_bytes(tokenizer):
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert lengths[tokenizer.eos_id] == 0
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.vocab_size + 5]) == ""


def test_incomplete_character_waits_and_ends_as_replacement():
    tokenizer = load_tokenizer("bytes")
    stream = tokenizer.stream()
    assert [stream.push(byte) for byte in "你".encode()] == ["", "", "你"]
    assert stream.push(0xE4) == "" and stream.finish() == "\ufffd"


def test_byte_conventions():
    (document,) = load_tokenizer("bytes").encode_documents(["hi"])
    assert document.tolist() == [104, 105, 256]
    (document,) = load_tokenizer("hnet-bytes").encode_documents(["hi"])
    assert document.tolist() == [254, 104, 105, 255]
    assert load_tokenizer("hnet-bytes").vocab_size == 256


def test_fingerprints_differ():
    assert len({load_tokenizer(name).fingerprint for name in BUILT_IN}) == len(BUILT_IN)


def test_lone_surrogate_does_not_stop_a_run(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_loads_from_file_and_folder(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(embedded_file("bpe-4096.json").read_bytes())
    shipped = load_tokenizer("bpe-4096")
    for name in (str(file), str(tmp_path)):
        loaded = load_tokenizer(name)
        assert loaded.fingerprint == shipped.fingerprint and loaded.vocab_size == 4096


def test_end_of_text_named_by_the_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(embedded_file("bpe-4096.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    assert load_tokenizer(str(tmp_path)).eos_id == 1


def test_sentencepiece_pieces_count_their_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0, "▁a": 1, "b": 2, "<0xE4>": 3, "<0xBD>": 4, "<0xA0>": 5}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    blanks = tokenizers.decoders.Replace("▁", " ")
    bytewise, fuse = tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    model.decoder = tokenizers.decoders.Sequence([blanks, bytewise, fuse])
    model.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.token_byte_lengths().tolist() == [0, 2, 1, 1, 1, 1]
    assert loaded.decode([1, 2, 3, 4, 5]) == " ab你"


@pytest.mark.parametrize("name", ["missing.json", "./nowhere", "gpt2", "/no/such/folder"])
def test_missing_tokenizer_names_the_choices(name):
    with pytest.raises(DataError, match="bytes, hnet-bytes, bpe-4096"):
        load_tokenizer(name)


def test_malformed_tokenizers(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json is not"):
        load_tokenizer(str(file))
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(file))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(file))


def test_bytes_need_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer("bytes").decode([104, 105]) == "hi"
    with pytest.raises(DataError, match=r"adaptive-lm\[bpe\]"):
        load_tokenizer("bpe-4096")


def test_shipped_bpe_is_what_the_command_makes_of_training_documents(tmp_path):
    pytest.importorskip("tokenizers")
    out = tmp_path / "bpe.json"
    assert main(["train-bpe", "--source", "embedded", "--vocab_size", "4096", "--out", str(out)]) == 0
    made, shipped = (json.loads(path.read_text())["model"] for path in (out, embedded_file("bpe-4096.json")))
    assert made == shipped


def test_trained_bpe_splits_digits_and_fills_its_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(train_bpe(["12 12 12 the the then them these"] * 5, 262))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 262
    assert len(tokenizer.encode("12")) == 2
    with pytest.raises(DataError, match="258"):
        train_bpe(["text"], 200)
    with pytest.raises(DataError, match="gives only"):
        train_bpe(["text"], 4096)
