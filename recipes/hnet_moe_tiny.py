"""An H-Net whose bytes go through experts: attention and experts before and behind the chunks, a transformer inside.

python -m adaptive.train --recipe hnet_moe_tiny
Numbers:  our own, for a CPU in minutes; chunks as in hnet_tiny, grouped queries and their norms as in Qwen3
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers import block
from adaptive.layers.chunkers import dynamic
from adaptive.layers.feed_forwards import experts
from adaptive.layers.mixers import attention
from adaptive.layers.moe.routers import token_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import repeated, tiny, tiny_stage


def recipe() -> Recipe:
    mixer = attention.Settings(heads=4, kv_heads=2, head_dim=32, window=128, qk_norm="head")
    routed = experts.Settings(token_choice.Settings(experts_per_token=2), experts=8, expert_size=96)
    return titled(
        tiny(tiny_stage(dynamic.Settings(target=4.0), 0.44, side=repeated(block.Settings(mixer, routed)))),
        "hnet_moe_tiny",
        "H-Net with experts around its chunks, on the embedded English text, for a CPU",
    )
