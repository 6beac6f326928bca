"""What the documents name exists: settings, recipes, commands, files."""

import dataclasses
import importlib.util
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from adaptive import recipe, settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
GROUPS = [field.name for field in dataclasses.fields(recipe.Recipe) if field.name not in recipe.ABOUT]


def exists(kind: Any, steps: list[str]) -> bool:
    """Whether a setting of this type has something at the end of these steps, whatever its nodes are."""
    if not steps:
        return True
    if settings.is_nodes(kind):
        return steps[0].isdecimal() and exists(typing.get_args(kind)[0], steps[1:])
    for node in [kind, *typing.get_args(kind)]:
        if not settings.is_dataclass_or_door(node):
            continue
        members = map(node.member, node.kinds()) if issubclass(node, settings.Member) else [node]
        for known in map(settings.hints, members):
            if steps[0] in known and exists(known[steps[0]], steps[1:]):
                return True
    return False


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_settings_exist(page):
    named = re.findall(rf"(?<![\w./])((?:{'|'.join(sorted(GROUPS))})(?:\.[a-z]\w*)+)(?![\w./(*])", page.read_text())
    files = {".py", ".jsonl", ".json", ".txt", ".md"}
    unknown = {n for n in named if not exists(recipe.Recipe, n.split(".")) and Path(n).suffix not in files}
    assert not unknown


@pages
def test_recipes_exist(page):
    text = page.read_text()
    named = set(re.findall(r"--recipe ([a-z]\w+)\b(?!/|\.)", text))
    named |= set(re.findall(r"`((?:mor|recursive|vanilla)\d?_\w+)`", text))
    assert named - {"mor_360m_short"} <= set(recipe.list_recipes())


@pages
def test_commands_and_links_exist(page):
    text = page.read_text()
    for module in set(re.findall(r"python -m ((?:adaptive|launch)[\w.]*\w)", text)):
        assert importlib.util.find_spec(module), f"no module {module}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:adaptive|docs|launch|recipes|requirements|scripts|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


def test_no_line_is_too_wide():
    for page in PAGES:
        wide = [
            line for line in page.read_text().splitlines() if len(line) > 125 and not line.startswith(("|", "<!--"))
        ]
        assert not wide, f"{page.name}: {wide}"
