"""MoR, 360M shape, four recursions of 8 layers, expert choice, middle-cycle sharing (98M unique parameters).

python -m adaptive.train --recipe mor4_360m
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each;
          34 layers instead of 32, so that four recursions divide the middle (released configuration)
Expect:   validation NLL 2.8204, average accuracy 41.6 after 30B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, mor, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(mor(llama_360m(layers=34), 4), 14216, warmup=86),
        "mor4_360m",
        "MoR, 360M shape, 1 + 8 x 4 + 1 layers (98M), expert choice",
        Published(
            result="validation NLL 2.8204, average accuracy 41.6",
            source="MoR paper, table of main results",
            tokens=30e9,
            flops=16.5e18,
        ),
    )
