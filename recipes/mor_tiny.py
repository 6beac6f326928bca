"""MoR on bytes: 5 effective layers, a shared block of 1 applied up to 3 times, expert-choice routing.

python -m adaptive.train --recipe mor_tiny
Numbers:  our own, for a CPU in minutes; routing as in mor_360m
Expect:   held-out bits per byte 2.76 at step 200 and 2.04 at the end (2026-11-21, one CPU device, jax 0.10.2)
Cost:     13 TFLOPs; 3 min 40 s on two cores of an AMD EPYC, compilation included
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import mor, tiny, titled


def recipe() -> Recipe:
    return titled(mor(tiny(), 3), "mor_tiny", "Mixture-of-Recursions on the embedded English text, for a CPU")
