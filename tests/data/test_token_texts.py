"""Text, streams and byte counts of tokenizers that are not byte-level are those of the library's own decoder."""

import random

import jax
import pytest

from adaptive.data.config import DataConfig
from adaptive.data.pipeline import open_data
from adaptive.data.tokenizers import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

TEXTS = [
    "",
    " ",
    "  ",
    "Hello World",
    " Hello  World ",
    "  two in front, two behind  ",
    "line\n\nline\r\n\ttab",
    "don't. it 's , here ! ok ?",
    "naïve café 你好 🙂👩‍👩‍👧",
    "a\u0301\u0327 e\u0308",
    "a\x00b",
    "the <tag> there",
    "x<tag>x <tag>",
    "<s></s><unk>",
    "▁ and ▁▁x",
    "<0x41> <0xE4>",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = "abcdefghijklmnopqrstuvwxyzHW.,'!?0123456789"
MARKERS = ["<unk>", "<s>", "</s>"]


def texts() -> list[str]:
    rng = random.Random(0)
    ranges = [(97, 122), (32, 32), (32, 126), (0x300, 0x320), (0x4E00, 0x4E10), (0x1F600, 0x1F610), (9, 13)]
    made = ("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 20))) for _ in range(60))
    return [*TEXTS, *made]


def vocabulary(pieces) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys([*MARKERS, *pieces]))}


def spaced() -> list[str]:
    """Pieces in SentencePiece's spelling."""
    return ["▁", "▁▁", *LETTERS, "▁H", "▁He", "lo", "▁t", "▁th", "▁the", "in", "▁W"]


MERGES = [
    ("▁", "▁"),
    ("▁", "H"),
    ("▁H", "e"),
    ("l", "o"),
    ("▁", "t"),
    ("▁t", "h"),
    ("▁th", "e"),
    ("i", "n"),
    ("▁", "W"),
]


def bpe(dropout=None):
    return models.BPE(
        vocab=vocabulary([*BYTES, *spaced()]), merges=MERGES, byte_fallback=True, unk_token="<unk>", dropout=dropout
    )


def llama():
    """As SentencePiece's models are converted: a blank put in front, and taken away again."""
    made = tokenizers.Tokenizer(bpe())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def metaspace(scheme):
    made = tokenizers.Tokenizer(bpe())
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    inner = [decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=scheme)]
    made.decoder = decoders.Sequence([decoders.Metaspace("▁", prepend_scheme=scheme), *inner[:1], decoders.Fuse()])
    return made


def unigram():
    pieces = [(piece, -float(i % 7 + 1)) for i, piece in enumerate(vocabulary([*BYTES, *spaced()]))]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="first")])
    return made


def wordpiece():
    pieces = [*LETTERS.lower(), *(f"##{letter}" for letter in LETTERS.lower()), "hello", "##llo", "n't", "'s"]
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary(pieces), unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def suffixed():
    """As GPT-1 and CLIP: a mark at the end of each word, for a blank that the last word has not."""
    letters = LETTERS.lower()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "he", "lo</w>", "the</w>"]
    merges = [("h", "e"), ("l", "o</w>"), ("t", "he</w>"), ("h", "e</w>")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary([*pieces, "he</w>"]), merges=merges, unk_token="<unk>", end_of_word_suffix="</w>")
    )
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return made


def words():
    """Without a decoder: the library puts a blank between all tokens."""
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary(["Hello", "World", "a", "the", "."]), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def unstripped():
    made = llama()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


MADE = {
    "llama": llama,
    "always": lambda: metaspace("always"),
    "first": lambda: metaspace("first"),
    "never": lambda: metaspace("never"),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "suffixed": suffixed,
    "words": words,
    "unstripped": unstripped,
}


@pytest.fixture(scope="module", params=MADE)
def pair(request, tmp_path_factory):
    """Our tokenizer and the library's, of one file."""
    made = MADE[request.param]()
    made.add_special_tokens(MARKERS)
    made.add_tokens([AddedToken("<tag>", lstrip=True, rstrip=True, normalized=False), "<b>"])
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    made.save(str(path))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    return load_tokenizer(str(path)), theirs


def streamed(tokenizer, ids) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(token) for token in ids) + stream.finish()


def test_texts(pair):
    ours, theirs = pair
    for text in texts():
        ids = ours.encode(text)
        if not any(marker in text for marker in MARKERS):
            assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids, text
        expected = theirs.decode(ids.tolist())
        assert ours.decode(ids) == expected, text
        assert streamed(ours, ids) == expected, text
        if "\ufffd" not in expected:  # which counts the bytes that it stands for
            assert ours.text_size(ids) == len(expected.encode()), text


def test_documents_one_after_the_other(pair):
    """A text that follows another's end begins like any text."""
    ours, theirs = pair
    for one, other in (("Hello", "World"), (" a", "the"), ("你", "好")):
        first, second = ours.encode_documents([one, other])
        expected = "".join(theirs.decode(ids.tolist()) for ids in (first, second))
        ids = [*first, *second]
        assert ours.decode(ids) == expected == streamed(ours, ids)
        assert ours.text_size(first) + ours.text_size(second) == len(expected.encode())


@pytest.mark.parametrize("crossing", [False, True])
def test_rows_count_the_bytes_of_their_text(tmp_path, crossing):
    """A text behind a begin token is counted without the blank that the convention puts before it."""
    made = llama()
    made.add_special_tokens(MARKERS)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    documents = [f"Hello {i} the World" + "!" * i for i in range(12)]
    text = "".join(f"{one}\n<|endoftext|>\n" for one in documents)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = DataConfig(
        source="files", paths=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path), seq_len=8, validation_every=2,
        cross_document=crossing, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data = open_data(config, batch_size=2, vocab_size=400)
    assert f"12 documents, {len(''.join(documents)):,} bytes of text" in "\n".join(data.describe())
    counts = data.tokenizer.byte_counts()
    rows = [(counts.of(row.targets, row.tokens) * row.mask).sum() for row in data.validation()]
    assert sum(rows) == len("".join(documents[1::2]))
    row = next(data.validation())
    traced = jax.eval_shape(lambda counts, *of: counts.of(*of), counts, row.targets, row.tokens)  # as on a device
    assert (traced.shape, traced.dtype) == (row.targets.shape, row.targets.dtype)


def test_rows_count_a_suffix_of_words_as_the_blank_that_it_is(tmp_path):
    made = suffixed()
    made.add_special_tokens(MARKERS)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    counts, texts = ours.byte_counts(), ["hello there", "he", "", "a b"]
    ids = [ours.eos_id, *(token for document in ours.encode_documents(texts) for token in document)]
    assert counts.of(ids[1:], ids[:-1]).sum() == len("".join(texts))


def test_any_ids(pair):
    """What a model may write: bytes that make no character, markers, ids beyond the vocabulary."""
    ours, theirs = pair
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(3, ours.vocab_size) for _ in range(rng.randint(1, 8))]
        assert ours.decode([*ids, ours.vocab_size + 5]) == theirs.decode(ids)


def test_a_text_has_one_tokenisation(tmp_path):
    made = tokenizers.Tokenizer(bpe(dropout=0.9))
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len({tuple(tokenizer.encode("the inlothelo")) for _ in range(20)}) == 1


def test_byte_level_vocabularies_may_hold_other_pieces(tmp_path):
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary([*pre_tokenizers.ByteLevel.alphabet(), "你▁"]), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(["é", "<tag>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    for text in texts():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.text_size(ids) == len(text.encode())
    assert tokenizer.token_bytes(tokenizer.encode("é")[0]) == "é".encode()


def test_an_end_that_is_no_special_token_is_no_text_either(tmp_path):
    library = llama()
    library.add_special_tokens(MARKERS)
    library.add_tokens(["<end>", "<b>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path), eos="<end>")
    (document,) = tokenizer.encode_documents(["a<end> <b>"])
    assert document[-1] == tokenizer.eos_id not in document[:-1]
    assert library.token_to_id("<b>") in document and tokenizer.decode(document) == "a<end> <b>"


@pytest.mark.parametrize("made", ["llama", "unigram", "words"])
def test_markers_in_a_text_stay_text(made, tmp_path):
    """Also where the model itself has the marker as a piece that text could make."""
    library = MADE[made]()
    library.add_special_tokens(MARKERS)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    (document,) = tokenizer.encode_documents(["</s> Hello <s>"])
    assert document[0] == 1 and document[-1] == 2 and not set(document[1:-1]) & {1, 2}
