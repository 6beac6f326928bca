"""MoR with experts on bytes: tokens choose how deep they go, and experts choose among the tokens of each recursion.

python -m adaptive.train --recipe mor_moe_tiny
Numbers:  our own, for a CPU in minutes
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.recipe import Recipe
from recipes.bases import moe, mor, tiny, titled


def recipe() -> Recipe:
    return titled(
        moe(mor(tiny(600), 3), "expert_choice"),
        "mor_moe_tiny",
        "Mixture-of-Recursions whose feed-forward is expert-choice experts, for a CPU",
    )
