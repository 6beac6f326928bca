"""DynaMoE: experts above a threshold, at most so many by layer (arXiv 2603.01697).

No formula of the paper could be confirmed and its code is not public; this is our reading of it.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, z_loss
from adaptive.layers.moe.settings import Balanced, MoESettings
from adaptive.layers.moe.varying import by_rank, one_expert
from adaptive.layers.site import Buffer, Site, lead_axes
from adaptive.routing.masked import share_loss
from adaptive.routing.select import top_choices
from adaptive.settings import ranged

Schedule = Literal["uniform", "descending", "ascending", "pyramid_up", "pyramid_down", "wave"]


@dataclasses.dataclass(frozen=True)
class Settings(Balanced):
    """Which experts a token may have, and how many."""

    threshold: Literal["token", "batch", "ema"] = "ema"  # over what the quantile of logits is taken
    quantile: float | None = ranged(None, least=0, below=1)  # none: 1 - experts_per_token / experts
    schedule: Schedule = "uniform"  # of the most experts a token may have, over the layers
    least: int = ranged(1, least=1)  # of the schedule
    most: int = ranged(4, least=1)
    momentum: float = ranged(0.99, least=0, below=1)  # of threshold=ema, and of batch where it generates

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if not self.least <= self.most <= config.experts:
            raise RecipeError(
                f"{at}.router.least={self.least} and {at}.router.most={self.most}: the schedule {self.schedule} must "
                f"stay within 1 and {at}.experts={config.experts}, and least not exceed most"
            )

    def unread(self) -> dict[str, str]:
        return {"momentum": "threshold=token keeps no running threshold"} if self.threshold == "token" else {}

    def of_logits(self, config: MoESettings) -> float:
        """The quantile of the logits that is the threshold."""
        return 1 - self.experts_per_token / config.experts if self.quantile is None else self.quantile

    def limits(self, site: Site) -> tuple[int, ...]:
        """The most experts of a token in each of the site's layers, in the order of its buffers' leading axes."""
        every = limits(self.schedule, self.least, self.most, site.depth)
        return tuple(every[layer] for layer in layers_of(site))

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        experts, q = config.experts, self.of_logits(config)
        reach = (1 - q) * experts
        if self.threshold == "token":
            reach = experts - math.ceil(round(q * (experts - 1), 9))
        taken = [min(limit, max(1.0, reach)) for limit in self.limits(site)]
        return tokens * sum(taken) / len(taken)

    def against_dropping(self, at: str) -> str:
        return f"raise {at}.router.most"


class Router(ExpertRouter):
    """The experts whose logit reaches the threshold, best first, at least one and at most the layer's limit.

    weight     f32[width, experts]
    threshold  f32[], updates f32[]: buffers of the running threshold, unless threshold=token
    limit      f32[], a buffer that nothing moves: this layer's most experts per token

    Weights are the softmax over the active logits.

    threshold=token  a quantile of the token's own logits: but for ties a fixed number of experts,
                     E - ceil(q (E - 1)), whatever the token
    threshold=batch  the quantile of all logits of the batch: sees other tokens in training; generation takes the
                     running threshold
    threshold=ema    the running mean of that quantile over earlier steps: sees no other token

    schedule  limit of layer l = round(least + (most - least) s(u)), u = l / (layers - 1), halves to even
      descending 1 - u; ascending u; pyramid_up 1 - |2u - 1|; pyramid_down |2u - 1|; wave (1 + sin 2 pi u) / 2;
      uniform 1/2, the mean of the others

    load_balancing_loss  E sum_e P_e n_e / sum n, n the active ones
    stats: truncated f32[], pairs above the threshold and beyond the limit; quantile f32[] and quantiles f32[], sum and
    number of the batches' thresholds
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        o: Settings = self.options
        self.q, self.limits = o.of_logits(config), o.limits(site)
        lead = (site.uses,) * bool(site.uses) + site.stack
        axes = ("uses",) * bool(site.uses) + lead_axes(site.stack)
        self.limit = Buffer(jnp.asarray(self.limits, jnp.float32).reshape(lead), axes=axes)
        running = o.threshold != "token"
        self.threshold = site.buffer(jnp.zeros(())) if running else None
        self.updates = site.buffer(jnp.zeros(())) if running else None

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c = self.config
        logits = self.logits(x)
        index = top_choices(context.among(logits), c.experts)
        ranked = jax.lax.stop_gradient(jnp.take_along_axis(logits, index, axis=-1))
        measured = self._of_batch(ranked, context)
        wanted = (ranked >= self._threshold(ranked, measured, context)) | (jnp.arange(c.experts) == 0)
        dispatch, load, stats = by_rank(
            c, logits, index, wanted, self.limit[...], max(self.limits), context, claims_all=False
        )
        losses = {
            "load_balancing_loss": share_loss(jax.nn.softmax(logits, axis=-1), load, context.present),
            "router_z_loss": z_loss(logits, context.present),
        }
        if measured is not None:
            found = jnp.isfinite(measured)  # not where no token is present
            stats["quantile"] = jnp.where(found, measured, 0.0)
            stats["quantiles"] = found.astype(jnp.float32)
        return Routing(dispatch, losses, stats, {}, logits)

    def update(self, stats: dict[str, jax.Array]) -> None:
        if self.threshold is None or self.updates is None:
            return
        # The first updates are plain means, so that the threshold forgets its start at once.
        seen = stats["quantiles"] > 0
        rate = jnp.where(seen, jnp.maximum(1 - self.options.momentum, 1 / (self.updates[...] + 1)), 0.0)
        fresh = stats["quantile"] / jnp.maximum(stats["quantiles"], 1.0)
        self.threshold[...] = self.threshold[...] + rate * (fresh - self.threshold[...])
        self.updates[...] = self.updates[...] + seen

    def selects_alike(self) -> bool:
        return self.options.threshold != "batch"

    def no_gradient(self) -> str:
        return "" if max(self.limits) > 1 else one_expert("most=1")

    def _of_batch(self, ranked: jax.Array, context: Context) -> jax.Array | None:
        """The quantile f32[] of all logits of tokens that are present; NaN where none is."""
        if self.threshold is None:
            return None
        if context.present is not None:
            ranked = jnp.where(context.present[..., None], ranked, jnp.nan)
        return jnp.nanquantile(ranked.reshape(-1), self.q)

    def _threshold(self, ranked: jax.Array, measured: jax.Array | None, context: Context) -> jax.Array:
        if self.threshold is None or measured is None:
            return _quantile(ranked, self.q)
        if self.options.threshold == "batch" and context.selection == "topk":
            return measured
        return self.threshold[...]


def limits(schedule: Schedule, least: int, most: int, layers: int) -> list[int]:
    """The most experts of a token in each of `layers` layers."""
    shape = {
        "uniform": lambda u: 0.5,
        "descending": lambda u: 1 - u,
        "ascending": lambda u: u,
        "pyramid_up": lambda u: 1 - abs(2 * u - 1),
        "pyramid_down": lambda u: abs(2 * u - 1),
        "wave": lambda u: (1 + math.sin(2 * math.pi * u)) / 2,
    }[schedule]
    places = [layer / max(layers - 1, 1) for layer in range(layers)]
    return [round(least + (most - least) * round(shape(u), 9)) for u in places]


def layers_of(site: Site) -> list[int]:
    """Numbers of the site's layers in the unrolled network, in the order of its buffers' leading axes."""
    passes = site.uses or (site.stack[0] if len(site.stack) > 1 else 1)
    stride = site.stride or len(site.layers)
    return [layer + r * stride for r in range(passes) for layer in site.layers]


def _quantile(ranked: jax.Array, q: float) -> jax.Array:
    """f32[..., 1]: the quantile q of the last axis of `ranked`, sorted descending, between neighbours linearly."""
    place = round(q * (ranked.shape[-1] - 1), 9)  # in Python, so that a logit that is the quantile equals it
    below, part = math.floor(place), place % 1
    low = ranked[..., -1 - below, None]
    if not part:
        return low
    high = ranked[..., -2 - below, None]
    return jnp.minimum(low + part * (high - low), high)
