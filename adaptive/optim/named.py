"""Choosing parameters by their paths, such as embedding or body/inner/depth/router/out."""

import difflib
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.named import matches


def chosen(params: Any, patterns: Sequence[str], at: str) -> Any:
    """For each parameter of an nnx.State whether one of the patterns is its path, or what its path begins with; a tree
    of bool like `params`. "*" and "?" stand for any text and any character.

    Raises RecipeError, in which `at` names the setting, for a pattern that no parameter has.
    """
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    for pattern in patterns:
        if not any(matches(path, (pattern,)) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
            raise RecipeError(f"{at}={pattern}: no parameter is called so; nearest: {', '.join(near)}")
    flags = [matches(path, patterns) for path in paths]
    leaves, tree = jax.tree.flatten(params)
    assert len(leaves) == len(flags), "every parameter is one array"
    return jax.tree.unflatten(tree, flags)
