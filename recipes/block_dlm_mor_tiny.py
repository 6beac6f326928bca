"""Block diffusion whose tokens choose their depth, on bytes: a shared block of 1 applied up to 3 times.

python -m adaptive.train --recipe block_dlm_mor_tiny
Numbers:  our own, for a CPU in minutes; routing as in mor_360m_token: tokens decide alone, as blocks are decoded
Expect:   held-out bits per byte 4.00 at step 200, 3.39 at step 600 of 1,200 (2026-11-30, one CPU device, jax 0.10.2);
          not measured to the end of its 900
Cost:     24 TFLOPs; 0.49 s a step on two cores of an AMD EPYC
"""

from adaptive.objectives import block_diffusion
from adaptive.recipe import Recipe
from adaptive.recipes.bases import mor_token, titled
from adaptive.recipes.dlm_bases import tiny_diffusion


def recipe() -> Recipe:
    return titled(
        mor_token(tiny_diffusion(900, block_diffusion.Settings(block=16)), 3),
        "block_dlm_mor_tiny",
        "block diffusion with a Mixture-of-Recursions on the embedded English text, for a CPU",
    )
