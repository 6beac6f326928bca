"""Recursive transformer, 135M shape, two recursions of 14 layers, middle-cycle sharing (57M unique parameters).

python -m adaptive.train --recipe recursive2_135m
Numbers:  MoR paper; 10B tokens under a cosine schedule; bases.py names the source of each
Expect:   train NLL 3.0330, average accuracy 37.96 after 10B tokens
          (MoR paper, table on sharing strategies); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import UNPRINTED_RATE, ablation, llama_135m, recursive, titled


def recipe() -> Recipe:
    return titled(
        ablation(recursive(llama_135m(), 2), 10e9),
        "recursive2_135m",
        "recursive transformer, 135M shape, 1 + 14 x 2 + 1 layers (57M)",
        Published(
            result="NLL 3.0330, average accuracy 37.96",
            source="MoR paper, table on sharing strategies",
            tokens=10e9,
            flops=0.0,
            notes="The caption says validation NLL, but the figures return in another table as training NLL. "
            + UNPRINTED_RATE,
        ),
    )
