"""What reading costs: tokens per second that arrive, beside plain loops over the same.

    stored     rows of the English corpus, in bytes, beside a Python loop that makes the same row by row, and nanoGPT's
               loop, which makes inputs and targets alone
    streamed   Python files of this installation in tokens of bpe-4096, as they are read, beside the tokenizer's library
               alone on the same files; by workers, and one process of 4 (whose job has four times what it gives)
    words      stored rows with data.boundaries=words, beside rows without

All ways of a part run in turns, so that what slows the machine slows each; the best turn counts.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive import command
from adaptive.command import number
from adaptive.data.batch import stack
from adaptive.data.config import DataConfig
from adaptive.data.order import Order
from adaptive.data.pipeline import open_data, store_of
from adaptive.data.tokenizers import JsonTokenizer, load_tokenizer
from adaptive.data.windows import Split, Windows

ROWS = 32  # of a batch
_VOCABULARY = 4096
_LONGEST = 1 << 16  # characters of a document
_GROUP = 64  # documents that the library is given at once

# Makes more tokens, and says how many.
Turn = Callable[[], int]


def source_files(part: int = 0, parts: int = 1) -> Iterator[str]:
    """The text of Python files of this installation, as documents; of every `parts`-th file alone."""
    for path in files()[part::parts]:
        if text := path.read_text(encoding="utf-8", errors="replace")[:_LONGEST]:
            yield text


@functools.cache
def files() -> list[Path]:
    """Those beside numpy: tens of millions of tokens where jax is installed, so that a measurement meets none twice."""
    return sorted(Path(np.__file__).parent.parent.rglob("*.py"), key=lambda path: (hash_of(path.name), path))


def hash_of(name: str) -> int:
    """A number by which files are mixed, the same on every machine."""
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 9973


def of_batches(config: DataConfig, shard: tuple[int, int] = (0, 1)) -> tuple[Turn, Callable[[], None]]:
    """A turn that takes a batch, and what ends it."""
    train = open_data(config, batch_size=ROWS, vocab_size=_VOCABULARY, shard=shard).train()
    return lambda: next(train).tokens.size, train.close


def row_by_row(config: DataConfig) -> Turn:
    """A Python loop over the rows of a batch: each read and made alone, then stacked."""
    store, _ = store_of(config, config.paths[0], load_tokenizer(config.tokenizer))
    split = Split(store, "train", config.validation_every)
    windows = Windows(split, config.seq_len, partial=False, cross_document=False, filler=0)
    order = Order([len(windows)], [1.0], config.shuffle_seed)
    first = itertools.count(0, ROWS)

    def turn() -> int:
        begin = next(first)
        rows = order.rows(range(begin, begin + ROWS))[1].tolist()
        return stack([windows[row] for row in rows]).tokens.size

    return turn


def nano_gpt(config: DataConfig) -> Turn:
    """Its get_batch, on a mapped file of tokens of two bytes."""
    store, _ = store_of(config, config.paths[0], load_tokenizer(config.tokenizer))
    tokens, rng, seq = store.read(0, len(store)).astype(np.uint16), np.random.default_rng(0), config.seq_len

    def turn() -> int:
        starts = rng.integers(0, len(tokens) - seq, ROWS)
        inputs = np.stack([tokens[i : i + seq].astype(np.int64) for i in starts])
        targets = np.stack([tokens[i + 1 : i + 1 + seq].astype(np.int64) for i in starts])
        return min(inputs.size, targets.size)

    return turn


def library() -> Turn:
    """The tokenizer's library on the same documents, in groups."""
    tokenizer = load_tokenizer("bpe-4096")
    assert isinstance(tokenizer, JsonTokenizer)
    encoder = tokenizer.library
    documents = itertools.chain.from_iterable(iter(source_files, None))

    def turn() -> int:
        some = encoder.encode_batch_fast(list(itertools.islice(documents, _GROUP)), add_special_tokens=False)
        return sum(len(np.array(one.ids, np.int32)) for one in some)

    return turn


@dataclasses.dataclass
class Way:
    """One way of a part, and the tokens per second of its best turn."""

    name: str
    turn: Turn
    end: Callable[[], None] = lambda: None
    best: float = 0.0

    def run(self, seconds: float) -> None:
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds / 4:  # what was made ahead while others ran
            self.turn()
        begin, tokens, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < seconds:
            tokens += self.turn()
            elapsed = time.perf_counter() - begin
        self.best = max(self.best, tokens / elapsed)


def parts(given: argparse.Namespace) -> Iterator[tuple[str, list[Way]]]:
    """Each part with its ways, the plain one first."""
    english = DataConfig()
    for seq in (256, 2048):
        config = dataclasses.replace(english, seq_len=seq)
        yield (
            f"stored, rows of {seq}",
            [
                Way("row by row", row_by_row(config)),
                Way("nanoGPT's loop", nano_gpt(config)),
                Way("ours", *of_batches(config)),
            ],
        )
    streamed = DataConfig(
        source="own", paths=(f"{__name__}:{source_files.__name__}",), tokenizer="bpe-4096", seq_len=1024,
        validation_every=0,
    )  # fmt: skip
    ways = [Way("the library alone", library()), Way("ours", *of_batches(streamed))]
    ways += [Way("one process of 4, times 4", *times(4, *of_batches(streamed, (0, 4))))]
    for count in given.workers:
        ways.append(Way(f"ours, {count} workers", *of_batches(dataclasses.replace(streamed, workers=count))))
    yield "streamed, BPE", ways
    words = dataclasses.replace(english, boundaries="words", seq_len=512)
    plain = dataclasses.replace(english, seq_len=512)
    ways = [Way("without", *of_batches(plain)), Way("ours", *of_batches(words))]
    for count in given.workers:
        ways.append(Way(f"ours, {count} workers", *of_batches(dataclasses.replace(words, workers=count))))
    yield "boundaries=words", ways


def times(factor: int, turn: Turn, end: Callable[[], None]) -> tuple[Turn, Callable[[], None]]:
    return lambda: factor * turn(), end


def main(arguments: Sequence[str]) -> int:
    """Measures and prints a table."""
    made = command.Options("bench data", __doc__ or "")
    made.add_argument("--seconds", type=number(float, least=0.1), default=2.0, help="of each turn (default 2)")
    made.add_argument("--turns", type=number(int, least=1), default=3, help="of each way (default 3)")
    made.add_argument("--workers", type=number(int, least=1), nargs="*", default=[1, 2], help="also by so many (1 2)")
    given = made.read(arguments)
    console = Console()
    table = Table("part", "way", "M tokens/s", "times the first")
    with console.status("") as status:
        for part, ways in parts(given):
            try:
                for way in itertools.chain(*itertools.repeat(ways, 1 + given.turns)):
                    status.update(f"{part}: {way.name}")
                    way.run(given.seconds if way.best else 0.1)  # the first time it starts what it needs
            finally:
                for way in ways:
                    way.end()
            for way in ways:
                shown = f"{way.best / 1e6:.2f}", f"{way.best / ways[0].best:.2f}"
                table.add_row(part if way is ways[0] else "", way.name, *shown)
    console.print(table)
    return 0
