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
    norms = np.sqrt(np.cumsum(weights**2, axis=-1)) / np.cumsum(weights, axis=-1)
    return (1.0, *(float(factor) for factor in np.mean(np.sqrt(shared) / norms, axis=0)))


@functools.cache
def token_choice_factor(experts: int, k: int, shared: float, sigmoid: bool = False) -> float:
    """The same for the k largest weights of every token, renormalised."""
    weights = _weights(experts, sigmoid)
    top = -np.sort(-weights, axis=-1)[:, :k]
    norms = np.linalg.norm(top / top.sum(-1, keepdims=True), axis=-1)
    return float(np.mean(np.sqrt(shared) / norms))


def _weights(experts: int, sigmoid: bool = False) -> np.ndarray:
    logits = np.random.default_rng(SEED).standard_normal((SAMPLES, experts))
    if sigmoid:
        return 1 / (1 + np.exp(-logits))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
