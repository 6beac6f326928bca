"""Adaptive computation modules: a prefix of N ordered learners computes each token (ACM, arXiv 2312.10193).

A small MLP picks k in 0..N per token; the output is b_0 + sum_{i<=k} o_i. The learners are the experts, slices of one
feed-forward as a rule, and a token's are 1..k with weight 1. Training picks by a straight-through Gumbel-softmax, all
else by the largest logit. This is the paper's third phase; in the first two the learners and then the gate learn from a
trained model.

The released gated forward leaves out the highest learner that was chosen; this one does not.
"""

import dataclasses
import itertools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.linear import scored
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe.gates import straight_through, where_present
from adaptive.layers.moe.settings import Execution, MoESettings, Scored
from adaptive.layers.site import Site, normal_param, param
from adaptive.routing.dispatch import by_mask
from adaptive.routing.losses import Sums, averaged, of_micro_batch
from adaptive.routing.types import Summed
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Scored):
    """The released recipe: the defaults, 4 learners; its budgets are experts_per_token / experts of 0.25 to 0.75."""

    even: ClassVar[bool] = False  # learners are nested

    gate_depth: int = ranged(3, least=1)  # linear maps of the gate
    gate_size: int = ranged(16, least=1)  # width between them
    tau: float = ranged(0.8, above=0)  # of the Gumbel-softmax
    least: int = ranged(0, least=0)  # the fewest learners of a token
    train: Literal["all", "taken"] = "all"  # learners that training computes; taken: no gradient from the others' gates
    budget_coefficient: float = ranged(0.1, least=0)
    entropy_coefficient: float = ranged(0.05, least=0)
    diversity_coefficient: float = ranged(0.05, least=0)

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if self.least >= config.experts:
            raise RecipeError(f"{at}.router.least={self.least}: must be below {at}.experts={config.experts}")

    def zeros(self) -> int:
        return 1

    def coefficients(self) -> dict[str, float]:
        return super().coefficients() | {
            "budget_loss": self.budget_coefficient,
            "usage_entropy_loss": self.entropy_coefficient,
            "diversity_loss": self.diversity_coefficient,
        }

    def sizes(self, config: MoESettings, width: int) -> tuple[int, ...]:
        """Widths of the gate, from its input to its logits."""
        return (width, *[self.gate_size] * (self.gate_depth - 1), config.choices)

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        return tokens * (config.experts if self.train == "all" else self.experts_per_token)

    def matrices(self, config: MoESettings, width: int) -> int:
        return sum(a * b for a, b in itertools.pairwise(self.sizes(config, width)))

    def vectors(self, config: MoESettings, width: int) -> int:
        return sum(self.sizes(config, width)[1:]) + width


class Router(ExpertRouter):
    """x -> number of learners.

    hidden.I.weight   f32[width or gate_size, gate_size], hidden.I.bias f32[gate_size]: the gate's maps but the last, I
                      from 0, each followed by a GELU
    weight            f32[gate_size, experts + 1], bias f32[experts + 1]: the last, one logit per number of learners
    base              f32[width]: b_0, which every token gets

    The last choice of the statistics and of the combine matrix is "no learner" (its weight is 1 where k = 0).

    budget_loss           |mean k / N - experts_per_token / experts|, over all layers and tokens
    usage_entropy_loss    -(entropy of how often each k is taken) / log(N + 1), mean over sequences and layers
    diversity_loss        -2 (mean over pairs of sequences of the difference of their mean k / N over all layers)
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        sizes = self.options.sizes(config, site.width)
        keys = jax.random.split(key, len(sizes) - 1)
        self.hidden = nnx.List(
            [_Map(*ends, site, k) for ends, k in zip(itertools.pairwise(sizes[:-1]), keys[1:], strict=True)]
        )
        self.weight = normal_param(keys[0], sizes[-2:], (None, None), _std(sizes[-2]), site.stack)
        self.bias = _zeros(self.choices, site)
        self.base = _zeros(site.width, site)

    def logits(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        for hidden in self.hidden:
            x = jax.nn.gelu(hidden(x), approximate=False)
        return scored(x, self.weight[...]) + self.bias[...]

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        o, n = self.options, self.config.experts
        logits = self.logits(x)
        allowed = jnp.where(jnp.arange(n + 1) < o.least, -1e9, logits)
        if context.replayed is not None:  # as many learners as were taken; the last choice is none at all
            number = context.replayed[..., :n].sum(-1, keepdims=True)
            allowed = jnp.where(jnp.arange(n + 1) == number, allowed, -1e9)
        count = straight_through(allowed, o.tau, context)
        present = where_present(context.present, x.shape[:2])[..., None]
        count = jnp.where(present, count, 0.0)
        weights = jnp.where(present, 1 - jnp.cumsum(count, axis=-1)[..., :n], 0.0)  # learner i: whether k > i
        taken = weights > 0
        everyone = context.training and o.train == "all" and context.replayed is None
        mask = jnp.broadcast_to(present, taken.shape) if everyone else taken
        dispatch = by_mask(mask, weights, zero_weights=jax.lax.stop_gradient(count[..., :1]))
        stop = jax.lax.stop_gradient
        claimed = jnp.append(taken.sum((0, 1)).astype(jnp.float32), stop(count[..., 0]).sum())
        stats = statistics(dispatch, logits, claimed, context.present)
        learners = count @ jnp.arange(n + 1, dtype=jnp.float32)
        stats |= {"dropped": jnp.zeros((), jnp.float32), "learners": stop(learners).sum()}
        tokens = present.sum((1, 2)).astype(jnp.float32)
        losses = {"usage_entropy_loss": _usage_entropy_loss(count.sum(1), tokens)}
        losses["router_z_loss"] = z_loss(logits, context.present)
        parts = {"compute": (count @ jnp.arange(n + 1, dtype=jnp.float32)).sum(-1) / n, "tokens": tokens}
        return Routing(dispatch, losses, stats, parts, logits)

    def zero_output(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.base[...], x.shape)

    def execution(self, context: Context) -> Execution:
        if self.config.execution != "auto" or (context.training and self.options.train == "all"):
            return self.config.execution
        return "ragged"

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, Summed]:
        compute, tokens = parts["compute"].sum(0), parts["tokens"].sum(0)  # of each sequence, over all layers
        target = self.options.experts_per_token / self.config.experts
        budget = Summed({"compute": compute.sum(), "tokens": tokens.sum()}, _OffTarget(target))
        share = compute / jnp.maximum(tokens, 1.0)
        pairs = max(len(share) * (len(share) - 1), 1)
        difference = jnp.abs(share[:, None] - share).sum() / pairs
        return {"budget_loss": budget, "diversity_loss": of_micro_batch(-2 * difference)}


@dataclasses.dataclass(frozen=True)
class _OffTarget:
    target: float

    def __call__(self, sums: Sums) -> jax.Array:
        return jnp.abs(sums["compute"] / jnp.maximum(sums["tokens"], 1.0) - self.target)


class _Map(nnx.Module):
    """x weight + bias, float32."""

    def __init__(self, inner: int, outer: int, site: Site, key: jax.Array):
        self.weight = normal_param(key, (inner, outer), (None, None), _std(inner), site.stack)
        self.bias = _zeros(outer, site)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, self.weight[...], precision=jax.lax.Precision.HIGHEST) + self.bias[...]


def _std(inner: int) -> float:
    """A narrow gate of several maps would hardly tell tokens apart with the weights of a wide one."""
    return 1 / math.sqrt(inner)


def _zeros(size: int, site: Site) -> nnx.Param:
    return param(jnp.zeros((*site.stack, size)), (None,), stack=site.stack, role="bias")


def _usage_entropy_loss(counts: jax.Array, tokens: jax.Array) -> Summed:
    """-(normalised entropy of counts f32[batch, choices] over tokens f32[batch]), mean over sequences that have any."""
    share = counts / jnp.maximum(tokens, 1.0)[:, None]
    # A choice that nobody takes adds nothing, with a finite slope.
    entropy = -(share * jnp.log(jnp.maximum(share, 1e-9))).sum(-1) / math.log(counts.shape[-1])
    return averaged(-entropy, tokens > 0)
