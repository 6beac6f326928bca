"""A hybrid Mixture-of-Recursions on bytes: its core is twice (three Mamba-2 layers, one of attention), up to 2 times.

python -m adaptive.train --recipe mor_hybrid_tiny
Numbers:  our own, for a CPU in minutes; routing as in mor_tiny, three to one as in published hybrids
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from dataclasses import replace

from adaptive.layers import stack
from adaptive.models.bodies import recursive
from adaptive.recipe import Recipe
from adaptive.recipes.bases import mor_depth, stack_of, tiny, titled, with_body
from adaptive.recipes.hnet_bases import TINY_FLOPS, budgeted, tiny_scans


def recipe() -> Recipe:
    attends = replace(stack_of(tiny()), repeats=1)
    core = stack.Settings((tiny_scans(3), *attends.blocks), repeats=2)
    body = recursive.Settings(prelude=attends, core=core, coda=attends, recursions=2, depth=mor_depth())
    return titled(
        budgeted(with_body(tiny(), body), TINY_FLOPS),
        "mor_hybrid_tiny",
        "Mixture-of-Recursions of Mamba-2 and attention on the embedded English text, for a CPU",
    )
