"""H-Net of two chunking stages, size L: m4 + (T1m4 + T26 + m4T1) + m4, widths 1024, 1024, 1536 (874M).

python -m adaptive.train --recipe hnet_2stage_l
Numbers:  released configuration; training from the H-Net paper, section 3. hnet_bases.py names the source of each and
          what is UNCONFIRMED; capacities are ours
Expect:   held-out FineWeb-Edu 0.743 bits per byte, average accuracy 55.5, 7.0 bytes per innermost chunk (H-Net paper,
          tables of the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_2stage_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_L, published, two_stages


def recipe() -> Recipe:
    return titled(
        two_stages(26, (1024, 1536), (2816, 4096), RATE_L),
        "hnet_2stage_l",
        "H-Net, two stages, size L (874M): bytes in chunks of chunks of about 7",
        published("0.743 bits per byte, average accuracy 55.5, 7.0 bytes per innermost chunk"),
    )
