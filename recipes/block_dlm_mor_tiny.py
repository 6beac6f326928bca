"""Block diffusion whose tokens choose their depth, on bytes: a shared block of 1 applied up to 3 times.

python -m adaptive.train --recipe block_dlm_mor_tiny
Numbers:  our own, for a CPU in minutes; routing as in mor_360m_token: tokens decide alone, as blocks are decoded
Expect:   not measured
Cost:     not measured
"""

from adaptive.objectives import block_diffusion
from adaptive.recipe import Recipe
from adaptive.recipes.bases import mor_token, titled
from adaptive.recipes.dlm_bases import tiny_diffusion


def recipe() -> Recipe:
    return titled(
        mor_token(tiny_diffusion(1200, block_diffusion.Settings(block=16)), 3),
        "block_dlm_mor_tiny",
        "block diffusion with a Mixture-of-Recursions on the embedded English text, for a CPU",
    )
