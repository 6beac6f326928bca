"""Top-p: a token takes its most probable experts until they have the probability p together (Huang et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, z_loss
from adaptive.layers.moe.settings import Balanced, MoESettings
from adaptive.layers.moe.varying import by_rank, one_expert
from adaptive.layers.site import Site
from adaptive.routing.losses import averaged
from adaptive.routing.masked import share_loss
from adaptive.routing.select import top_choices
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Balanced):
    """p=0.4 is that of published baselines."""

    p: float = ranged(0.4, above=0, below=1)
    most: int = ranged(0, least=0)  # experts of a token at most, the static bound; 0: all
    entropy_coefficient: float = ranged(1e-4, least=0)  # no source prints it

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if self.most > config.experts:
            raise RecipeError(f"{at}.router.most={self.most}: must be 0, or 1 to {at}.experts={config.experts}")

    def coefficients(self) -> dict[str, float]:
        return super().coefficients() | {"router_entropy_loss": self.entropy_coefficient}

    def against_dropping(self, at: str) -> str:
        return f"raise {at}.router.most"


class Router(ExpertRouter):
    """Experts by descending probability, up to and including the one at which their sum exceeds p.

    weight  f32[width, experts]

    Weights are the probabilities of those that were kept over their sum. experts_per_token is the average that the
    account of compute expects, and nothing else.

    load_balancing_loss  E sum_e P_e n_e / sum n, n counted before `most` cuts
    router_entropy_loss  mean entropy of p, which keeps the number of experts from drifting up

    stats: truncated f32[], the pairs that `most` cut.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        self.most = self.options.most or config.experts

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        p = jax.nn.softmax(logits, axis=-1)
        index = top_choices(context.among(logits), c.experts)
        ranked = jax.lax.stop_gradient(jnp.take_along_axis(p, index, axis=-1))
        ahead = jnp.cumsum(ranked, axis=-1)[..., :-1]
        wanted = jnp.concatenate([jnp.ones_like(index[..., :1], bool), ahead <= o.p], axis=-1)
        dispatch, load, stats = by_rank(c, logits, index, wanted, self.most, self.most, context, claims_all=True)
        entropy = -(p * jax.nn.log_softmax(logits, axis=-1)).sum(-1)
        losses = {
            "load_balancing_loss": share_loss(p, load, context.present),
            "router_entropy_loss": averaged(entropy, context.present),
            "router_z_loss": z_loss(logits, context.present),
        }
        return Routing(dispatch, losses, stats, {}, logits)

    def no_gradient(self) -> str:
        return "" if self.most > 1 else one_expert("most=1")
