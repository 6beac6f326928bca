"""H-Net of one chunking stage, size XL: m4 + T24 + m4, widths 1024 and 2048 (1.27B).

python -m adaptive.train --recipe hnet_1stage_xl
Numbers:  released configuration; training from the H-Net paper, section 3. hnet_bases.py names the source of each and
          what is UNCONFIRMED; capacities are ours
Expect:   held-out FineWeb-Edu 0.728 bits per byte, average accuracy 56.2, 4.7 bytes per chunk (H-Net paper, tables of
          the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_XL, one_stage, published


def recipe() -> Recipe:
    return titled(
        one_stage(24, 2048, 5504, RATE_XL),
        "hnet_1stage_xl",
        "H-Net, one stage, size XL (1.27B): bytes in chunks of about 5",
        published("0.728 bits per byte, average accuracy 56.2, 4.7 bytes per chunk"),
    )
