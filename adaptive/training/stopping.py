"""Stopping when asked: signals become a flag that the loop reads, and all processes stop at the same step."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from adaptive.parallel import cluster
from adaptive.parallel.cluster import PREEMPTED

__all__ = ["INTERRUPTED", "PREEMPTED", "GivenUpError", "StopRequest"]

INTERRUPTED = 130  # the exit code of a run that a second signal ended at once: what was not saved is lost

_SAVE = 2**16  # in a sum of flags, above the most processes that ask to stop
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class GivenUpError(Exception):
    """What is under way is given up because the run was asked to stop."""


class Agreed(NamedTuple):
    """What at least one of the processes asks all of them for."""

    stop: bool
    save: bool


class StopRequest:
    """While the block runs, SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C ask the run to stop; a second one ends
    the process at once with 130. A SIGHUP that whoever started the process has ignored (nohup) stays ignored.

    Signals are taken by a thread, so that both work while the main thread is inside a compilation or a long step.
    Enter it in the main thread.

    say   prints a line; it is called from that thread, and may be exchanged
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.say = say
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._nothing_to_save: Callable[[], object] | None = None
        self._terminals: list[int] = []
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._read = self._write = -1
        self._flag: Any = None  # the flags of all processes, summed on the devices, as of the last call of `agree`

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Asks for the same without a signal."""
        self._asked.set()

    @contextlib.contextmanager
    def at_once(self, close: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Around what leaves nothing to save, such as a compilation before the first step: a signal ends the process
        there and then, with 75, and the others of its job. close: what is to be done before. Blocks may nest."""
        with self._lock:
            if self.requested:
                self._leave(close)
            outer, self._nothing_to_save = self._nothing_to_save, close
        try:
            yield
        finally:
            with self._lock:
                self._nothing_to_save = outer

    def agreed(self) -> bool:
        """Whether the processes stop now; see `agree`."""
        return self.agree().stop

    def agree(self, *, save: bool = False) -> "Agreed":
        """What the processes do now: the same answer in all of them, which must call it equally often.

        One process is told at once. Several exchange their flags by a collective that is read at the next call, when it
        has long finished, so that no call waits for the step under way.

        save  whether a checkpoint is due for this process
        """
        import jax

        if jax.process_count() == 1:
            return Agreed(self.requested, save)
        before, self._flag = self._flag, _total(self.requested + _SAVE * save)
        total = 0 if before is None else int(before)
        return Agreed(total % _SAVE > 0, total >= _SAVE)

    def check(self) -> None:
        """Raises GivenUpError where the processes stop now. As of `agreed`, all must call it equally often."""
        if self.agreed():
            raise GivenUpError

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        threading.Thread(target=self._listen, args=(self._read,), name="signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        heard = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._before = {number: signal.signal(number, _left_to_the_thread) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # the thread reads the end of the pipe, and ends

    def _listen(self, read: int) -> None:
        with open(read, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] in _SIGNALS:
                    self._on_signal(signal.Signals(byte[0]))

    def _on_signal(self, number: signal.Signals) -> None:
        if self.requested:
            print(f"{number.name} again: ending now, without saving", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        if number == signal.SIGHUP:
            for terminal in self._terminals:  # nobody is there any more: a line would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        with self._lock:
            self._asked.set()
            if self._nothing_to_save is not None:
                self.say(f"{number.name}: stopping now; there is nothing to save")
                self._leave(self._nothing_to_save)
        self.say(f"{number.name}: stopping after this step and saving (again: at once, without saving)")

    def _leave(self, close: Callable[[], object]) -> None:
        close()
        cluster.stopped()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(PREEMPTED)  # not sys.exit: the main thread may be inside the compiler


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    del number, frame  # the wake-up pipe has it already


def _total(flags: int) -> Any:
    """i32[] on every device: the sum of what the processes give. Returns before it is computed."""
    import jax
    import numpy as np

    split, total = _over_all_devices()
    mine = np.zeros(jax.local_device_count(), np.int32)
    mine[0] = flags
    return total(jax.make_array_from_process_local_data(split, mine))


@functools.cache
def _over_all_devices() -> tuple[Any, Callable[[Any], Any]]:
    """The sharding of one number per device, and the compiled sum of them that every device gets."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    total = jax.jit(lambda flags: flags.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec("all")), total
