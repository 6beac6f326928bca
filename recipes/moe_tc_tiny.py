"""Token choice on bytes: top-2 of 8 experts per layer, dropless, with a balancing loss.

python -m adaptive.train --recipe moe_tc_tiny
Numbers:  our own, for a CPU in minutes
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import token_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = token_choice.Settings()
    return titled(
        moe(tiny(600), router),
        "moe_tc_tiny",
        "Token-choice experts (top-2 of 8) on the embedded English text, for a CPU",
    )
