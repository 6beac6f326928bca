"""Recursive transformer, 360M shape, two recursions of 15 layers, middle-cycle sharing (167M unique parameters).

python -m adaptive.train --recipe recursive2_360m
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each
Expect:   validation NLL 2.8079, average accuracy 42.6 after 20B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, recursive, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(recursive(llama_360m(), 2), 9438, warmup=57),
        "recursive2_360m",
        "recursive transformer, 360M shape, 1 + 15 x 2 + 1 layers (167M)",
        Published(
            result="validation NLL 2.8079, average accuracy 42.6",
            source="MoR paper, table of main results",
            tokens=20e9,
            flops=16.5e18,
        ),
    )
