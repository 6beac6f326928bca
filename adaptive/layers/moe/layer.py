"""A mixture of experts in place of a feed-forward: scores -> Dispatch -> experts -> weighted sum."""

import dataclasses
import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.feed_forwards.dense import Dense
from adaptive.layers.moe.base import Context, ExpertRouter, RoutedLayer, Routing, poisoned, shape_in
from adaptive.layers.moe.compute import computed
from adaptive.layers.moe.experts import Experts
from adaptive.layers.moe.settings import MoESettings, RouterSettings
from adaptive.layers.site import Site
from adaptive.routing.types import Summed
from adaptive.settings import check_ranges, hints, parse, show, without_effect

# What asks for nothing of a router that does not have the setting.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "experts_per_token": (2,),
    "capacity_factor": (0,),
    "capacity_group": ("sequence",),
    "drop": ("weight",),
    "balance_coefficient": (0, 0.01),
    "z_coefficient": (0,),
}


class MoE(RoutedLayer):
    """y = sum_e g_e FFN_e(x) + zero experts + shared(x).

    A token without any expert gets 0 (plus the shared feed-forward): it passes by the block's residual. The weighted
    sum is float32.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        router, experts, shared = jax.random.split(key, 3)
        self.settings, self.site = config, site
        self.router: ExpertRouter = _file_of(config.router.kind()).Router(config, site, router)
        self.reads_previous, self.choices = self.router.reads_previous, self.router.choices
        self.experts = Experts(config, site, experts)
        self.shared = Dense(site, config.shared_size, shared) if config.shared_size else None

    @classmethod
    def shape_of(cls, arrays: Mapping[str, jax.Array]) -> tuple[int, dict[str, Any]]:
        experts, width, hidden = shape_in(arrays, "experts.up", 3)
        shared = arrays["shared.up"].shape[-1] if "shared.up" in arrays else 0
        gated = "experts.gate" in arrays
        return width, {"experts": experts, "expert_size": hidden, "shared_size": shared, "gated": gated}

    def routed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        x = jnp.asarray(x)
        routing = self.router(x, context)
        y, lost = computed(self.experts, x * self.router.input_scale, routing.dispatch, self.router.execution(context))
        routing.stats["lost"] = lost
        zero = self.router.zero_output(x, routing.dispatch.zero_weights)
        for part in (zero, None if self.shared is None else self.shared(x)):
            y = y if part is None else y + part.astype(y.dtype)
        return poisoned(y, routing.logits).astype(x.dtype), routing

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, Summed]:
        return self.router.joint_losses(parts)

    def update(self, stats: dict[str, jax.Array]) -> None:
        self.router.update(stats)

    def describe(self) -> str:
        c = self.settings
        zero = f" and {self.router.zero_experts} that compute nothing" if self.router.zero_experts else ""
        shared = f", and {c.shared_size} shared hidden units" if c.shared_size else ""
        return f"{c.experts} experts of {c.expert_size} hidden units{zero}, {c.router.per_token():g} per token{shared}"

    def no_gradient(self) -> str:
        return self.router.no_gradient()

    def refuse_generation(self) -> str:
        return self.router.refuse_generation()

    def selects_alike(self) -> bool:
        return self.router.selects_alike()


def routed_layer(config: MoESettings, site: Site, key: jax.Array) -> RoutedLayer:
    """The layer of the router that `config` names: a MoE, or the router's own kind of layer."""
    return layer_kind(config.router.kind())(config, site, key)


def layer_kind(router: str) -> Any:
    """What the router of this name makes a layer of: a MoE, or its own kind."""
    return getattr(_file_of(router), "Layer", MoE)


def _file_of(router: str) -> Any:
    own, colon, _ = router.partition(":")  # a part of the user's own is MODULE:NAME
    return importlib.import_module(own if colon else f"{RouterSettings.door}.{router}")


def layer_from_weights(router: str, weights: Mapping[str, Any], **settings: Any) -> RoutedLayer:
    """One layer with explicit weights.

    router    name of a router
    weights   path in the layer -> array: "router.weight" f32[width, choices], "experts.up" and, unless gated=False,
              "experts.gate" f32[experts, width, hidden], "experts.down" f32[experts, hidden, width]; "shared.gate",
              "shared.up", "shared.down"; a router's further parameters and buffers by their names in its file, and so
              all of a router that is a `Layer`. Buffers may be left out and start as in a fresh model, and so may
              biases (zeros), gains (ones) and temperatures
    settings  those of the layer (`MoESettings`) and of its router, whose own may also be given as a dict, `options`

    Raises RecipeError for names that are unknown or missing and shapes that do not fit. Settings of the router that
    mean nothing beside the others are named by one UserWarning.
    """
    kind = RouterSettings.member(router, where="router")
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
    width, implied = layer_kind(router).shape_of(arrays)
    given = implied | settings.pop("options", {}) | settings
    config = _settings(kind, given)
    check_ranges(config, "settings.")
    config.check(width, "settings")
    own = config.router
    if idle := [f"{name}={show(getattr(own, name))} has no effect: {why}" for name, why in without_effect(own).items()]:
        warnings.warn(f"router {router}: {'; '.join(idle)}", stacklevel=2)
    return _filled(config, width, arrays)


def _settings(kind: type[RouterSettings], given: dict[str, Any]) -> MoESettings:
    """The settings of a layer from those given by name, the router's among them."""
    layer, own = ({f.name: hints(cls)[f.name] for f in dataclasses.fields(cls)} for cls in (MoESettings, kind))
    of_layer, of_router = {}, {}
    for name, value in given.items():
        if name in own:
            of_router[name] = parse(own[name], show(value), where=f"settings.router.{name}")
        elif name in layer and name != "router":
            of_layer[name] = parse(layer[name], show(value), where=f"settings.{name}")
        elif value not in WITHOUT_EFFECT.get(name, ()):
            known = ", ".join(f"{f.name}={show(f.default)}" for f in dataclasses.fields(kind))
            raise RecipeError(f"settings: the router {kind.kind()} has no setting {name!r}; it has {known or 'none'}")
    return MoESettings(kind(**of_router), **of_layer)


def _filled(config: MoESettings, width: int, arrays: dict[str, jax.Array]) -> RoutedLayer:
    """A layer that holds these arrays, by path, and where they hold none fresh buffers and what starts alike in every
    model."""
    build = lambda: routed_layer(config, Site(width), jax.random.key(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}
    unknown = sorted(set(arrays) - set(paths))
    missing = sorted(name for name, path in paths.items() if name not in arrays and _drawn(flat[path]))
    if unknown or missing:
        raise RecipeError(
            f"a layer of router {config.router.kind()} has {', '.join(sorted(paths))}"
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    for name, value in arrays.items():
        if value.shape != flat[paths[name]].shape:
            raise RecipeError(f"{name} has shape {list(value.shape)}, expected {list(flat[paths[name]].shape)}")
    absent = [path for name, path in paths.items() if name not in arrays]
    # Compiled, so that nothing else of a fresh layer is made.
    fresh = jax.jit(lambda: [dict(nnx.to_flat_state(nnx.state(build())))[path][...] for path in absent])
    values = dict(zip(absent, fresh() if absent else [], strict=True)) | {
        paths[n]: value for n, value in arrays.items()
    }
    flat = {path: leaf.replace(values[path]) for path, leaf in flat.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def _drawn(value: nnx.Variable) -> bool:
    """Whether a fresh one is random, so that explicit weights have to say it."""
    return isinstance(value, nnx.Param) and value.get_metadata()["role"] not in ("bias", "scale")
