"""A mixture of experts in place of a feed-forward: scores -> Dispatch -> experts -> weighted sum."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.moe import routers
from adaptive.layers.moe.base import Context, RoutedLayer, Routing, poisoned, shape_in
from adaptive.layers.moe.compute import computed
from adaptive.layers.moe.experts import Experts
from adaptive.layers.moe_config import MoEConfig
from adaptive.layers.site import Site


class MoE(RoutedLayer):
    """y = sum_e g_e FFN_e(x) + zero experts + shared(x).

    A token without any expert gets 0 (plus the shared feed-forward): it passes by the block's residual. The weighted
    sum is float32.
    """

    def __init__(self, config: MoEConfig, hidden: int, site: Site, key: jax.Array):
        """hidden: width of each expert where the configuration leaves it open."""
        router, experts, shared = jax.random.split(key, 3)
        config = dataclasses.replace(config, expert_size=config.expert_size or hidden)
        self.config = config
        self.router = routers.module(config.router).Router(config, site, router)
        self.reads_previous, self.choices = self.router.reads_previous, self.router.choices
        self.experts = Experts(config, config.expert_size, site, experts)
        self.shared = (
            FeedForward(site.width, config.shared_size, site.std, shared, site.stack) if config.shared_size else None
        )

    @classmethod
    def shape_of(cls, arrays: Mapping[str, jax.Array]) -> tuple[int, int, dict[str, Any]]:
        experts, width, hidden = shape_in(arrays, "experts.up", 3)
        shared = arrays["shared.up"].shape[-1] if "shared.up" in arrays else 0
        gated = "experts.gate" in arrays
        return width, hidden, {"experts": experts, "expert_size": hidden, "shared_size": shared, "gated": gated}

    def routed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        """The layer's output and its router's whole decision."""
        routing = self.router(x, context)
        y, lost = computed(self.experts, x * self.router.input_scale, routing.dispatch, self.router.execution(context))
        routing.stats["lost"] = lost
        zero = self.router.zero_output(x, routing.dispatch.zero_weights)
        for part in (zero, None if self.shared is None else self.shared(x)):
            y = y if part is None else y + part.astype(y.dtype)
        return poisoned(y, routing.logits).astype(x.dtype), routing

    def coefficients(self) -> dict[str, float]:
        return self.router.coefficients()

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return self.router.joint_losses(parts)

    def update(self, stats: dict[str, jax.Array]) -> None:
        self.router.update(stats)

    def flops(self, tokens: float, width: int) -> tuple[float, float]:
        c = self.config
        experts = (6.0 if c.gated else 4.0) * self.router.pairs(tokens) * width * c.expert_size
        return self.router.router_flops(tokens), experts + 6.0 * tokens * width * c.shared_size

    def router_train_flops(self, tokens: float, width: int) -> float:
        return self.router.router_train_flops(tokens)

    def describe(self) -> str:
        c = self.config
        zero = f" and {self.router.zero_experts} that compute nothing" * bool(self.router.zero_experts)
        shared = f", and {c.shared_size} shared hidden units" * bool(c.shared_size)
        return f"{c.experts} experts of {c.expert_size} hidden units{zero}, {c.experts_per_token:g} per token{shared}"

    def no_gradient(self) -> str:
        return self.router.no_gradient()

    def refuse_generation(self) -> str:
        return self.router.refuse_generation()

    def selects_alike(self) -> bool:
        return self.router.selects_alike()


def routed_layer(config: MoEConfig, hidden: int, site: Site, key: jax.Array) -> RoutedLayer:
    """The layer of the router that `config` names: a MoE, or the router's own kind of layer."""
    module = routers.module(config.router)
    return getattr(module, "Layer", MoE)(config, hidden, site, key)


def abstract_layer(config: MoEConfig, hidden: int, site: Site) -> RoutedLayer:
    """The layer with shapes in place of arrays, for arithmetic."""
    return nnx.eval_shape(lambda: routed_layer(config, hidden, site, jax.random.key(0)))


def layer_from_weights(router: str, weights: Mapping[str, Any], **settings: Any) -> RoutedLayer:
    """One layer with explicit weights.

    router    name of a router
    weights   path in the layer -> array: "router.weight" f32[width, choices], "experts.up" and, unless gated=False,
              "experts.gate" f32[experts, width, hidden], "experts.down" f32[experts, hidden, width]; "shared.gate",
              "shared.up", "shared.down"; a router's further parameters and buffers by their names in its file, and so
              all of a router that is a `Layer`. Buffers may be left out and start as in a fresh model
    settings  fields of MoEConfig; `options` as a dict of the router's own settings

    Raises RecipeError for names that are unknown or missing and shapes that do not fit.
    """
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    width, hidden, implied = getattr(routers.module(router), "Layer", MoE).shape_of(arrays)
    options = implied.pop("options", {}) | settings.pop("options", {})
    spelt = tuple(f"{name}={_spelt(value)}" for name, value in options.items())
    config = MoEConfig(router=router, options=spelt, **(implied | settings))
    config.validate(1)
    build = lambda: routed_layer(config, hidden, Site(width), jax.random.key(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(build))
    fresh = None
    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}
    unknown = sorted(set(arrays) - set(paths))
    missing = sorted(name for name, path in paths.items() if name not in arrays and isinstance(flat[path], nnx.Param))
    if unknown or missing:
        raise RecipeError(
            f"a layer of router {router} has {', '.join(sorted(paths))}"
            + (f"; unknown: {', '.join(unknown)}" * bool(unknown))
            + (f"; missing: {', '.join(missing)}" * bool(missing))
        )
    for name, path in paths.items():
        if name not in arrays:
            fresh = fresh or dict(nnx.to_flat_state(nnx.state(build())))
            flat[path] = fresh[path]
        elif arrays[name].shape != flat[path].shape:
            raise RecipeError(f"{name} has shape {list(arrays[name].shape)}, expected {list(flat[path].shape)}")
        else:
            flat[path] = flat[path].replace(arrays[name])
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
