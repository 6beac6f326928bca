"""Everything at once on bytes: chunks of chunks, each up to 3 times through a core whose experts choose among them.

python -m adaptive.train --recipe hnet_hnet_mor_moe_tiny
Numbers:  our own, for a CPU in minutes; stages as in hnet_2stage_tiny, inside them mor_moe_tiny of width 192
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from dataclasses import replace

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import layers_of, mor_depth, shared, titled
from adaptive.recipes.hnet_bases import tiny, tiny_two_stages


def recipe() -> Recipe:
    dense = layers_of(layers=5, heads=6, kv_heads=2, head_dim=32, hidden=512)
    routed = experts.Settings(expert_choice.Settings(), experts=8, expert_size=256)
    inside = replace(dense, blocks=(replace(dense.blocks[0], feed_forward=routed),))
    return titled(
        tiny(tiny_two_stages(shared(inside, 3, depth=mor_depth()))),
        "hnet_hnet_mor_moe_tiny",
        "Mixture-of-Recursions of experts in two stages of chunks, for a CPU",
    )
