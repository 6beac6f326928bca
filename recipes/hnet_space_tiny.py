"""H-Net (space) on bytes: hnet_tiny's network, a chunk after every space.

python -m adaptive.train --recipe hnet_space_tiny
Numbers:  our own, for a CPU in minutes; network and capacity as in hnet_tiny
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import chunks, tiny


def recipe() -> Recipe:
    return titled(
        tiny('["m2", ["T4"], "m2"]', (128, 192), (0, 512), *chunks("space", (6,), (0.44,))),
        "hnet_space_tiny",
        "H-Net (space) on the embedded English text, for a CPU",
    )
