"""BlockFFN on bytes: 16 experts of 32 units without gates per layer, as many active as a ReLU router likes.

python -m adaptive.train --recipe moe_blockffn_tiny
Numbers:  our own, for a CPU in minutes; losses as the paper's, with a shorter schedule of their coefficient
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.recipe import Recipe
from recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    return titled(
        moe(tiny(600), "blockffn", "hold_steps=200", "window=50", experts=16, per_token=4, size=32).with_(
            "model.moe.gated=false"
        ),
        "moe_blockffn_tiny",
        "BlockFFN (a ReLU router over small experts) on the embedded English text, for a CPU",
    )
