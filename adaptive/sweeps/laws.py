"""What losses are fitted with, as `adaptive.sweeps.fits` has laws. All sizes are divided by their geometric mean before
they are raised to a power, so that coefficients are nats at the middle of the runs."""

from collections.abc import Sequence

import numpy as np

EXPONENT = (0.02, 2.0)  # least and greatest
WORTH = (-1.0, 2.0)


def middle(values: np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(values).mean()))


class Chinchilla:
    """L = E + A N^-alpha + B D^-beta (arXiv 2203.15556); parameters N and tokens D of each run, f64[runs]."""

    names: tuple[str, ...] = ("alpha", "beta")
    linear: tuple[str, ...] = ("E", "A", "B")
    lower: tuple[float, ...] = (EXPONENT[0], EXPONENT[0])
    upper: tuple[float, ...] = (EXPONENT[1], EXPONENT[1])

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray):
        self._n = parameters / middle(parameters)
        self._d = tokens / middle(tokens)

    def columns(self, theta: np.ndarray) -> np.ndarray:
        n, d = self._n ** -theta[:, :1], self._d ** -theta[:, 1:2]
        return np.stack([np.ones_like(n), n, d], -1)


class WorthOfRecursion:
    """L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta (arXiv 2604.21106): a shared block of N_rec parameters that
    is passed r times counts as r^phi N_rec of its own. phi = 1: as much as fresh layers would; 0: as one pass.

    once, shared  f64[runs]  parameters outside and inside the shared block; of a plain model, any division of its own
    passes        f64[runs]  r, of routed depth the mean over tokens; 1: a plain model
    """

    names: tuple[str, ...] = ("alpha", "beta", "phi")
    linear: tuple[str, ...] = ("E", "A", "B")
    lower: tuple[float, ...] = (EXPONENT[0], EXPONENT[0], WORTH[0])
    upper: tuple[float, ...] = (EXPONENT[1], EXPONENT[1], WORTH[1])

    def __init__(self, once: np.ndarray, shared: np.ndarray, passes: np.ndarray, tokens: np.ndarray):
        self._unit = middle(once + shared)
        self._once, self._shared = once / self._unit, shared / self._unit
        self._log_passes = np.log(passes)
        self._d = tokens / middle(tokens)

    def columns(self, theta: np.ndarray) -> np.ndarray:
        n = self._once + self._shared * np.exp(theta[:, 2:3] * self._log_passes)
        return np.stack([np.ones_like(n), n ** -theta[:, :1], self._d ** -theta[:, 1:2]], -1)


class Curves:
    """L = E + A_v C^-alpha for every variant v: one floor and one exponent, and so a variant is worth (A_0 / A_v)^(1 /
    alpha) times its compute to variant 0.

    variants  of each run
    compute   f64[runs]  FLOPs of training
    """

    names: tuple[str, ...] = ("alpha",)
    lower: tuple[float, ...] = (EXPONENT[0],)
    upper: tuple[float, ...] = (EXPONENT[1],)

    def __init__(self, variants: Sequence[str], compute: np.ndarray):
        self.variants = tuple(dict.fromkeys(variants))
        self.linear: tuple[str, ...] = ("E", *self.variants)
        self.unit = middle(compute)
        self._own = np.array([[v == one for one in self.variants] for v in variants], np.float64)
        self._c = compute / self.unit

    def columns(self, theta: np.ndarray) -> np.ndarray:
        own = self._c[:, None] ** -theta[:, :1, None] * self._own
        return np.concatenate([np.ones((*own.shape[:2], 1)), own], -1)
