"""What the documents show: blocks of code, and commands."""

import re
import shlex
from pathlib import Path

from adaptive import __main__

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
INLINE = r"\./scripts/train|python -m adaptive|adaptive [a-z]|pip install|sbatch |\.venv/bin/"
FENCED = r"^```(\w*)\n(.*?)^```$"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "": of none."""
    fenced = re.findall(FENCED, page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for own, text in fenced if own == language]


def shown(page: Path) -> list[tuple[bool, str]]:
    """Commands of a page in their order, each as (whole, what is typed): those of its blocks, which are called sh, with
    the variables that a block sets, and those within its text, where some are only named."""
    found = []
    for kind, block, text in re.findall(FENCED + r"|`([^`\n]+)`", page.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "sh":
            for name, value in re.findall(r"^([A-Z]+)=(\S+)$", block, re.MULTILINE):
                block = block.replace(f"{name}={value}\n", "").replace(f"${name}", value)
            found += [(True, line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        elif re.match(INLINE, text):
            found.append((" -" in text.removeprefix("python -m") or text == "adaptive doctor", text))
    return found


def commands(page: Path) -> list[list[str]]:
    """Those of this package that a page shows or names, in words."""
    words = [shlex.split(line, comments=True) for _, line in shown(page)]
    return [each for each in words if ours(each)]


def ours(words: list[str]) -> bool:
    return (
        words[0] == "adaptive"
        or "./scripts/train" in words
        or (words[:2] == ["python", "-m"] and "adaptive" in words[2])
    )


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    if "-m" in words:
        at = words.index("-m")
        return words[at + 1], words[at + 2 :]
    if words[0] == "adaptive":
        assert words[1] in __main__.COMMANDS, words
        return f"adaptive.{words[1]}", words[2:]
    at = words.index("./scripts/train")
    return "adaptive.train", words[at + 1 :]


def abstract(word: str) -> bool:
    """Whether a word stands for another: NAME, ..."""
    return word == "..." or (word.isupper() and word.isalpha())
