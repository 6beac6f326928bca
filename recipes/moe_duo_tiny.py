"""Duo-LLM on bytes: a feed-forward and one a sixteenth as wide in every layer, first at random, then routed.

python -m adaptive.train --recipe moe_duo_tiny
Numbers:  our own, for a CPU in minutes
Expect:   see docs/moe.md
Cost:     see docs/moe.md
"""

from adaptive.recipe import Recipe
from recipes.bases import moe, tiny, titled


def recipe() -> Recipe:
    base = moe(tiny(600), "duo_llm", "random_steps=400", "budget=0.5", "tau_decay=0.997", experts=2, per_token=1)
    return titled(base, "moe_duo_tiny", "Big or small feed-forwards (Duo-LLM) on the embedded English text, for a CPU")
