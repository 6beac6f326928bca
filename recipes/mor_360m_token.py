"""MoR, 360M shape, three recursions of 10 layers, token choice, middle-cycle sharing (118M unique parameters).

python -m adaptive.train --recipe mor_360m_token
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each
Expect:   validation NLL 2.9163, average accuracy 40.0 after 30B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, mor_token, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(mor_token(llama_360m(), 3), 14161, warmup=86),
        "mor_360m_token",
        "MoR, 360M shape, 1 + 10 x 3 + 1 layers (118M), token choice",
        Published(
            result="validation NLL 2.9163, average accuracy 40.0",
            source="MoR paper, table of main results",
            tokens=30e9,
            flops=16.5e18,
        ),
    )
