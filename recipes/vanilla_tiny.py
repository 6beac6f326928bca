"""Vanilla transformer on bytes: 5 layers, each with its own parameters.

python -m adaptive.train --recipe vanilla_tiny
Numbers:  our own; the base of mor_tiny
Expect:   not measured
Cost:     not measured
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import tiny, titled


def recipe() -> Recipe:
    return titled(tiny(), "vanilla_tiny", "vanilla transformer on the embedded English text, for a CPU")
