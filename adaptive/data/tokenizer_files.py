"""What the files of a tokenizer say: a `tokenizer.json` of the `tokenizers` library, and the `tokenizer_config.json`
that transformers writes beside it.

Everything is checked while it is read: whatever a file holds, a UserError names the file and what is wrong.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptive.data.files import digest
from adaptive.errors import DataError

CONFIG = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")
MOST_IDS = 1 << 22  # the largest known vocabularies have a fourth of it; a table has a row for each
_MASK_NAMES = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "[MASK]", "<mask>")
_SHOWN = 8  # tokens in a message


class TokenizerFiles(NamedTuple):
    """A tokenizer as its files define it.

    library     the `tokenizers.Tokenizer`, which neither cuts nor pads
    encoder     the same for the text of users, in which a marker is text
    vocabulary  every piece, added ones included, and its id
    special     ids of markers, which stand for no text
    decoders    names of the steps that make text of pieces
    begin, end  ids that documents begin and end with
    mask        id that stands for a hidden token; None: no token does
    sha256      (hex) of what defines the ids of a document
    """

    library: Any
    encoder: Any
    vocabulary: dict[str, int]
    special: frozenset[int]
    decoders: frozenset[str]
    begin: int | None
    end: int
    mask: int | None
    sha256: str


def read_tokenizer(path: Path, config_path: Path, bos: str | None, eos: str) -> TokenizerFiles:
    """Reads a `tokenizer.json` and, where there is one, its configuration.

    bos  the token to begin documents with; "": as the files say, None: none
    eos  the token to end them with; "": as the files say, or the best-known name among the tokens

    Raises DataError for malformed files, ids that repeat or are out of all range, and tokens that do not exist.
    """
    content = _content(path)
    library = _parsed(content, path)
    tree = json.loads(content)
    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    _check_ids(vocabulary, tree.get("added_tokens") or [], path)
    before, after = _around(_state(library.post_processor), path)
    config = _config(config_path)
    begin = _begin(bos, before, config, vocabulary, path)
    end = _end(eos, after, config, vocabulary, path)
    sha256 = hashlib.sha256(content).hexdigest()
    if (begin, end) != (None, _best_known(vocabulary)):  # not told by the content alone
        sha256 = digest([sha256, begin, end])
    added = library.get_added_tokens_decoder()
    special = frozenset(token for token, entry in added.items() if entry.special)
    hidden = _spelt_otherwise({piece for piece, token in vocabulary.items() if token in {*special, begin, end}}, tree)
    encoder = library if hidden is None else _parsed(hidden, path)
    decoders = frozenset(_kinds(_state(library.decoder)))
    mask = vocabulary.get(_named(config, "mask_token"), _first_of(_MASK_NAMES, vocabulary))
    return TokenizerFiles(library, encoder, vocabulary, special, decoders, begin, end, mask, sha256)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever the library raises inside the block into a DataError that begins with `what`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics that are no Exception
        raise DataError(f"data.tokenizer: {what}: {error}") from None


# Reading


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data.tokenizer: {path} cannot be read: {error.strerror}") from None


def _parsed(content: bytes, path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"the tokenizer {path} needs a package: pip install 'adaptive-lm[bpe]'") from None
    with explained(f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} can read"):
        library = tokenizers.Tokenizer.from_buffer(content)
    # Text of users is text: a marker such as <|endoftext|> inside it must not become a special token.
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, "dropout", None):
        library.model.dropout = None  # a way to train: a text has one tokenisation here
    return library


def _spelt_otherwise(markers: set[str], tree: dict) -> bytes | None:
    """A tokenizer.json with the same ids that finds no marker in any text; None where `tree` finds none either.

    The library looks for tokens that are added and not special, and its models take any piece that they find, but for
    BPE, which makes pieces by its merges alone.
    """
    model, added = tree["model"], tree.get("added_tokens") or []
    vocab = model["vocab"]
    pieces = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    found = markers & pieces if "merges" not in model or model.get("ignore_merges") else set()
    if not found and all(entry["special"] for entry in added if entry["content"] in markers):
        return None
    other = lambda piece: f"\ufdd0{piece}\ufdd1" if piece in found else piece  # noqa: E731
    if isinstance(vocab, dict):
        vocab = {other(piece): token for piece, token in vocab.items()}
    else:
        vocab = [(other(piece), score) for piece, score in vocab]
    unknown = {"unk_token": other(model["unk_token"])} if model.get("unk_token") else {}
    added = [entry | {"special": entry["special"] or entry["content"] in markers} for entry in added]
    return json.dumps(
        tree
        | {
            "model": model | {"vocab": vocab} | unknown,
            "added_tokens": [entry for entry in added if entry["content"] not in found],
            "post_processor": None,
        }
    ).encode()


def _check_ids(vocabulary: Mapping[str, int], added: list[dict], path: Path) -> None:
    where = f"data.tokenizer: {path}"
    if not vocabulary:
        raise DataError(f"{where} has no tokens")
    pieces: dict[int, str] = {}
    for piece, token in vocabulary.items():
        if token >= MOST_IDS:
            raise DataError(f"{where} gives {piece!r} the id {token:,}, and ids are below {MOST_IDS:,} here")
        if token in pieces:
            raise DataError(f"{where} gives the id {token} to both {pieces[token]!r} and {piece!r}")
        pieces[token] = piece
    for entry in added:
        if entry["id"] != (found := vocabulary.get(entry["content"])):
            raise DataError(
                f"{where} gives {entry['content']!r} the id {entry['id']:,} among its added tokens, but its vocabulary "
                f"leaves {found} for it: ids of added tokens follow the vocabulary without a gap"
            )


def _config(path: Path) -> dict[str, Any]:
    """The configuration; empty where there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"data.tokenizer: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.tokenizer: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"data.tokenizer: {path} holds a {type(config).__name__}, expected an object")
    return config


def _state(part: Any) -> dict | None:
    """A part of the library's tokenizer as JSON has it, in the form of today whatever the file's."""
    return None if part is None else json.loads(part.__getstate__())


def _kinds(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", [])))


# Begin and end


def _around(processor: dict | None, path: Path) -> tuple[list[int], list[int]]:
    """Ids that a post-processor puts before a text and after it."""
    if processor is None:
        return [], []
    kind = processor["type"]
    if kind == "Sequence":
        before: list[int] = []
        after: list[int] = []
        for part in processor["processors"]:  # each puts its own around what those before it made
            outer = _around(part, path)
            before, after = outer[0] + before, after + outer[1]
        return before, after
    if kind == "TemplateProcessing":
        pieces, known = processor["single"], processor["special_tokens"]
        names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in pieces]
        if unknown := {name for name in names if name is not None} - known.keys():
            raise DataError(f"data.tokenizer: {path} puts {', '.join(unknown)} around texts and defines no such token")
        ids = [[] if name is None else known[name]["ids"] for name in names]
        text = names.index(None) if None in names else len(names)
        return list(itertools.chain(*ids[:text])), list(itertools.chain(*ids[text:]))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    return [], []


def _begin(
    bos: str | None, before: list[int], config: Mapping[str, Any], vocabulary: Mapping[str, int], path: Path
) -> int | None:
    """The id that documents begin with. What the configuration says of it counts more than the template."""
    if bos is None:
        return None
    if bos:
        return _known(bos, "data.bos", vocabulary, path)
    if config.get("add_bos_token") is False:
        return None
    if len(before) > 1:
        names = " ".join(_pieces(before, vocabulary))
        raise DataError(
            f"data.tokenizer: {path} begins a text with {len(before)} tokens, {names}, and one is what a document can "
            "begin with here: choose it with data.bos=TOKEN, or data.bos=none"
        )
    if before:
        return _existing(before[0], vocabulary, path)
    return vocabulary.get(_named(config, "bos_token")) if config.get("add_bos_token") is True else None


def _end(eos: str, after: list[int], config: Mapping[str, Any], vocabulary: Mapping[str, int], path: Path) -> int:
    """The id that documents end with: the one named, the configuration's, the template's, or the best known."""
    if eos:
        return _known(eos, "data.eos", vocabulary, path)
    if (named := _named(config, "eos_token")) in vocabulary:
        return vocabulary[named]
    if len(after) == 1:
        return _existing(after[0], vocabulary, path)
    found = _best_known(vocabulary)
    if found is None:
        raise DataError(
            f"data.tokenizer: {path} has no end-of-text token that is known; say which it is with data.eos=TOKEN "
            f"(looked for {', '.join(_END_NAMES)})"
        )
    return found


def _best_known(vocabulary: Mapping[str, int]) -> int | None:
    return _first_of(_END_NAMES, vocabulary)


def _first_of(names: Sequence[str], vocabulary: Mapping[str, int]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _named(config: Mapping[str, Any], key: str) -> str:
    """The text of a token that the configuration names; empty where it names none."""
    named = config.get(key)
    named = named.get("content") if isinstance(named, dict) else named
    return named if isinstance(named, str) else ""


def _known(text: str, option: str, vocabulary: Mapping[str, int], path: Path) -> int:
    if text not in vocabulary:
        marked = [piece for piece in vocabulary if piece[:1] in "<[" and piece[-1:] in ">]" and len(piece) > 2]
        near = ", ".join(sorted(marked, key=vocabulary.__getitem__)[:_SHOWN]) or "nothing alike"
        raise DataError(f"{option}={text}: {path} has no such token; it has {near}")
    return vocabulary[text]


def _existing(token: int, vocabulary: Mapping[str, int], path: Path) -> int:
    if token not in vocabulary.values():
        raise DataError(f"data.tokenizer: {path} puts the token {token} around texts, and no token has that id")
    return token


def _pieces(ids: list[int], vocabulary: Mapping[str, int]) -> list[str]:
    names = {token: piece for piece, token in vocabulary.items()}
    return [names.get(token, str(token)) for token in ids]
