"""What an engine is asked and what it answers: sequences of token ids. Texts, and where they stop, are their users'."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import numpy as np

from adaptive.inference.drawing import Drawing

Reason = Literal["length", "end", "cancelled", "deadline", "failed"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A sequence to continue.

    prompt    i32[n], at least one token
    tokens    at most so many after it
    how       each is drawn, by the key of `seed`, `stream` and its number alone: whatever else is computed beside it
    stream    of several that have one seed, so that their draws differ: as the row of a prompt in `adaptive generate`
    end       token that ends it, itself the last one answered; None: none does
    likeliest how many of the likeliest tokens are told with each
    seconds   from now on, after which it is given up; None: none
    """

    prompt: np.ndarray
    tokens: int
    how: Drawing = Drawing()
    seed: int = 0
    stream: int = 0
    end: int | None = None
    likeliest: int = 0
    seconds: float | None = None


class Made(NamedTuple):
    """One token that continues a sequence.

    logprob    natural logarithm of its probability by the model, before any rule of drawing
    likeliest  (token, logprob) of the likeliest, in that order
    depth      passes that it took when it was computed in its turn (1 where none chooses); None: the last never was
    begins     whether it begins a chunk, of each stage of an H-Net
    flops      of matmuls that it cost; None: as `depth`
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()
    depth: int | None = None
    begins: tuple[bool, ...] = ()
    flops: float | None = None


class Ticket(Protocol):
    """A request that was taken on. It may be read by one thread, cancelled by any."""

    def __iter__(self) -> Iterator[Made]:
        """Its tokens as they are made; ends when no more come. Raises what an engine failed with."""

    def cancel(self) -> None:
        """No more tokens are wanted; its room is given to others before the next pass."""

    @property
    def reason(self) -> Reason | None:
        """Why it ended; None: it has not."""


class Full(Exception):
    """No more requests can wait now.

    seconds  in which there may be room again
    """

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


class Engine(Protocol):
    """Computes requests together. `with` closes it."""

    def refuse(self, request: Request) -> str:
        """Why it could never be computed, with the limit; empty where it can."""

    def submit(self, request: Request) -> Ticket:
        """Takes it on. Raises Full where too many wait, RuntimeError where it is closed."""

    def figures(self) -> dict[str, float]:
        """What it did and does, by the names of docs/serving.md: waiting, running, tokens, passes, ..."""

    def close(self, *, finish: bool = True) -> None:
        """Ends it: what was taken on is finished first, or given up."""
