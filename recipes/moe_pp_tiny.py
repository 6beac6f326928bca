"""MoE++ on bytes: top-2 of 8 true, 2 constant, 1 copy and 1 zero expert per layer, with gating residuals.

python -m adaptive.train --recipe moe_pp_tiny
Numbers:  our own, for a CPU in minutes; experts and tau as the paper's 0.6B, inputs not scaled. The loss has no factor
          choices / k, hence 0.06; capacity 2 for 1.1, because so short a run does not balance
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.recipe import Recipe
from recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    return titled(
        moe(tiny(600), "moe_pp", "capacity_of=pair", size=176).with_(
            "model.moe.capacity_factor=2", "model.moe.balance_coefficient=0.06"
        ),
        "moe_pp_tiny",
        "MoE++ (zero, copy and constant experts) on the embedded English text, for a CPU",
    )
