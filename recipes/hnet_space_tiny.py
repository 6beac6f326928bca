"""H-Net (space) on bytes: hnet_tiny's network, a chunk after every space.

python -m adaptive.train --recipe hnet_space_tiny
Numbers:  our own, for a CPU in minutes; network and capacity as in hnet_tiny
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.chunkers import space
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import tiny, tiny_stage


def recipe() -> Recipe:
    return titled(
        tiny(tiny_stage(space.Settings(), 0.44)),
        "hnet_space_tiny",
        "H-Net (space) on the embedded English text, for a CPU",
    )
