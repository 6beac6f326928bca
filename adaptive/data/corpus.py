"""The corpora shipped with the package, so that a fresh machine trains on real text."""

import hashlib
import lzma
from importlib import resources
from pathlib import Path

from adaptive.data.files import ELSEWHERE, cache_dir, explained, write_atomically
from adaptive.errors import DataError

CORPORA = ("english", "python", "chinese", "dna")


def embedded_file(name: str) -> Path:
    """Path of a file of `adaptive/data/corpus/`."""
    return Path(str(resources.files("adaptive.data").joinpath("corpus", name)))


def embedded_corpus(name: str, cache: str = "") -> Path:
    """Path of the UTF-8 text of an embedded corpus, decompressed into the cache folder at first use.

    Documents are closed by a line `<|endoftext|>`. Raises DataError for an unknown name or an unwritable cache.
    """
    if name not in CORPORA:
        raise DataError(f"data.paths: no embedded corpus is called '{name}'; there are {', '.join(CORPORA)}")
    packed = embedded_file(f"{name}.txt.xz").read_bytes()
    version = hashlib.sha256(packed).hexdigest()[:12]
    target = cache_dir(cache) / "corpus" / f"{name}-{version}.txt"
    if not target.exists():
        with explained(f"unpacking the '{name}' corpus", ELSEWHERE):
            write_atomically(target, lzma.decompress(packed))
    return target
