"""Vanilla transformer, 1.7B shape (1.61B non-embedding parameters).

python -m adaptive.train --recipe vanilla_1_7b
Numbers:  MoR paper; steps derived from its FLOP budget; bases.py names the source of each
Expect:   validation NLL 2.8658, average accuracy 40.54 after 4.8B tokens
          (MoR paper, table of scaling laws (isoFLOP)); not measured here
Cost:     not measured; reduced twin: recipes/vanilla_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, budgeted, llama_1_7b, titled


def recipe() -> Recipe:
    return titled(
        budgeted(llama_1_7b(), 16.5e18),
        "vanilla_1_7b",
        "vanilla transformer, 1.7B shape, 24 layers (1.61B)",
        Published(
            result="validation NLL 2.8658, average accuracy 40.54",
            source="MoR paper, table of scaling laws (isoFLOP)",
            tokens=4.8e9,
            flops=16.5e18,
            notes="At 68.5e18 (train.steps=9544): average accuracy 48.9 (printed after 20B tokens). " + UNPRINTED_RATE,
        ),
    )
