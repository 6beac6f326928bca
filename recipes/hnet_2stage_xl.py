"""H-Net of two chunking stages, size XL: m4 + (T1m4 + T27 + m4T1) + m4, widths 1024, 1536, 2048 (1.60B).

python -m adaptive.train --recipe hnet_2stage_xl
Numbers:  released configuration; training from the H-Net paper, section 3. hnet_bases.py names the source of each and
          what is UNCONFIRMED; capacities are ours
Expect:   held-out FineWeb-Edu 0.715 bits per byte, average accuracy 58.2, 6.9 bytes per innermost chunk (H-Net paper,
          tables of the main results); not measured here
Cost:     not measured; reduced twin: recipes/hnet_2stage_tiny.py (CPU, minutes)
"""

from adaptive.recipe import Recipe
from adaptive.recipes.bases import titled
from adaptive.recipes.hnet_bases import RATE_XL, published, two_stages


def recipe() -> Recipe:
    return titled(
        two_stages(27, (1536, 2048), (4096, 5504), RATE_XL),
        "hnet_2stage_xl",
        "H-Net, two stages, size XL (1.60B): bytes in chunks of chunks of about 7",
        published("0.715 bits per byte, average accuracy 58.2, 6.9 bytes per innermost chunk"),
    )
