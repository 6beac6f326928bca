"""Adaptive computation modules on bytes: 4 learners per layer, of which a gate takes the first k, two on average.

python -m adaptive.train --recipe moe_acm_tiny
Numbers:  our own, for a CPU in minutes; the losses of the paper's third phase, from scratch
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import acm
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = acm.Settings(experts_per_token=2)
    return titled(
        moe(tiny(600), router, experts=4, size=88),
        "moe_acm_tiny",
        "Prefixes of learners (adaptive computation modules) on the embedded English text, for a CPU",
    )
