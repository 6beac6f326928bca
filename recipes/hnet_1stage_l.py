"""H-Net of one chunking stage, size L: m4 + T22 + m4, widths 1024 and 1536 (679M).

python -m adaptive.train --recipe hnet_1stage_l
Numbers:  released configuration; training from the H-Net paper, section 3. hnet_bases.py names the source of each and
          what is UNCONFIRMED; capacities are ours
Expect:   held-out FineWeb-Edu 0.755 bits per byte, average accuracy 53.6 of seven tasks, 4.8 bytes per chunk (H-Net
          paper, tables of the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_L, one_stage, published


def recipe() -> Recipe:
    return titled(
        one_stage(22, 1536, 4096, RATE_L),
        "hnet_1stage_l",
        "H-Net, one stage, size L (679M): bytes in chunks of about 5",
        published("0.755 bits per byte, average accuracy 53.6, 4.8 bytes per chunk"),
    )
