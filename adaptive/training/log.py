"""metrics.jsonl of a run: one row a line, as adaptive/training/metrics.py describes them."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive.data.files import write_text_atomically
from adaptive.errors import UserError
from adaptive.runs.folder import METRICS_FILE
from adaptive.settings import parse_json

Row = dict[str, Any]


class WorkdirLostError(OSError):
    """The folder of a run is no longer where the run began."""


class MetricsLog:
    """The rows of a run, kept in WORKDIR/metrics.jsonl: the truth that reports and plots read.

    kept  the rows that were there at opening: where a resumed run goes on counting

    Every row is handed to the system when `write` returns, so it outlives a killed process. `MetricsLog(None)`, for
    processes other than 0, accepts rows and keeps none.
    """

    def __init__(self, path: Path | None, kept: Sequence[Row] = ()):
        self.kept = list(kept)
        self._path = path
        self._file: Any = None if path is None else _opened(path)
        self._folder = None if path is None else _identity(path.parent)

    @classmethod
    def open(cls, workdir: str | Path, resume_step: int) -> "MetricsLog":
        """Opens the log for a run that goes on after `resume_step` (0: a fresh one).

        Rows past that step are dropped, because those steps will be taken again, and so is a line that a killed process
        left unfinished. Raises UserError where the folder cannot be written, or holds a row that is none.
        """
        path = Path(workdir) / METRICS_FILE
        kept = [row for row in read_rows(workdir) if row["step"] <= resume_step]
        try:
            write_text_atomically(path, "".join(map(_line, kept)))
            return cls(path, kept)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --workdir") from None

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row; numbers may be of numpy or of 0-d arrays.

        Raises WorkdirLostError where the folder was moved or deleted since opening, OSError where the row cannot be
        written; no row is kept after that.
        """
        if self._file is None:
            return
        try:
            self.check()
            line = _line(row).encode()
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.close()
            raise

    def check(self) -> None:
        """Raises WorkdirLostError where the folder was moved or deleted since opening. A file that was replaced (by an
        editor) is opened anew."""
        if self._file is None or self._path is None:
            return
        if _identity(self._path.parent) != self._folder:
            raise WorkdirLostError(errno.ENOENT, "it was moved or deleted while the run went on")
        if _identity(self._path) != _identity(self._file.fileno()):
            self._file.close()
            self._file = _opened(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _opened(path: Path) -> Any:
    return path.open("ab", buffering=0)  # a row that cannot be written must not come up again when the file is closed


def _identity(path: Path | int) -> tuple[int, int] | None:
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return None
    return about.st_dev, about.st_ino


def read_rows(workdir: str | Path) -> list[Row]:
    """The rows of WORKDIR/metrics.jsonl in order, without a last line that was left unfinished; none where there is no
    file. Raises UserError, with the line, for what is no row."""
    path = Path(workdir) / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    *lines, last = text.split("\n")
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    with contextlib.suppress(UserError):  # a last line without an end may be the half of one
        rows.append(_row(last, ""))
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        why = str(error).removeprefix("line 1: ").removeprefix("somewhere: ")
        raise UserError(f"{where}: {why}; mend the line or take it out") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        raise UserError(f'{where} is no row: it has no "step" that is a whole number; mend the line or take it out')
    for name, value in row.items():
        for item in _leaves(value):
            if not _fits(name, item):
                raise UserError(f"{where}: {name} has {item!r} where a number or null belongs; mend it")
    return row


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _fits(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return name.endswith("by_layer/part")
    return value is None or type(value) in (int, float)


def is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


def steps_without_row(rows: Sequence[Row], last: int) -> list[tuple[int, int]]:
    """(first, last) of the steps up to `last` that no row of training steps holds."""
    gaps, reached = [], 0
    for row in rows:
        if is_evaluation(row):
            continue
        before = row["step"] - row.get("steps", row["step"] - reached)  # the first versions did not say
        if before > reached:
            gaps.append((reached + 1, before))
        reached = max(reached, row["step"])
    return [*gaps, (reached + 1, last)] if reached < last else gaps


def shown_gaps(gaps: Sequence[tuple[int, int]]) -> str:
    """Such steps in a few words."""
    each = [str(first) if first == last else f"{first} to {last}" for first, last in gaps[:4]]
    return ", ".join(each) + (f" and {len(gaps) - 4} more" if len(gaps) > 4 else "")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
