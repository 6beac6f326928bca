"""Models that no family of the library has, for the modelling file that is written beside them.

config.json has the settings tree under `adaptive`, and `layout`: of each parameter by its path [name, shape,
transposed, rows, axis, offset] of every tensor that it is made of. Their names are those of the authors' code where
that has such models, else the parameters' own paths.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.interop.families import Family
from adaptive.interop.fields import Fields
from adaptive.interop.tensors import Layout, Part, one
from adaptive.layers import stack
from adaptive.layers.moe.settings import MoESettings
from adaptive.layers.site import passes_of
from adaptive.models import language_model
from adaptive.models.bodies import Body, hnet, plain, recursive
from adaptive.settings import read, to_tree

KIND = "adaptive"
_MIXERS, _FEED_FORWARDS = ("attention", "mamba2"), ("dense", "mlp", "experts")
_ROUTERS = ("token_choice", "expert_choice", "top_p", "dynamoe", "remoe", "blockffn", "adamoe", "longcat", "acm",
            "moe_pp", "duo_llm", "versatile")  # fmt: skip
_DEPTHS = ("all", "expert_choice", "token_choice", "mixture_of_depths")
_CHUNKERS = ("dynamic", "similarity", "stride", "none", "space")
_CODE = "modeling_adaptive"


def refused(settings: language_model.Settings) -> str:
    """Why the modelling file does not compute such a model; empty where it does."""
    return _refused_body(settings.body)


def _refused_body(body: Body) -> str:
    if isinstance(body, plain.Settings):
        return _refused_stack(body.stack)
    if isinstance(body, hnet.Settings):
        if body.chunker.kind() not in _CHUNKERS:
            return f"it has no chunker={body.chunker.kind()}, only {', '.join(_CHUNKERS)}"
        return _refused_stack(body.encoder) or _refused_stack(body.decoder) or _refused_body(body.inner)
    if not isinstance(body, recursive.Settings):
        return f"it has no body={body.kind()}, only plain, recursive and hnet"
    depth = body.depth
    if depth.kind() not in _DEPTHS:
        return f"it has no depth={depth.kind()}, only {', '.join(_DEPTHS)}"
    if getattr(depth, "random", False):
        return "depth.random=true draws depths, and nothing there would draw the same"
    return next((why for own in (body.core, *body.ends) if (why := _refused_stack(own))), "")


def _refused_stack(own: stack.Settings) -> str:
    for block in own.blocks:
        if block.mixer is not None and block.mixer.kind() not in _MIXERS:
            return f"it has no mixer={block.mixer.kind()}, only {', '.join(_MIXERS)}"
        if block.feed_forward is not None and block.feed_forward.kind() not in _FEED_FORWARDS:
            return f"it has no feed_forward={block.feed_forward.kind()}, only {', '.join(_FEED_FORWARDS)}"
        if isinstance(block.feed_forward, MoESettings) and (why := _refused_router(block.feed_forward.router)):
            return why
    return ""


def _refused_router(router: Any) -> str:
    if router.kind() not in _ROUTERS:
        return f"it has no router={router.kind()} of experts, only {', '.join(_ROUTERS)}"
    if getattr(router, "decode", "") == "refuse":
        return "it has no router.decode=refuse, which cannot decide from the past alone"
    if getattr(router, "phase", "") == "random":
        return "router.phase=random draws choices, and nothing there would draw the same"
    if getattr(router, "threshold", "") == "token":
        return "it has no router.threshold=token"
    return "it has no router.scale_to_shared" if getattr(router, "scale_to_shared", False) else ""


def _shapes(settings: language_model.Settings) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Shape of every parameter and buffer by its path."""
    model = nnx.eval_shape(lambda: settings.build(jax.random.key(0)))
    return {path: tuple(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def _per_pass(settings: language_model.Settings) -> list[str]:
    """Paths of what each pass of a recursion has for itself."""
    model = nnx.eval_shape(lambda: settings.build(jax.random.key(0)))
    return ["/".join(map(str, path)) for path, leaf in nnx.to_flat_state(nnx.state(model)) if passes_of(leaf)]


def layout(settings: language_model.Settings) -> Layout:
    """Each parameter under its own path."""
    return {path: one(".".join(map(str, path)), shape) for path, shape in _shapes(settings).items()}


def config(settings: language_model.Settings, layout: Layout) -> dict[str, Any]:
    """config.json of such a model."""
    shapes = _shapes(settings)
    named = {
        "/".join(map(str, path)): [[p.name, list(p.shape), p.transposed, p.rows and list(p.rows), p.axis, p.offset]
                                   for p in parts]
        for path, parts in layout.items()
    }  # fmt: skip
    return {
        "architectures": ["AdaptiveForCausalLM"],
        "model_type": KIND,
        "auto_map": {
            "AutoConfig": f"{_CODE}.AdaptiveConfig",
            "AutoModelForCausalLM": f"{_CODE}.AdaptiveForCausalLM",
        },
        "vocab_size": settings.vocab_size,
        "adaptive": to_tree(settings),
        "layout": named,
        "shapes": {"/".join(map(str, path)): list(shapes[path]) for path in layout},
        "per_pass": _per_pass(settings),
    }


class Custom(Family):
    """Read back by the same layout."""

    architecture, model_type, lossless = "AdaptiveForCausalLM", KIND, True

    def settings(self, fields: Fields) -> language_model.Settings:
        found: language_model.Settings = read(language_model.Settings, fields.get("adaptive"), where="config.adaptive")
        self._check(fields, found)
        return found

    def config(self, settings: language_model.Settings) -> dict[str, Any]:
        if why := refused(settings):
            raise RecipeError(why)
        return config(settings, layout(settings))

    def layout(self, settings: language_model.Settings) -> Layout:
        return layout(settings)

    def layout_of(self, settings: language_model.Settings, given: Mapping[str, Any]) -> Layout:
        """As the configuration says it."""
        paths = {"/".join(map(str, path)): path for path in _shapes(settings)}
        return {
            paths[path]: tuple(
                Part(name, tuple(shape), transposed, tuple(rows) if rows else None, axis, offset)
                for name, shape, transposed, rows, axis, offset in parts
            )
            for path, parts in given["layout"].items()
        }

    def _check(self, fields: Fields, settings: language_model.Settings) -> None:
        """Raises RecipeError where the layout is none of this model."""
        settings.validate()
        paths = {"/".join(map(str, path)) for path in _shapes(settings)}
        given = fields.get("layout")
        if not isinstance(given, Mapping) or set(given) != paths:
            raise RecipeError("official adaptive: layout does not say where each parameter of the settings lies")
        try:
            self.layout_of(settings, {"layout": given})
        except (TypeError, ValueError):
            raise RecipeError("official adaptive: layout has parts that are no [name, shape, ...]") from None
