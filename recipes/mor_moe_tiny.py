"""MoR with experts on bytes: tokens choose how deep they go, and experts choose among the tokens of each recursion.

python -m adaptive.train --recipe mor_moe_tiny
Numbers:  our own, for a CPU in minutes
Expect:   held-out bits per byte 2.80 at step 200 and 2.18 at the end (2026-11-21, one CPU device, jax 0.10.2)
Cost:     6.6 TFLOPs; 1 min 57 s on two cores of an AMD EPYC, compilation included
"""

from adaptive.layers.moe.routers import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, mor, tiny, titled


def recipe() -> Recipe:
    return titled(
        mor(moe(tiny(600), expert_choice.Settings()), 3),
        "mor_moe_tiny",
        "Mixture-of-Recursions whose feed-forward is expert-choice experts, for a CPU",
    )
