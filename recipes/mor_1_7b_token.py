"""MoR, 1.7B shape, three recursions of 8 layers, token choice, middle-cycle sharing (0.67B unique parameters).

python -m adaptive.train --recipe mor_1_7b_token
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   average accuracy 45.4 after 30B tokens
          (MoR paper, table of larger models); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_1_7b, mor_token, titled


def recipe() -> Recipe:
    return titled(
        budgeted(mor_token(llama_1_7b(layers=26), 3), 68.5e18),
        "mor_1_7b_token",
        "MoR, 1.7B shape, 1 + 8 x 3 + 1 layers (0.67B), token choice",
        Published(
            result="average accuracy 45.4",
            source="MoR paper, table of larger models",
            tokens=30e9,
            flops=68.5e18,
            notes="The budget buys 27.0B tokens, the paper prints 30B. " + UNPRINTED_RATE,
        ),
    )
