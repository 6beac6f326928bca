"""A control: text whose characters are shuffled within each document, and what no model of it can fall below.

Nothing is left to learn but how frequent characters are. A model that does better than that reads its targets, by a
router that sees the whole row or by a mistake.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from adaptive.data.corpus import embedded_corpus
from adaptive.data.files import explained, write_text_atomically
from adaptive.data.sources import MARKER, read_documents


def write_shuffled(path: Path, corpus: str = "english") -> None:
    """The documents of an embedded corpus, in their order, with the characters of each shuffled; the same every time.
    Raises DataError where the disk refuses."""
    rng = random.Random(0)
    parts = []
    for text in _documents(corpus):
        characters = list(text)
        rng.shuffle(characters)
        parts.append(f"{''.join(characters)}\n{MARKER.decode()}\n")
    with explained("writing shuffled text", "Choose a --workdir that can be written."):
        write_text_atomically(path, "".join(parts))


def least_loss(every: int, corpus: str = "english") -> float:
    """Nats per byte of the held-out documents (every `every`-th) below which no model comes but by chance: of all
    orders of a document's characters each is as likely."""
    texts = list(_documents(corpus))[every - 1 :: every]
    nats = sum(math.lgamma(len(text) + 1) - sum(math.lgamma(n + 1) for n in Counter(text).values()) for text in texts)
    return nats / sum(len(text.encode()) for text in texts)


def _documents(corpus: str) -> Iterator[str]:
    for document in read_documents([embedded_corpus(corpus)]):
        assert isinstance(document, str)
        yield document
