"""The workdir of a run: one recipe, one process (or one job) at a time, and where each file is."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive.data.files import write_text_atomically
from adaptive.errors import CheckpointError, RecipeError
from adaptive.optim.schedule import make_schedule
from adaptive.paths import bucket_scheme, local_path
from adaptive.recipe import Recipe, difference, identity_difference
from adaptive.runs.checkpoint import steps_in
from adaptive.runs.mirror import CHECKPOINTS, LOCK_FILE, RECIPE_FILE, Mirror
from adaptive.settings import parse_json

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"

BEAT_S = 5.0  # how often a running process renews its claim
SILENCE_S = 20.0  # a claim from another host that is not renewed for so long has lost its process

Say = Callable[[str], None]


class RunFolder:
    """The workdir of a run. `RunFolder(path)` only names its files; `RunFolder.open` claims it for this process."""

    def __init__(
        self,
        path: str | Path,
        *,
        about: "_About | None" = None,
        lock: "_Lock | Mirror | None" = None,
        mirror: Mirror | None = None,
    ):
        self.path = Path(path)
        self._about = about
        self._lock = lock
        self._mirror = mirror

    @classmethod
    def at(cls, text: str, option: str) -> "RunFolder":
        """The folder of a run that a user named, by its path or its address in a bucket, whose files are then copied
        here. Raises UserError for what is neither, CheckpointError where the bucket cannot be read."""
        if not bucket_scheme(text):
            return cls(local_path(text, option))
        mirror = Mirror(text, option, reading=True)
        mirror.pull()
        return cls(mirror.local, mirror=mirror)

    @property
    def place(self) -> Any:
        """What all processes of a job share: the folder, or an `etils.epath.Path` of the one in a bucket."""
        return self._mirror.remote if self._mirror else self.path

    def __str__(self) -> str:
        """As the user names it."""
        return str(self.place)

    @property
    def run_id(self) -> str:
        """Stays the same over all resumptions; "" where the folder was not opened."""
        return self._about.run_id if self._about else ""

    @property
    def saved(self) -> int:
        """The newest step whose checkpoint is known to have been complete; 0: none."""
        return self._about.saved if self._about else 0

    @property
    def finished(self) -> int:
        """The last step of the run for which all was done, its report included; 0: none."""
        return self._about.finished if self._about else 0

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE_FILE

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Any:
        """Its path; of a run in a bucket an `etils.epath.Path`."""
        return self._mirror.checkpoints if self._mirror else self.path / CHECKPOINTS

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @classmethod
    def open(cls, workdir: str | Path, recipe: Recipe, *, primary: bool = True, say: Say = print) -> "RunFolder":
        """Makes the folder, or comes back to it, and claims it until `close`.

        recipe   what is to be trained; written to recipe.json
        primary  False on processes other than 0, which look at nothing and write nothing
        say      prints a line: settings that changed since the last start, a claim that was taken over

        Raises CheckpointError where the folder cannot be made or written, holds something else, holds a run of another
        recipe (with the differences), or is in use.
        """
        mirror = Mirror(str(workdir)) if bucket_scheme(str(workdir)) else None
        path = mirror.local if mirror else Path(workdir).expanduser()
        if not primary:
            return cls(path, mirror=mirror)
        shown = str(workdir) if mirror else str(path)
        with contextlib.ExitStack() as undo:
            if mirror:
                mirror.claim(say)  # before the files here are made anew
                undo.callback(mirror.abandon)
                mirror.pull()
            saved = _look(path)
            if saved is not None:
                steps = steps_in(mirror.checkpoints if mirror else path / CHECKPOINTS)
                _refuse_another(shown, path / RECIPE_FILE, saved, recipe, steps)
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = mirror or _Lock(path / LOCK_FILE)
                if isinstance(lock, _Lock):
                    lock.take(say)
                    undo.callback(lock.release)
                about = _about(path)
                if saved != recipe:
                    write_text_atomically(path / RECIPE_FILE, recipe.to_json())
                if mirror:
                    mirror.push()
            except OSError as error:
                raise _unwritable(shown, error) from None
            undo.pop_all()
        changes = difference(saved, recipe) if saved is not None else []
        if changes:
            say(f"{shown}: settings changed since the last start: {'; '.join(changes)}")
        return cls(path, about=about, lock=lock, mirror=mirror)

    def note(self, *, saved: int | None = None, finished: int | None = None) -> None:
        """Keeps them with the run. Does nothing where the folder was not opened. Raises OSError."""
        if self._about is None:
            return
        about = _About(
            self.run_id, self.saved if saved is None else saved, self.finished if finished is None else finished
        )
        if about != self._about:
            self._about = about
            write_text_atomically(self.path / RUN_FILE, json.dumps(about._asdict()) + "\n")
            self.push()

    def push(self) -> None:
        """Copies what has changed to where the run is kept, which is elsewhere for one in a bucket. Raises OSError."""
        if self._mirror is not None:
            self._mirror.push()

    def close(self) -> None:
        """Gives the claim back. May be called twice."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            lock.release()
        except OSError as error:
            print(f"warning: {error}; what is newer is in {self.path}", file=sys.stderr, flush=True)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unwritable(path: Path | str, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write to {path}: {error.strerror or error}; choose another --workdir")


def _look(path: Path) -> Recipe | None:
    """The recipe of the run in the folder; None where the folder is missing or empty."""
    try:
        names = (entry.name for entry in path.iterdir())
        there = sorted(name for name in names if name != LOCK_FILE and not name.startswith("."))
        if not there:
            return None
        if RECIPE_FILE not in there:
            shown = ", ".join(there[:4]) + (", ..." if len(there) > 4 else "")
            raise CheckpointError(
                f"{path} is not the folder of a run: it has no {RECIPE_FILE}, but {shown}. Nothing was changed; "
                "choose an empty or a new --workdir"
            )
        return Recipe.from_json((path / RECIPE_FILE).read_text(encoding="utf-8"), where=str(path / RECIPE_FILE))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise CheckpointError(f"--workdir {path}: it, or a folder above it, is a file; choose another") from None
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {path}: {what}; choose another --workdir") from None
    except RecipeError as error:
        raise CheckpointError(f"{error}; to train {path}'s recipe anew, choose another --workdir") from None


def _refuse_another(path: str, file: Path, saved: Recipe, recipe: Recipe, steps: list[int]) -> None:
    lines = identity_difference(saved, recipe)
    taken = max(steps, default=0)
    if [line.partition(":")[0] for line in lines] == ["train.steps"]:
        if (other := _other_rate(saved, recipe, taken)) is None:
            return  # of the steps that were taken nothing changes
        lines.append(
            f"  with so many steps, step {other} of the {taken} taken would have had another learning rate; "
            "they stay the same where the warm-up is as long in both and then schedule.kind=constant, or a trapezoid "
            "has not begun to decay"
        )
    if saved.name != recipe.name and lines:
        lines = [f"recipe: {saved.name} -> {recipe.name}", *lines]
    if lines:
        shown = [f"  {line}" for line in lines[:20]] + ([f"  (and {len(lines) - 20} more)"] if len(lines) > 20 else [])
        raise CheckpointError(
            "\n".join(
                [
                    f"{path} holds a run of another recipe; saved there -> asked for:",
                    *shown,
                    f"To train what was asked for, choose another --workdir; --init_from {path} begins it with the "
                    f"weights of that run. To continue that run: --recipe {file} --workdir {path}",
                ]
            )
        )


def _other_rate(saved: Recipe, recipe: Recipe, taken: int) -> int | None:
    """The first of the steps taken, from 1, that would have had another learning rate under the new recipe, or would
    not have been taken; None where there is none."""
    if recipe.train.steps < taken:
        return recipe.train.steps + 1
    before, now = (
        make_schedule(each.schedule, each.optimizer.learning_rate, each.train.steps)(np.arange(taken))
        for each in (saved, recipe)
    )
    differ = np.flatnonzero(before != now)
    return int(differ[0]) + 1 if differ.size else None


class _About(NamedTuple):
    """What run.json holds; see RunFolder."""

    run_id: str
    saved: int = 0
    finished: int = 0


def _about(path: Path) -> _About:
    file = path / RUN_FILE
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        known = parse_json(file.read_text(encoding="utf-8"))
        return _About(str(known["run_id"]), int(known.get("saved", 0)), int(known.get("finished", 0)))
    about = _About(secrets.token_hex(4))
    write_text_atomically(file, json.dumps(about._asdict()) + "\n")
    return about


class _Lock:
    """A claim on a workdir: a file that names its owner and is renewed while the owner lives.

    On one host the operating system knows whether the owner lives (flock), and frees the file when it is killed. Not
    all network file systems pass that on, so a claim from another host counts as long as it is renewed.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="workdir", daemon=True)
        self._beats = 0

    def take(self, say: Say) -> None:
        """Raises CheckpointError where another process has the folder."""
        owner = self._read()
        held = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError:  # a file system without locks
            pass
        if not held and owner and owner.get("host") != socket.gethostname():
            say(f"{self._path.parent} was last used by {_who(owner)}; watching {SILENCE_S:.0f} s whether it still is")
            held = self._renewed(owner)
        if held:
            os.close(self._file)
            raise CheckpointError(
                f"{self._path.parent} is in use by {_who(owner)}, which trains there: stop it first (it saves when "
                "it gets SIGTERM), or choose another --workdir"
            )
        if owner:
            say(f"{self._path.parent}: {_who(owner)} ended without closing this run; taking over")
        self._write()
        self._renewer.start()

    def release(self) -> None:
        self._stop.set()
        self._renewer.join(BEAT_S)
        if not self._renewer.is_alive():  # else it hangs in a write, and the end of the process frees the file
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)

    def _renewed(self, owner: dict[str, Any]) -> bool:
        due = time.monotonic() + SILENCE_S
        while time.monotonic() < due:
            time.sleep(min(1.0, SILENCE_S / 10))
            if self._path.exists() and _parse(self._path.read_bytes()) not in (owner, {}):
                return True
        return False

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end a run here
                self._write()

    def _write(self) -> None:
        self._beats += 1
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "beats": self._beats})
        os.pwrite(self._file, f"{text:<200}\n".encode(), 0)  # of constant length: no reader sees a shorter file

    def _read(self) -> dict[str, Any]:
        return _parse(os.pread(self._file, 1000, 0))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
