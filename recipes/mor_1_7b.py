"""MoR, 1.7B shape, three recursions, expert choice, middle-cycle sharing (0.67B unique parameters).

python -m adaptive.train --recipe mor_1_7b
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each;
          26 layers instead of 24, so that three recursions divide the middle (appendix on scaling laws)
Expect:   validation NLL 2.8316, average accuracy 40.97 after 6.5B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_1_7b, mor, titled


def recipe() -> Recipe:
    return titled(
        budgeted(mor(llama_1_7b(layers=26), 3), 16.5e18),
        "mor_1_7b",
        "MoR, 1.7B shape, 1 + 8 x 3 + 1 layers (0.67B), expert choice",
        Published(
            result="validation NLL 2.8316, average accuracy 40.97",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=6.5e9,
            flops=16.5e18,
            notes="At 68.5e18 (train.steps=12874): average accuracy 46.7 (printed after 27B tokens). " + UNPRINTED_RATE,
        ),
    )
