"""AdaMoE on bytes: top-3 of 8 true and 4 null experts per layer, so about two true ones per token.

python -m adaptive.train --recipe moe_adamoe_tiny
Numbers:  our own, for a CPU in minutes; the null-averaged loss with the coefficient of token choice
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.recipe import Recipe
from recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    return titled(
        moe(tiny(600), "adamoe", "null_experts=4", per_token=3, size=176),
        "moe_adamoe_tiny",
        "AdaMoE (top-3 of 8 true and 4 null experts) on the embedded English text, for a CPU",
    )
