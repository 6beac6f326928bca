"""python -m adaptive.data: prepare token stores, train tokenizers, look at what a source holds.

    python -m adaptive.data prepare   --source corpus/ --tokenizer bpe-4096 --out tokens/
    python -m adaptive.data train-bpe --source corpus/ --vocab_size 4096 --out tokenizer.json
    python -m adaptive.data show      --source tokens/ --tokenizer bpe-4096

A source is `embedded` (the English, Python and Chinese corpora), `embedded:NAME`, or a file, folder or glob of .txt,
.jsonl[.gz|.xz|.zst] or .parquet.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from adaptive import command
from adaptive.data.bpe import train_bpe
from adaptive.data.config import DataConfig
from adaptive.data.files import explained, write_atomically
from adaptive.data.foreign import open_tokens
from adaptive.data.prepare import cached_store, prepare, source_files
from adaptive.data.sources import Document, read_documents
from adaptive.data.store import TokenStore, open_store
from adaptive.data.tokenizers import BUILT_IN, Tokenizer, load_tokenizer

_EMBEDDED = ("english", "python", "chinese")
_TOKEN_SUFFIXES = (".bin", ".npy")
_DEFAULTS = DataConfig()


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    return command.exit_code(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    options.run(options)
    return 0


def _prepare(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    files = [file for corpus in _corpora(options) for file in corpus]
    prepare(files, tokenizer, Path(options.out), text_key=options.text_key)
    _print_store(open_store(Path(options.out), tokenizer), tokenizer, options.tokens)
    print(f"train on it with: data.source=tokens data.paths={options.out} data.tokenizer={options.tokenizer}")


def _train_bpe(options: argparse.Namespace) -> None:
    documents = _training(_corpora(options), options.text_key, options.validation_every)
    content = train_bpe(documents, options.vocab_size)
    with explained(f"writing {options.out}", "Choose another --out."):
        write_atomically(Path(options.out), content.encode())
    print(f"{options.out}: {options.vocab_size} tokens; use it with data.tokenizer={options.out}")


def _show(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    for source in options.source:
        if _holds_tokens(source):
            stores = [open_tokens(source, tokenizer, options.token_dtype)]
        else:
            stores = [cached_store(files, tokenizer, text_key=options.text_key) for files in _corpora_of(source)]
        for store in stores:
            _print_store(store, tokenizer, options.tokens)


def _print_store(store: TokenStore, tokenizer: Tokenizer, shown: int) -> None:
    opening = store.read(0, min(shown, len(store)))
    print(f"{store.name}")
    print(f"  documents    {len(store.documents) - 1:,}")
    print(f"  tokens       {len(store):,} ({tokenizer.name}, largest id {store.max_id})")
    print(f"  first ids    {' '.join(str(token) for token in opening)}")
    print(f"  first text   {tokenizer.decode(opening)!r}")


def _corpora(options: argparse.Namespace) -> list[list[Path]]:
    return [files for source in options.source for files in _corpora_of(source)]


def _corpora_of(source: str) -> list[list[Path]]:
    """The files of each corpus that `source` means."""
    kind, _, name = source.partition(":")
    if kind == "embedded":
        return [source_files("embedded", corpus) for corpus in ([name] if name else _EMBEDDED)]
    return [source_files("files", source)]


def _training(corpora: list[list[Path]], text_key: str, every: int) -> Iterator[Document]:
    """The documents of each corpus that a run trains on: a tokenizer must not have seen held-out text either."""
    for files in corpora:
        for i, document in enumerate(read_documents(files, text_key)):
            if not every or i % every != every - 1:
                yield document


def _holds_tokens(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        return (path / "index.json").exists() or any(file.suffix in _TOKEN_SUFFIXES for file in path.iterdir())
    return path.suffix in _TOKEN_SUFFIXES


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adaptive.data", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="{prepare,train-bpe,show}")
    names = ", ".join(BUILT_IN)

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--source", nargs="+", required=True, help="embedded, embedded:NAME, files, folders or globs")
        sub.add_argument("--text_key", default=_DEFAULTS.text_key, help="field of jsonl and parquet rows")
        sub.set_defaults(run=run)
        return sub

    sub = add("prepare", _prepare, "Tokenise documents into a token store.")
    sub.add_argument("--tokenizer", required=True, help=f"{names}, or a path of a tokenizer.json")
    sub.add_argument("--out", required=True, help="a new folder")
    sub.set_defaults(tokens=20)

    sub = add("train-bpe", _train_bpe, "Train a byte-level BPE tokenizer on the documents runs would train on.")
    sub.add_argument("--vocab_size", type=_positive, required=True)
    sub.add_argument("--out", required=True, help="the tokenizer.json to write")
    sub.add_argument(
        "--validation_every",
        type=_natural,
        default=_DEFAULTS.validation_every,
        help="leave out document i of each file when i %% every == every - 1; 0: use all",
    )

    sub = add("show", _show, "Print sizes and the first tokens of text or token files.")
    sub.add_argument("--tokenizer", default=_DEFAULTS.tokenizer, help=f"{names}, or a path of a tokenizer.json")
    sub.add_argument("--token_dtype", default=_DEFAULTS.token_dtype, choices=("uint8", "uint16", "uint32"))
    sub.add_argument("--tokens", type=_positive, default=20, help="how many tokens to print")
    return parser


if __name__ == "__main__":
    sys.exit(command.start(main))
