"""Recursive transformer, 730M shape, three recursions, middle-cycle sharing (252M unique parameters).

python -m adaptive.train --recipe recursive_730m
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   validation NLL 2.7886, average accuracy 42.21 after 10.1B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_730m, recursive, titled


def recipe() -> Recipe:
    return titled(
        budgeted(recursive(llama_730m(), 3), 16.5e18),
        "recursive_730m",
        "recursive transformer, 730M shape, 1 + 8 x 3 + 1 layers (252M)",
        Published(
            result="validation NLL 2.7886, average accuracy 42.21",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=10.1e9,
            flops=16.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
