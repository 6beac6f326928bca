"""Recursive transformer, 1.7B shape, three recursions, middle-cycle sharing (0.67B unique parameters).

python -m adaptive.train --recipe recursive_1_7b
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each;
          26 layers instead of 24, so that three recursions divide the middle (appendix on scaling laws)
Expect:   validation NLL 3.0042, average accuracy 38.87 after 4.5B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_1_7b, recursive, titled


def recipe() -> Recipe:
    return titled(
        budgeted(recursive(llama_1_7b(layers=26), 3), 16.5e18),
        "recursive_1_7b",
        "recursive transformer, 1.7B shape, 1 + 8 x 3 + 1 layers (0.67B)",
        Published(
            result="validation NLL 3.0042, average accuracy 38.87",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=4.5e9,
            flops=16.5e18,
            notes="At 68.5e18 (train.steps=8809): average accuracy 46.2 (printed after 20B tokens). " + UNPRINTED_RATE,
        ),
    )
