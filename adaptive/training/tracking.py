"""Weights & Biases, when asked for or when a key is present; never needed, and nothing in a run waits for it.

All calls into the wandb package are made by one thread of their own, which is fed through a bounded queue: a slow or
absent network costs a run nothing, and no answer of the service can influence what the processes compute. What could
not be sent is still in metrics.jsonl.
"""

import importlib.util
import itertools
import netrc
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from adaptive.training.experts import scalar_columns

Mode = Literal["auto", "online", "offline", "disabled"]
Say = Callable[[str], None]

_QUEUE = 10_000  # rows that may wait while the service starts
_INIT_TIMEOUT_S = 60.0
_FINISH_TIMEOUT_S = 30.0
_GIVE_UP_S = _FINISH_TIMEOUT_S + 5.0  # should the package not keep to it


class Tracker(Protocol):
    """Where rows go besides metrics.jsonl. No method raises, waits for a network, or returns anything."""

    def log(self, row: Mapping[str, Any]) -> None:
        """The scalars of a row of metrics.jsonl, those of each layer by themselves, under its own step."""

    def finish(self) -> None:
        """Ends the run's record; gives up after a limited time."""


class NoTracker:
    """Tracking is off, or this is not process 0."""

    def log(self, row: Mapping[str, Any]) -> None:
        del row

    def finish(self) -> None:
        return


def start_tracking(
    mode: Mode,
    *,
    workdir: str | Path,
    project: str,
    name: str,
    run_id: str,
    config: Mapping[str, Any],
    start_step: int = 0,
    primary: bool = True,
    say: Say = print,
) -> Tracker:
    """Begins to track this attempt at a run and returns at once.

    mode        auto: online if a key is present (WANDB_API_KEY or .netrc) or as WANDB_MODE says, otherwise disabled
    workdir     keeps the offline files
    name        of the recipe
    run_id      of the workdir; all attempts at the run form one group
    config      the resolved recipe as nested dicts
    start_step  where this attempt begins; each attempt is a run of its own, because steps of a run must increase
    primary     False on processes other than 0
    say         where to print what could not be done, a line each

    Whatever fails is said and otherwise without consequence.
    """
    chosen = _choose(mode, say) if primary else "disabled"
    if chosen == "disabled":
        return NoTracker()
    group = f"{name}-{run_id}"
    about = {
        "project": project,
        "name": f"{group}-from-{start_step}" if start_step else group,
        "group": group,
        "job_type": "train",
        "dir": str(workdir),
        "config": {**config, "run_id": run_id, "start_step": start_step},
    }
    return WandbTracker(chosen, about, say)


def key_present() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, or in .netrc for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(c).expanduser() for c in candidates if c):
        try:
            if netrc.netrc(path).authenticators(host):
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

    def __init__(self, mode: Literal["online", "offline"], about: dict[str, Any], say: Say):
        self._mode, self._about, self._say = mode, about, say
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE)
        self._dropped = itertools.count()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in scalar_columns(row).items() if value is not None}
        self._put(lambda run: run.log(values, step=int(row["step"])))

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
        import wandb

        try:
            run = wandb.init(mode=self._mode, settings=_settings(), **self._about)
        except Exception as error:
            if self._mode == "offline":
                raise
            self._say(f"W&B: cannot be reached ({_first_line(error)}), so this run is tracked offline")
            self._mode = "offline"
            run = wandb.init(mode="offline", settings=_settings(), **self._about)
        run.define_metric("step")
        for pattern in ("*", "eval/*", "aux/*", "routing/*", "experts/*", "told/*"):
            run.define_metric(pattern, step_metric="step")
        for lowest in ("loss", "eval/loss", "eval/bits_per_byte"):
            run.define_metric(lowest, step_metric="step", summary="min")
        if self._mode == "online":
            self._say(f"W&B: {run.url}")
        else:
            folder = Path(run.dir).parent
            self._say(f"W&B: offline; look with `wandb leet run {folder}`, upload with `wandb sync {folder}`")
        return run


def _settings() -> Any:
    """Silent (the terminal is ours), and limited in time where this version of the package knows how."""
    import wandb

    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": _INIT_TIMEOUT_S,
        "finish_timeout": _FINISH_TIMEOUT_S,
    }
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
