"""Text is read and written in UTF-8, whatever the locale says: whatever opens a text file names its encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adaptive", "kernels_pallas", "launch", "recipes", "scripts")
# What has an `open` of its own that opens no text by default.
OTHERS = {"os", "gzip", "bz2", "lzma", "compressed", "webbrowser", "tarfile", "zipfile", "RunFolder", "MetricsLog"}


def text_without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text and name no encoding."""
    return sorted(_calls(ast.parse(source)))


def _calls(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(word.arg in ("encoding", None) for word in node.keywords):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            positional = node.args[1:] if owner is None else node.args
            mode = next((word.value for word in node.keywords if word.arg == "mode"), next(iter(positional), None))
            binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
            if name == "open" and getattr(owner, "id", "") not in OTHERS and not binary:
                yield node.lineno
            if name == "read_text" and not node.args:
                yield node.lineno
            if name == "write_text" and len(node.args) == 1:
                yield node.lineno


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open(path)", True), ("open(path, 'w')", True), ("path.open('a')", True), ("path.open()", True),
        ("path.read_text()", True), ("path.write_text(text)", True),
        ("open(path, 'rb')", False), ("open(path, mode='wb')", False), ("open(path, encoding='utf-8')", False),
        ("path.write_text(text, encoding='utf-8')", False), ("gzip.open(path)", False), ("path.open('rb')", False),
    ],
)  # fmt: skip
def test_what_is_looked_for(line, found):
    assert bool(text_without_encoding(line)) == found


def test_text_is_utf8_everywhere():
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in text_without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not found
