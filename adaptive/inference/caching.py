"""The policy of a recursion's cache, chosen when a model is used: parameters have no part in it."""

from adaptive.errors import UserError
from adaptive.models import policies
from adaptive.models.bodies.recursive import Settings as Recursion
from adaptive.models.language_model import Settings
from adaptive.recipe import Recipe
from adaptive.settings import nodes, with_leaf


def recursion_of(model: Settings) -> tuple[str, Recursion] | None:
    """(dotted path, settings) of a model's recursion; None where it has none."""
    at = model.facts().recursion
    return next(((path, node) for path, node in nodes(model, "model") if path == at), None)


def with_cache(recipe: Recipe, text: str, option: str) -> Recipe:
    """The recipe with the policy that a text names, as `cycle(2)`; option: how the user gave it, for messages.

    Raises UserError for a model without recursions, an unknown policy, and one that the model cannot have.
    """
    policy, found = policies.named(text, option), recursion_of(recipe.model)
    if found is None:
        raise UserError(f"{option} {text}: {recipe.name} has no recursion, so each layer keeps one cache of all tokens")
    path, recursion = found
    if reason := policies.refusal(policy, recursion):
        raise UserError(f"{option} {text}: {recipe.name}: {reason}")
    return with_leaf(recipe, f"{path}.cache", policy)


def inexact(recipe: Recipe) -> str:
    """The recipe's policy where generation with it is not the full forward pass; empty where it is."""
    found = recursion_of(recipe.model)
    if found is None or found[1].policy.exact(found[1]):
        return ""
    return found[1].policy.describe()


def refuse_fixed(model: Settings) -> str:
    """Why a cache that is made once, for rows of a given length, may be too small for them; empty where it is not."""
    found = recursion_of(model)
    if found is None or found[1].policy.slots(found[1], 1) is None:
        return ""
    path, recursion = found
    return (
        f"{path}.cache={recursion.policy.kind()} grows with the tokens that take a pass, and the caches of rows that "
        "come and go are of one size; use per_pass"
    )
