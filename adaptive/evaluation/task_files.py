"""Tasks out of files: JSON lines of several shapes, and the bundle of CORE."""

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adaptive.errors import DataError
from adaptive.paths import local_path

Kind = Literal["multiple_choice", "schema", "language_modeling"]  # as CORE calls them
KINDS: tuple[Kind, ...] = ("multiple_choice", "schema", "language_modeling")


class Item(NamedTuple):
    """contexts, continuations: one of either is common to all options, or there is one of both; gold: the option that
    is right."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Items of one kind.

    multiple_choice    one context, several continuations, the right one to be found
    schema             several contexts, one continuation that fits the right one
    language_modeling  a context and its continuation, to be written greedily

    delimiter  stands between context and continuation
    shots      examples before each item
    baseline   share that is right by chance
    core       whether it is one of a bundle's
    """

    name: str
    kind: Kind
    items: tuple[Item, ...]
    delimiter: str = " "
    shots: int = 0
    baseline: float = 0.0
    core: bool = False


def read_tasks(given: Sequence[str], shots: int | None = None, option: str = "--tasks") -> list[Task]:
    """The tasks of files and folders.

    given   of each: a file of JSON lines, whose shape says its kind; a folder of such files; the folder or the
            core.yaml of a CORE bundle, which says kinds, shots and baselines
    shots   in place of what bundles say, and of none
    option  how the user gave them; messages begin with it

    Raises DataError for what cannot be read, with file and line.
    """
    tasks = [task for text in given for task in _read(local_path(text, option), option)]
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise DataError(f"two tasks are called {twice[0]}: rename one of the files")
    if shots is not None:
        tasks = [dataclasses.replace(task, shots=shots) for task in tasks]
    for task in tasks:
        if task.shots >= len(task.items):
            raise DataError(f"{task.name}: {task.shots} examples before each item need more than its {len(task.items)}")
    return tasks


def _read(path: Path, option: str) -> list[Task]:
    if path.suffix in (".yaml", ".yml"):
        return list(_bundle(path))
    if path.is_dir():
        if (path / "core.yaml").is_file():
            return list(_bundle(path / "core.yaml"))
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{option} {path}: the folder has neither .jsonl files nor a core.yaml")
        return [_from_file(file) for file in files]
    if not path.exists():
        raise DataError(f"{option} {path}: there is no such file or folder")
    return [_from_file(path)]


# JSON lines


class _Shape(NamedTuple):
    """Rows with these keys, and what they are: the first shape whose keys a row has."""

    keys: tuple[str, ...]
    kind: Kind
    item: Callable[[dict[str, Any]], Item]


def _cloze(row: dict[str, Any]) -> Item:
    """LAMBADA's: the last word is to be written."""
    context, blank, word = row["text"].rpartition(" ")
    return Item((context,), (word,) if blank else ("",), 0)


_SHAPES = (
    _Shape(("context_options", "continuation", "gold"), "schema",
           lambda r: Item(tuple(r["context_options"]), (r["continuation"],), r["gold"])),
    _Shape(("query", "choices", "gold"), "multiple_choice",
           lambda r: Item((r["query"],), tuple(r["choices"]), r["gold"])),
    _Shape(("question", "choices", "gold"), "multiple_choice",
           lambda r: Item((f"Question: {r['question']}\nAnswer:",), tuple(r["choices"]), r["gold"])),
    _Shape(("question_stem", "choices", "gold"), "multiple_choice",
           lambda r: Item((r["question_stem"],), tuple(r["choices"]), r["gold"])),
    _Shape(("goal", "sol1", "sol2", "label"), "multiple_choice",
           lambda r: Item((f"Question: {r['goal']}\nAnswer:",), (r["sol1"], r["sol2"]), r["label"])),
    _Shape(("context", "continuation"), "language_modeling",
           lambda r: Item((r["context"],), (r["continuation"],), 0)),
    _Shape(("text",), "language_modeling", _cloze),
)  # fmt: skip
_LISTS, _NUMBERS = ("choices", "context_options"), ("gold", "label")


def _from_file(file: Path, kind: Kind | None = None) -> Task:
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{file} holds no items")
    shape = _shape_of(rows[0][1], rows[0][0], kind)
    items = tuple(_item(row, where, shape) for where, row in rows)
    options = [max(len(item.contexts), len(item.continuations)) for item in items]
    chance = 0.0 if shape.kind == "language_modeling" else sum(1 / n for n in options) / len(options)
    return Task(file.name.split(".")[0], shape.kind, items, baseline=chance)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def _shape_of(row: dict[str, Any], where: str, kind: Kind | None) -> _Shape:
    shapes = [shape for shape in _SHAPES if kind in (None, shape.kind)]
    found = next((shape for shape in shapes if set(shape.keys) <= row.keys()), None)
    if found is None:
        known = "; ".join(", ".join(shape.keys) for shape in shapes)
        raise DataError(f"{where}: no task has the keys {', '.join(map(str, row)) or 'none'}; known are {known}")
    return found


def _item(row: dict[str, Any], where: str, shape: _Shape) -> Item:
    for key in shape.keys:
        if key not in row:
            raise DataError(f"{where}: '{key}' is missing, which the first item of the file has")
        value = row[key]
        if key in _NUMBERS:
            good, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        elif key in _LISTS:
            good = isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value)
            expected = "a list of at least two texts"
        else:
            good, expected = isinstance(value, str), "text"
        if not good:
            raise DataError(f"{where}: '{key}' is {str(value)[:40]!r}, expected {expected}")
    item = shape.item(row)
    options = max(len(item.contexts), len(item.continuations))
    if not 0 <= item.gold < options:
        raise DataError(f"{where}: the right option is number {item.gold}, there are {options}, numbered from 0")
    if "" in item.continuations:
        what = "a text of at least two words, the last to be written" if shape.keys == ("text",) else "text to score"
        raise DataError(f"{where}: nothing to score: expected {what}")
    return item


# The bundle of CORE


def _bundle(config: Path) -> Iterator[Task]:
    """core.yaml, eval_meta_data.csv and eval_data/ as DCLM and nanochat have them."""
    baselines = _baselines(config.parent / "eval_meta_data.csv")
    for number, entry in enumerate(_entries(config), 1):
        where = f"{config}, task {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected a mapping, found {type(entry).__name__}")
        missing = [key for key in ("label", "dataset_uri", "num_fewshot", "icl_task_type") if key not in entry]
        if missing:
            raise DataError(f"{where}: {', '.join(missing)} missing")
        label, kind, shots = str(entry["label"]), entry["icl_task_type"], entry["num_fewshot"]
        if kind not in KINDS:
            raise DataError(f"{where}, {label}: icl_task_type {kind!r}: expected {', '.join(KINDS)}")
        if not isinstance(shots, list) or not shots or not isinstance(shots[0], int) or shots[0] < 0:
            raise DataError(f"{where}, {label}: num_fewshot {shots!r}: expected a list of whole numbers")
        if label not in baselines:
            raise DataError(f"{where}: {label} has no line in {config.parent / 'eval_meta_data.csv'}")
        read = _from_file(config.parent / "eval_data" / str(entry["dataset_uri"]), kind)
        delimiter = str(entry.get("continuation_delimiter", " "))
        yield Task(label, kind, read.items, delimiter, shots[0], baselines[label], core=True)


def _entries(config: Path) -> list[Any]:
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{config}: malformed YAML: {' '.join(str(error).split())}") from None
    tasks = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise DataError(f"{config}: expected a list icl_tasks")
    return tasks


def _baselines(file: Path) -> dict[str, float]:
    """Share right by chance of each task; the file has per cent."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    found = {}
    for number, row in enumerate(rows, 2):
        try:
            found[str(row["Eval Task"])] = 0.01 * float(row["Random baseline"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file}:{number}: expected columns 'Eval Task' and 'Random baseline', a number") from None
        if not 0 <= found[str(row["Eval Task"])] < 1:
            raise DataError(f"{file}:{number}: a random baseline is 0 to below 100 per cent")
    return found
