"""What the documents name exists: settings, recipes, commands, files."""

import importlib.util
import re
from pathlib import Path

import pytest

from adaptive import recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
GROUPS = {path.partition(".")[0] for path in recipe.setting_kinds()}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_settings_exist(page):
    named = re.findall(rf"(?<![\w./])((?:{'|'.join(sorted(GROUPS))})(?:\.[a-z]\w*)+)(?![\w./(*])", page.read_text())
    files = {".py", ".jsonl", ".json", ".txt", ".md"}
    unknown = {name for name in named if name not in recipe.setting_kinds() and Path(name).suffix not in files}
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
