"""Fits by variable projection: of laws that are linear in most of what they know.

A law predicts losses as X(theta) c. For a given theta the best c >= 0 is found at once, so that the search is over
theta alone, by Gauss-Newton with the gradient of the reduced problem (Kaufman). Residuals are relative, X c / loss - 1,
which to first order are those of the logarithm, and count by Huber's rule: squares below `huber`, absolute values
above.

Everything has a leading axis of problems that are solved together: starting points, or resamples of the runs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

HUBER = 5e-3  # relative residual from which on a run counts as an outlier; about what seeds differ by
RESAMPLES = 1000
LEVEL = 0.95
_STEPS, _INNER = 60, 6


class Law(Protocol):
    """names: of theta, with the least and the greatest value of each; linear: of c."""

    names: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    linear: tuple[str, ...]

    def columns(self, theta: np.ndarray) -> np.ndarray:
        """f64[problems, runs, linear] of f64[problems, names]; none is negative."""
        ...


@dataclasses.dataclass(frozen=True)
class Fit:
    """theta f64[names] and c f64[linear], with r_squared of log losses; `drawn_*` of each resample, a row each.

    runs  that were fitted
    """

    law: Law
    theta: np.ndarray
    linear: np.ndarray
    r_squared: float
    runs: int
    drawn_theta: np.ndarray
    drawn_linear: np.ndarray

    def __getitem__(self, name: str) -> float:
        return float(self._of(name, self.theta, self.linear))

    def drawn(self, name: str) -> np.ndarray:
        """f64[resamples]"""
        return self._of(name, self.drawn_theta, self.drawn_linear)

    def _of(self, name: str, theta: np.ndarray, linear: np.ndarray) -> np.ndarray:
        if name in self.law.names:
            return theta[..., self.law.names.index(name)]
        return linear[..., self.law.linear.index(name)]

    def interval(self, name: str) -> tuple[float, float]:
        return interval(self.drawn(name))

    def at_limit(self, name: str) -> bool:
        """Whether the search ended at a limit of what it may be, in the fit or in one resample of forty: then the runs
        do not say how large it is."""
        i = self.law.names.index(name)
        low, high = self.law.lower[i], self.law.upper[i]
        near = lambda values: (values <= low + 1e-6) | (values >= high - 1e-6)  # noqa: E731
        return bool(near(self.theta[i]) or near(self.drawn_theta[:, i]).mean() > (1 - LEVEL) / 2)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of f64[resamples]."""
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [edge, 100 - edge])
    return float(low), float(high)


def fit(
    law: Law,
    loss: np.ndarray,
    groups: Sequence[str] = (),
    *,
    resamples: int = RESAMPLES,
    huber: float = HUBER,
    seed: int = 0,
) -> Fit:
    """The best fit from a grid of starts, and that of every resample of the runs.

    loss    f64[runs], above 0
    groups  of each run: resamples draw within a group, so that each has runs of all kinds; none: from all
    """
    loss = np.asarray(loss, np.float64)
    starts = grid(law)
    theta, linear, cost = minimise(law, loss, np.ones((len(starts), len(loss))), starts, huber)
    best = np.argsort(cost, kind="stable")
    drawn = weights(groups or [""] * len(loss), resamples, seed)
    # Each resample begins at the best point of the whole, and at one that the search found elsewhere.
    begins = [theta[best[0]], theta[best[len(best) // 2]]]
    found = [minimise(law, loss, drawn, np.tile(begin, (resamples, 1)), huber) for begin in begins]
    choose = np.argmin([cost for _, _, cost in found], axis=0)
    each = np.arange(resamples)
    predicted = (law.columns(theta[best[:1]])[0] @ linear[best[0]]).clip(1e-300)
    log = np.log(loss)
    spread = float(((log - log.mean()) ** 2).sum())
    return Fit(
        law,
        theta[best[0]],
        linear[best[0]],
        1 - float(((np.log(predicted) - log) ** 2).sum()) / max(spread, 1e-300),
        len(loss),
        np.stack([one for one, _, _ in found])[choose, each],
        np.stack([one for _, one, _ in found])[choose, each],
    )


def grid(law: Law, each: int = 4) -> np.ndarray:
    """f64[each ** names, names]: points within the limits."""
    axes = [np.linspace(a, b, each + 2)[1:-1] for a, b in zip(law.lower, law.upper, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def weights(groups: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """f64[resamples, runs]: how often each resample has each run."""
    rng = np.random.default_rng([seed, len(groups)])
    out = np.zeros((resamples, len(groups)))
    for name in dict.fromkeys(groups):
        at = np.flatnonzero(np.array(groups) == name)
        out[:, at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), size=resamples)
    return out


def minimise(
    law: Law, loss: np.ndarray, counts: np.ndarray, start: np.ndarray, huber: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(theta f64[problems, names], c f64[problems, linear], cost f64[problems]) of every problem.

    counts  f64[problems, runs]  how often each run counts
    start   f64[problems, names]
    """
    theta = start.copy()
    c, w, cost = _inner(_relative(law, theta, loss), counts, counts, huber, 4 * _INNER)
    damping = np.full(len(start), 1e-3)
    going = np.arange(len(start))  # problems that still get better
    for _ in range(_STEPS):
        x = _relative(law, theta[going], loss)
        step = _step(law, theta[going], loss, x, c[going], w[going], damping[going])
        tried = np.clip(theta[going] + step, law.lower, law.upper)
        found = _inner(_relative(law, tried, loss), counts[going], w[going], huber, _INNER)
        gain = cost[going] - found[2]
        better, moved = gain > 0, np.abs(tried - theta[going]).max(axis=1) > 1e-6
        at = going[better]
        theta[at], c[at], w[at], cost[at] = tried[better], found[0][better], found[1][better], found[2][better]
        damping[going] = np.clip(np.where(better, damping[going] / 5, damping[going] * 4), 1e-12, 1e8)
        done = np.where(better, gain < 1e-9 * cost[going], damping[going] > 1e6) | ~moved
        going = going[~done]
        if not len(going):
            break
    return theta, c, cost


def _relative(law: Law, theta: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return law.columns(theta) / loss[:, None]


def _step(
    law: Law, theta: np.ndarray, loss: np.ndarray, x: np.ndarray, c: np.ndarray, w: np.ndarray, damping: np.ndarray
) -> np.ndarray:
    """f64[problems, names] of Gauss-Newton on the reduced problem: what c makes up for is taken out of the Jacobian."""
    residual = _applied(x, c) - 1
    h = 1e-5
    jacobian = np.empty((*residual.shape, theta.shape[1]))
    for i in range(theta.shape[1]):
        change = np.zeros(theta.shape[1])
        change[i] = h
        jacobian[..., i] = _applied(_relative(law, theta + change, loss) - _relative(law, theta - change, loss), c)
    jacobian /= 2 * h
    free = x * (c > 0)[:, None, :]
    weighted = _turned(free * w[..., None])
    jacobian -= free @ np.linalg.solve(_regular(weighted @ free), weighted @ jacobian)
    weighted = _turned(jacobian * w[..., None])
    square, gradient = weighted @ jacobian, weighted @ residual[..., None]
    diagonal = np.einsum("bpp->bp", square)
    scale = np.maximum(diagonal, 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30)
    damped = square + (damping[:, None] * scale)[..., None] * np.eye(theta.shape[1])
    return -np.linalg.solve(damped, gradient)[..., 0]


def _inner(
    x: np.ndarray, counts: np.ndarray, w: np.ndarray, huber: float, rounds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(c, weights, cost): the best c >= 0 by Huber's rule, found by reweighting squares; w: weights to begin with."""
    for _ in range(rounds):
        weighted = _turned(x * w[..., None])
        c = nonnegative(weighted @ x, weighted.sum(axis=2))
        size = np.abs(_applied(x, c) - 1)
        w = counts * np.minimum(1, huber / np.maximum(size, 1e-300))
    loss = np.where(size <= huber, size**2 / 2, huber * (size - huber / 2))
    return c, w, (counts * loss).sum(axis=1)


def _applied(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """x c of every problem: f64[problems, runs]."""
    return (x @ c[..., None])[..., 0]


def _turned(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, 1, 2)


def nonnegative(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """c >= 0 that minimises c' G c / 2 - t' c, for G f64[problems, k, k], t f64[problems, k]: coordinates that come out
    negative leave one after another, the most negative first."""
    k = gram.shape[-1]
    free = np.ones(target.shape, bool)
    eye = np.eye(k)
    for _ in range(k):
        both = free[:, :, None] & free[:, None, :]
        c = np.linalg.solve(_regular(np.where(both, gram, eye)), np.where(free, target, 0)[..., None])[..., 0]
        share = np.where(free, c * np.sqrt(np.maximum(np.einsum("bkk->bk", gram), 0)), 0)
        worst = np.argmin(share, axis=1)
        leaves = share[np.arange(len(c)), worst] < 0
        if not leaves.any():
            break
        free[leaves, worst[leaves]] = False
    return np.where(free, np.maximum(c, 0), 0)


def _regular(gram: np.ndarray) -> np.ndarray:
    """The matrices with what keeps them invertible where a resample leaves columns alike."""
    k = gram.shape[-1]
    size = np.maximum(np.einsum("bkk->bk", gram), 1e-30)
    return gram + 1e-13 * size[:, :, None] * np.eye(k)
