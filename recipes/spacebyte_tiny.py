"""SpaceByte on bytes: a chunk after every space, transformers throughout.

python -m adaptive.train --recipe spacebyte_tiny
Numbers:  our own, for a CPU in minutes; kinds as in spacebyte_l
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.layers.chunkers import space
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import repeated, tiny, tiny_attends, tiny_stage


def recipe() -> Recipe:
    side = repeated(tiny_attends(128, 384, window=128))
    return titled(
        tiny(tiny_stage(space.Settings(), 0.44, side=side)),
        "spacebyte_tiny",
        "SpaceByte on the embedded English text, for a CPU",
    )
