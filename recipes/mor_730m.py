"""MoR, 730M shape, three recursions, expert choice, middle-cycle sharing (252M unique parameters).

python -m adaptive.train --recipe mor_730m
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   validation NLL 2.7438, average accuracy 43.55 after 14.9B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_730m, mor, titled


def recipe() -> Recipe:
    return titled(
        budgeted(mor(llama_730m(), 3), 16.5e18),
        "mor_730m",
        "MoR, 730M shape, 1 + 8 x 3 + 1 layers (252M), expert choice",
        Published(
            result="validation NLL 2.7438, average accuracy 43.55",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=14.9e9,
            flops=16.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
