"""What the documents name exists: settings, recipes, commands and their options, files. What they show runs."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import re
import typing
from pathlib import Path

import pytest
from documents import PAGES, ROOT, abstract, blocks, commands, module_and_arguments

from adaptive import recipe, settings, train
from adaptive.data.config import DATA_PRESETS, DataConfig
from adaptive.errors import RecipeError

FILES = {".py", ".jsonl", ".json", ".txt", ".md", ".html", ".yaml"}
# Pages that are not called as their command.
COMMANDS_OF = {"evaluation": "evaluate", "machines": "compile", "serving": "serve", "studies": "study"}
NEEDS = "# needs "  # how a block begins that needs files, a network or a trained run

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# Settings


def classes(kind) -> list[type]:
    """The dataclasses that a node of this type can be."""
    node = settings._node(kind)
    if node is None:
        return []
    return [node.member(name) for name in node.kinds()] if issubclass(node, settings.Member) else [node]


def below(kind, name: str) -> list:
    """Types of what `name` can be inside a node of this type."""
    if settings.is_nodes(kind):
        return [typing.get_args(kind)[0]] if name.isdecimal() else []
    return [fields(one)[name] for one in classes(kind) if name in fields(one)]


@functools.cache
def fields(cls: type) -> dict:
    return {field.name: settings.hints(cls)[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def everywhere() -> dict[str, list]:
    """Name -> types of the settings of this name, wherever in a recipe."""
    seen, due, found = set(), [recipe.Recipe], {}
    while due:
        cls = due.pop()
        if cls in seen:
            continue
        seen.add(cls)
        for name, kind in fields(cls).items():
            found.setdefault(name, []).append(kind)
            due += classes(typing.get_args(kind)[0] if settings.is_nodes(kind) else kind)
    return found


def kinds_at(path: str) -> list:
    """Types of what stands at a dotted path that begins anywhere in a recipe."""
    first, *rest = path.split(".")
    found = everywhere()[first]
    for name in rest:
        found = [kind for one in found for kind in below(one, name)]
    return found


def fits(kinds: list, text: str) -> bool:
    """Whether a setting of one of these types can have the value."""
    for kind in kinds:
        if kind is DataConfig and text in DATA_PRESETS:
            return True
        with contextlib.suppress(RecipeError, KeyError):
            settings.parse(kind, text, where="")
            return True
    return False


@pages
def test_settings_exist(page):
    # Parameters have dotted names too.
    text = re.sub(r"^(Parameters|Buffers): .*?(?=\n\n)", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`([a-z]\w*(?:\.\w+)+)`", text)
    named += re.findall(rf"(?<![\w./])((?:{'|'.join(fields(recipe.Recipe))})(?:\.[a-z0-9]\w*)+)(?![\w./(*])", text)
    unknown = {path for path in named if path.split(".")[0] in everywhere() and not kinds_at(path)}
    assert not {path for path in unknown if Path(path).suffix not in FILES}
    given = re.findall(
        r"(?<![\w.$-])([a-z]\w*(?:\.\w+)*)=([\w.,+-]*\w)(?![\w(.])", "\n".join(re.findall("`[^`\n]*`", text))
    )
    wrong = {f"{path}={value}" for path, value in given if path.split(".")[0] in everywhere()
             and value != value.upper() and not fits(kinds_at(path), value)}  # fmt: skip
    assert not wrong


@pages
def test_recipes_exist(page):
    text = page.read_text()
    named = set(re.findall(r"--recipe ([a-z]\w+)\b(?!/|\.)", text))
    sizes = r"tiny|\d+m|\d_\db|x?l"
    families = "mor|mod|moe|recursive|vanilla|hnet|bytes|bpe|llamabyte|mambabyte|spacebyte"
    named |= set(re.findall(rf"`((?:{families})\d?_(?:[a-z0-9]+_)*(?:{sizes})(?:_[a-z]+)*)`", text))
    compiled_alone = {path.stem for path in (ROOT / "benchmarks" / "aot").glob("*.py")}
    assert named - {"mor_360m_short"} <= {*recipe.list_recipes(), *compiled_alone}


@pages
def test_tables_list_what_exists(page):
    """Tables of settings and options have such in their first column; options are of the page's command."""
    heading = ""
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            heading = ""
            continue
        first = line.split("|")[1]
        heading = heading or first.strip()
        if heading in ("setting", "option") or heading.startswith("below"):
            unknown = [path for path in re.findall(r"`([a-z][\w.]*)`", first)
                       if path.split(".")[0] not in everywhere() or not kinds_at(path)]  # fmt: skip
            assert not unknown
            if options := re.findall(r"`(--\w+)", first):
                check_options(f"adaptive.{COMMANDS_OF.get(page.stem, page.stem)}", options)


# Commands


@pages
def test_commands_can_be_given(page):
    for words in commands(page):
        name, arguments = module_and_arguments(words)
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"no module {name}"
        if name == "adaptive.launch" and "--" in arguments:
            check_training(arguments[arguments.index("--") + 1 :])
            arguments = arguments[: arguments.index("--")]
        if name == "adaptive.train":
            check_training(arguments)
        else:
            check_options(name, arguments)


@pages
def test_commands_stand_in_blocks_that_are_executed(page):
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    assert not [line for line in lines if re.match(r"(\./scripts/|\.ci/|python -m |pip |adaptive [a-z]+ -)", line)]


def check_training(arguments: list[str]) -> None:
    """The options exist, the recipe does, and takes the settings."""
    given = train.options().read([word for word in arguments if word != "..."])
    overrides = [word for word in given.settings if not abstract(word)]
    if given.recipe and not abstract(given.recipe) and "/" not in given.recipe:
        recipe.load(given.recipe).with_(*overrides).validate()


def check_options(name: str, arguments: list[str]) -> None:
    """The options, by their names, are in the source of the command, of bench in that of what it measures."""
    if importlib.util.find_spec(name).submodule_search_locations:
        name += ".__main__"
    source = inspect.getsource(importlib.import_module(name))
    if name == "adaptive.launch.__main__":
        for each in ("local", "job", *importlib.import_module(name).TARGETS):
            source += inspect.getsource(importlib.import_module(f"adaptive.launch.{each}"))
    if name == "adaptive.bench" and arguments and arguments[0] != "train":
        assert arguments[0] in importlib.import_module(name).OPERATIONS
        source = inspect.getsource(importlib.import_module(f"adaptive.benchmarks.{arguments[0]}"))
    for word in arguments:
        if word.startswith("--"):
            option = word[2:].partition("=")[0]
            assert f'"{option}"' in source or f'"--{option}"' in source, f"{name} has no option --{option}"


@pages
def test_modules_files_and_links_exist(page):
    text = page.read_text()
    for module in set(re.findall(r"python -m (adaptive[\w.]*\w)", text)):
        assert importlib.util.find_spec(module), f"no module {module}"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / target).exists(), target
    rooms = "adaptive|docs|kernels_pallas|launch|recipes|requirements|scripts|tests"
    for target in re.findall(rf"`((?:{rooms})/[\w./-]*)`", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|[a-z_]+\.py)`", text):
        assert target == "utils.py" or any((base / target).exists() for base in rooms_of(ROOT)), target


@functools.cache
def rooms_of(root: Path) -> list[Path]:
    """Folders that a page may name a file from."""
    return [
        root,
        *(path for path in (root / "adaptive").rglob("*") if path.is_dir()),
        root / "adaptive",
        root / "recipes",
    ]


def test_messages_that_are_explained_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| (?:[a-z0-9% ]+ )?`([^`]+)`", page, re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "adaptive").rglob("*.py"))
    assert len(quoted) > 6
    for text in quoted:
        for part in re.split(r"\bN\b|\.\.\.", text):
            assert part.strip() in source, text


# Programs


@pytest.mark.compiles
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_programs_run(page):
    """The Python blocks of a page, one after another in one program; but for those that need more than this package."""
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        if not block.startswith(NEEDS):
            exec(compile(block, str(page), "exec"), names)


def test_no_line_is_too_wide():
    for page in PAGES:
        wide = [
            line for line in page.read_text().splitlines() if len(line) > 125 and not line.startswith(("|", "<!--"))
        ]
        assert not wide, f"{page.name}: {wide}"
