"""BlockFFN on bytes: 16 experts of 32 units without gates per layer, as many active as a ReLU router likes.

python -m adaptive.train --recipe moe_blockffn_tiny
Numbers:  our own, for a CPU in minutes; losses as the paper's, with a shorter schedule of their coefficient
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import blockffn
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = blockffn.Settings(experts_per_token=4.0, hold_steps=200, window=50)
    return titled(
        moe(tiny(600), router, experts=16, size=32, gated=False),
        "moe_blockffn_tiny",
        "BlockFFN (a ReLU router over small experts) on the embedded English text, for a CPU",
    )
