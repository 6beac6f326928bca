"""Recursive transformer, 135M shape, three recursions, middle-cycle sharing (42M unique parameters).

python -m adaptive.train --recipe recursive_135m
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each;
          32 layers instead of 30, so that three recursions divide the middle (appendix on scaling laws)
Expect:   validation NLL 2.9552, average accuracy 39.79 after 50.0B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_135m, recursive, titled


def recipe() -> Recipe:
    return titled(
        budgeted(recursive(llama_135m(layers=32), 3), 16.5e18),
        "recursive_135m",
        "recursive transformer, 135M shape, 1 + 10 x 3 + 1 layers (42M)",
        Published(
            result="validation NLL 2.9552, average accuracy 39.79",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=50.0e9,
            flops=16.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
