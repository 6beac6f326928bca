"""MoE++ on bytes: top-2 of 8 true, 2 constant, 1 copy and 1 zero expert per layer, with gating residuals.

python -m adaptive.train --recipe moe_pp_tiny
Numbers:  our own, for a CPU in minutes; experts and tau as the paper's 0.6B, inputs not scaled. The loss has no factor
          choices / k, hence 0.06; capacity 2 for 1.1, because so short a run does not balance
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import moe_pp
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = moe_pp.Settings(balance_coefficient=0.06, capacity_factor=2.0, capacity_of="pair")
    return titled(
        moe(tiny(600), router),
        "moe_pp_tiny",
        "MoE++ (zero, copy and constant experts) on the embedded English text, for a CPU",
    )
