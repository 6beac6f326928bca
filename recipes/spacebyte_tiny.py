"""SpaceByte on bytes: a chunk after every space, transformers throughout.

python -m adaptive.train --recipe spacebyte_tiny
Numbers:  our own, for a CPU in minutes; kinds as in spacebyte_l
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import chunks, tiny


def recipe() -> Recipe:
    return titled(
        tiny('["T1", ["T4"], "T1"]', (128, 192), (384, 512), *chunks("space", (6,), (0.44,))),
        "spacebyte_tiny",
        "SpaceByte on the embedded English text, for a CPU",
    )
