"""MoR on bytes: 5 effective layers, a shared block of 1 applied up to 3 times, expert-choice routing.

python -m adaptive.train --recipe mor_tiny
Numbers:  our own, for a CPU in minutes; routing as in mor_360m
Expect:   not measured
Cost:     not measured
"""

from adaptive.recipe import Recipe
from recipes.bases import mor, tiny, titled


def recipe() -> Recipe:
    return titled(mor(tiny(), 3), "mor_tiny", "Mixture-of-Recursions on the embedded English text, for a CPU")
