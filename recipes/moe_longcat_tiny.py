"""LongCat's identity experts on bytes: top-3 of 8 true and 4 identity experts, two true ones held on average.

python -m adaptive.train --recipe moe_longcat_tiny
Numbers:  our own, for a CPU in minutes; biases balance, no loss does; weights scaled by 3, the experts of a token
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import longcat
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = longcat.Settings(experts_per_token=3, balance_coefficient=0.0, zero_experts=4, route_scale=3.0)
    return titled(
        moe(tiny(600), router),
        "moe_longcat_tiny",
        "Identity experts under a controller (LongCat) on the embedded English text, for a CPU",
    )
