"""Recursive transformer, 1.7B shape, two recursions of 11 layers, middle-cycle sharing (0.87B unique parameters).

python -m adaptive.train --recipe recursive2_1_7b
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   average accuracy 46.5 after 18B tokens
          (MoR paper, table of larger models); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_1_7b, recursive, titled


def recipe() -> Recipe:
    return titled(
        budgeted(recursive(llama_1_7b(), 2), 68.5e18),
        "recursive2_1_7b",
        "recursive transformer, 1.7B shape, 1 + 11 x 2 + 1 layers (0.87B)",
        Published(
            result="average accuracy 46.5",
            source="MoR paper, table of larger models",
            tokens=18e9,
            flops=68.5e18,
            notes="The budget buys 20.0B tokens; the paper's token counts of its two recursive rows look swapped. "
            + UNPRINTED_RATE,
        ),
    )
