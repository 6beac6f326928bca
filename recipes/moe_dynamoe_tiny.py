"""DynaMoE on bytes: 1 to 4 of 8 experts per token, those above a running threshold, two on average.

python -m adaptive.train --recipe moe_dynamoe_tiny
Numbers:  our own, for a CPU in minutes; our reading of the method, the descending schedule of its image results
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import dynamoe
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = dynamoe.Settings(schedule="descending", least=1, most=4)
    return titled(
        moe(tiny(600), router),
        "moe_dynamoe_tiny",
        "DynaMoE (experts above a threshold) on the embedded English text, for a CPU",
    )
