"""A run whose workdir is an address in a bucket: its files are kept in a folder of this machine, and copied there.

Buckets have no files that are appended to, renamed or locked. So everything but checkpoints, which Orbax writes where
they belong, lies in a folder of the cache and is copied to the bucket when it changed: at every checkpoint and
evaluation, every minute, and at the end.
"""

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adaptive.caches import cache_folder
from adaptive.errors import CheckpointError, UserError
from adaptive.paths import bucket_path, bucket_scheme, local_path

LOCK_FILE = "run.lock"
CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.json"
PUSH_S = 60.0
BEAT_S = 15.0  # how often a running process renews its claim
SILENCE_S = 50.0  # a claim that is not renewed for so long has lost its process

Say = Callable[[str], None]


class Mirror:
    """The files of a run in a bucket, and the folder of this machine where they are worked on.

    address  such as gs://bucket/runs/one
    option   how the user named it; messages begin with it
    reading  a folder for this process alone, removed at its end: the run may be trained on this machine meanwhile

    Raises UserError for what is no address, and where its package is not installed.
    """

    def __init__(self, address: str, option: str = "--workdir", *, reading: bool = False):
        self.remote = place_of(address, option)
        key = hashlib.sha256(str(self.remote).encode()).hexdigest()[:12]
        own = f"-{os.getpid()}-{secrets.token_hex(4)}" if reading else ""
        self.local = cache_folder() / "runs" / f"{self.remote.name}-{key}{own}"
        if reading:
            atexit.register(shutil.rmtree, self.local, ignore_errors=True)
        self._known: dict[str, tuple[int, int]] = {}  # size and time of change of what is in the bucket as it is here
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def checkpoints(self) -> Any:
        return self.remote / CHECKPOINTS

    def pull(self) -> None:
        """Makes the folder hold what the bucket does. Raises CheckpointError where the bucket cannot be read, or holds
        something else than a run, which is then not copied."""
        try:
            with self._lock:
                self._refuse_something_else()
                shutil.rmtree(self.local, ignore_errors=True)
                self.local.mkdir(parents=True)
                for name, path in _files(self.remote):
                    target = self.local / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
                    self._known[name] = _state(target)
        except CheckpointError:
            raise
        except Exception as error:  # of many kinds: no permission, no bucket, no network
            raise self._unreadable(error) from None

    def _refuse_something_else(self) -> None:
        names = [path.name for path in self.remote.iterdir()] if self.remote.exists() else []
        there = sorted(name for name in names if name != LOCK_FILE and not name.startswith("."))
        if there and RECIPE_FILE not in there:
            shown = ", ".join(there[:4]) + (", ..." if len(there) > 4 else "")
            raise CheckpointError(
                f"{self.remote} is not the folder of a run: it has no {RECIPE_FILE}, but {shown}. Nothing was changed; "
                "choose an empty or a new --workdir"
            )

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot read {self.remote}: {_first_line(error)}")

    def push(self) -> None:
        """Copies what has changed here into the bucket. Raises OSError where that fails."""
        with self._lock:
            for path in sorted(path for path in self.local.rglob("*") if path.is_file()):
                name = path.relative_to(self.local).as_posix()
                if path.name == LOCK_FILE or path.name.endswith(".tmp"):
                    continue
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    state = _state(path)
                    if self._known.get(name) != state:
                        self._put(self.remote / name, path.read_bytes())
                        self._known[name] = state

    def _put(self, target: Any, content: bytes) -> None:
        try:
            target.write_bytes(content)
        except Exception as error:
            raise OSError(f"{target} could not be written: {_first_line(error)}") from None

    # The claim

    def claim(self, say: Say) -> None:
        """Says in the bucket that this process trains there, until `release`; from then on changes are copied by
        themselves. Raises CheckpointError where another process does, and where nothing can be written."""
        owner = self._owner()
        if _is_gone(owner):
            say(f"{self.remote}: {_who(owner)} ended without closing this run; taking over")
        elif owner:
            say(f"{self.remote} was last used by {_who(owner)}; watching {SILENCE_S:.0f} s whether it still is")
            due = time.monotonic() + SILENCE_S
            while time.monotonic() < due:
                time.sleep(min(1.0, SILENCE_S / 10))
                if self._owner() not in (owner, {}):
                    raise CheckpointError(
                        f"{self.remote} is in use by {_who(owner)}, which trains there: stop it first (it saves when "
                        "it gets SIGTERM), or choose another --workdir"
                    )
            say(f"{self.remote}: {_who(owner)} ended without closing this run; taking over")
        try:
            self._beat(0)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.remote}: {error}; choose another --workdir") from None
        self._thread = threading.Thread(target=self._keep, name="workdir", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Copies what is left, and gives the claim back. Raises OSError where that fails."""
        self._stop_beating()
        self.push()
        self.abandon()

    def abandon(self) -> None:
        """Gives the claim back and copies nothing."""
        self._stop_beating()
        with contextlib.suppress(Exception):  # what is left there is taken over by the next
            (self.remote / LOCK_FILE).unlink(missing_ok=True)

    def _stop_beating(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _keep(self) -> None:
        beats, pushed = 0, time.monotonic()
        while not self._stop.wait(BEAT_S):
            beats += 1
            with contextlib.suppress(OSError):  # a network that is away for a moment must not end a run here
                self._beat(beats)
                if time.monotonic() - pushed > PUSH_S:
                    self.push()
                    pushed = time.monotonic()

    def _beat(self, beats: int) -> None:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "beats": beats}
        self._put(self.remote / LOCK_FILE, json.dumps(about).encode())

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads((self.remote / LOCK_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        except Exception as error:
            raise self._unreadable(error) from None
        return owner if isinstance(owner, dict) else {}


def place_of(text: str, option: str) -> Any:
    """Where a run is kept: a path of this machine, or an `etils.epath.Path` in a bucket. Raises UserError for what is
    neither, and for a bucket that takes no checkpoints."""
    scheme = bucket_scheme(text)
    if scheme == "s3":
        raise UserError(
            f"{option}: {text}: Orbax writes checkpoints to folders and to gs://, not to s3://: mount the bucket as a "
            "folder and give that (data may be read from s3://)"
        )
    return bucket_path(text, option) if scheme else local_path(text, option)


def _files(folder: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """What is below a folder of a bucket, by its path in there, checkpoints left out."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        name = f"{above}{path.name}"
        if path.is_dir():
            if name != CHECKPOINTS:
                yield from _files(path, f"{name}/")
        elif name != LOCK_FILE:
            yield name, path


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no longer there."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    if pid == os.getpid():  # one before this, in a container of the same name
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
