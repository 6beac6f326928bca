"""Masked diffusion on bytes: 5 layers that see both ways say what is hidden.

python -m adaptive.train --recipe dlm_tiny
Numbers:  our own, for a CPU in minutes
Expect:   not measured
Cost:     not measured
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.dlm_bases import tiny_diffusion


def recipe() -> Recipe:
    return titled(tiny_diffusion(), "dlm_tiny", "masked-diffusion transformer on the embedded English text, for a CPU")
