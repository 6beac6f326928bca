"""VersatileFFN on bytes: one feed-forward per layer, as top-2 of 8 slices and applied up to 4 times.

python -m adaptive.train --recipe moe_versatile_tiny
Numbers:  our own, for a CPU in minutes; tau falls as far as in the paper's longer runs; the paper balances with 5e-5
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import versatile
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = versatile.Settings(hidden=352, tau_decay=0.9967)
    return titled(
        moe(tiny(600), router, experts=8, size=44),  # slices: an eighth each
        "moe_versatile_tiny",
        "A feed-forward used in width and in depth (VersatileFFN) on the embedded English text, for a CPU",
    )
