"""MoR, 135M shape, three recursions, expert choice, middle-cycle sharing (42M unique parameters).

python -m adaptive.train --recipe mor_135m
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each;
          32 layers instead of 30, so that three recursions divide the middle (appendix on scaling laws)
Expect:   validation NLL 2.9490, average accuracy 38.11 after 76.2B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_135m, mor, titled


def recipe() -> Recipe:
    return titled(
        budgeted(mor(llama_135m(layers=32), 3), 16.5e18),
        "mor_135m",
        "MoR, 135M shape, 1 + 10 x 3 + 1 layers (42M), expert choice",
        Published(
            result="validation NLL 2.9490, average accuracy 38.11",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=76.2e9,
            flops=16.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
