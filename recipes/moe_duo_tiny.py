"""Duo-LLM on bytes: a feed-forward and one a sixteenth as wide in every layer, first at random, then routed.

python -m adaptive.train --recipe moe_duo_tiny
Numbers:  our own, for a CPU in minutes
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.layers.moe.routers import duo_llm
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    router = duo_llm.Settings(random_steps=400, budget=0.5, tau_decay=0.997)
    return titled(
        moe(tiny(600), router, experts=2, size=352),
        "moe_duo_tiny",
        "Big or small feed-forwards (Duo-LLM) on the embedded English text, for a CPU",
    )
