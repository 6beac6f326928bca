"""What generation keeps of a token, in bytes, by the policy of a recursion's cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from adaptive.models import policies
from adaptive.models.bodies.recursive import Recursive
from adaptive.models.language_model import LanguageModel

SLOTS = 1024  # per row; sizes of two lengths tell what a token adds


class Kept(NamedTuple):
    """policy: its name, with its number; "" of a model without recursions. exact: whether generation with it equals the
    full forward pass. bytes: of the room for a token of a row; of an H-Net, were every byte a chunk."""

    policy: str
    exact: bool
    bytes: float


def kept_per_token(model: LanguageModel) -> tuple[Kept, ...]:
    """By every policy that the model can have, its own first; () where generation has no cache. Arrays of the model may
    be shapes."""
    if model.refuse_cache():
        return ()
    model = nnx.clone(model)  # its settings change below
    found = next((part for _, part in nnx.iter_modules(model.body) if isinstance(part, Recursive)), None)
    if found is None:
        return (Kept("", True, _per_token(model)),)
    own = found.settings
    every = [own.cache, *(p for p in policies.possible(own) if p.kind() != own.cache.kind())]
    told = []
    for policy in every:
        found.settings = dataclasses.replace(own, cache=policy)
        told.append(Kept(policy.describe(), policy.exact(own), _per_token(model)))
    return tuple(told)


def _per_token(model: LanguageModel) -> float:
    def size(slots: int) -> int:
        leaves: list[Any] = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, slots)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return (size(2 * SLOTS) - size(SLOTS)) / SLOTS
