"""What a tokenizer.json and its configuration say: which tokens begin and end documents, and what is refused."""

import functools
import json
import random

import pytest

from adaptive.data.config import DataConfig
from adaptive.data.corpus import embedded_file
from adaptive.data.files import digest
from adaptive.data.pipeline import open_data
from adaptive.data.prepare import cached_store
from adaptive.data.store import open_store, write_store
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError
from adaptive.inference.sampling import prompt_tokens

tokenizers = pytest.importorskip("tokenizers")

PIECES = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "a", "b", "c"]
IDS = {piece: i for i, piece in enumerate(PIECES)}


def special(*names: str) -> list[dict]:
    return [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]


def template(before=(), after=()) -> dict:
    single = [*special(*before), {"Sequence": {"id": "A", "type_id": 0}}, *special(*after)]
    known = {name: {"id": name, "ids": [IDS[name]], "tokens": [name]} for name in (*before, *after)}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": known}


def tree(**changes) -> dict:
    added = [
        {"id": IDS[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for name in PIECES[:5]
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": dict(IDS), "unk_token": "<unk>"},
    } | changes  # fmt: skip


ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True,
           "add_prefix_space": False}  # fmt: skip
BERT = {"type": "BertProcessing", "sep": ["[SEP]", 4], "cls": ["[CLS]", 3]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


@pytest.fixture
def load(tmp_path):
    """A tokenizer of files with these contents."""

    def loaded(config=None, bos="", eos="", **changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree(**changes)), encoding="utf-8")
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_tokenizer(str(tmp_path), bos=bos, eos=eos)

    return loaded


@pytest.mark.parametrize(
    ("processor", "before", "after"),
    [
        (None, None, 2),
        (template(["<s>"]), 1, 2),
        (template(["<s>"], ["</s>"]), 1, 2),
        (template(["[CLS]"], ["[SEP]"]), 3, 4),
        (template([], ["[SEP]"]), None, 4),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template(["<s>"])]}, 1, 2),
        (ROBERTA, 1, 2),
        (BERT, 3, 4),
        (BYTE_LEVEL, None, 2),
    ],
)
def test_what_the_post_processor_puts_around_a_text(load, tmp_path, processor, before, after):
    tokenizer = load(post_processor=processor)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (before, after)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a b").ids
    (document,) = tokenizer.encode_documents(["a b"])
    assert document.tolist() == (whole if whole[-1] == after else [*whole, after])
    if before is not None:
        assert prompt_tokens(tokenizer, "").tolist() == [before]
        assert prompt_tokens(tokenizer, "a").tolist() == [before, 5]
        assert tokenizer.decode(document) == tokenizer.decode(document[1:-1])


@pytest.mark.parametrize(
    ("config", "processor", "before", "after"),
    [
        ({"bos_token": "<s>", "add_bos_token": True}, None, 1, 2),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True, "eos_token": {"content": "[SEP]"}}, None, 1, 4),
        ({"bos_token": "<s>"}, None, None, 2),
        ({"bos_token": "<s>", "add_bos_token": False}, template(["<s>"]), None, 2),
        ({"bos_token": None, "add_bos_token": True, "eos_token": 7}, template(["[CLS]"]), 3, 2),
        ({"bos_token": "<gone>", "add_bos_token": True, "eos_token": "<gone>"}, None, None, 2),
    ],
)
def test_what_the_configuration_says(load, config, processor, before, after):
    tokenizer = load(config, post_processor=processor)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (before, after)


def test_settings_count_more_than_files(load):
    config = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "</s>"}
    named = load(config, bos="[CLS]", eos="b", post_processor=template(["<s>"]))
    assert (named.bos_id, named.eos_id) == (3, 6)
    assert load(config, bos=None, post_processor=template(["<s>"])).bos_id is None
    with pytest.raises(DataError, match=r"^data\.bos=<S>: .* has no such token; it has <unk>, <s>, </s>"):
        load(bos="<S>")
    with pytest.raises(DataError, match=r"^data\.eos=x: .* has no such token"):
        load(eos="x")


def test_settings_of_byte_tokenizers():
    assert load_tokenizer("hnet-bytes", bos=None).encode_documents(["a"])[0].tolist() == [97, 255]
    assert load_tokenizer("bytes", bos=None).encode_documents(["a"])[0].tolist() == [97, 256]
    with pytest.raises(DataError, match=r"data\.eos=x: the tokenizer bytes has no tokens with names"):
        load_tokenizer("bytes", eos="x")


def test_without_a_known_end_the_setting_is_named(load):
    odd = {"type": "WordLevel", "vocab": {"<unk>": 0, "stop": 1}, "unk_token": "<unk>"}
    with pytest.raises(DataError, match=r"no end-of-text token that is known; say which it is with data\.eos=TOKEN"):
        load(model=odd, added_tokens=[])
    assert load(model=odd, added_tokens=[], eos="stop").eos_id == 1


def test_several_tokens_before_a_text_need_a_choice(load):
    several = template(["[CLS]", "<s>"])
    with pytest.raises(
        DataError, match=r"begins a text with 2 tokens, \[CLS\] <s>.*data\.bos=TOKEN, or data\.bos=none"
    ):
        load(post_processor=several)
    assert load(post_processor=several, bos="<s>").bos_id == 1


def test_other_ends_are_another_tokenizer(load, tmp_path):
    """Stores and caches follow what documents begin and end with, wherever that is said."""
    made = [
        load(),
        load(eos="b"),
        load(bos="<s>"),
        load(post_processor=template(["<s>"])),
        load(post_processor=template(["<s>"]), bos=None),
        load({"eos_token": "[SEP]"}),
        load({"eos_token": "[SEP]", "bos_token": "<s>", "add_bos_token": True}),
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert load({}).fingerprint == made[0].fingerprint
    text = tmp_path / "a.txt"
    text.write_text("a b", encoding="utf-8")
    stores = [cached_store([text], tokenizer, cache=str(tmp_path / "cache")) for tokenizer in made]
    assert [store.read(0, len(store)).tolist() for store in stores] == [
        tokenizer.encode_documents(["a b"])[0].tolist() for tokenizer in made
    ]
    write_store(tmp_path / "s", ["a"], made[0], sources=[{"path": "here"}], options={})
    with pytest.raises(DataError, match=r"begin token none, end token 2.*the recipe has .*begin token 1, end token 2"):
        open_store(tmp_path / "s", made[2])


def test_a_store_made_before_is_still_of_its_tokenizer():
    """Where the content alone tells the end, and nothing begins a document, its hash is the tokenizer's."""
    import hashlib

    content = embedded_file("bpe-4096.json").read_bytes()
    assert load_tokenizer("bpe-4096").fingerprint == hashlib.sha256(content).hexdigest() != digest(content.hex())


def test_the_user_is_told(load, tmp_path):
    load(post_processor=template(["<s>"]))
    (tmp_path / "a.txt").write_text("a b c " * 20, encoding="utf-8")
    files = {"source": "files", "paths": (str(tmp_path / "a.txt"),), "cache_dir": str(tmp_path / "cache"), "seq_len": 4}

    def lines(**changes):
        config = DataConfig(**({"tokenizer": str(tmp_path)} | files | changes))
        return "\n".join(open_data(config, batch_size=2, vocab_size=config.seq_len * 80).describe())

    expected = "each document and each prompt begins with <s> (token 1), and each document ends with </s> (token 2)"
    assert expected in lines()
    assert "begins with no token, and each document ends with [SEP] (token 4)" in lines(bos=None, eos="[SEP]")
    assert "ends with" not in lines(source="synthetic", paths=("uniform",), tokenizer="bytes", cache_dir="")


def broken(change) -> str:
    whole = tree()
    change(whole)
    return json.dumps(whole)


def vocab(**pieces):
    return broken(lambda whole: whole["model"].update(vocab=IDS | pieces))


BROKEN = {
    "empty": ("", "is not a tokenizer.json"),
    "cut short": (json.dumps(tree())[:-40], "is not a tokenizer.json"),
    "a list": ("[]", "is not a tokenizer.json"),
    "deep": ("[" * 100_000, "is not a tokenizer.json"),
    "no UTF-8": ("\udcff{}", "is not a tokenizer.json"),
    "no model": (broken(lambda whole: whole.pop("model")), "is not a tokenizer.json"),
    "no vocabulary": (broken(lambda whole: whole["model"].pop("vocab")), "is not a tokenizer.json"),
    "unknown model": (broken(lambda whole: whole["model"].update(type="Telepathy")), "is not a tokenizer.json"),
    "vocabulary of another type": (broken(lambda whole: whole["model"].update(vocab=7)), "is not a tokenizer.json"),
    "no tokens": (broken(lambda whole: whole.update(added_tokens=[], model={"type": "BPE", "vocab": {}, "merges": []})),
                  "has no tokens"),
    "negative id": (vocab(x=-1), "is not a tokenizer.json"),
    "fraction of an id": (vocab(x=1.5), "is not a tokenizer.json"),
    "huge id": (vocab(x=10**9), "gives 'x' the id 1,000,000,000"),
    "id beyond 32 bits": (vocab(x=2**40), "is not a tokenizer.json"),
    "id twice": (vocab(x=5), "gives the id 5 to both"),
    "huge added id": (broken(lambda whole: whole["added_tokens"][1].update(id=10**9, content="<x>")),
                      "gives '<x>' the id 1,000,000,000 among its added tokens"),
    "added id of another token": (broken(lambda whole: whole["added_tokens"][1].update(id=2)), "'<s>' the id 2"),
    "template of an unknown id": (
        broken(lambda whole: whole.update(post_processor={
            "type": "BertProcessing", "sep": ["[SEP]", 4], "cls": ["[CLS]", 999]})),
        "puts the token 999 around texts",
    ),
    "merge of unknown pieces": (
        broken(lambda whole: whole.update(model={"type": "BPE", "vocab": IDS, "merges": [["x", "y"]]})),
        "is not a tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_files(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"^data\.tokenizer: .*tokenizer\.json ") as caught:
        load_tokenizer(str(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[" * 100_000, "is not JSON"), (b"[1]", "holds a list")],
)
def test_malformed_configurations(load, tmp_path, content, message):
    load()
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"tokenizer_config\.json .*{message}|tokenizer_config\.json {message}"):
        load_tokenizer(str(tmp_path))


def test_text_that_has_no_tokens_is_an_error(load):
    tokenizer = load(model={"type": "WordLevel", "vocab": IDS, "unk_token": "<none>"})
    with pytest.raises(DataError, match="cannot encode some of the text"):
        tokenizer.encode("z")


def test_a_tokenizer_that_cannot_be_opened(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(DataError, match=r"no file .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def places(value, at=()):
    """Paths of everything in a tree of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def test_no_file_ends_in_a_traceback(tmp_path):
    """Parts of good files missing, or of another type or size: a tokenizer that works, or an error naming the file."""
    rng, odd = random.Random(0), [None, True, 0, -1, 2**31, 2**64, 1.5, "", "x", [], {}, [1], {"a": 1}]
    worked = 0
    for number in range(200):
        processor = (None, template(["<s>"], ["</s>"]), BERT, {"type": "Sequence", "processors": [ROBERTA]})[number % 4]
        whole = tree(post_processor=processor, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
        *above, last = rng.choice(list(places(whole)))
        inner = functools.reduce(lambda node, key: node[key], above, whole)
        if rng.random() < 0.4:
            del inner[last]
        else:
            inner[last] = rng.choice(odd)
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
        config = {key: rng.choice(odd) for key in ("bos_token", "eos_token", "add_bos_token") if rng.random() < 0.5}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            tokenizer = load_tokenizer(str(tmp_path))
            (document,) = tokenizer.encode_documents(["a b <s> z"])
        except DataError as error:
            assert str(tmp_path) in str(error)
        else:
            worked += len(tokenizer.decode(document)) >= 0 and tokenizer.text_size(document) >= 0
    assert 20 < worked < 180
