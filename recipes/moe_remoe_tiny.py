"""ReMoE on bytes: 8 experts per layer under a ReLU router, which an adaptive L1 loss holds at two on average.

python -m adaptive.train --recipe moe_remoe_tiny
Numbers:  our own, for a CPU in minutes; the coefficient's rule as published
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import remoe
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = remoe.Settings()
    return titled(
        moe(tiny(600), router),
        "moe_remoe_tiny",
        "ReMoE (a ReLU router under an L1 loss) on the embedded English text, for a CPU",
    )
