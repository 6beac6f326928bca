"""Scale of routed against shared experts: f[n] = E[sqrt(shared / sum of squares of the n weights)] (EC-DLM)."""

import functools

import numpy as np

SAMPLES, SEED = 10_000, 42


@functools.cache
def expert_choice_table(experts: int, shared: float) -> tuple[float, ...]:
    """f[0..experts]: multiplies the weights of a token that n experts picked; `shared` is the shared width in experts.

    The first n of the softmax of standard normal logits, renormalised; f[0] = 1. Monte Carlo with a fixed seed.
    """
    weights = _weights(experts)
    factors = [1.0]
    for n in range(1, experts + 1):
        factors.append(_factor(weights[:, :n] / weights[:, :n].sum(-1, keepdims=True), shared))
    return tuple(factors)


@functools.cache
def token_choice_factor(experts: int, k: int, shared: float, sigmoid: bool = False) -> float:
    """The same for the k largest weights of every token."""
    weights = _weights(experts, sigmoid)
    top = -np.sort(-weights, axis=-1)[:, :k]
    return _factor(top / top.sum(-1, keepdims=True), shared)


def _weights(experts: int, sigmoid: bool = False) -> np.ndarray:
    logits = np.random.default_rng(SEED).standard_normal((SAMPLES, experts))
    if sigmoid:
        return 1 / (1 + np.exp(-logits))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _factor(weights: np.ndarray, shared: float) -> float:
    return float(np.mean(np.sqrt(shared) / np.linalg.norm(weights, axis=-1)))
