"""A byte-level transformer of 5 layers, width 128: what the tiny H-Nets are compared with.

python -m adaptive.train --recipe bytes_tiny
Numbers:  our own, for a CPU in minutes; blocks and initialisation as in hnet_tiny
Expect:   not measured
Cost:     as many training FLOPs as hnet_tiny and hnet_2stage_tiny (the account says 9 TFLOPs); not yet timed
"""

from adaptive.recipe import Recipe
from recipes.bases import titled
from recipes.hnet_bases import tiny


def recipe() -> Recipe:
    return titled(
        tiny('["T5"]', (128,), (384,)),
        "bytes_tiny",
        "Transformer on the bytes of the embedded English text, for a CPU",
    )
