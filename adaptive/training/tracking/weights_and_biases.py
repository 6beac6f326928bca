"""Weights & Biases, when asked for or when a key is present.

All calls into the wandb package are made by one thread of their own, which is fed through a bounded queue: a slow or
absent network costs a run nothing, and no answer of the service can influence what the processes compute. What could
not be sent is still in metrics.jsonl.
"""

import html
import importlib.util
import itertools
import netrc
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from adaptive.paths import absolute
from adaptive.training.tracking.base import About, Say, distributions, scalars

Mode = Literal["auto", "online", "offline", "disabled"]

_QUEUE = 10_000  # rows that may wait while the service starts
_INIT_TIMEOUT_S = 60.0
_FINISH_TIMEOUT_S = 30.0
_GIVE_UP_S = _FINISH_TIMEOUT_S + 5.0  # should the package not keep to it


def start(mode: Mode, project: str, about: About, say: Say) -> "WandbTracker | None":
    """Begins to track this start of a run and returns at once; None where it is not tracked.

    mode   auto: online if a key is present (WANDB_API_KEY or .netrc) or as WANDB_MODE says, otherwise disabled
    about  all starts of the run are one W&B run, whose id is the run's: a resumed run goes on in its own curves. Rows
           that are repeated after the last checkpoint are shown twice, at the same steps with the same values
    say    where to print what could not be done, a line each

    Whatever fails is said and otherwise without consequence.
    """
    chosen = _choose(mode, say)
    if chosen == "disabled":
        return None
    arguments = {
        "project": project,
        "id": about.run_id,
        "resume": "allow",
        "name": about.title,
        "group": about.name,
        "job_type": "train",
        "dir": str(about.workdir),
        "config": {**about.config, "run_id": about.run_id, **about.facts},
        "tags": list(about.tags) or None,
        "notes": about.notes or None,
    }
    return WandbTracker(chosen, arguments, say, resumed=about.start > 0)


def key_present() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, or in .netrc for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in filter(None, candidates):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):  # as it is where there is no home
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _choose(mode: Mode, say: Say) -> Literal["online", "offline", "disabled"]:
    asked = _automatic() if mode == "auto" else mode
    if asked == "disabled":
        return "disabled"
    if importlib.util.find_spec("wandb") is None:
        say(f"W&B: not tracked ({asked}), the wandb package is missing: pip install 'adaptive-lm[wandb]'")
        return "disabled"
    if asked == "online" and not key_present():
        say("W&B: no key found (WANDB_API_KEY or `wandb login`), so this run is tracked offline")
        return "offline"
    return asked


def _automatic() -> Literal["online", "offline", "disabled"]:
    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as wish:
            return wish
    return "online" if key_present() else "disabled"


class WandbTracker:
    """Feeds the thread that talks to W&B."""

    def __init__(self, mode: Literal["online", "offline"], arguments: dict[str, Any], say: Say, *, resumed: bool):
        self._mode, self._arguments, self._say, self._resumed = mode, arguments, say, resumed
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE)
        self._dropped = itertools.count()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        values, shares = scalars(row), distributions(row)

        def send(run: Any) -> None:
            # Not under W&B's own step: it must increase, and a resumed run repeats steps after its last checkpoint.
            run.log(values | {name: _histogram(shares) for name, shares in shares.items()})

        self._put(send)

    def text(self, name: str, step: int, text: str) -> None:
        page = f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
        self._put(lambda run: run.log({"step": step, name: _wandb().Html(page)}))

    def report(self, path: Path, step: int) -> None:
        def send(run: Any) -> None:
            artifact = _wandb().Artifact(f"report-{run.id}", type="report", metadata={"step": step})
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._put(send)

    def checkpoint(self, path: Path, step: int) -> None:
        def send(run: Any) -> None:
            artifact = _wandb().Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": step})
            artifact.add_reference(absolute(path).as_uri(), checksum=False)
            run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

        self._put(send)

    def finish(self) -> None:
        if not self._thread.is_alive():
            return
        self._put(None)
        self._thread.join(_GIVE_UP_S)
        if self._thread.is_alive():
            self._say(f"W&B: gave up waiting after {_GIVE_UP_S:.0f} s; everything is in metrics.jsonl")

    def _put(self, task: Callable[[Any], None] | None) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            if next(self._dropped) == 0:
                self._say("W&B: not keeping up, some rows are left out there; all are in metrics.jsonl")

    def _work(self) -> None:
        """The thread: start, pass on what comes, end. Any failure ends tracking and nothing else."""
        try:
            run = self._start()
            while (task := self._queue.get()) is not None:
                task(run)
            run.finish()
        except Exception as error:  # the package raises many kinds; none may reach the run
            self._say(f"W&B: tracking stopped ({_first_line(error)}); everything is in metrics.jsonl")

    def _start(self) -> Any:
        wandb = _wandb()
        try:
            run = wandb.init(mode=self._mode, settings=_settings(), **self._arguments)
        except Exception as error:
            if self._mode == "offline":
                raise
            self._say(f"W&B: cannot be reached ({_first_line(error)}), so this run is tracked offline")
            self._mode = "offline"
            run = wandb.init(mode="offline", settings=_settings(), **self._arguments)
        run.define_metric("step")
        for pattern in ("*", "eval/*", "aux/*", "routing/*", "experts/*", "told/*"):
            run.define_metric(pattern, step_metric="step")
        for lowest in ("loss", "eval/loss", "eval/bits_per_byte"):
            run.define_metric(lowest, step_metric="step", summary="min")
        if self._mode == "online":
            self._say(f"W&B: {run.url}")
        else:
            folder = Path(run.dir).parent
            sync = "wandb sync --append" if self._resumed else "wandb sync"
            self._say(f"W&B: offline; look with `wandb leet run {folder}`, upload with `{sync} {folder}`")
        return run


def _settings() -> Any:
    """Silent (the terminal is ours), and limited in time where this version of the package knows how."""
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": _INIT_TIMEOUT_S,
        "finish_timeout": _FINISH_TIMEOUT_S,
    }
    settings = _wandb().Settings
    return settings(**{name: value for name, value in wanted.items() if name in settings.model_fields})


def _wandb() -> Any:
    """The package, which takes seconds to import."""
    import wandb

    return wandb


def _histogram(shares: list[float]) -> Any:
    """Bars around 0, 1, 2, ..."""
    return _wandb().Histogram(np_histogram=(shares, [i - 0.5 for i in range(len(shares) + 1)]))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
