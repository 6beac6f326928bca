"""Vanilla transformer, 360M shape: 32 layers (315M non-embedding parameters).

python -m adaptive.train --recipe vanilla_360m
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each
Expect:   validation NLL 2.7824, average accuracy 42.3 after 20B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/vanilla_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(llama_360m(), 9438, warmup=57),
        "vanilla_360m",
        "vanilla transformer, 360M shape, 32 layers (315M)",
        Published(
            result="validation NLL 2.7824, average accuracy 42.3",
            source="MoR paper, table of main results",
            tokens=20e9,
            flops=16.5e18,
        ),
    )
