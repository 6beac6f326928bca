"""Prompts that an engine continues, as the plain loop of generation tells it."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from adaptive.inference.engine import Engine
from adaptive.inference.requests import Made, Request
from adaptive.inference.sampling import Piece


def pieces(engine: Engine, prompts: Sequence[np.ndarray], request: Request) -> Iterator[Piece]:
    """Pieces (`sampling.Sampler`) of the prompts, of which no depths are told, and of a token of each row at a time.

    Prompt r is continued as `request`, in stream r. The token that ends a row is not in its pieces.
    """
    longest = max(map(len, prompts))
    tokens, valid = np.zeros((len(prompts), longest), np.int32), np.zeros((len(prompts), longest), bool)
    for r, prompt in enumerate(prompts):
        tokens[r, : len(prompt)], valid[r, : len(prompt)] = prompt, True
    yield Piece(tokens, valid, np.zeros((0, *tokens.shape), bool), prompt=True)
    tickets = [engine.submit(dataclasses.replace(request, prompt=p, stream=r)) for r, p in enumerate(prompts)]
    rows = [iter(ticket) for ticket in tickets]
    going = [True] * len(rows)
    try:
        while True:
            made = [next(row, None) if goes else None for row, goes in zip(rows, going, strict=True)]
            going = [one is not None and one.token != request.end for one in made]
            if not any(going):
                return
            yield _piece(made, going)
    finally:
        for ticket in tickets:
            ticket.cancel()


def _piece(made: Sequence[Made | None], there: Sequence[bool]) -> Piece:
    """One token of each row that has one."""
    own = [one if one is not None and goes else Made(0, 0.0) for one, goes in zip(made, there, strict=True)]

    def column(values: Iterable[Any], dtype: type) -> np.ndarray:
        return np.array([*values], dtype)[:, None]

    return Piece(
        column((one.token for one in own), np.int32),
        column(there, bool),
        np.zeros((0, len(own), 1), bool),
        prompt=False,
        logprobs=column((one.logprob for one in own), np.float32),
        depth=column((one.depth or 0 for one in own), np.int32),
    )
