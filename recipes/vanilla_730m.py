"""Vanilla transformer, 730M shape (654M non-embedding parameters).

python -m adaptive.train --recipe vanilla_730m
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   validation NLL 2.7048, average accuracy 43.43 after 10.1B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/vanilla_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_730m, titled


def recipe() -> Recipe:
    return titled(
        budgeted(llama_730m(), 16.5e18),
        "vanilla_730m",
        "vanilla transformer, 730M shape, 26 layers (654M)",
        Published(
            result="validation NLL 2.7048, average accuracy 43.43",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=10.1e9,
            flops=16.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
