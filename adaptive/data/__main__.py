"""Prepares token stores, trains tokenizers, shows what a source holds:

    adaptive data prepare   --source corpus/ --tokenizer bpe-4096 --out tokens/
    adaptive data train-bpe --source corpus/ --vocab_size 4096 --out tokenizer.json
    adaptive data show      --source tokens/ --tokenizer bpe-4096

A source is `embedded` (the English, Python and Chinese corpora), `embedded:NAME`, or a file, folder or glob of text,
JSON lines or parquet.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.data.__main__"))

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from adaptive import command
from adaptive.command import number
from adaptive.data import fetch
from adaptive.data.bpe import train_bpe
from adaptive.data.config import DataConfig
from adaptive.data.documents import Document
from adaptive.data.files import explained, write_atomically
from adaptive.data.find import Found
from adaptive.data.foreign import TOKEN_SUFFIXES, open_tokens
from adaptive.data.prepare import cached_store, prepare, source_files
from adaptive.data.sources import read_documents
from adaptive.data.store import TokenStore, open_store
from adaptive.data.tokenizers import BUILT_IN, Tokenizer, load_tokenizer
from adaptive.errors import UserError
from adaptive.paths import local_path
from adaptive.printable import printable
from adaptive.settings import show

_EMBEDDED = ("english", "python", "chinese")
_DEFAULTS = DataConfig()
_TOKENIZERS = f"{', '.join(BUILT_IN)}, or a path of a tokenizer.json"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    return command.exit_code(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in _COMMANDS:
        raise UserError(f"which of {', '.join(_COMMANDS)}? '{name}' is none of them (--help tells what they do)")
    command_of, add_options = _COMMANDS[name]
    options = command.Options(f"data {name}", command_of.__doc__ or "")
    options.add_argument("--source", nargs="+", required=True, help="embedded, embedded:NAME, files, folders or globs")
    options.add_argument("--text_key", default=_DEFAULTS.text_key, help="field of jsonl and parquet rows")
    add_options(options)
    given = options.read(rest)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    command_of(given)
    return 0


def _prepare(options: argparse.Namespace) -> None:
    """Tokenises documents into a token store."""
    tokenizer = _tokenizer(options)
    out = local_path(options.out, "--out")
    corpora = _corpora(options)
    _print_files(corpora)
    files = [file for found in corpora for file in found.files]
    prepare(files, tokenizer, out, text_key=options.text_key, prompt_key=options.prompt_key)
    _print_store(open_store(out, tokenizer), tokenizer, options.tokens)
    ends = [f"data.{name}={value}" for name, value in (("bos", options.bos), ("eos", options.eos)) if value]
    settings = [
        "data.source=tokens",
        f"data.paths={show((options.out,))}",
        f"data.tokenizer={options.tokenizer}",
        *ends,
    ]
    print(printable(f"train on it with: {shlex.join(settings)}"))


def _train_bpe(options: argparse.Namespace) -> None:
    """Trains a byte-level BPE tokenizer on the documents that runs would train on."""
    out = local_path(options.out, "--out")
    corpora = _corpora(options)
    _print_files(corpora)
    documents = _training(corpora, options.text_key, options.validation_every)
    content = train_bpe(documents, options.vocab_size)
    with explained(f"writing {options.out}", "Choose another --out."):
        write_atomically(out, content.encode())
    print(printable(f"{options.out}: {options.vocab_size} tokens; use it with data.tokenizer={options.out}"))


def _show(options: argparse.Namespace) -> None:
    """Prints sizes and the first tokens of text or token files."""
    tokenizer = _tokenizer(options)
    for source in options.source:
        if _holds_tokens(source):
            stores = [open_tokens(source, tokenizer, options.token_dtype)]
        else:
            corpora = _corpora_of(source)
            _print_files(corpora)
            stores = [cached_store(found.files, tokenizer, text_key=options.text_key) for found in corpora]
        for store in stores:
            _print_store(store, tokenizer, options.tokens)


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    return load_tokenizer(options.tokenizer, bos=None if options.bos == "none" else options.bos, eos=options.eos)


def _print_files(corpora: list[Found]) -> None:
    for found in corpora:
        if about := found.about():
            print(printable(about))


def _print_store(store: TokenStore, tokenizer: Tokenizer, shown: int) -> None:
    opening = store.read(0, min(shown, len(store)))
    print(printable(store.name))
    print(f"  documents    {len(store.documents) - 1:,}")
    if store.empty or store.keyless:
        print(f"  left out     {store.empty:,} empty, {store.keyless:,} without the key of the text")
    print(f"  tokens       {len(store):,} ({tokenizer.name}, largest id {store.max_id})")
    print(f"  delimiters   {tokenizer.describe_borders()}")
    print(f"  first ids    {' '.join(str(token) for token in opening)}")
    print(f"  first text   {tokenizer.decode(opening)!r}")


def _corpora(options: argparse.Namespace) -> list[Found]:
    return [found for source in options.source for found in _corpora_of(source)]


def _corpora_of(source: str) -> list[Found]:
    """The files of each corpus that `source` means."""
    kind, _, name = source.partition(":")
    if kind == "embedded":
        return [source_files("embedded", corpus) for corpus in ([name] if name else _EMBEDDED)]
    return [source_files("files", source)]


def _training(corpora: list[Found], text_key: str, every: int) -> Iterator[Document]:
    """The documents of each corpus that a run trains on: a tokenizer must not have seen held-out text either."""
    for found in corpora:
        for i, document in enumerate(read_documents(found.files, text_key)):
            if not every or i % every != every - 1:
                yield document


def _holds_tokens(source: str) -> bool:
    path = fetch.here(source, "--source")
    if path.is_dir():
        return (path / "index.json").exists() or any(file.suffix in TOKEN_SUFFIXES for file in path.iterdir())
    return path.suffix in TOKEN_SUFFIXES


def _tokenizer_options(options: command.Options) -> None:
    options.add_argument("--bos", default="", help="token before each document, or none (default: the tokenizer's own)")
    options.add_argument("--eos", default="", help="token after each document (default: the tokenizer's own)")


def _prepare_options(options: command.Options) -> None:
    _tokenizer_options(options)
    options.add_argument("--tokenizer", required=True, help=_TOKENIZERS)
    options.add_argument("--out", required=True, help="a new folder")
    options.add_argument("--prompt_key", default="", help="field of jsonl rows whose text comes before, not predicted")
    options.set_defaults(tokens=20)


def _train_bpe_options(options: command.Options) -> None:
    options.add_argument("--vocab_size", type=number(int, least=1), required=True)
    options.add_argument("--out", required=True, help="the tokenizer.json to write")
    held_out = "leave out document i of each file when i %% every == every - 1; 0: use all"
    default = _DEFAULTS.validation_every
    options.add_argument("--validation_every", type=number(int, least=0), default=default, help=held_out)


def _show_options(options: command.Options) -> None:
    _tokenizer_options(options)
    options.add_argument("--tokenizer", default=_DEFAULTS.tokenizer, help=_TOKENIZERS)
    options.add_argument("--token_dtype", default=_DEFAULTS.token_dtype, choices=("uint8", "uint16", "uint32"))
    options.add_argument("--tokens", type=number(int, least=1), default=20, help="how many tokens to print")


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[command.Options], None]]] = {
    "prepare": (_prepare, _prepare_options),
    "train-bpe": (_train_bpe, _train_bpe_options),
    "show": (_show, _show_options),
}
