"""Mixture-of-Depths on bytes: 8 blocks, of which every second computes an eighth of the text.

python -m adaptive.train --recipe mod_tiny
Numbers:  shares of 12.5% in alternate blocks are the paper's best (Raposo et al. 2024, section 4); the rest is our own
Expect:   not measured
Cost:     15 TFLOPs by the account; not yet timed
"""

import dataclasses

from adaptive.models.bodies import recursive
from adaptive.models.depth import mixture_of_depths
from adaptive.recipe import Recipe
from adaptive.recipes.bases import stack_of, tiny, titled, with_body


def recipe() -> Recipe:
    base = tiny()
    block = dataclasses.replace(stack_of(base), repeats=1)
    body = recursive.Settings(core=block, recursions=8, depth=mixture_of_depths.Settings(share=0.125), shared="none")
    return titled(with_body(base, body), "mod_tiny", "Mixture-of-Depths on the embedded English text, for a CPU")
