"""Recursive transformer, 360M shape, four recursions of 8 layers, middle-cycle sharing (98M unique parameters).

python -m adaptive.train --recipe recursive4_360m
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each;
          34 layers instead of 32, so that four recursions divide the middle (released configuration)
Expect:   validation NLL 2.8781, average accuracy 41.0 after 19B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, recursive, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(recursive(llama_360m(layers=34), 4), 8883, warmup=57),
        "recursive4_360m",
        "recursive transformer, 360M shape, 1 + 8 x 4 + 1 layers (98M)",
        Published(
            result="validation NLL 2.8781, average accuracy 41.0",
            source="MoR paper, table of main results",
            tokens=19e9,
            flops=16.5e18,
        ),
    )
