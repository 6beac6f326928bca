"""Expert choice on bytes: 8 experts per layer take a quarter of the sequence each; a running threshold generates.

python -m adaptive.train --recipe moe_ec_tiny
Numbers:  our own, for a CPU in minutes
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = expert_choice.Settings()
    return titled(
        moe(tiny(600), router),
        "moe_ec_tiny",
        "Expert-choice experts on the embedded English text, for a CPU",
    )
