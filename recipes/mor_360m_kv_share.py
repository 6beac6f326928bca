"""MoR, 360M shape, three recursions of 10 layers, expert choice, keys and values shared (118M unique parameters).

python -m adaptive.train --recipe mor_360m_kv_share
Numbers:  MoR paper and the released configuration of this run; bases.py names the source of each
Expect:   validation NLL 2.7983, average accuracy 41.9 after 31B tokens
          (MoR paper, table of main results); not measured here
Cost:     not measured; reduced twin: recipes/mor_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Published, Recipe
from adaptive.recipes.bases import llama_360m, mor, steps, titled


def recipe() -> Recipe:
    return titled(
        steps(mor(llama_360m(), 3, keys_values="shared"), 14672, warmup=86),
        "mor_360m_kv_share",
        "MoR, 360M shape, 1 + 10 x 3 + 1 layers (118M), expert choice, shared keys and values",
        Published(
            result="validation NLL 2.7983, average accuracy 41.9",
            source="MoR paper, table of main results",
            tokens=31e9,
            flops=16.5e18,
        ),
    )
