"""An H-Net around a Mixture-of-Recursions: chunks of about 4 bytes, each through a shared block up to 3 times.

python -m adaptive.train --recipe hnet_mor_tiny
Numbers:  our own, for a CPU in minutes; outer stage as in hnet_tiny, routing as in mor_360m
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.chunkers import dynamic
from adaptive.recipe import Recipe
from adaptive.recipes.bases import layers_of, mor_depth, shared, titled
from adaptive.recipes.hnet_bases import tiny, tiny_stage


def recipe() -> Recipe:
    inside = layers_of(layers=5, heads=6, kv_heads=2, head_dim=32, hidden=512)
    network = shared(inside, 3, depth=mor_depth())
    return titled(
        tiny(tiny_stage(dynamic.Settings(target=4.0), 0.44, inner=network)),
        "hnet_mor_tiny",
        "Mixture-of-Recursions on chunks of the embedded English text, for a CPU",
    )
