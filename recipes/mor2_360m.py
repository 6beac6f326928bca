"""MoR, 360M shape, two recursions of 15 layers, expert choice, middle-cycle sharing (167M unique parameters).

python -m adaptive.train --recipe mor2_360m
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each
Expect:   validation NLL 2.7511, average accuracy 43.1 after 27B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, mor, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(mor(llama_360m(), 2), 12619, warmup=86),
        "mor2_360m",
        "MoR, 360M shape, 1 + 15 x 2 + 1 layers (167M), expert choice",
        Published(
            result="validation NLL 2.7511, average accuracy 43.1",
            source="MoR paper, table of main results",
            tokens=27e9,
            flops=16.5e18,
        ),
    )
