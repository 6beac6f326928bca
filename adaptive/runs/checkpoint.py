"""Checkpoints: everything the next step depends on, written beside training, read back whole or not at all.

A checkpoint is a folder named by its step: the arrays of the state under plain, stable names, and one JSON object that
says what they are (`about`). The arrays have a digest there, and all of it a checksum. A checkpoint gets its name only
when complete, and older ones are removed only after that. Reading never changes a folder.
"""

import contextlib
import errno
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import adaptive
from adaptive.errors import CheckpointError
from adaptive.parallel.cluster import anywhere
from adaptive.paths import absolute, bucket_scheme
from adaptive.runs.config import CheckpointConfig
from adaptive.runs.digest import checksum, digest, named
from adaptive.runs.state import TrainState

FORMAT_VERSION = 1
MAX_FAILURES = 3  # failed saves in a row after which a run stops
SAVE_LIMIT_S = 1200  # for one save to end on all processes; one that fails keeps the others waiting for so long
_GRACE_S = 60  # after that, for the threads that wait to say so

_UNFINISHED = "*.orbax-checkpoint-tmp*"  # how Orbax names what it has not finished
COMMITTED = "commit_success.txt"  # Orbax's mark of a finished checkpoint in a bucket, where nothing can be renamed
_ORBAX = f"orbax{os.sep}checkpoint"  # in the path of its modules

Say = Callable[[str], None]


class Restored(NamedTuple):
    """What a checkpoint held.

    state       on the devices and with the shardings that were asked for
    data_state  the position in the data that belongs to the state
    recipe      the resolved recipe of the run that saved, as nested dicts
    digest      of the state's arrays (see `digest`)
    """

    state: TrainState
    step: int
    data_state: dict[str, Any]
    recipe: dict[str, Any]
    digest: str


class Checkpoints:
    """The checkpoints of one run, in one folder.

    folder       where they are; made by the first save
    config       which to keep; when to save is the caller's to decide
    recipe_json  the resolved recipe, saved with each
    say          prints a line

    All processes call the same methods in the same order.
    """

    def __init__(self, folder: Any, config: CheckpointConfig, recipe_json: Mapping[str, Any], *, say: Say = print):
        self._folder, self._config, self._recipe, self._say = absolute(folder), config, dict(recipe_json), say
        self._orbax: Any = None  # opened at first use: a fresh run starts without waiting for its import
        self._opened = 0
        self._pending: int | None = None  # the step of the save now under way
        self._damaged: list[int] = []  # newer than what was restored, and unreadable
        self._failures = 0
        self._losses: dict[int, float] = {}  # held-out, by step

    @property
    def failed(self) -> bool:
        """Whether the last save whose outcome is known failed: then newer steps are lost when the run ends."""
        return self._failures > 0

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, readable or not."""
        return steps_in(self._folder)

    def rate(self, step: int, loss: float | None) -> bool:
        """Notes the held-out loss at a step, saved or not; whether it is among those that `keep_best` keeps."""
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
        return step in self.best()

    def best(self) -> list[int]:
        """As many steps as `keep_best` says, the lowest held-out loss first; of equal ones the earlier."""
        return sorted(self._losses, key=lambda step: (self._losses[step], step))[: self._config.keep_best]

    def save(self, step: int, state: TrainState, data_state: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint and returns when the state's arrays may be changed again.

        Waits for the save before this one and says if it failed; a failed save leaves older checkpoints as they are.
        Does nothing where a checkpoint of this step exists. `data_state` is JSON.

        Raises CheckpointError at the third failure in a row, and where the save before does not end in time.
        """
        self.wait()
        self._remove_unfinished()
        self._put_damaged_aside()
        if step in self.steps():
            return
        arrays = named(state)
        about = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "data_state": dict(data_state),
            "recipe": self._recipe,
            "program": {"adaptive": adaptive.__version__, "jax": jax.__version__},
            "key_implementation": _key_implementation(),
            "arrays": {name: [a.dtype.name, list(a.shape)] for name, a in arrays.items()},
            "digest": digest(state),
        }
        about["checksum"] = checksum(about)
        failure = None
        try:
            _write(self._manager(), step, arrays, about)
        except Exception as error:  # a full disk, lost permissions, a vanished mount: whatever it is must not end a run
            failure = error
        if anywhere(failure is not None):
            self._report_failure(step, failure)
        else:
            self._pending = step

    def wait(self) -> None:
        """Waits until the save under way has ended, and says so if it failed. Raises as `save` does."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        limit = SAVE_LIMIT_S + _GRACE_S
        try:
            failure = _outcome(self._orbax.wait_until_finished, limit)
        except TimeoutError:
            self._orbax = None  # closing it would wait as well
            raise CheckpointError(
                f"the checkpoint at step {step} is still not written after {limit} s; {self._last_good()}"
            ) from None
        if anywhere(failure is not None):
            self._report_failure(step, failure)
        else:
            self._failures = 0

    def close(self) -> None:
        """Waits for the save under way and lets go of all threads. Raises as `save` does."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that reads back whole; None where there is none at all.

        abstract  the state to restore into, with ShapeDtypeStructs that carry shardings, or arrays, as leaves: the
                  checkpoint is placed by these, whatever the mesh was when it was saved

        One that is truncated or altered is passed over for the one before, with a line. Raises CheckpointError for a
        checkpoint of a newer format, or that holds other arrays than `abstract`, and where none can be read.
        """
        steps = self.steps()
        self._damaged = []
        reason = ""
        for step in reversed(steps):
            restored, failure = None, None
            try:
                restored = _read(self._manager(), self._folder, step, abstract)
            except CheckpointError:
                raise
            except Exception as error:  # damaged files show as errors of many kinds
                failure = error
            if not anywhere(failure is not None):
                if self._damaged:
                    newer = ", ".join(map(str, self._damaged))
                    self._say(f"warning: checkpoint {newer} cannot be read ({reason}); going on from step {step}")
                return restored
            self._damaged.append(step)
            shared = _shared_reason(failure)
            reason = reason or shared
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self._folder} can be read (newest, step {steps[-1]}: {reason}); "
                "to start anew, choose another --workdir"
            )
        return None

    # Parts

    def _manager(self) -> Any:
        if self._orbax is None:
            self._opened += 1
            self._orbax = _open_manager(self._folder, self._config, self.best, barriers=str(self._opened))
        return self._orbax

    def _report_failure(self, step: int, failure: Exception | None) -> None:
        self._failures += 1
        self._remove_unfinished()
        # This one has lost from its list what it was going to remove, and may have left barriers half-way.
        self._orbax = None
        problem = f"checkpoint at step {step} could not be written: {_shared_reason(failure)}; {self._last_good()}"
        if self._failures >= MAX_FAILURES:
            raise CheckpointError(f"{problem}; the run ends, as this was failure {self._failures} in a row")
        self._say(f"warning: {problem}; training goes on")

    def _remove_unfinished(self) -> None:
        """Removes what a killed or failed save left behind, also while the threads of a failed one still write."""
        if jax.process_index() == 0:
            for path in self._unfinished():
                for _ in range(20):
                    _remove(path)
                    if not path.exists():
                        break
                    time.sleep(0.1)

    def _unfinished(self) -> list[Any]:
        if not bucket_scheme(str(self._folder)):
            return [*self._folder.glob(_UNFINISHED)]
        if not self._folder.exists():
            return []
        done = self.steps()
        return [path for path in self._folder.iterdir() if path.name.isdecimal() and int(path.name) not in done]

    def _last_good(self) -> str:
        steps = [step for step in self.steps() if step not in self._damaged]
        return f"the last good one is step {steps[-1]}" if steps else "there is none before it"

    def _put_damaged_aside(self) -> None:
        """Renames what could not be read, so that its step can be saved again and it does not count as kept."""
        if not self._damaged:
            return
        if jax.process_index() == 0:
            for step in self._damaged:
                aside = self._folder / f"{step}.unreadable"
                try:
                    _remove(aside)
                    (self._folder / str(step)).rename(aside)
                except OSError as error:
                    self._say(f"warning: cannot rename {self._folder / str(step)}: {error.strerror or error}")
        self._damaged = []
        anywhere(False)  # no process looks into the folder before the renaming is done
        self._manager().reload()


def _remove(path: Any) -> None:
    """Removes a folder as far as that can be done."""
    if bucket_scheme(str(path)):
        with contextlib.suppress(Exception):
            path.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def steps_in(folder: Any) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending, readable or not."""
    if bucket_scheme(str(folder)):
        entries = [path for path in folder.iterdir() if (path / COMMITTED).exists()] if folder.exists() else []
    else:
        entries = [path for path in folder.glob("*") if path.is_dir()]
    return sorted(int(path.name) for path in entries if path.name.isdecimal() and path.name == str(int(path.name)))


# Names


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *above, last = name.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _leaf(tree: Mapping[str, Any], name: str) -> Any:
    node: Any = tree
    for part in name.split("/"):
        node = node[part]
    return node


def _key_implementation() -> str:
    return str(jax.config.jax_default_prng_impl)  # type: ignore[attr-defined]


# Orbax


def _open_manager(folder: Any, config: CheckpointConfig, best: Callable[[], list[int]], *, barriers: str) -> Any:
    _silence()
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as keep

    policies: list[Any] = [keep.LatestN(config.keep_last)]
    if config.keep_every:
        policies.append(keep.EveryNSteps(config.keep_every))
    if config.keep_best:

        class Best(keep.PreservationPolicy):
            def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
                return [checkpoint.step in best() for checkpoint in checkpoints]

        policies.append(Best())
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(policies),
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_LIMIT_S),
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=barriers),
        save_root_metadata=False,
        lightweight_initialize=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def _outcome(call: Callable[[], object], limit_s: float) -> Exception | None:
    """What `call` raised, or None. Raises TimeoutError where it does not return in time."""
    raised: list[Exception] = []

    def target() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=target, name="checkpoint", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError
    return raised[0] if raised else None


def _silence() -> None:
    """Keeps Orbax's own log, which is long and repeats every exception it raises, out of the run's output.

    After a failure, each read or write still under way reports to `sys.unraisablehook` that nobody waits for it.
    """
    log = logging.getLogger("absl")
    if _not_from_orbax in log.filters:
        return
    log.addFilter(_not_from_orbax)
    previous = sys.unraisablehook

    def hook(report: Any) -> None:
        coroutine = getattr(report.object, "cr_code", None)
        unread = coroutine is not None and _ORBAX in coroutine.co_filename
        unwritten = report.exc_type is RuntimeError and str(report.exc_value) == "Event loop is closed"
        if not (unread or unwritten):
            previous(report)

    sys.unraisablehook = hook


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return _ORBAX not in record.pathname


def _write(manager: Any, step: int, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(state=ocp.args.StandardSave(_nested(arrays)), about=ocp.args.JsonSave(dict(about)))
    manager.save(step, args=items, force=True)


def _read(manager: Any, folder: Any, step: int, abstract: TrainState) -> Restored:
    """Raises CheckpointError for a checkpoint that is whole but not for this run, other errors for a damaged one."""
    import orbax.checkpoint as ocp

    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    wanted = named(abstract)
    _check(about, folder / str(step), step, wanted)
    into = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in wanted.items()}
    items = ocp.args.Composite(state=ocp.args.StandardRestore(_nested(into)))
    tree = manager.restore(step, args=items)["state"]
    leaves = [_leaf(tree, name) for name in wanted]
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    found = digest(state)
    if found != about["digest"]:
        raise ValueError(f"its arrays have the digest {found}, not {about['digest']}")
    return Restored(state, step, about["data_state"], about["recipe"], found)


def read_part(folder: Any, step: int, part: Any, leave: Callable[[str], bool] = lambda name: False) -> Any:
    """Some fields of the TrainState of a checkpoint, the others left unread: parameters without optimizer states.

    part   {field: tree of ShapeDtypeStructs with shardings, or of arrays}; the same with arrays is returned
    leave  whether the array of a name (`named`) is returned as `part` has it, whatever the checkpoint holds

    Raises CheckpointError for a checkpoint that cannot be read, that is of a newer format or that holds other arrays.
    Damage that shows in no error goes unseen, as the digest is of the whole.
    """
    _silence()
    import orbax.checkpoint as ocp

    where, leaves = absolute(folder) / str(step), named(part)
    wanted = {name: a for name, a in leaves.items() if not leave(name)}
    try:
        about = ocp.JsonCheckpointHandler().restore(where / "about")
        _check_version(about, where)
        _check_whole(about, step)
        saved = {n: a for n, a in about["arrays"].items() if n.partition("/")[0] in part and not leave(n)}
        _check_arrays(saved, where, wanted)
        into = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in wanted.items()}
        nested = _nested(into)
        args = ocp.args.PyTreeRestore(
            nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=True
        )
        tree = ocp.PyTreeCheckpointer().restore(where / "state", args=args)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files show as errors of many kinds
        raise CheckpointError(f"{where} cannot be read: {_reason(error)}") from None
    read = [_leaf(tree, name) if name in wanted else a for name, a in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(part), read)


def _check(about: Mapping[str, Any], where: Path, step: int, wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the checkpoint is of this format, random keys and arrays, ValueError where it was
    changed."""
    _check_version(about, where)
    _check_whole(about, step)
    if about["key_implementation"] != _key_implementation():
        raise CheckpointError(
            f"{where} holds a random key of {about['key_implementation']}, this run uses {_key_implementation()}: "
            f"set JAX_DEFAULT_PRNG_IMPL={about['key_implementation']}"
        )
    _check_arrays(about["arrays"], where, wanted)


def _check_version(about: Mapping[str, Any], where: Path) -> None:
    version = about["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has checkpoint format {version}, this version of adaptive ({adaptive.__version__}) reads up to "
            f"{FORMAT_VERSION}; it was written by adaptive {about['program']['adaptive']}: update to read it"
        )


def _check_whole(about: Mapping[str, Any], step: int) -> None:
    """Raises ValueError where what stands beside the arrays is not as it was saved, or not under its own step."""
    if about.get("checksum") != checksum(about):
        raise ValueError("what is said beside its arrays (position in the data, step, recipe) was changed")
    if about["step"] != step:
        raise ValueError(f"it is the checkpoint of step {about['step']}, not of {step} as its folder is called")


def _check_arrays(arrays: Mapping[str, Any], where: Path, wanted: Mapping[str, Any]) -> None:
    saved = {name: f"{dtype}{shape}" for name, (dtype, shape) in arrays.items()}
    needed = {name: f"{np.dtype(a.dtype).name}{list(a.shape)}" for name, a in wanted.items()}
    differ = [
        f"  {name}: {saved.get(name, 'nothing')} in the checkpoint, {needed.get(name, 'nothing')} in the model"
        for name in dict.fromkeys([*needed, *saved])
        if saved.get(name) != needed.get(name)
    ]
    if differ:
        more = [f"  (and {len(differ) - 8} more)"] if len(differ) > 8 else []
        raise CheckpointError("\n".join([f"{where} does not fit the model of this run:", *differ[:8], *more]))


_ELSEWHERE = "it failed on another process"

# Text of the operating system that says more than a library's wrapping of it; most specific first.
_SYSTEM = tuple(
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


def _shared_reason(failure: Exception | None) -> str:
    """Why it failed, the same text in every process: what the system said to one of them, if it did."""
    reason = _reason(failure)
    if jax.process_count() == 1:
        return reason
    from jax.experimental import multihost_utils

    rows = multihost_utils.process_allgather(np.frombuffer(reason.encode()[:200].ljust(200), np.uint8))
    reasons = [bytes(row).decode(errors="replace").strip() for row in rows]
    return min(reasons, key=lambda text: (text not in _SYSTEM, text == _ELSEWHERE))


def _reason(error: Exception | None) -> str:
    if error is None:
        return _ELSEWHERE
    texts = []
    chain: BaseException | None = error
    while chain is not None:
        texts.append(str(chain).strip() or type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    known = next((words for words in _SYSTEM if any(words in text for text in texts)), None)
    return known or texts[0].splitlines()[0][:200]
