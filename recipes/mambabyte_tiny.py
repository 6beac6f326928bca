"""Mamba-2 on bytes: 8 layers of width 128 without feed-forwards.

python -m adaptive.train --recipe mambabyte_tiny
Numbers:  our own, for a CPU in minutes; kinds as in mambabyte_l
Expect:   not measured
Cost:     9 TFLOPs by the account, as hnet_tiny; not yet timed
"""

from adaptive.models.bodies import plain
from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import repeated, tiny, tiny_scans


def recipe() -> Recipe:
    return titled(
        tiny(plain.Settings(repeated(tiny_scans(8)))),
        "mambabyte_tiny",
        "Mamba-2 on the bytes of the embedded English text, for a CPU",
    )
