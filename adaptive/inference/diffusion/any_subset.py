"""Speculative sampling of any-subset autoregressive models (Guo and Ermon 2025, arXiv 2504.20456, algorithm 1): several
tokens at once, distributed as if each had been drawn with all those before it known."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from adaptive.errors import UserError

Denoise = Callable[[np.ndarray], Any]
Verify = Callable[[np.ndarray, Sequence[np.ndarray]], Any]


class Speculated(NamedTuple):
    """tokens i32[rows, n]; calls of the denoiser, those that verify among them; rounds and accepted i32[rows]: of each
    row its rounds, and the drafted tokens that stayed."""

    tokens: np.ndarray
    calls: int
    rounds: np.ndarray
    accepted: np.ndarray


def speculate(
    denoise: Denoise,
    tokens: Any,
    *,
    mask_id: int,
    ahead: int,
    key: jax.Array,
    order: Any = None,
    temperature: float = 1.0,
    verify: Verify | None = None,
) -> Speculated:
    """Writes every masked position of tokens i32[rows, n], in an order, each drawn given all before it.

    denoise      tokens i32[rows, n] -> logits f32[rows, n, vocab]
    ahead        positions that a round drafts, from one call, each alone. A second call says what each would have been
                 given those before it; drafts are accepted by the ratio of the two probabilities, and the first that is
                 not is drawn anew from what the first call gave too little. A round writes two positions or more, so
                 that there are never more calls than positions
    key          of draws: row r draws by jax.random.fold_in(key, r)
    order        i32[rows, n]: all places in the order in which the masked ones are written; None: from left to right
    verify       (tokens i32[rows, n] with drafts, drafted places of each row in their order) -> logits f32[rows, ahead,
                 vocab] of each of these given what is before it, for models that tell all in one pass. None: `denoise`
                 is called once with a row for each of them
    """
    if ahead < 1 or temperature <= 0:
        name, value = ("ahead", ahead) if ahead < 1 else ("temperature", temperature)
        raise UserError(f"{name}={value}: must be {'at least 1' if ahead < 1 else 'above 0'}")
    x = np.array(tokens, np.int32)
    rows, n = x.shape
    places = np.broadcast_to(np.arange(n) if order is None else np.asarray(order, int), (rows, n))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))
    draws = [np.random.default_rng(own) for own in np.asarray(jax.random.key_data(keys))]
    rounds, accepted, calls = np.zeros(rows, int), np.zeros(rows, int), 0
    check = _one_by_one(denoise, mask_id) if verify is None else verify

    def chances(logits: Any) -> np.ndarray:
        logits = np.array(logits, np.float64) / temperature
        if mask_id < logits.shape[-1]:
            logits[..., mask_id] = -np.inf
        share = np.exp(logits - logits.max(-1, keepdims=True))
        return share / share.sum(-1, keepdims=True)

    while (x == mask_id).any():
        due = [places[r][x[r, places[r]] == mask_id][:ahead] for r in range(rows)]
        draft, tried = chances(denoise(x)), x.copy()
        calls += 1
        for r, own in enumerate(due):
            for place in own:
                tried[r, place] = _pick(draft[r, place], draws[r])
        if max(map(len, due)) == 1:  # nothing is between a draft and what it is given
            x, accepted, rounds = tried, accepted + [len(own) for own in due], rounds + [len(own) > 0 for own in due]
            continue
        given = chances(check(_only(x, tried, due), due))
        calls += 1
        for r, own in enumerate(due):
            rounds[r] += len(own) > 0
            for i, place in enumerate(own):
                one, other, token = given[r, i] if i else draft[r, place], draft[r, place], tried[r, place]
                if draws[r].random() * other[token] < one[token]:
                    x[r, place] = token
                    accepted[r] += 1
                    continue
                rest = np.maximum(one - other, 0)
                x[r, place] = _pick(rest / rest.sum(), draws[r])
                break
    return Speculated(x, calls, rounds, accepted)


def _only(x: np.ndarray, tried: np.ndarray, due: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens with the drafts at the places that are due."""
    out = x.copy()
    for r, own in enumerate(due):
        out[r, own] = tried[r, own]
    return out


def _pick(chance: np.ndarray, draws: np.random.Generator) -> int:
    return int(min(np.searchsorted(np.cumsum(chance), draws.random() * chance.sum(), side="right"), len(chance) - 1))


def _one_by_one(denoise: Denoise, mask_id: int) -> Verify:
    """What verifies with a row for each draft but the first, of which the first call has told."""

    def verify(tried: np.ndarray, due: Sequence[np.ndarray]) -> np.ndarray:
        asked, where = [], []
        for r, own in enumerate(due):
            for i in range(1, len(own)):
                row = tried[r].copy()
                row[own[i:]] = mask_id
                asked.append(row)
                where.append((r, i, own[i]))
        logits = np.asarray(denoise(np.stack(asked)))
        out = np.zeros((len(tried), max(map(len, due)), logits.shape[-1]), logits.dtype)
        for each, (r, i, place) in zip(logits, where, strict=True):
            out[r, i] = each[place]
        return out

    return verify
