"""MoR with experts on bytes: the passes share their attention, and each has experts of its own.

python -m adaptive.train --recipe mor_moe_per_pass_tiny
Numbers:  our own, for a CPU in minutes; mor_moe_tiny with feed-forwards apart
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.moe.routers import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import moe, mor, tiny, titled
from adaptive.recipes.hnet_bases import TINY_FLOPS, budgeted


def recipe() -> Recipe:
    return titled(
        budgeted(mor(moe(tiny(), expert_choice.Settings()), 3, shared="mixers"), TINY_FLOPS),
        "mor_moe_per_pass_tiny",
        "Mixture-of-Recursions with experts of every pass's own, for a CPU",
    )
