"""Every environment variable that the code reads or sets stands in docs/environment.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
FOLDERS = ("adaptive", "kernels_pallas", "recipes", "launch", "scripts")

NAME = r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+"
READ = r"""env(?:iron)?(?:\.\w+\(|\[)\s*["']([A-Z]\w*)["']|["']([A-Z]\w*)["'] (?:not )?in (?:os\.)?env"""
SHELL = r"\$\{?([A-Z][A-Z0-9_]+)|\b([A-Z][A-Z0-9_]+)=|name: ([A-Z][A-Z0-9_]+)$"


def in_python(text: str) -> Iterator[str]:
    """What is looked up in an environment, and in files that do so every string that looks like a variable's name."""
    if "environ" not in text:
        return
    yield from (name for names in re.findall(READ, text) for name in names if name)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(NAME, node.value):
            yield node.value


def in_shell(text: str) -> Iterator[str]:
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    yield from (name for names in re.findall(SHELL, code, re.MULTILINE) for name in names if name)


def variables() -> set[str]:
    found = set(in_python((ROOT / "tests" / "conftest.py").read_text()))
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()):
        if path.suffix == ".py":
            found |= set(in_python(path.read_text()))
        elif path.parent.name in ("launch", "scripts"):
            found |= set(in_shell(path.read_text()))
    return found - {"BASH_SOURCE"}


def test_every_variable_is_documented():
    found = variables()
    assert {"ADAPTIVE_CACHE", "ADAPTIVE_PYTHON", "NO_COLOR", "NPROC", "NETRC", "SLURM_PROCID", "XLA_FLAGS"} <= found
    missing = found - set(re.findall(r"`(\w+)`", PAGE.read_text()))
    assert not missing, f"not in docs/environment.md: {', '.join(sorted(missing))}"


def test_what_is_documented_as_ours_is_read():
    ours = set(re.findall(r"`(ADAPTIVE_\w+)`", PAGE.read_text()))
    assert ours <= variables()
