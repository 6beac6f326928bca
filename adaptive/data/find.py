"""Which files a path means: itself, what a glob matches, or those below a folder."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from adaptive.data import compressed, fetch
from adaptive.errors import DataError

TEXTS = (".txt", ".md")
ROWS = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
SUFFIXES = (*(kind + packing for kind in (*TEXTS, *ROWS) for packing in ("", *compressed.SUFFIXES)), *PARQUET)


class Found(NamedTuple):
    """The files that a path means.

    files        sorted by name, each once
    passed_over  what else a folder holds, by suffix, and how many
    """

    files: list[Path]
    passed_over: Mapping[str, int]

    def about(self) -> str:
        """How many files of which kind, and what was passed over; empty for a single file."""
        if len(self.files) == 1 and not self.passed_over:
            return ""
        count = f"{len(self.files):,} file{'s' * (len(self.files) != 1)}"
        over = f"; passed over: {_listed(self.passed_over)}" if self.passed_over else ""
        return f"{count} ({_listed(Counter(map(_suffix, self.files)))}){over}"


def find(path: str, suffixes: tuple[str, ...] = SUFFIXES, cache: str = "") -> Found:
    """The files `path` means: itself, what a glob matches, or every file below a folder with one of `suffixes`.

    Suffixes count in any case of letters. Below a folder, whatever is hidden (its name begins with a dot) is left out,
    links are followed, and a file that is reached twice is read once. What is in a bucket is copied into the folder
    `cache` first. Raises DataError when there is no file, for a
    named one that is of another kind or empty, and where the disk refuses.
    """
    here = fetch.here(path, "data.paths", cache)
    try:
        if here.is_dir():
            found, other = _sorted_out(_below(here), suffixes)
            missing = f"the folder holds no {_kinds(suffixes)} file" + (f", but {_listed(other)}" if other else "")
        elif glob.has_magic(str(here)) and not here.exists():
            found, other = _sorted_out(_matches(str(here), suffixes), suffixes)
            missing = "no file matches"
        else:
            found, other = _sorted_out(_checked([here], suffixes) if here.is_file() else [], suffixes)
            missing = f"no such file or folder (looked in {Path.cwd()})"
        if len(found) == 1 and found[0].stat().st_size == 0:
            raise DataError(f"data.paths: {found[0]} is empty")
    except OSError as error:
        raise DataError(f"data.paths: {path}: {error.strerror or error}") from None
    if not found:
        raise DataError(f"data.paths: {path}: {missing}")
    return Found(found, other)


def is_of(file: Path, kinds: tuple[str, ...]) -> bool:
    """Whether the file is of one of the kinds, such as .jsonl, compressed or not."""
    name = file.name.lower()
    packing = next((suffix for suffix in compressed.SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(packing).endswith(kinds)


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """What is below a folder and not hidden, besides folders: but one that may not be read is given itself."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except PermissionError:
        yield folder
        return
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry, (*above, real))
        else:
            yield entry


def _matches(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    matches = (Path(match) for match in glob.glob(pattern, recursive=True))
    return _checked([match for match in matches if match.is_file()], suffixes)


def _checked(files: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files, which the user named; DataError for one of another kind."""
    for file in files:
        if not file.name.lower().endswith(suffixes):
            raise DataError(f"data.paths: {file}: unknown kind of file; known are {_kinds(suffixes)}")
    return files


def _sorted_out(entries: Iterable[Path], suffixes: tuple[str, ...]) -> tuple[list[Path], Counter[str]]:
    """The files of a known kind, each once and sorted by name, and a count of everything else."""
    files: dict[str, Path] = {}
    other: Counter[str] = Counter()
    for entry in sorted(entries):
        if entry.is_dir():
            other["folders that may not be read"] += 1
        elif not entry.is_file():
            other["broken links" if entry.is_symlink() else "no files"] += 1
        elif not entry.name.lower().endswith(suffixes):
            other[_suffix(entry)] += 1
        elif (real := os.path.realpath(entry)) in files:
            other["links to files that are read"] += 1
        else:
            files[real] = entry
    return list(files.values()), other


def _suffix(file: Path) -> str:
    """.jsonl of a.jsonl, .jsonl.gz of a.jsonl.gz."""
    own = file.suffix.lower()
    return (Path(file.stem).suffix.lower() + own if own in compressed.SUFFIXES else own) or "without a suffix"


def _kinds(suffixes: tuple[str, ...]) -> str:
    plain = [suffix for suffix in suffixes if not suffix.endswith(compressed.SUFFIXES)]
    packed = f" (the text ones also {', '.join(compressed.SUFFIXES)})" if len(plain) < len(suffixes) else ""
    return f"{', '.join(plain)}{packed}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items(), key=lambda one: -one[1]))
