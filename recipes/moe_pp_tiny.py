"""MoE++ on bytes: top-2 of 8 true, 2 constant, 1 copy and 1 zero expert per layer, with gating residuals.

python -m adaptive.train --recipe moe_pp_tiny
Numbers:  our own, for a CPU in minutes; experts, tau and capacity as the paper's 0.6B, inputs not scaled
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.recipe import Recipe
from recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    return titled(
        moe(tiny(600), "moe_pp", "capacity_of=pair", size=176).with_("model.moe.capacity_factor=1.1"),
        "moe_pp_tiny",
        "MoE++ (zero, copy and constant experts) on the embedded English text, for a CPU",
    )
