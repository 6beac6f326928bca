"""A token-choice model as an expert-choice one: the same parameters, another rule of who computes whom (EC-DLM, arXiv
2604.01622, section 5).

Every token-choice router becomes an expert-choice one whose experts take as many tokens on average, and that weighs as
it did: over all experts' probabilities, or over those of the experts that a token has.

    token choice                                expert choice
    score=softmax or logits, normalise=true     score=selected
    score=softmax or logits, normalise=false    score=softmax
    score=sigmoid, normalise=true               score=sigmoid

Its balancing loss, capacity and bias have no part in that. Where the objective sees the whole text, decode=refuse.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.interop.tensors import Place
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.models import language_model
from adaptive.settings import leaf_values, nodes

_KEPT = ("z_coefficient", "jitter", "route_scale", "scale_to_shared")


@dataclasses.dataclass(frozen=True)
class Retrofitted:
    """A model of `settings` with the parameters `trained`, by path, and buffers of its own."""

    settings: language_model.Settings
    trained: Mapping[Any, Any]

    def state(self, shapes: Any, place: Place) -> Any:
        """The model's state, each parameter made by itself and put where `place` says."""
        flat = nnx.to_flat_state(shapes)
        fresh = [path for path, _ in flat if path not in self.trained]
        build = lambda: dict(nnx.to_flat_state(nnx.state(self.settings.build(jax.random.key(0)))))  # noqa: E731
        values = dict(zip(fresh, jax.jit(lambda: [build()[path][...] for path in fresh])(), strict=True))
        values |= {path: variable[...] for path, variable in self.trained.items()}
        made = lambda path, variable: variable.replace(place(path, np.asarray(values[path], variable.dtype)))  # noqa: E731
        return nnx.from_flat_state([(path, made(path, variable)) for path, variable in flat])


def routers(model: language_model.Settings, *, causal: bool) -> dict[str, Any]:
    """Values for a recipe by dotted path, which make every token-choice router an expert-choice one.

    Raises RecipeError where there is none, or one whose weights no expert choice has.
    """
    found: dict[str, Any] = {}
    for path, node in nodes(model, "model"):
        if isinstance(node, token_choice.Settings):
            own = _chosen(node, path, causal)
            found[path] = own.kind()
            # What the other router had under the same name is not carried over by the change of kind alone.
            found |= {f"{path}.{name}": value for name, value in leaf_values(own).items()}
    if not found:
        others = {node.router.kind() for _, node in nodes(model, "model") if hasattr(node, "router")}
        raise RecipeError(
            f"the run has no token_choice router to replace; its experts are routed by {', '.join(sorted(others))}"
            if others
            else "the run has no token_choice router to replace: its model has no experts"
        )
    return found


def _chosen(router: token_choice.Settings, path: str, causal: bool) -> expert_choice.Settings:
    if router.score == "cosine" or (router.score == "sigmoid" and not router.normalise):
        told = f"score={router.score}" + ("" if router.score == "cosine" else " and normalise=false")
        raise RecipeError(f"{path} has {told}, weights that no expert choice has")
    score = "sigmoid" if router.score == "sigmoid" else "selected" if router.normalise else "softmax"
    kept = {name: getattr(router, name) for name in _KEPT}
    return expert_choice.Settings(
        experts_per_token=float(router.experts_per_token),
        score=score,  # type: ignore[arg-type]
        decode="threshold" if causal else "refuse",
        **kept,
    )
