"""A page in Markdown with pictures beside it."""

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from adaptive.data.files import write_text_atomically
from adaptive.errors import CheckpointError

WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Page:
    """name: of the file and of the folder of its pictures; text: Markdown, in which PICTURE/x.svg stands for a picture;
    pictures: SVG by the name of its file; verdict: lines for the terminal."""

    name: str
    text: str
    pictures: Mapping[str, str]
    verdict: Sequence[str]

    def write(self, folder: Path) -> Path:
        """Writes page and pictures; the page's path. Raises CheckpointError where the disk refuses."""
        path = folder / f"{self.name}.md"
        try:
            for name, svg in self.pictures.items():
                write_text_atomically(folder / self.name / name, svg)
            write_text_atomically(path, self.text.replace("PICTURE/", f"{self.name}/"))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
        return path


def wrapped(text: str) -> str:
    """Paragraphs in lines of at most 120 characters; runs of blanks and line breaks are one blank."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(_filled(" ".join(one.split())) for one in paragraphs)


def listed(items: Sequence[str]) -> str:
    """A list with a dash before each."""
    return "\n".join(_filled(" ".join(f"- {one}".split()), "  ") for one in items)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head."""
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "| " + " | ".join(["---"] * len(rows[0])) + " |", *rest])
