"""Auxiliary losses of depth routing, and what losses of all kinds are made of; all float32."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive.routing.types import Summed

Sums = dict[str, jax.Array]


def mean_over(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Mean f32[] of `values` over the positions where `where` holds (None: all); 0 over no positions."""
    if where is None:
        return values.mean()
    return jnp.where(where, values, 0.0).sum() / jnp.maximum(where.sum(), 1)


def averaged(values: jax.Array, where: jax.Array | None) -> Summed:
    """The same mean, as a loss."""
    count = jnp.float32(values.size) if where is None else where.sum().astype(jnp.float32)
    total = values.sum() if where is None else jnp.where(where, values, 0.0).sum()
    return Summed({"total": total, "count": count}, _mean)


def of_micro_batch(value: jax.Array) -> Summed:
    """A loss f32[] that no sums over a batch give: of a batch, the mean over its micro-batches."""
    return Summed({"total": value, "count": jnp.ones((), jnp.float32)}, _mean)


def _mean(sums: Sums) -> jax.Array:
    return sums["total"] / jnp.maximum(sums["count"], 1.0)


@dataclasses.dataclass(frozen=True)
class Product:
    """scale * sum_i (weight_i / tokens) (claims_i / tokens), of sums weight and claims f32[choices], tokens f32[]."""

    scale: float

    def __call__(self, sums: Sums) -> jax.Array:
        tokens = jnp.maximum(sums["tokens"], 1.0)
        return self.scale * (sums["weight"] / tokens * sums["claims"] / tokens).sum()


@dataclasses.dataclass(frozen=True)
class _OfCalls:
    """The mean, or the sum, of what `form` makes of each entry of the leading axis."""

    form: Callable[[Any], jax.Array]
    mean: bool

    def __call__(self, sums: Any) -> jax.Array:
        each = jax.vmap(self.form)(sums)
        return each.mean() if self.mean else each.sum()


def of_calls(loss: Summed, *, mean: bool = True) -> Summed:
    """The mean (or the sum) of a loss over calls, whose sums have a leading axis of them."""
    return Summed(loss.sums, _OfCalls(loss.form, mean))


@dataclasses.dataclass(frozen=True)
class _Together:
    forms: tuple[Callable[[Any], jax.Array], ...]

    def __call__(self, sums: Any) -> jax.Array:
        each = (form(own) for form, own in zip(self.forms, sums, strict=True))
        return sum(each, start=jnp.zeros((), jnp.float32))


def together(losses: Sequence[Summed]) -> Summed:
    """The sum of several losses."""
    return Summed([loss.sums for loss in losses], _Together(tuple(loss.form for loss in losses)))


def sampling_loss(logits: jax.Array, chosen: jax.Array, candidates: jax.Array | None) -> Summed:
    """Binary cross entropy that teaches a router to decide alone what top-k decided over the sequence.

    logits f32[batch, n], chosen bool[batch, n], candidates bool[batch, n] or None: all are.
    The mean over one recursion's candidates (MoR paper, appendix on routing); callers sum over recursions.
    """
    bce = optax.sigmoid_binary_cross_entropy(logits, chosen.astype(jnp.float32))
    return averaged(bce, candidates)


def router_z_loss(logits: jax.Array, where: jax.Array | None) -> Summed:
    """Mean of logsumexp(logits over choices)^2; logits f32[batch, n, choices], where bool[batch, n] or None."""
    return averaged(jnp.square(jax.nn.logsumexp(logits, axis=-1)), where)


def balancing_loss(probabilities: jax.Array, choice: jax.Array, where: jax.Array | None) -> Summed:
    """sum_i f_i P_i: 1 when softmax routing is perfectly balanced (MoR paper, section 2.2).

    probabilities f32[batch, n, choices] (after alpha), choice i32[batch, n]; f_i is `choices` times the share of tokens
    that chose i, P_i the mean probability of i. The gradient goes through P alone.
    """
    choices = probabilities.shape[-1]
    there = jnp.ones(choice.shape, jnp.float32) if where is None else where.astype(jnp.float32)
    weight = (probabilities * there[..., None]).sum((0, 1))
    sums = {"weight": weight, "claims": counts_of(choice, choices, where), "tokens": there.sum()}
    return Summed(sums, Product(choices))


def counts_of(choice: jax.Array, choices: int, where: jax.Array | None) -> jax.Array:
    """Tokens of each choice, f32[choices]; choice i32[batch, n], where bool[batch, n] or None."""
    chosen = choice[..., None] == jnp.arange(choices)
    return (chosen if where is None else chosen & where[..., None]).sum((0, 1)).astype(jnp.float32)


def updated_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Loss-free balancing: bias f32[choices] moved by `rate` towards the underloaded (MoR paper, section 2.2).

    load f32[choices], over all devices and micro-batches of the step.
    """
    return bias + rate * jnp.sign(load.mean() - load)
