"""VersatileFFN: one feed-forward used in width and in depth (arXiv 2512.14531; huawei-noah's released code).

    F(h)    = h + FFN(norm(h))
    depth   H^0 = x, H^l = F(H^{l-1}), l = 1..loops; Y_d = sum_l p_l H^l with p a straight-through Gumbel-softmax
            of x W_loop
    width   virtual experts are slices of FFN's hidden units; top-k of x W_g, softmax over the k;
            Y_w = sum_k g_k (x + FFN_k(norm(x)))
    mix     E = sum_l l p_l, lambda = (loops - E) / loops; Y = (1 - lambda) Y_d + lambda Y_w

Outside training p is the largest logit. Then each token pays for its own loops alone, and for the width path unless it
takes all loops; in training every token computes everything, which the gradient needs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards.dense import Dense
from adaptive.layers.linear import use
from adaptive.layers.moe.base import Context, RoutedLayer, Routing, poisoned, shape_in, statistics, z_loss
from adaptive.layers.moe.choosing import mask_of
from adaptive.layers.moe.compute import computed
from adaptive.layers.moe.experts import Weights
from adaptive.layers.moe.gates import LinearGate, straight_through, where_present
from adaptive.layers.moe.settings import Chosen, Execution, ExpertCost, MoESettings
from adaptive.layers.norm import RMSNorm
from adaptive.layers.site import Site
from adaptive.routing.balance import balancing_loss, claims
from adaptive.routing.dispatch import by_token
from adaptive.routing.select import top_choices
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Chosen):
    """The release: the defaults, with 8 experts of an eighth of the feed-forward each, 2 per token and a balancing loss
    of 5e-5."""

    own_norm: ClassVar[bool] = True
    weighs_sum: ClassVar[bool] = True

    hidden: int = ranged(1408, least=1)  # hidden width of the feed-forward, of which expert_size units are a slice
    loops: int = ranged(4, least=1)  # the most times that the feed-forward is applied
    slices: Literal["equal", "strided"] = "equal"  # equal: adjacent; strided: of expert_size, evenly spread (the paper)
    tau: float = ranged(5.0, above=0)  # of the Gumbel-softmax: the first, the factor of every step, the last
    tau_decay: float = ranged(0.99984, above=0, most=1)
    tau_last: float = ranged(0.1, above=0)

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if config.shared_size or not config.gated or config.activation != "silu":
            raise RecipeError(
                f"{at}.router=versatile has one SwiGLU feed-forward: leave {at}.shared_size, {at}.gated and "
                f"{at}.activation as they are"
            )
        size, total = config.expert_size, config.experts * config.expert_size
        if total != self.hidden if self.slices == "equal" else size > self.hidden:
            near = f"{self.hidden / config.experts:g}" if self.slices == "equal" else f"1 to {self.hidden}"
            raise RecipeError(
                f"{at}.expert_size={size}: {config.experts} {self.slices} slices of a feed-forward with "
                f"{at}.router.hidden={self.hidden} units need {near}"
            )

    def layer_parameters(self, config: MoESettings, width: int) -> int:
        return width + 3 * width * self.hidden + width * (config.experts + self.loops)

    def layer_cost(self, config: MoESettings, tokens: float, site: Site) -> ExpertCost:
        routers = 2.0 * tokens * site.width * (config.experts + self.loops)
        units = self.loops * self.hidden + self.experts_per_token * config.expert_size
        return ExpertCost(routers, 3 * routers, 6.0 * tokens * site.width * units)


class Layer(RoutedLayer):
    """Y - x of the formulas above: it normalises its input itself, and the decoder adds x.

    norm.weight                       f32[width], before every application
    feed_forward.gate, .up            f32[width, hidden], feed_forward.down f32[hidden, width]
    router.weight                     f32[width, experts]  W_g; reads x before the norm
    loops.weight                      f32[width, loops]    W_loop; likewise
    tau                               f32[], the buffer of the annealing

    The dispatch is that of the width path, before lambda; outside training it leaves out tokens with all loops.
    load_balancing_loss is E sum_e P_e n_e / (T k) over the softmax of all experts (the release does not show its
    formula).
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        feed_forward, router, loops = jax.random.split(key, 3)
        self.settings, self.site = config, site
        assert isinstance(config.router, Settings)
        self.options = o = config.router
        self.choices, self.further = config.choices, o.loops
        self.hidden, self.k, self.size = o.hidden, o.experts_per_token, config.expert_size
        self.norm = RMSNorm(site.width, site.norm_eps, site.stack)
        self.feed_forward = Dense(site, o.hidden, feed_forward)
        self.router = LinearGate(config.experts, site, router)
        self.loops = LinearGate(o.loops, site, loops)
        self.tau = site.buffer(jnp.array(o.tau))

    @classmethod
    def shape_of(cls, arrays: Mapping[str, jax.Array]) -> tuple[int, dict[str, Any]]:
        width, hidden = shape_in(arrays, "feed_forward.up", 2)
        experts = shape_in(arrays, "router.weight", 2)[1]
        loops = shape_in(arrays, "loops.weight", 2)[1]
        return width, {"experts": experts, "expert_size": hidden // experts, "hidden": hidden, "loops": loops}

    def routed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        c, o, x = self.settings, self.options, jnp.asarray(x)
        present = where_present(context.present, x.shape[:2])
        loops = self.loops(x)
        if context.replayed is not None:
            loops = jnp.where(context.replayed[..., c.experts :], loops, -1e9)
        taken = straight_through(loops, self.tau[...], context)  # [batch, seq, loops]
        mean_loops = (taken * jnp.arange(1, o.loops + 1, dtype=jnp.int32)).sum(-1)
        width_share = (o.loops - mean_loops) / o.loops

        logits = self.router(x)
        index = top_choices(context.among(logits), self.k)
        weights = jax.nn.softmax(jnp.take_along_axis(logits, index, axis=-1), axis=-1)
        wanted = context.wanted(index, jnp.broadcast_to(present[..., None], index.shape))
        computes = wanted if context.training else wanted & (width_share > 0)[..., None]
        dispatch = by_token(index, weights, computes, c.experts)
        slices = _Matrices(self._slices(x.dtype))
        execution = c.execution if context.training or c.execution != "auto" else "ragged"
        wide, lost = computed(slices, self.norm(x), dispatch, execution)

        deep = self._mixed(x, taken) if context.training else self._looped(x, taken, present)
        share = jnp.where(present, width_share, 0.0)[..., None]
        y = poisoned(share * wide + (1 - share) * deep, logits)

        load = claims(index, wanted, c.experts)
        stats = statistics(dispatch, logits, load.sum(0), context.present)
        stats |= {"lost": lost, "loops": jnp.where(present[..., None], jax.lax.stop_gradient(taken), 0.0).sum((0, 1))}
        probabilities = jax.nn.softmax(logits, axis=-1)
        losses = {
            "load_balancing_loss": balancing_loss(probabilities, index, wanted, context.present, "switch"),
            "router_z_loss": z_loss(logits, context.present),
        }
        chosen = jnp.concatenate([mask_of(index, wanted, c.experts), taken > 0.5], axis=-1)
        return y.astype(x.dtype), Routing(dispatch, losses, stats, {}, logits, chosen)

    def update(self, stats: dict[str, jax.Array]) -> None:
        self.tau[...] = jnp.maximum(self.tau[...] * self.options.tau_decay, self.options.tau_last)

    def describe(self) -> str:
        c = self.settings
        return (
            f"a feed-forward of {self.hidden} hidden units, {self.k} of its {c.experts} slices of {self.size} or up to "
            f"{self.options.loops} times the whole"
        )

    # Parts

    def _mixed(self, x: jax.Array, taken: jax.Array) -> jax.Array:
        """Y_d - x, f32[batch, seq, width], with every loop computed for every token."""
        h, y = x, jnp.zeros(x.shape, jnp.float32)
        for loop in range(self.options.loops):  # the paper's index
            h = h + self.feed_forward(self.norm(h))
            y = y + taken[..., loop, None] * (h - x).astype(jnp.float32)
        return y

    def _looped(self, x: jax.Array, taken: jax.Array, present: jax.Array) -> jax.Array:
        """The same where each token computes its own number of loops alone."""
        one = _Matrices({name: w[None] for name, w in self._weights(x.dtype).items()})
        count = jnp.where(present, jnp.argmax(taken, axis=-1) + 1, 0)
        execution: Execution = "dense" if self.settings.execution == "dense" else "ragged"
        h = x
        for loop in range(self.options.loops):
            index = jnp.zeros((*count.shape, 1), jnp.int32)
            dispatch = by_token(index, jnp.ones(index.shape, jnp.float32), (count > loop)[..., None], 1)
            h = h + computed(one, self.norm(h), dispatch, execution)[0].astype(x.dtype)
        return (h - x).astype(jnp.float32)

    def _weights(self, dtype: jax.typing.DTypeLike) -> Weights:
        f = self.feed_forward
        return {"gate": use(f.gate, dtype), "up": use(f.up, dtype), "down": use(f.down, dtype)}

    def _slices(self, dtype: jax.typing.DTypeLike) -> Weights:
        """The virtual experts: gate, up [experts, width, size], down [experts, size, width]."""
        whole, n, size = self._weights(dtype), self.settings.experts, self.size
        if self.options.slices == "equal":
            inward = lambda w: w.reshape(-1, n, size).swapaxes(0, 1)  # noqa: E731
            outward = whole["down"].reshape(n, size, -1)
        else:
            units = hidden_units(n, size, self.hidden)
            inward = lambda w: w[:, units].swapaxes(0, 1)  # noqa: E731
            outward = whole["down"][units]
        return {"gate": inward(whole["gate"]), "up": inward(whole["up"]), "down": outward}


def hidden_units(experts: int, size: int, hidden: int) -> jax.Array:
    """i32[experts, size]: expert i has `size` adjacent units from floor(i (hidden - size) / (experts - 1)) on."""
    starts = jnp.arange(experts, dtype=jnp.int32) * (hidden - size) // max(experts - 1, 1)
    return starts[:, None] + jnp.arange(size, dtype=jnp.int32)


class _Matrices:
    """Matrices of a feed-forward, already in the compute dtype, as experts."""

    activation: str = "silu"

    def __init__(self, weights: Weights):
        self._weights = weights

    def weights(self, dtype: jax.typing.DTypeLike) -> Weights:
        return self._weights

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        inward = ("experts", "width", "expert_ff")
        return {"gate": inward, "up": inward, "down": ("experts", "expert_ff", "width")}
