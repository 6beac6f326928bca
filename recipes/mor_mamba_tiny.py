"""A Mixture-of-Recursions of Mamba-2 layers on bytes: a scan over the positions that each recursion computes.

python -m adaptive.train --recipe mor_mamba_tiny
Numbers:  our own, for a CPU in minutes; routing as in mor_tiny, Mamba-2 as in hnet_tiny, in place of attention
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from dataclasses import replace

from adaptive.layers import stack
from adaptive.layers.feed_forwards import dense
from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import mor, tiny, titled, with_body
from adaptive.recipes.hnet_bases import TINY_FLOPS, budgeted, tiny_scans


def recipe() -> Recipe:
    one = replace(tiny_scans(1), feed_forward=dense.Settings(352))
    base = with_body(tiny(), plain.Settings(stack.Settings((one,), repeats=5)))
    return titled(
        budgeted(mor(base, 3), TINY_FLOPS),
        "mor_mamba_tiny",
        "Mixture-of-Recursions of Mamba-2 layers on the embedded English text, for a CPU",
    )
