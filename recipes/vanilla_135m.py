"""Vanilla transformer, 135M shape (106M non-embedding parameters).

python -m adaptive.train --recipe vanilla_135m
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   validation NLL 2.8432, average accuracy 42.15 after 53.3B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/vanilla_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_135m, titled


def recipe() -> Recipe:
    return titled(
        budgeted(llama_135m(), 16.5e18),
        "vanilla_135m",
        "vanilla transformer, 135M shape, 30 layers (106M)",
        Published(
            result="validation NLL 2.8432, average accuracy 42.15",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=53.3e9,
            flops=16.5e18,
            notes=UNPRINTED_RATE,
        ),
    )
