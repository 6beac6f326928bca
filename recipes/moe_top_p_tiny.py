"""Top-p experts on bytes: a token takes its most probable experts up to 0.4 in all, at most 4 of 8.

python -m adaptive.train --recipe moe_top_p_tiny
Numbers:  our own, for a CPU in minutes; p as in published baselines
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import top_p
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = top_p.Settings(p=0.4, most=4)
    return titled(
        moe(tiny(600), router),
        "moe_top_p_tiny",
        "Top-p experts on the embedded English text, for a CPU",
    )
