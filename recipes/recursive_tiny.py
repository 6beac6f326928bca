"""Recursive transformer on bytes: 5 effective layers, a shared block of 1 applied 3 times to every token.

python -m adaptive.train --recipe recursive_tiny
Numbers:  our own; mor_tiny without its router
Expect:   not measured
Cost:     not measured
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import recursive, tiny, titled


def recipe() -> Recipe:
    return titled(
        recursive(tiny(), 3), "recursive_tiny", "recursive transformer on the embedded English text, for a CPU"
    )
