"""H-Net (pool) on bytes: hnet_tiny's network, a chunk every 4 bytes.

python -m adaptive.train --recipe hnet_pool_tiny
Numbers:  our own, for a CPU in minutes; network as in hnet_tiny. The stride restarts with each document, hence a
          capacity above one in four
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.chunkers import stride
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import tiny, tiny_stage


def recipe() -> Recipe:
    return titled(
        tiny(tiny_stage(stride.Settings(length=4), 0.3)),
        "hnet_pool_tiny",
        "H-Net (pool) on the embedded English text, for a CPU",
    )
