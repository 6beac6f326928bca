"""MoR, 1.7B shape, two recursions of 11 layers, expert choice, middle-cycle sharing (0.87B unique parameters).

python -m adaptive.train --recipe mor2_1_7b
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   average accuracy 48.4 after 26B tokens
          (MoR paper, table of larger models); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_1_7b, mor, titled


def recipe() -> Recipe:
    return titled(
        budgeted(mor(llama_1_7b(), 2), 68.5e18),
        "mor2_1_7b",
        "MoR, 1.7B shape, 1 + 11 x 2 + 1 layers (0.87B), expert choice",
        Published(
            result="average accuracy 48.4",
            source="MoR paper, table of larger models",
            tokens=26e9,
            flops=68.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
