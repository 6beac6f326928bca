"""AdaMoE on bytes: top-3 of 8 true and 4 null experts per layer, so about two true ones per token.

python -m adaptive.train --recipe moe_adamoe_tiny
Numbers:  our own, for a CPU in minutes; the null-averaged loss with the coefficient of token choice
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import adamoe
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = adamoe.Settings(experts_per_token=3, null_experts=4)
    return titled(
        moe(tiny(600), router),
        "moe_adamoe_tiny",
        "AdaMoE (top-3 of 8 true and 4 null experts) on the embedded English text, for a CPU",
    )
