"""Recursive transformer, 360M shape, three recursions of 10 layers, middle-cycle sharing (118M unique parameters).

python -m adaptive.train --recipe recursive_360m
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each
Expect:   validation NLL 2.8466, average accuracy 41.5 after 20B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/recursive_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, recursive, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(recursive(llama_360m(), 3), 9438, warmup=57),
        "recursive_360m",
        "recursive transformer, 360M shape, 1 + 10 x 3 + 1 layers (118M)",
        Published(
            result="validation NLL 2.8466, average accuracy 41.5",
            source="MoR paper, table of main results",
            tokens=20e9,
            flops=16.5e18,
        ),
    )
