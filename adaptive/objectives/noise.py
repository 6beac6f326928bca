"""Which tokens of a text are hidden, and what each then counts: the forward process of masked diffusion."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Draws = Literal["independent", "stratified", "antithetic"]
Weighting = Literal["exact", "llada", "mdlm"]
LEAST_KEPT = 1e-3  # MDLM's share of tokens that the log-linear schedule keeps at t = 1


class Units(NamedTuple):
    """What has a share of hidden tokens of its own: a row, or a block of one. Of each position i32[rows, n] the first
    of its unit and the one after it."""

    first: jax.Array
    end: jax.Array

    def total(self, a: jax.Array) -> jax.Array:
        """f32[rows, n]: of each position the sum of f32[rows, n] over its unit."""
        sums = jnp.pad(jnp.cumsum(a, axis=1), ((0, 0), (1, 0)))
        return jnp.take_along_axis(sums, self.end, axis=1) - jnp.take_along_axis(sums, self.first, axis=1)


class Noise(NamedTuple):
    """hidden bool[rows, n]; weights f32[rows, n]: what a token's cross entropy counts, 0 unless it is hidden."""

    hidden: jax.Array
    weights: jax.Array


def whole_rows(shape: tuple[int, int]) -> Units:
    """Each row is a unit."""
    return Units(jnp.zeros(shape, jnp.int32), jnp.full(shape, shape[1], jnp.int32))


def ratios(key: jax.Array, count: int, draws: Draws) -> jax.Array:
    """f32[count], each uniform on 0 to 1.

    independent  of each other
    stratified   one in every 1 / count of the interval (MDLM calls that antithetic); neighbours are far apart, so that
                 any 2^k of them that follow each other are spread over it as well
    antithetic   so are every second one, and each other one is 1 less the one before it
    """
    if draws == "independent":
        return jax.random.uniform(key, (count,))
    strata = count if draws == "stratified" else -(-count // 2)
    turn, inside = jax.random.split(key)
    order = jnp.asarray(_apart(strata))
    number = (order + jax.random.randint(turn, (), 0, strata)) % strata
    t = (number + jax.random.uniform(inside, (strata,))) / strata
    return t if draws == "stratified" else jnp.stack([t, 1 - t], axis=1).reshape(-1)[:count]


def _apart(count: int) -> np.ndarray:
    """i32[count]: the numbers below it in the order of their reversed bits."""
    bits = max(count - 1, 1).bit_length()
    mirrored = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)]
    return np.argsort(np.argsort(mirrored)).astype(np.int32)


def by_chance(
    key: jax.Array, t: jax.Array, counted: jax.Array, units: Units, weighting: Weighting, eps: float, *, stable: bool
) -> Noise:
    """Each token that counts is hidden with its unit's probability, independently.

    t        f32[rows, n], the same within a unit, uniform on 0 to 1
    counted  bool[rows, n]: tokens that may be hidden

    exact    probability t, one of each unit at least; weights 1 / r, r the unit's share that is hidden, or 1 if stable
             (EC-DLM)
    llada    probability (1 - eps) t + eps, weights 1 over that
    mdlm     t is put into eps to 1; probability and weights are those of the log-linear schedule
    """
    draw = jax.random.uniform(key, counted.shape)
    if weighting == "exact":
        hidden = counted & ((draw < t) | (_rank(draw, counted, units) == 0))
        return Noise(hidden, shares(hidden, counted, units, stable=stable))
    if weighting == "llada":
        chance = (1 - eps) * t + eps
        weight = 1 / chance
    else:
        t = (1 - eps) * t + eps
        sigma, rate = log_linear_noise(t)
        chance, weight = -jnp.expm1(-sigma), rate / jnp.expm1(sigma)
    hidden = counted & (draw < chance)
    return Noise(hidden, hidden * weight)


def by_number(key: jax.Array, t: jax.Array, counted: jax.Array, units: Units) -> Noise:
    """Of the n tokens of a unit that count 1 + floor(t n) are hidden, any of them alike, with weights n over that
    number: the bound with less variance (LLaDA, arXiv 2502.09992). Weights add up to the tokens that count."""
    among = units.total(counted.astype(jnp.float32))
    number = jnp.clip(jnp.floor(t * among) + 1, 1, jnp.maximum(among, 1))
    hidden = counted & (_rank(jax.random.uniform(key, counted.shape), counted, units) < number)
    return Noise(hidden, shares(hidden, counted, units))


def complement(noise: Noise, counted: jax.Array, units: Units, *, stable: bool) -> Noise:
    """The same tokens, those hidden that were not; of a unit of which all were, none."""
    hidden = counted & ~noise.hidden
    return Noise(hidden, shares(hidden, counted, units, stable=stable))


def shares(hidden: jax.Array, counted: jax.Array, units: Units, *, stable: bool = False) -> jax.Array:
    """f32[rows, n]: of hidden tokens one over their unit's share of hidden ones, or 1 if stable; of others 0."""
    found = hidden.astype(jnp.float32)
    if stable:
        return found
    return found * units.total(counted.astype(jnp.float32)) / jnp.maximum(units.total(found), 1.0)


def log_linear_noise(t: jax.Array, eps: float = LEAST_KEPT) -> tuple[jax.Array, jax.Array]:
    """(sigma, its derivative by t), f32 as t: a token is hidden with probability 1 - exp(-sigma) = (1 - eps) t."""
    t = jnp.asarray(t, jnp.float32)
    return -jnp.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)


def _rank(draw: jax.Array, counted: jax.Array, units: Units) -> jax.Array:
    """i32[rows, n]: how many tokens of its unit that count have drawn less than each one."""
    rows, n = draw.shape
    slot = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (rows, n))
    # Units follow each other, so that sorting by them first leaves each where it is.
    order = jax.lax.sort((units.first, jnp.where(counted, draw, 2.0), slot), num_keys=2)[2]
    return jnp.argsort(order, axis=1).astype(jnp.int32) - units.first
