"""A learned filter for parallel decoding (Learn2PD, arXiv 2509.25188): a small network reads how sure the proposals of
a block are and says which are already final. Its features and threshold are not known; these are ours: a position that
is written counts as sure."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive.errors import UserError
from adaptive.inference.diffusion.policies import Policy, Seen, likeliest
from adaptive.settings import ranged


class Filter(NamedTuple):
    """f32[block] confidences -> f32[block] logits of being final: inner [block, hidden], outer [hidden, block]."""

    inner: np.ndarray
    inner_bias: np.ndarray
    outer: np.ndarray
    outer_bias: np.ndarray

    def logits(self, confidence: jax.Array) -> jax.Array:
        """[..., block] -> [..., block]."""
        return jax.nn.relu(confidence @ self.inner + self.inner_bias) @ self.outer + self.outer_bias

    def save(self, path: str | Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **self._asdict())


@functools.cache
def loaded(path: str) -> Filter:
    """The filter in a file. Raises UserError where there is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Filter(**{name: np.asarray(file[name], np.float32) for name in Filter._fields})
    except OSError as error:
        raise UserError(f"policy.filter={path or '(empty)'}: {error.strerror or error}") from None
    except (KeyError, ValueError) as error:
        raise UserError(f"policy.filter={path} holds no filter ({error}); `fit` makes one") from None


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """Positions that the filter calls final with at least this probability, and always the likeliest."""

    filter: str = ""  # file of `Filter.save`
    threshold: float = ranged(0.9, least=0)

    def check(self, block: int) -> None:
        size = len(loaded(self.filter).inner)
        if size != block:
            raise UserError(f"policy.filter={self.filter} was made for blocks of {size} positions, not {block}")

    def writes(self, seen: Seen) -> jax.Array:
        filter = loaded(self.filter)
        places = seen.begin[:, None] + jnp.arange(len(filter.inner))
        take = lambda a, fill: a.at[jnp.arange(len(a))[:, None], places].get(mode="fill", fill_value=fill)  # noqa: E731
        confidence, free = take(seen.confidence, 1.0), take(seen.open, False)
        sure = jax.nn.sigmoid(filter.logits(jnp.where(free, confidence, 1.0))) >= self.threshold
        put = jnp.zeros(seen.open.shape, bool).at[jnp.arange(len(sure))[:, None], places]
        return (put.set(sure & free, mode="drop") & seen.open) | likeliest(seen)


def fit(
    confidence: np.ndarray,
    final: np.ndarray,
    free: np.ndarray,
    *,
    hidden: int = 32,
    steps: int = 500,
    rate: float = 3e-3,
    key: jax.Array | None = None,
) -> Filter:
    """A filter out of decoded texts.

    confidence  f32[calls, block] of the proposals of a block, 1 where it was written
    final       bool[calls, block]: whether the proposal is what was written in the end
    free        bool[calls, block]: positions that were not written, which alone count
    """
    block = confidence.shape[1]
    make = jax.nn.initializers.he_normal()
    one, two = jax.random.split(jax.random.key(0) if key is None else key)
    start = Filter(make(one, (block, hidden)), jnp.zeros(hidden), make(two, (hidden, block)), jnp.zeros(block))  # type: ignore[arg-type]
    optimizer, weight = optax.adam(rate), free.astype(np.float32)

    def loss(filter: Filter) -> jax.Array:
        each = optax.sigmoid_binary_cross_entropy(filter.logits(jnp.asarray(confidence)), final.astype(np.float32))
        return (each * weight).sum() / jnp.maximum(weight.sum(), 1)

    @jax.jit
    def trained(filter: Filter) -> Filter:
        def step(carry: tuple[Filter, optax.OptState], _: None) -> tuple[tuple[Filter, optax.OptState], None]:
            filter, state = carry
            updates, state = optimizer.update(jax.grad(loss)(filter), state)
            return (optax.apply_updates(filter, updates), state), None

        return jax.lax.scan(step, (filter, optimizer.init(filter)), None, length=steps)[0][0]

    return Filter(*map(np.asarray, trained(start)))
