"""Block diffusion on bytes: blocks of 16 one after another, the bytes of each in any order.

python -m adaptive.train --recipe block_dlm_tiny
Numbers:  our own, for a CPU in minutes
Expect:   not measured
Cost:     not measured
"""

from adaptive.objectives import block_diffusion
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import tiny_diffusion


def recipe() -> Recipe:
    return titled(
        tiny_diffusion(900, block_diffusion.Settings(block=16)),
        "block_dlm_tiny",
        "block-diffusion transformer on the embedded English text, for a CPU",
    )
