"""Elements that a thread makes before they are asked for."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_ENDS_WITHIN_S = 5.0
_LOOKS_UP_S = 0.1  # how often a thread that waits looks whether it is still wanted


class Ahead(Generic[T]):
    """The elements of an iterator, of which a thread makes up to `count` ahead. What it raises, `next` raises."""

    def __init__(self, elements: Iterator[T], count: int):
        self._made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
        self._unwanted, self._started = threading.Event(), False
        self._thread = threading.Thread(target=self._make, args=(elements,), name="data ahead", daemon=True)

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        if not self._started:
            self._started = True
            self._thread.start()
        element, error = self._made.get()
        if error is not None:
            self._made.put((None, error))
            raise error
        return element  # type: ignore[return-value]

    @property
    def ready(self) -> int:
        """Elements that are made and not taken."""
        return self._made.qsize()

    def close(self) -> None:
        """Ends the thread once it has made what it is at, or leaves it to end with the process."""
        self._unwanted.set()
        if self._started:
            self._thread.join(_ENDS_WITHIN_S)

    def _make(self, elements: Iterator[T]) -> None:
        try:
            for element in elements:
                if not self._put((element, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # is raised where the element would have been returned
            self._put((None, error))

    def _put(self, made: tuple[T | None, BaseException | None]) -> bool:
        while not self._unwanted.is_set():
            with contextlib.suppress(queue.Full):
                self._made.put(made, timeout=_LOOKS_UP_S)
                return True
        return False
